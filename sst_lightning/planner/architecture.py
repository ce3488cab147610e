"""The shapes of a base model without its weights, on the meta device."""

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sst_lightning.algebra.errors import BackboneError, SSTMergeError
from sst_lightning.modules.backbone import ALIASES, DTYPES
from sst_lightning.modules.model_files import cache_folder, quiet_transformers
from sst_lightning.planner.quantised import quantise_linears

META = torch.device("meta")

# Numbers of the models' public config.json, for machines without the files: only what decides on
# shapes and on which layers there are.
PUBLISHED: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": {
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    "mistralai/Mistral-7B-Instruct-v0.2": {
        "model_type": "mistral",
        "dtype": "bfloat16",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-14B-Instruct": {
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "vocab_size": 152064,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
    },
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}

CONVERTED = {"HuggingFaceTB/SmolLM2-135M-Instruct": "smollm2-135m-instruct-q4_1"}
"""Folders in the cache of converted models (``modules.model_files``)."""


@dataclass(frozen=True, eq=False)
class Architecture:
    """A base model's config.

    Attributes:
        name: what was asked for.
        config: transformers config.
        source: where the config was found.
        stored: dtype of the weights in the model's files; ``None`` where the config does not say.
    """

    name: str
    config: PretrainedConfig
    source: str
    stored: torch.dtype | None

    def build(
        self,
        dtype: str = "bfloat16",
        attention: str = "sdpa",
        quantization: str | None = None,
        accelerator: str = "gpu",
    ) -> PreTrainedModel:
        """Return the model on the meta device, frozen and in eval mode, as it would be loaded.

        Args:
            dtype: of the weights (with ``nf4``: of those that are not quantised).
            attention: ``sdpa`` or ``eager``; the memory of flash attention is that of sdpa.
            quantization: ``nf4`` stores the linear layers, but the head, in 4 bits.
            accelerator: ``gpu`` or ``cpu``, where products of 4-bit weights are taken in fp32.
        """
        implementation = "eager" if attention == "eager" else "sdpa"
        with META, quiet_transformers():
            model = AutoModelForCausalLM.from_config(
                # Its attention is written into the config that a model is made with.
                deepcopy(self.config),
                attn_implementation=implementation,
                dtype=DTYPES[dtype],
            )
        if quantization is not None:
            quantise_linears(model, torch.float32 if accelerator == "cpu" else None)
        return model.requires_grad_(False).eval()


def find_architecture(name: str) -> Architecture:
    """Find a model's config without asking the network.

    Args:
        name: folder with config.json (or that file), alias, or hub id in the hub's cache.

    Raises:
        BackboneError: there is none; says what was tried.
    """
    path = Path(name).expanduser()
    if name not in ALIASES and (path.exists() or name.startswith((".", "/", "~"))):
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise BackboneError(
                f"model '{name}': there is no {file}; give a folder with config.json"
            )
        return _read(name, file)
    hub_id = ALIASES.get(name, name)
    if hub_id in CONVERTED:
        file = cache_folder() / CONVERTED[hub_id] / "config.json"
        if file.is_file():
            return _read(name, file)
    if hub_id.count("/") == 1:
        cached = try_to_load_from_cache(hub_id, "config.json")
        if isinstance(cached, str):
            return _read(name, Path(cached))
    if hub_id in PUBLISHED:
        return _architecture(
            name, PUBLISHED[hub_id], f"numbers of the public config.json of {hub_id}"
        )
    raise BackboneError(
        f"model '{name}': no such folder, and no config.json of it in the hub's cache. Give a folder "
        f"with config.json, run hf download {hub_id} config.json, or use {', '.join(ALIASES)}"
    )


def _read(name: str, file: Path) -> Architecture:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise BackboneError(f"{file}: not the config of a transformers model: it has no model_type")
    return _architecture(name, values, str(file))


def _architecture(name: str, values: dict[str, Any], source: str) -> Architecture:
    options = {key: value for key, value in values.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(values["model_type"], **options).get_text_config()
    except Exception as error:
        # transformers' validators raise anything from ValueError to their own classes.
        raise BackboneError(f"{source}: not a config that transformers reads: {error}") from error
    stored = config.dtype
    return Architecture(
        name, config, source, stored if isinstance(stored, torch.dtype) else DTYPES.get(str(stored))
    )


def parameter_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, each once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


class PlanError(SSTMergeError):
    """A run that cannot be planned."""
