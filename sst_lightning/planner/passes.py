"""Dry runs of the project's own steps on the meta device: what they allocate beside the weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from sst_lightning.algebra.accumulators import make_accumulator
from sst_lightning.algebra.core import CoreBasis, CoreSpace
from sst_lightning.modules.causal_lm import CausalLMModule, completion_nll
from sst_lightning.modules.core_hooks import CoreInjector, EmbeddingLeaf, InjectedCapture
from sst_lightning.modules.supervised import SupervisedLoRA
from sst_lightning.planner.architecture import META
from sst_lightning.planner.job import Adapter, Job, Reading
from sst_lightning.planner.quantised import QuantisedLinear
from sst_lightning.planner.trace import DryRun, MemoryTrace, Tag


@dataclass(frozen=True)
class Pass:
    """What a pass allocates.

    Attributes:
        peak: bytes by kind at the moment when their sum is largest.
        products: shapes of half-precision matrix products, each of which a CPU compiles once.
        small: bytes at that moment that a CPU's allocator has in its heap (``trace.LARGE``).
    """

    peak: Mapping[str, int]
    products: frozenset[tuple[Any, ...]]
    small: int


ACTIVATIONS, SCORES, LOGITS = "activations", "attention scores", "logits"
GRADIENTS, CACHE, DEQUANTISED = "gradients of the adapter", "KV cache", "dequantised weights"

Shape = tuple[int, int]
"""Rows and columns of a matrix."""


def linear_shapes(model: nn.Module) -> dict[str, Shape]:
    """Return (d_out, d_in) of every linear layer by its name."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def core_shapes(model: nn.Module, adapters: tuple[Adapter, ...]) -> dict[str, tuple[Shape, Shape]]:
    """Return (d_out, p) and (d_in, q) of each module's core bases.

    Trained adapters span as many directions as their ranks add up to, where the module is wide enough.
    """
    result = {}
    for name, (d_out, d_in) in linear_shapes(model).items():
        rank = sum(adapter.rank for adapter in adapters if name in adapter.modules)
        if rank:
            directions = min(rank, d_out, d_in)
            result[name] = (d_out, directions), (d_in, directions)
    return result


def training_step(model: PreTrainedModel, job: Job) -> Pass:
    """Run ``SupervisedLoRA``'s step, forward and backward; with accumulation the second of two."""
    (adapter,) = job.adapters
    module = _training_module(model, job, adapter)
    parameters = [p for p in module.parameters() if p.requires_grad]
    with DryRun(job.batch_size * job.labelled), MemoryTrace(_tags(model, job.tokens)) as trace:
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: trace.retag(p.grad, GRADIENTS))
        for _ in range(min(job.accumulate, 2)):
            trace.restart()
            nll, tokens = module.sequence_nll(_batch(job.batch_size, job.tokens))
            (nll.sum() / tokens.sum()).backward()
            del nll, tokens
    return _result(trace)


def fisher_step(model: PreTrainedModel, job: Job) -> Pass:
    """Run one batch of ``FisherCollector``, with the hooks of ``MergeModule``.

    What the accumulators keep of the batch is not in it.
    """
    bases = {
        name: CoreBasis(torch.empty(out, device=META), torch.empty(into, device=META))
        for name, (out, into) in core_shapes(model, job.adapters).items()
    }
    space = CoreSpace(bases)
    module = CausalLMModule(job.base)
    module.model = model

    def receive(name: str, inputs: Tensor, gradients: Tensor) -> None:
        make_accumulator(job.estimator).update(inputs, gradients)  # type: ignore[arg-type]

    with DryRun(job.batch_size * job.labelled):
        injector = CoreInjector(model, space)
        injector.set({name: _core(basis) for name, basis in bases.items()})
        capture = InjectedCapture(injector, receive)
        leaf = EmbeddingLeaf(model)
        batch = _batch(job.batch_size, job.tokens)
        try:
            with MemoryTrace(_tags(model, job.tokens)) as trace:
                capture.start(batch["attention_mask"])
                nll, _ = module.sequence_nll(batch)
                assert leaf.output is not None
                torch.autograd.grad(nll.float().sum(), leaf.output)
        finally:
            for hooks in (injector, capture, leaf):
                hooks.remove()
    return _result(trace)


@torch.no_grad()
def reading_step(model: PreTrainedModel, reading: Reading, adapter: Adapter | None) -> Pass:
    """Read a batch, score it, and generate the last token of its answers, whose cache is largest.

    Args:
        model: the base.
        reading: the batch.
        adapter: on the base; ``None`` is the bare base.
    """
    module = CausalLMModule()
    module.model = model if adapter is None else _with_adapter(model, adapter)
    lm = module.language_model
    decoder, head = lm.get_decoder(), lm.get_output_embeddings()
    batch = _batch(reading.sequences, reading.tokens)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    try:
        with (
            DryRun(reading.scored),
            MemoryTrace(_tags(model, reading.tokens, generates=bool(reading.answer))) as trace,
        ):
            output = decoder(input_ids=ids, attention_mask=mask, use_cache=bool(reading.answer))
            hidden, cache = output.last_hidden_state, output.past_key_values
            del output
            if reading.scored:
                completion_nll(lm, hidden, batch["labels"])
            if reading.answer:
                hidden = hidden[:, -1].contiguous()
                head(hidden).float().argmax(-1)
                del hidden
                _grow(cache, reading.answer - 1)
                longer = _batch(reading.sequences, reading.tokens + reading.answer)
                hidden = decoder(
                    input_ids=ids[:, :1],
                    attention_mask=longer["attention_mask"],
                    position_ids=ids[:, :1],
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state[:, -1]
                head(hidden.contiguous()).float().argmax(-1)
    finally:
        if isinstance(module.model, PeftModel):
            module.model.unload()
    return _result(trace, _attention_products(lm, reading))


class _Training(SupervisedLoRA):
    """The module of ``fit`` on a model that is there already."""

    given: list[PreTrainedModel]

    def load_base(self) -> PreTrainedModel:
        return self.given[0]


def _training_module(model: PreTrainedModel, job: Job, adapter: Adapter) -> SupervisedLoRA:
    module = _Training(
        job.base,
        r=adapter.rank,
        target_modules=sorted({name.rpartition(".")[2] for name in adapter.modules}),
        gradient_checkpointing=job.gradient_checkpointing,
    )
    # In a list, because a submodule it becomes as part of PEFT's model.
    module.given = [model]
    with META:
        module.model = module.build_model()
    return module


def _with_adapter(model: PreTrainedModel, adapter: Adapter) -> PeftModel:
    config = LoraConfig(r=adapter.rank, target_modules=list(adapter.modules), task_type="CAUSAL_LM")
    with META:
        return get_peft_model(model, config).eval()  # type: ignore[return-value]


def _attention_products(model: PreTrainedModel, reading: Reading) -> Iterable[tuple[Any, ...]]:
    """Shapes of the attention's products at every token of the answers."""
    heads = model.config.num_attention_heads * reading.sequences
    if model.dtype == torch.float32:
        return
    for length in range(reading.tokens + 1, reading.tokens + reading.answer):
        yield "scores", heads, length
        yield "values", heads, length


def _grow(cache: DynamicCache, tokens: int) -> None:
    """Put the keys and values of further tokens into a cache."""
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        batch, heads, length, width = layer.keys.shape
        shape = batch, heads, length + tokens, width
        layer.keys, layer.values = layer.keys.new_empty(shape), layer.values.new_empty(shape)


def _batch(sequences: int, tokens: int) -> dict[str, Any]:
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.empty(sequences, tokens, dtype=torch.long, device=META) for name in names}


def _core(basis: CoreBasis) -> Tensor:
    return torch.empty(basis.shape, dtype=torch.float64, device=META)


def _tags(model: PreTrainedModel, tokens: int, generates: bool = False) -> Tag:
    config = model.config
    kept = getattr(config, "num_key_value_heads", config.num_attention_heads)
    weights = {
        (module.out_features, module.in_features)
        for module in model.modules()
        if isinstance(module, QuantisedLinear)
    }

    def tag(tensor: Tensor) -> str:
        shape = tuple(tensor.shape)
        if shape and shape[-1] == config.vocab_size:
            return LOGITS
        if (
            len(shape) == 4
            and shape[1] == config.num_attention_heads
            and shape[2:] == (tokens,) * 2
        ):
            return SCORES
        if generates and len(shape) == 4 and shape[1] == kept and shape[2] >= tokens:
            return CACHE
        return DEQUANTISED if shape in weights else ACTIVATIONS

    return tag


def _result(trace: MemoryTrace, more: Iterable[tuple[Any, ...]] = ()) -> Pass:
    peak = {kind: size for kind, size in trace.at_peak.items() if size}
    return Pass(peak, frozenset({*trace.products, *more}), trace.small_at_peak)
