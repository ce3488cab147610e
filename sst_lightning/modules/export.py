"""Base and adapter as one folder of full weights, tensor by tensor."""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import sst_lightning
from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.errors import BackboneError, OutputExistsError
from sst_lightning.algebra.files import atomic_folder, refuse_overwrite
from sst_lightning.algebra.merged_weight import WeightLoss, merge_weight
from sst_lightning.algebra.tensor_file import write_tensors
from sst_lightning.algebra.weight_files import INDEX, WEIGHTS, WeightFiles
from sst_lightning.data.quiet import quiet_transformers
from sst_lightning.modules.backbone import (
    DTYPES,
    Dtype,
    Quantization,
    identity,
    nf4_config,
    resolve,
)
from sst_lightning.modules.base_check import check_base_name, check_shapes
from sst_lightning.modules.nf4 import (
    belongs_to_4_bits,
    is_stored_in_4_bits,
    quantised_modules,
    read_4_bits,
    shape_of_4_bits,
    through_nf4,
)
from sst_lightning.report.export_summary import export_losses

RECORD = "export.json"
FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
"""Files of a base that hold weights; all others but the index are copied."""


@dataclass(frozen=True)
class _Base:
    """A model folder and what of its architecture decides where ΔW goes.

    Attributes:
        files: weights on disk.
        head: name of the output layer.
        tied: key of the input embeddings, where the output layer shares them.
        quantised: layers that go through 4 bits.
    """

    files: WeightFiles
    head: str
    tied: str | None
    quantised: set[str]


def export_weights(
    base: str,
    adapter: str | Path,
    output: str | Path,
    dtype: Dtype = "bfloat16",
    quantization: Quantization | None = None,
    overwrite: bool = False,
    progress: Callable[[list[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """Write W + ΔW of every module as a model folder that transformers and vLLM load.

    The sum is taken in fp32 and rounded once. Weights of a base that is stored in 4 bits are
    dequantised before. Memory is needed for one tensor; the shards are those of the base.

    An adapter on the output layer of a model that ties it to the input embeddings changes the
    output alone, as it does under PEFT: both are written, and ``tie_word_embeddings`` is false.

    Args:
        base: alias, hub id or folder of the base model.
        adapter: PEFT folder.
        output: folder for weights, config, tokenizer and ``export.json``.
        dtype: of all weights.
        quantization: ``nf4`` writes the weights that an adapter of a 4-bit base was trained on:
            linear layers, loaded in ``dtype``, go through 4 bits before ΔW is added.
        overwrite: replace an earlier export in ``output``.
        progress: wraps the keys of the tensors of a file.

    Returns:
        The content of ``export.json``: what was lost, for the model, its worst module and each.

    Raises:
        SSTMergeError: base or adapter cannot be read, do not fit each other, or the output exists.
    """
    output, source = Path(output), resolve(base)
    _refuse_replacing(output, overwrite)
    lora = LoraAdapter.open(adapter)
    check_base_name(lora, base)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    opened = _open_base(source, lora, dtype, quantization, config)
    losses: dict[str, WeightLoss] = {}
    with atomic_folder(output) as temporary:
        _copy_other_files(source, temporary)
        untied = _write_weights(opened, lora, DTYPES[dtype], temporary, losses, progress)
        _write_config(config, dtype, untied, temporary)
        record = {
            "sst_merge": sst_lightning.__version__,
            "base": identity(base),
            "adapter_sha256": lora.fingerprint,
            "dtype": dtype,
            "quantization": "stored" if _is_stored_quantised(opened.files) else quantization,
            "untied_output_layer": untied,
            **export_losses(losses),
        }
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (temporary / RECORD).write_text(text, encoding="utf-8")
    return record


def _open_base(
    source: Path,
    lora: LoraAdapter,
    dtype: Dtype,
    quantization: Quantization | None,
    config: dict[str, Any],
) -> _Base:
    """Read architecture and headers, and refuse what cannot be exported.

    Raises:
        SSTMergeError: base and adapter do not fit, or weights are stored in an unknown format.
    """
    files = WeightFiles(source)
    method = (config.get("quantization_config") or {}).get("quant_method")
    stored = _is_stored_quantised(files)
    if method is not None and not stored:
        raise BackboneError(
            f"{source}: weights quantised by '{method}' cannot be exported: only 4-bit weights of "
            "bitsandbytes are dequantised here. Give the base that is not quantised"
        )
    if stored and quantization is not None:
        raise BackboneError(f"{source}: its weights are in 4 bits already: leave quantization out")
    model = _meta_model(source)
    check_shapes(lora, model)
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    inner = model.get_input_embeddings()
    embeddings = next(n for n, m in model.named_modules() if m is inner)
    # Of the architecture: its default is not written to config.json.
    tied = f"{embeddings}.weight" if model.config.tie_word_embeddings else None
    quantised: set[str] = set()
    if quantization is not None:
        quantised = quantised_modules(model, nf4_config(quantization, DTYPES[dtype]))
    for name in lora.factors:
        if f"{name}.weight" not in files.files and not (name == head and tied):
            # Names the module and those that are there.
            files.shape(name)
    return _Base(files, head, tied, quantised)


def _meta_model(source: Path) -> PreTrainedModel:
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(source, local_files_only=True)
            return AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, OSError) as error:
        raise BackboneError(
            f"{source}: no causal language model that transformers knows ({error})"
        ) from error


def _is_stored_quantised(files: WeightFiles) -> bool:
    return any(is_stored_in_4_bits(files, key) for key in files.files)


def _write_weights(
    base: _Base,
    lora: LoraAdapter,
    dtype: torch.dtype,
    folder: Path,
    losses: dict[str, WeightLoss],
    progress: Callable[[list[str]], Iterable[str]],
) -> bool:
    """Write the shards and their index; returns whether the output layer was untied."""
    files = base.files
    head = f"{base.head}.weight"
    untied = base.tied is not None and base.head in lora.factors
    shards: dict[str, list[str]] = {}
    for key, path in files.files.items():
        if not belongs_to_4_bits(files, key) and not (untied and key == head):
            shards.setdefault(path.name, []).append(key)
            if untied and key == base.tied:
                shards[path.name].append(head)
    weight_map: dict[str, str] = {}
    size = 0
    for name, keys in shards.items():
        source = {key: base.tied if untied and key == head else key for key in keys}
        shapes = {key: _shape(files, str(source[key])) for key in keys}
        dtypes = {key: _dtype(files, str(source[key]), dtype) for key in keys}
        tensors = (
            (key, _merged(base, lora, key, str(source[key]), dtypes[key], losses))
            for key in progress(keys)
        )
        write_tensors(folder / name, shapes, tensors, {"format": "pt"}, dtypes)
        weight_map |= dict.fromkeys(keys, name)
        size += sum(dtypes[key].itemsize * math.prod(shapes[key]) for key in keys)
    if set(shards) != {WEIGHTS}:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return untied


def _merged(
    base: _Base,
    lora: LoraAdapter,
    key: str,
    source: str,
    dtype: torch.dtype,
    losses: dict[str, WeightLoss],
) -> Tensor:
    """One tensor of the export; notes what a weight loses."""
    files, module = base.files, key.removesuffix(".weight")
    packed = is_stored_in_4_bits(files, source)
    weight = read_4_bits(files, source) if packed else files.tensor(source)
    if not weight.is_floating_point():
        return weight
    before = None
    if module in base.quantised:
        before, weight = weight, _through_nf4(weight, dtype)
    factors = lora.factors.get(module)
    if factors is None and before is None and weight.dtype == dtype:
        return weight
    merged, losses[module] = merge_weight(module, weight, factors, dtype, before)
    return merged


def _through_nf4(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return through_nf4(weight.to(dtype), nf4_config("nf4", dtype))


def _shape(files: WeightFiles, key: str) -> tuple[int, ...]:
    if is_stored_in_4_bits(files, key):
        return shape_of_4_bits(files, key)
    return files.shape_of(key)


def _dtype(files: WeightFiles, key: str, dtype: torch.dtype) -> torch.dtype:
    """``dtype``; that of the file for tensors that are no weights, such as counters."""
    if is_stored_in_4_bits(files, key):
        return dtype
    own = files.dtype_of(key)
    return dtype if own.is_floating_point else own


def _copy_other_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation settings, licence and so on."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in FORMATS or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name not in ("config.json", RECORD):
            # Not a link: files of the hub's cache are links.
            shutil.copyfile(path, folder / path.name)


def _write_config(config: dict[str, Any], dtype: Dtype, untied: bool, folder: Path) -> None:
    kept = {key: value for key, value in config.items() if key != "quantization_config"}
    # transformers 4 says torch_dtype.
    kept["torch_dtype" if "torch_dtype" in kept else "dtype"] = dtype
    if untied:
        kept["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _refuse_replacing(output: Path, overwrite: bool) -> None:
    """Let an export take the place of an export, or of nothing.

    Raises:
        OutputExistsError: ``output`` is there and is something else, or ``overwrite`` is false.
    """
    refuse_overwrite(output, overwrite)
    if output.is_file() or (
        output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file()
    ):
        raise OutputExistsError(
            f"{output} has no {RECORD}: nothing but an earlier export is replaced. Choose another "
            "output"
        )
