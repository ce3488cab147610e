"""Random inputs with the shapes of Llama-3.1-8B: adapters, Fishers and full models."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from sst_lightning.algebra.adapter import LoraAdapter, LoraFactors
from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.files import atomic_file, atomic_folder
from sst_lightning.algebra.fisher_file import FORMAT
from sst_lightning.algebra.lazy import LazyMapping
from sst_lightning.algebra.tensor_file import write_tensors

LAYERS, RANK, SEQUENCES = 32, 32, 256
VOCABULARY = 64
SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}


def modules(layers: int, shrink: int = 1) -> dict[str, tuple[int, int]]:
    """Name and shape of every module; widths are divided by ``shrink``, to try the program out."""
    return {
        f"model.layers.{layer}.{name}": (d_out // shrink, d_in // shrink)
        for layer in range(layers)
        for name, (d_out, d_in) in SHAPES.items()
    }


def make_adapter(folder: Path, seed: int, layers: int, shrink: int) -> None:
    if folder.exists():
        return

    def factors(name: str) -> LoraFactors:
        d_out, d_in = shapes[name]
        generator = torch.Generator().manual_seed(hash_of(f"{seed} {name}"))
        a, b = (torch.randn(*s, generator=generator) for s in ((RANK, d_in), (d_out, RANK)))
        return LoraFactors(0.02 * a, 0.02 * b, 1.0)

    shapes = modules(layers, shrink)
    LoraAdapter(LazyMapping(shapes, factors), "random/llama-3.1-8b").save(folder)


def hash_of(text: str) -> int:
    return int.from_bytes(sha256(text.encode()).digest()[:6], "little")


def make_fishers(folder: Path, adapters: list[Path]) -> None:
    """Random samples in the core space of the adapters, written as sst-merge validate does."""
    inputs = [LoraAdapter.open(path) for path in adapters]
    space = CoreSpace.streamed(inputs)
    size = RANK * len(adapters)
    fingerprints = [adapter.fingerprint for adapter in inputs]
    for number, name in enumerate(("utility", "safety")):
        path = folder / f"{name}.safetensors"
        if path.exists():
            continue
        shapes: dict[str, tuple[int, ...]] = {}
        for module, factors in inputs[0].factors.items():
            d_out, d_in = factors.d_out, factors.d_in
            shapes |= {
                f"q_out/{module}": (d_out, size),
                f"q_in/{module}": (d_in, size),
                f"samples/{module}": (SEQUENCES, size, size),
                f"weights/{module}": (SEQUENCES,),
                f"scale/{module}": (),
            }

        def tensors(number: int = number) -> Iterator[tuple[str, Tensor]]:
            for module in space.bases:
                basis = space.bases[module]
                generator = torch.Generator().manual_seed(hash_of(f"{number} {module}"))
                # Uneven over the coordinates, as gradients are.
                scale = torch.rand(size, 1, generator=generator) * torch.rand(
                    1, size, generator=generator
                )
                samples = scale * torch.randn(SEQUENCES, size, size, generator=generator)
                yield f"q_out/{module}", basis.q_out
                yield f"q_in/{module}", basis.q_in
                yield f"samples/{module}", samples
                yield f"weights/{module}", torch.ones(SEQUENCES)
                yield f"scale/{module}", torch.tensor(1.0)

        metadata = {
            "base_model": "random/llama-3.1-8b",
            "base_fingerprint": "none",
            "adapter_fingerprints": fingerprints,
            "data_name": name,
            "data_fingerprint": "none",
            "count": SEQUENCES,
            "estimator": "exact",
            "point": "safety" if name == "safety" else f"utility {[1.0] * (len(adapters) - 1)}",
        }
        header = {"format": FORMAT, "metadata": json.dumps(metadata)}
        with atomic_file(path) as temporary:
            write_tensors(temporary, shapes, tensors(), header)


def make_model(folder: Path, layers: int, shrink: int, adapter: Path | None) -> None:
    """A random model of the shape (with a tiny vocabulary), with the adapter added to its weights."""
    if folder.exists():
        return
    from transformers import LlamaConfig

    deltas = LoraAdapter.open(adapter).factors if adapter is not None else {}
    shapes = {f"{name}.weight": shape for name, shape in modules(layers, shrink).items()}
    width = 4096 // shrink
    for layer in range(layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (width,)  # type: ignore[assignment]
    shapes |= {
        "model.embed_tokens.weight": (VOCABULARY, width),
        "model.norm.weight": (width,),  # type: ignore[dict-item]
        "lm_head.weight": (VOCABULARY, width),
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape in shapes.items():
            generator = torch.Generator().manual_seed(hash_of(name))
            weight = 0.02 * torch.randn(*shape, generator=generator)
            module = name.removesuffix(".weight")
            if module in deltas:
                item = deltas[module]
                weight += item.scaling * (item.B @ item.A)
            yield name, weight

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=14336 // shrink,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )
    with atomic_folder(folder) as temporary:
        config.save_pretrained(temporary)
        write_tensors(temporary / "model.safetensors", shapes, tensors(), {"format": "pt"})
