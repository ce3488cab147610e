"""LoRA adapters on disk and in memory, defined by ΔW = s B A per module (DESIGN.md section 2)."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sst_lightning.algebra.errors import AdapterError
from sst_lightning.algebra.files import atomic_folder, refuse_overwrite

PREFIX = "base_model.model."
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = ("adapter_model.bin", "adapter_model.pt")


@dataclass(frozen=True)
class LoraFactors:
    """The low-rank factors of one module.

    Attributes:
        A: (r, d_in).
        B: (d_out, r).
        scaling: s = lora_alpha / r, or lora_alpha / √r with rsLoRA.
    """

    A: Tensor
    B: Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """Number of columns of B."""
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        """Width of the module's input."""
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the module's output."""
        return self.B.shape[0]

    def delta(self) -> Tensor:
        """Return ΔW = s B A, (d_out, d_in) in fp64."""
        return self.scaling * (self.B.double() @ self.A.double())


class LoraAdapter:
    """A LoRA adapter: factors by base-model module name.

    Args:
        factors: module name in the base model (``model.layers.0.self_attn.q_proj``) to factors.
        base_model: hub id or path of the base model the adapter was trained on.
        path: folder the adapter was read from.
    """

    def __init__(
        self,
        factors: dict[str, LoraFactors],
        base_model: str | None = None,
        path: Path | None = None,
    ) -> None:
        self.factors = factors
        self.base_model = base_model
        self.path = path

    @classmethod
    def load(cls, path: str | Path) -> "LoraAdapter":
        """Read a PEFT folder.

        Args:
            path: folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or a
                ``.bin``/``.pt`` file of tensors, read with ``weights_only=True``).

        Raises:
            AdapterError: a file is missing, truncated or holds what is not supported; names it.
        """
        folder = Path(path)
        config = _read_config(folder)
        _refuse_unsupported(folder, config)
        tensors = _read_tensors(folder)
        halves: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            match = re.fullmatch(r"(.+)\.lora_(A|B)(?:\.default)?\.weight", key)
            if match is None:
                raise AdapterError(
                    f"{folder}: tensor '{key}' is not a LoRA factor of a linear layer; only plain "
                    "LoRA on linear layers is supported"
                )
            if not torch.isfinite(tensor).all():
                raise AdapterError(
                    f"{folder}: tensor '{key}' has NaN or infinite values; retrain it"
                )
            halves.setdefault(match[1].removeprefix(PREFIX), {})[match[2]] = tensor
        if not halves:
            raise AdapterError(f"{folder}: the weight file holds no LoRA factors")
        factors = {}
        for name, pair in sorted(halves.items()):
            missing = {"A", "B"} - set(pair)
            if missing:
                raise AdapterError(f"{folder}: module '{name}' has no lora_{missing.pop()} factor")
            a, b = pair["A"], pair["B"]
            if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
                raise AdapterError(
                    f"{folder}: module '{name}' has lora_A {tuple(a.shape)} and lora_B "
                    f"{tuple(b.shape)}, which do not multiply"
                )
            factors[name] = LoraFactors(a, b, _scaling(folder, config, name, a.shape[0]))
        return cls(factors, config.get("base_model_name_or_path"), folder)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a PEFT folder, atomically.

        All modules get one common rank r, padded with zeros, and ``lora_alpha = r`` (scaling 1
        with s folded into B): PEFT 0.21 cannot reload every adapter with a ``rank_pattern``
        (peft#3737), and zero rows and columns change nothing in ΔW.

        Raises:
            OutputExistsError: ``path`` is there and ``overwrite`` is false.
        """
        folder = Path(path)
        refuse_overwrite(folder, overwrite)
        rank = max(factors.rank for factors in self.factors.values())
        tensors: dict[str, Tensor] = {}
        for name, factors in self.factors.items():
            a = torch.zeros(rank, factors.d_in)
            b = torch.zeros(factors.d_out, rank)
            a[: factors.rank] = factors.A.float()
            b[:, : factors.rank] = (factors.scaling * factors.B.double()).float()
            tensors[f"{PREFIX}{name}.lora_A.weight"] = a
            tensors[f"{PREFIX}{name}.lora_B.weight"] = b
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.base_model,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            # Full names: a merge may cover a module in one layer and not in another.
            "target_modules": _target_modules(list(self.factors)),
        }
        with atomic_folder(folder) as temporary:
            save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
            (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 over module names, factors and scalings."""
        digest = hashlib.sha256()
        for name, factors in sorted(self.factors.items()):
            digest.update(
                f"{name} {factors.scaling!r} {factors.A.dtype} {factors.B.dtype}".encode()
            )
            for tensor in (factors.A, factors.B):
                digest.update(
                    tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                )
        return digest.hexdigest()


def check_compatible(adapters: Sequence[LoraAdapter]) -> None:
    """Refuse adapters that cannot be merged with each other.

    Raises:
        AdapterError: bases, target modules or shapes differ; names both folders and the module.
    """
    first = adapters[0]
    for other in adapters[1:]:
        pair = f"{first.path} and {other.path}"
        if first.base_model and other.base_model and first.base_model != other.base_model:
            raise AdapterError(
                f"{pair} were trained on different bases: '{first.base_model}' and "
                f"'{other.base_model}'. Merge adapters of one base model only"
            )
        differing = sorted(set(first.factors) ^ set(other.factors))
        if differing:
            raise AdapterError(
                f"{pair} have different target modules: '{differing[0]}' is only in one of them. "
                "Train both with the same target_modules"
            )
        for name, factors in first.factors.items():
            shapes = [(item.d_out, item.d_in) for item in (factors, other.factors[name])]
            if shapes[0] != shapes[1]:
                raise AdapterError(
                    f"{pair}: ΔW of module '{name}' is {shapes[0]} in one and {shapes[1]} in the "
                    "other; they belong to different base models"
                )


def _target_modules(names: list[str]) -> list[str]:
    """Shortest list that PEFT expands to exactly ``names``: last parts if every layer has them."""
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    layers = {re.sub(r"\.[^.]+\.[^.]+$", "", name) for name in names}
    complete = len(names) == len(suffixes) * len(layers)
    return suffixes if complete else sorted(names)


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder; train one with sst-merge fit")
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder}: {CONFIG} is missing; this is not a PEFT adapter folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: not a JSON object")
    return config


def _refuse_unsupported(folder: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{folder}: peft_type is {config.get('peft_type')!r}; only LORA is supported"
        )
    if config.get("use_dora"):
        raise AdapterError(
            f"{folder}: a DoRA adapter (use_dora) is not a sum W + ΔW and cannot be merged; "
            "train with use_dora=False"
        )
    for key in ("modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias"):
        if config.get(key):
            raise AdapterError(f"{folder}: {key} is set ({config[key]}), which is not supported")
    if config.get("bias", "none") != "none":
        raise AdapterError(
            f"{folder}: bias='{config['bias']}' is not supported; train with bias='none'"
        )
    if config.get("fan_in_fan_out"):
        raise AdapterError(f"{folder}: fan_in_fan_out (Conv1D layers) is not supported")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if path.is_file():
        try:
            return load_file(path)
        except (SafetensorError, ValueError) as error:
            raise AdapterError(
                f"{path}: damaged or truncated safetensors file ({error}); copy it again"
            ) from error
    for name in PICKLED:
        path = folder / name
        if path.is_file():
            try:
                return dict(torch.load(path, weights_only=True, map_location="cpu"))
            except Exception as error:  # torch raises anything from EOFError to UnpicklingError
                raise AdapterError(f"{path}: cannot be read as tensors only ({error})") from error
    raise AdapterError(f"{folder}: {WEIGHTS} is missing")


def _scaling(folder: Path, config: dict[str, Any], name: str, rank: int) -> float:
    expected = _pattern(config.get("rank_pattern") or {}, name, config.get("r"))
    if expected != rank:
        raise AdapterError(
            f"{folder}: module '{name}' has rank {rank}, but {CONFIG} says {expected}; "
            "weights and configuration do not belong together"
        )
    alpha = _pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise AdapterError(f"{folder}: lora_alpha is {alpha!r} in {CONFIG}")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the module name wins."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
