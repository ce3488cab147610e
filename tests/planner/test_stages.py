"""Phases and terms of a stage, and what is suggested where it does not fit."""

from dataclasses import replace

import pytest

from sst_lightning.planner.advice import device_size, enough, host_size, suggest
from sst_lightning.planner.architecture import parameter_bytes
from sst_lightning.planner.base import CUDA_CONTEXT
from sst_lightning.planner.cpu import TRAINING_HOLES
from sst_lightning.planner.job import Reading
from sst_lightning.planner.quantised import nf4_bytes
from sst_lightning.planner.stages import plan_stage
from tests.planner.jobs import fit_job, merge_job

PROGRAM = 1000


def sizes(terms):
    return {term.name: term.size for term in terms}


def phase(plan, name):
    return next(phase for phase in plan.phases if phase.name == name)


def test_terms_of_fit_by_hand(nano, architecture):
    plan = plan_stage(fit_job(nano, checkpoints=2), architecture, PROGRAM)
    lora = 4 * 4 * 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    weights = parameter_bytes(architecture.build("float32"))
    terms = sizes(phase(plan, "optimizer step").terms)
    assert terms == {
        "program: Python and libraries": PROGRAM,
        "base weights": weights,
        "adapter": lora,
        "optimizer state": 2 * lora,
        "gradients of the adapter": lora,
    }
    assert sizes(plan.disk)["checkpoints (2)"] == 2 * 3 * lora
    assert plan.memory == plan.peak.size("device", "host")
    assert plan.peak.name == "training step"
    assert plan.largest.size == max(term.size for term in plan.peak.terms)


def test_on_a_gpu_host_and_device_are_apart(nano, architecture):
    job = fit_job(nano, accelerator="gpu", attention="sdpa", processes=2)
    plan = plan_stage(job, architecture, PROGRAM)
    terms = sizes(phase(plan, "optimizer step").terms)
    lora = terms["adapter"]
    assert terms["CUDA context (assumed)"] == CUDA_CONTEXT
    assert terms["DDP's buckets of gradients"] == lora
    assert plan.memory == plan.peak.size("device")
    assert plan.host_peak.name == "loading the base"
    parameters = sum(p.numel() for p in architecture.build("float32").parameters())
    assert plan.host_peak.size("host") == PROGRAM + 4 * parameters


def test_fishers_of_a_merge_by_hand(nano, architecture):
    plan = plan_stage(merge_job(nano), architecture, PROGRAM)
    sample = 4 * 8 * 8 * 14
    assert sizes(phase(plan, "Fisher pass").terms)["Fishers"] == (10 + 6 + 8) * sample
    first = sizes(phase(plan, "Fishers finished").terms)
    assert first["Fishers"] == 24 * (sample + 8 * 14) + 3 * 14 * 8
    assert first["a set's samples joined"] == 10 * sample
    second = sizes(phase(plan, "Fishers at the merge finished").terms)
    assert second["Fishers"] == first["Fishers"]
    assert second["Fishers at the merge"] == 16 * (sample + 8 * 14) + 2 * 14 * 8
    # 10 + 6 sequences and as many at the merge against 8, of 64 coordinates each: 40 < 64.
    solve = sizes(phase(plan, "filter").terms)["one module's filter"]
    assert solve == 4 * 32 * 64 + 8 * 40 * 64 + 8 * 40 * 64 + 8 * 40 * 40
    assert sizes(plan.disk)["merged adapters (1)"] == 4 * 8 * 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)


def test_gradients_that_go_to_disk_are_in_memory_a_block_and_a_module_at_a_time(nano, architecture):
    sample = 4 * 8 * 8 * 14
    for block, sequences in ((64, 10), (4, 4), (1, 4)):  # a batch of 4 at least
        job = merge_job(nano, fisher_files=True, block_samples=block)
        plan = plan_stage(job, architecture, PROGRAM)
        assert sizes(phase(plan, "Fisher pass").terms)["Fishers"] == sequences * sample
    finished = sizes(phase(plan, "Fishers finished").terms)
    assert finished["a module's samples joined"] == 2 * 10 * 4 * 8 * 8
    assert sizes(phase(plan, "filter").terms)["Fishers, one module"] == 24 * 4 * 8 * 8
    tight = replace(job, block_samples=64, memory_budget_gib=4 * 5 * sample / 2**30)
    pass_ = phase(plan_stage(tight, architecture, PROGRAM), "Fisher pass")
    assert sizes(pass_.terms)["Fishers"] == 4 * sample


def test_a_method_without_fishers_collects_none(nano, architecture):
    plan = plan_stage(merge_job(nano, estimator="", at_merge=()), architecture, PROGRAM)
    assert [p.name for p in plan.phases] == ["loading the base", "verification"]


def test_kept_fishers_make_the_host_short_not_the_device(nano, architecture):
    job = merge_job(nano, accelerator="gpu", attention="sdpa", stage="validate", at_merge=())
    more = replace(job, samples=tuple((name, 100 * count) for name, count in job.samples))
    few, many = (plan_stage(item, architecture, PROGRAM) for item in (job, more))
    assert few.memory == many.memory
    assert host_size(few) < host_size(many)


@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
@pytest.mark.parametrize("stage", ["fit", "merge", "test"])
def test_suggestions_save_what_they_say(nano, architecture, accelerator, stage):
    reading = Reading("scores and answers", 8, 32, 8 * 32, 4)
    makers = {
        "fit": lambda **o: fit_job(nano, **o),
        "merge": lambda **o: merge_job(nano, readings=(reading,), **o),
        "test": lambda **o: replace(merge_job(nano, readings=(reading,), **o), stage="test"),
    }
    job = makers[stage](accelerator=accelerator, tokens=128, labelled=128)
    plan = plan_stage(job, architecture, PROGRAM)
    for size in (device_size, host_size):
        found = suggest(plan, architecture, PROGRAM, size)
        for item in found:
            assert size(plan) - size(item.plan) == item.saving > 0
            assert size(plan_stage(item.plan.job, architecture, PROGRAM)) == size(item.plan)
        assert [item.saving for item in found] == sorted((i.saving for i in found), reverse=True)
    assert suggest(plan, architecture, PROGRAM, device_size)


def test_changes_together_go_down_to_the_limit(nano, architecture):
    plan = plan_stage(fit_job(nano, tokens=256, labelled=256), architecture, PROGRAM)
    limit = plan.memory // 4
    taken = enough(plan, architecture, PROGRAM, device_size, limit)
    totals = [plan.memory, *(item.plan.memory for item in taken)]
    assert totals == sorted(totals, reverse=True)
    assert all(total > limit for total in totals[:-1])
    assert totals[-1] <= limit
    texts = " ".join(item.text for item in taken)
    assert "gradient checkpointing" in texts or "smaller batches" in texts
    # Nothing brings it to a byte, and it ends.
    assert enough(plan, architecture, PROGRAM, device_size, 1)[-1].plan.memory > 1
    assert enough(plan, architecture, PROGRAM, device_size, plan.memory) == []


def test_fewer_samples_and_kfac_save_host_memory(nano, architecture):
    job = merge_job(nano, accelerator="gpu", stage="validate", at_merge=())
    job = replace(job, samples=tuple((name, 1000) for name, _ in job.samples))
    plan = plan_stage(job, architecture, PROGRAM)
    savings = {i.text: i.saving for i in suggest(plan, architecture, PROGRAM, host_size)}
    kfac = next(size for text, size in savings.items() if "K-FAC" in text)
    half = next(size for text, size in savings.items() if "fewer" in text)
    assert kfac > half > 0


def test_one_batch_of_an_accumulated_step_is_halved_with_its_number_kept(nano, architecture):
    plan = plan_stage(fit_job(nano, accumulate=3), architecture, PROGRAM)
    (item,) = [i for i in suggest(plan, architecture, PROGRAM, device_size) if "batches" in i.text]
    assert (item.plan.job.batch_size, item.plan.job.accumulate) == (2, 6)
    assert "accumulate_grad_batches: 6" in item.text


def test_paged_state_leaves_the_device_between_updates(nano, architecture, monkeypatch):
    monkeypatch.setattr("sst_lightning.planner.storage.SMALLEST_PAGED", 1)
    job = fit_job(nano, accelerator="gpu", attention="sdpa", optimizer="paged_adamw_8bit")
    plan = plan_stage(job, architecture, PROGRAM + 1)
    state = 2 * 4 * 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    step, update = phase(plan, "training step"), phase(plan, "optimizer step")
    assert sizes(step.terms)["optimizer state, paged out"] == state
    assert step.size("host") == PROGRAM + 1 + state
    assert sizes(update.terms)["optimizer state, paged in"] == state
    assert update.size("host") == PROGRAM + 1


def test_fishers_that_are_read_are_not_collected(nano, architecture):
    job = merge_job(nano, at_merge=(), accelerator="gpu", attention="sdpa")
    collected = plan_stage(job, architecture, PROGRAM)
    read = plan_stage(replace(job, reads_fishers=True), architecture, PROGRAM)
    assert "Fisher pass" in [p.name for p in collected.phases]
    assert [p.name for p in read.phases[:3]] == ["loading the base", "Fisher files read", "filter"]
    written = plan_stage(replace(job, fisher_files=True), architecture, PROGRAM)
    assert sizes(phase(read, "filter").terms) == sizes(phase(written, "filter").terms)
    assert phase(read, "filter").size("host") < phase(collected, "filter").size("host")
    assert {"Fisher file utility", "Fisher file safety"} <= set(sizes(read.disk))


def test_a_cpu_has_holes_beside_its_small_blocks(nano, architecture, monkeypatch):
    cpu = phase(plan_stage(fit_job(nano), architecture, PROGRAM), "training step")
    gpu = phase(
        plan_stage(fit_job(nano, accelerator="gpu"), architecture, PROGRAM), "training step"
    )
    tensors = sum(
        sizes(cpu.terms).get(kind, 0)
        for kind in ("activations", "attention scores", "logits", "gradients of the adapter")
    )
    # All of the nano model's tensors are below 32 MiB.
    assert sizes(cpu.terms)["holes in glibc's heap"] == int(TRAINING_HOLES * tensors)
    assert "holes in glibc's heap" not in sizes(gpu.terms)
    # Layers that are computed again leave as many.
    again = phase(
        plan_stage(fit_job(nano, gradient_checkpointing=True), architecture, PROGRAM),
        "training step",
    )
    assert sizes(again.terms)["holes in glibc's heap"] == int(TRAINING_HOLES * tensors)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    mapped = plan_stage(fit_job(nano, dtype="bfloat16"), architecture, PROGRAM)
    assert "holes in glibc's heap" not in sizes(phase(mapped, "training step").terms)


def test_4_bits_on_a_cpu_share_the_mapped_file_and_copy_only_what_is_quantised(nano, architecture):
    job = fit_job(nano, quantization="nf4")
    plan = plan_stage(job, architecture, PROGRAM)
    model = architecture.build("float32")
    file = 4 * sum(p.numel() for p in model.parameters())
    shapes = [m.weight.shape for n, m in model.named_modules() if n in job.adapters[0].modules]
    quantised = sum(nf4_bytes(shape.numel()) for shape in shapes)
    loading = sizes(phase(plan, "loading the base").terms)
    assert loading["base model's file, mapped"] == file
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert loading["base weights"] == quantised + buffers
    # Where the dtype is another than the file's, everything is a copy beside it.
    other = plan_stage(replace(job, dtype="bfloat16"), architecture, PROGRAM)
    rest = (file - 4 * sum(shape.numel() for shape in shapes)) // 2
    assert (
        sizes(phase(other, "loading the base").terms)["base weights"] == quantised + rest + buffers
    )


def layers_and_rest(architecture, dtype="float32"):
    """Bytes of one decoder layer, of all, and of what is outside of them, counted by hand."""
    model = architecture.build(dtype)
    sizes = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    layers = {
        number: sum(s for name, s in sizes.items() if f".layers.{number}." in name)
        for number in range(2)
    }
    all_layers = sum(layers.values())
    return max(layers.values()), all_layers, sum(sizes.values()) - all_layers + buffers


def test_layers_are_divided_among_the_processes_of_fsdp(nano, architecture):
    layer, layers, rest = layers_and_rest(architecture)
    job = fit_job(nano, processes=2, sharded=True)
    plan = plan_stage(job, architecture, PROGRAM)
    lora = 4 * 4 * 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    assert sizes(phase(plan, "optimizer step").terms) == {
        "program: Python and libraries": PROGRAM,
        "base weights": rest + layers // 2,
        # Embeddings, norm and head are views of it.
        "base model's file, still mapped": plan.disk[0].size - rest,
        "adapter": lora // 2,
        "optimizer state": lora,
        "gradients of the adapter": lora // 2,
    }
    step = sizes(phase(plan, "training step").terms)
    assert step["layers gathered from all processes"] == 2 * (layer + lora // 2)
    whole = plan_stage(fit_job(nano), architecture, PROGRAM)
    other = sizes(phase(whole, "training step").terms)
    assert step["activations"] == other["activations"]
    # What one process writes is whole.
    assert sizes(plan.disk) == sizes(whole.disk)
    # An adapter in hooks is not divided.
    collects = plan_stage(
        merge_job(nano, stage="validate", at_merge=(), sharded=True, processes=2),
        architecture,
        PROGRAM,
    )
    gathered = sizes(phase(collects, "Fisher pass").terms)["layers gathered from all processes"]
    assert gathered == 2 * layer
    # The more processes, the less each has; all load the whole base on the host.
    gpu = {"accelerator": "gpu", "attention": "sdpa"}
    two, four = (
        plan_stage(fit_job(nano, processes=n, sharded=True, **gpu), architecture, PROGRAM)
        for n in (2, 4)
    )
    assert four.memory < two.memory
    assert two.host_peak.size("host") == four.host_peak.size("host")
    assert two.host_peak.size("host") == whole.disk[0].size + PROGRAM
    # 4-bit weights and 8-bit optimizers are refused under fsdp, so they are no suggestions.
    found = suggest(two, architecture, PROGRAM, device_size)
    assert found
    assert not any("bit" in item.text for item in found)


def test_models_are_read_on_every_storage_of_the_base(nano, architecture):
    suite = Reading("suite mmlu", 64, 128, 64, 0, suite=True)
    readings = (Reading("scores", 64, 128, 64, 0), suite)
    gpu = {"accelerator": "gpu", "attention": "sdpa", "dtype": "bfloat16", "readings": readings}
    job = merge_job(nano, quantization="nf4", estimator="", at_merge=(), **gpu)
    served = replace(job, served_on=(("bfloat16", None), ("bfloat16", "nf4")))
    plan = plan_stage(served, architecture, PROGRAM)
    # The merge's own base is loaded and goes first; suites run on the first that was asked for.
    assert [p.name for p in plan.phases] == [
        "loading the base", "verification", "scores",
        "loading the base, in bfloat16", "scores, in bfloat16", "suite mmlu, in bfloat16",
    ]  # fmt: skip
    _, layers, rest = layers_and_rest(architecture, "bfloat16")
    there = sizes(phase(plan, "scores, in bfloat16").terms)
    assert there["base weights"] == layers + rest
    here = sizes(phase(plan, "scores").terms)
    assert here["base weights"] < layers + rest
    # The adapters and the merge stay; the merge's own weights do not.
    others = {name: size for name, size in here.items() if name in there}
    del others["base weights"], others["activations"]
    assert {name: there[name] for name in others} == others
    texts = {i.text: i for i in suggest(plan, architecture, PROGRAM, device_size)}
    own = texts["measure on the merge's own base alone (served_on: [nf4])"]
    assert own.plan.job.served_on == ()
    assert own.saving > 0
    # Storages that are named stay when the merge's own changes.
    named = replace(served, quantization=None, served_on=(("bfloat16", None),))
    plain = plan_stage(named, architecture, PROGRAM)
    assert [p.name for p in plain.phases][-2:] == ["scores", "suite mmlu"]
    packed = plan_stage(replace(named, quantization="nf4"), architecture, PROGRAM)
    assert [p.name for p in packed.phases][-2:] == [
        "scores, in bfloat16",
        "suite mmlu, in bfloat16",
    ]
    # Hooks are put on the new base when it is there.
    loading = sizes(phase(packed, "loading the base, in bfloat16").terms)
    assert "merge in the model's hooks" in sizes(phase(packed, "scores, in bfloat16").terms)
    assert "merge in the model's hooks" not in loading
    assert "core bases" in loading
