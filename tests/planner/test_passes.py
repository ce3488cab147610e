"""Dry runs against what torch's memory profiler records of the real steps on the CPU."""

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sst_lightning.algebra.core import CoreSpace
from sst_lightning.modules.backbone import load_backbone
from sst_lightning.modules.causal_lm import CausalLMModule, completion_nll
from sst_lightning.modules.core_hooks import CoreInjector, EmbeddingLeaf, InjectedCapture
from sst_lightning.modules.supervised import SupervisedLoRA
from sst_lightning.planner.job import Reading
from sst_lightning.planner.passes import (
    CACHE,
    GRADIENTS,
    LOGITS,
    SCORES,
    core_shapes,
    fisher_step,
    reading_step,
    training_step,
)
from tests.adapters import random_adapter
from tests.nano import VOCABULARY, random_batch
from tests.planner.jobs import fit_job, merge_job

CLOSE = 0.02


def peak_of(step):
    """Largest sum of what the CPU allocator gave and took during a step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    now = highest = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def batch_of(job):
    return random_batch([(job.tokens - job.labelled, job.labelled)] * job.batch_size)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_step(nano, architecture, checkpointing, dtype):
    # Long enough for the random states that checkpointing keeps, 5 KB a layer, not to matter.
    job = fit_job(nano, gradient_checkpointing=checkpointing, accumulate=2, dtype=dtype, tokens=128)
    module = SupervisedLoRA(str(nano), dtype, "eager", r=4, gradient_checkpointing=checkpointing)
    module.configure_model()
    batch = batch_of(job)

    def step():
        nll, tokens = module.sequence_nll(batch)
        (nll.sum() / tokens.sum()).backward()

    step()
    gradients = sum(p.grad.numel() * 4 for p in module.parameters() if p.requires_grad)
    predicted = training_step(architecture.build(dtype, "eager"), job).peak
    assert predicted[GRADIENTS] == gradients
    assert sum(predicted.values()) - gradients == pytest.approx(peak_of(step), rel=CLOSE)


def test_logits_and_scores_are_named(nano, architecture):
    job = fit_job(nano, tokens=64, labelled=64)
    size = 4 * job.batch_size * 64 * len(VOCABULARY)
    reading = Reading("scores", job.batch_size, 8, 64 * job.batch_size, 0)
    # The logits, their log-softmax, and what it is gathered from.
    assert reading_step(architecture.build("float32"), reading, None).peak[LOGITS] >= 2 * size
    scores = training_step(architecture.build("float32", "eager"), job).peak[SCORES]
    assert scores >= 2 * 4 * 4 * job.batch_size * 64 * 64
    assert scores % (4 * 4 * 64 * 64) == 0
    fused = training_step(architecture.build("float32", "sdpa"), replace(job, attention="sdpa"))
    assert SCORES not in fused.peak


def test_fisher_step(nano, architecture):
    job = merge_job(nano)
    model = load_backbone(str(nano), "float32", "eager")
    adapters = [random_adapter(model, rank=rank, seed=rank) for rank in (3, 5)]
    space = CoreSpace.from_adapters(adapters)
    found = core_shapes(architecture.build(), job.adapters)
    assert {n: (tuple(b.q_out.shape), tuple(b.q_in.shape)) for n, b in space.bases.items()} == found
    module = CausalLMModule(str(nano))
    module.model = model
    samples = []
    injector = CoreInjector(model, space)
    injector.set(space.encode(adapters[0]))
    capture = InjectedCapture(
        injector, lambda _, p, r: samples.append(torch.bmm(r.transpose(1, 2), p).shape)
    )
    leaf = EmbeddingLeaf(model)
    batch = batch_of(job)
    batch["attention_mask"][-1, -1] = 0  # padding takes a mask

    def step():
        capture.start(batch["attention_mask"])
        nll, _ = module.sequence_nll(batch)
        torch.autograd.grad(nll.sum(), leaf.output)
        leaf.output = None

    step()
    assert samples[0] == (4, 8, 8)
    predicted = sum(fisher_step(architecture.build("float32", "eager"), job).peak.values())
    assert predicted == pytest.approx(peak_of(step), rel=CLOSE)


def test_reading_step(nano, architecture):
    reading = Reading("scores", 3, 40, 3 * 10, 0)
    model = load_backbone(str(nano), "float32", "eager")
    batch = random_batch([(30, 10)] * 3)

    @torch.no_grad()
    def step():
        hidden = model.get_decoder()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        completion_nll(model, hidden, batch["labels"])

    step()
    predicted = reading_step(architecture.build("float32", "eager"), reading, None).peak
    assert sum(predicted.values()) == pytest.approx(peak_of(step), rel=CLOSE)


def test_cache_grows_with_the_answer(architecture):
    model = architecture.build("float32", "sdpa")
    short, long = (
        reading_step(model, Reading("answers", 2, 20, 0, answer), None) for answer in (1, 400)
    )
    # Keys and values of two layers and two heads of width 8, for all tokens but the last.
    assert long.peak[CACHE] >= 2 * 2 * 4 * 2 * 2 * 8 * 419
    assert short.peak[CACHE] < long.peak[CACHE]
