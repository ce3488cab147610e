"""LoRA adapters on disk and in memory: ΔW = s B A per module (docs/mathematics.md section 1)."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sst_lightning.algebra import peft_folder
from sst_lightning.algebra.errors import AdapterError, SSTMergeError
from sst_lightning.algebra.files import atomic_folder, refuse_overwrite
from sst_lightning.algebra.lazy import LazyMapping
from sst_lightning.algebra.tensor_file import TensorFile, write_tensors


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
        config: content of its ``adapter_config.json``.
    """

    def __init__(
        self,
        factors: Mapping[str, LoraFactors],
        base_model: str | None = None,
        path: Path | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.factors = factors
        self.base_model = base_model
        self.path = path
        self.config = config or {}

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
        config = peft_folder.read_config(folder)
        factors = {
            name: LoraFactors(a, b, peft_folder.read_scaling(folder, config, name, a.shape[0]))
            for name, (a, b) in peft_folder.read_factors(folder).items()
        }
        return cls(factors, config.get("base_model_name_or_path"), folder, config)

    @classmethod
    def open(cls, path: str | Path) -> "LoraAdapter":
        """Read a PEFT folder module by module, when a module is asked for (safetensors only).

        Raises:
            AdapterError: as :meth:`load`; values that are not finite when their module is read.
        """
        folder = Path(path)
        config = peft_folder.read_config(folder)
        if not (folder / peft_folder.WEIGHTS).is_file():
            raise AdapterError(
                f"{folder}: {peft_folder.WEIGHTS} is missing; reading module by module needs "
                "safetensors (PEFT's save_pretrained writes it)"
            )
        try:
            file = TensorFile(folder / peft_folder.WEIGHTS)
        except SSTMergeError as error:
            raise AdapterError(str(error)) from error
        keys = peft_folder.factor_keys(folder, file.shapes)
        scalings = {
            name: peft_folder.read_scaling(folder, config, name, file.shapes[first][0])
            for name, (first, _) in keys.items()
        }

        def read(name: str) -> LoraFactors:
            first, second = keys[name]
            pair = file.read(first), file.read(second)
            peft_folder.check_finite(folder, name, pair)
            return LoraFactors(*pair, scalings[name])

        factors = LazyMapping(keys, read)
        return cls(factors, config.get("base_model_name_or_path"), folder, config)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a PEFT folder, atomically.

        All modules get one common rank r, padded with zeros, and ``lora_alpha = r`` (scaling 1
        with s folded into B): PEFT 0.21 cannot reload every adapter with a ``rank_pattern``
        (peft#3737), and zero rows and columns change nothing in ΔW.

        Raises:
            AdapterError: the adapter has no module.
            OutputExistsError: ``path`` is there and ``overwrite`` is false, or it is there and holds
                something else than an adapter.
        """
        folder = Path(path)
        if not self.factors:
            raise AdapterError(f"{folder}: an adapter without modules cannot be saved")
        refuse_overwrite(folder, overwrite)
        peft_folder.refuse_replacing(folder)
        rank = self.rank
        shapes: dict[str, tuple[int, ...]] = {}
        for name, factors in self.factors.items():
            shapes[f"{peft_folder.PREFIX}{name}.lora_A.weight"] = rank, factors.d_in
            shapes[f"{peft_folder.PREFIX}{name}.lora_B.weight"] = factors.d_out, rank
        config = peft_folder.plain_config(self.base_model, rank, list(self.factors))
        with atomic_folder(folder) as temporary:
            weights = temporary / peft_folder.WEIGHTS
            write_tensors(weights, shapes, self._padded(rank), {"format": "pt"})
            text = json.dumps(config, indent=1) + "\n"
            (temporary / peft_folder.CONFIG).write_text(text, encoding="utf-8")

    def _padded(self, rank: int) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the weight file, one module at a time."""
        for name, factors in self.factors.items():
            a = torch.zeros(rank, factors.d_in)
            b = torch.zeros(factors.d_out, rank)
            a[: factors.rank] = factors.A.float()
            b[:, : factors.rank] = (factors.scaling * factors.B.double()).float()
            yield f"{peft_folder.PREFIX}{name}.lora_A.weight", a
            yield f"{peft_folder.PREFIX}{name}.lora_B.weight", b

    @property
    def rank(self) -> int:
        """Largest rank of a module: the one rank that :meth:`save` gives to all."""
        return max((factors.rank for factors in self.factors.values()), default=0)

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 over module names, factors and scalings."""
        digest = hashlib.sha256()
        for name in sorted(self.factors):
            # One module at a time: the factors may be on disk, or made when they are asked for.
            factors = self.factors[name]
            digest.update(f"{name} {factors.scaling!r}".encode())
            for tensor in (factors.A, factors.B):
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                flat = tensor.detach().cpu().contiguous().view(torch.uint8)
                digest.update(flat.numpy().tobytes())
        return digest.hexdigest()


def relative_distance(first: LoraAdapter, second: LoraAdapter) -> float:
    """Return √Σ‖ΔW − ΔW′‖² / √Σ‖ΔW′‖² over all modules, from the factors.

    Accurate to about 1e-7, the rounding of fp32 factors.
    """
    difference = total = 0.0
    for name in {*first.factors, *second.factors}:
        pair = [first.factors.get(name), second.factors.get(name)]
        parts = [
            (sign * item.scaling * item.B.double(), item.A.double())
            for sign, item in zip((1.0, -1.0), pair, strict=True)
            if item is not None
        ]
        # ‖B A‖ = ‖R_B R_Aᵀ‖ with thin QRs: unlike traces of Gram matrices nothing cancels.
        left = torch.linalg.qr(torch.cat([b for b, _ in parts], dim=1), mode="r")[1]
        right = torch.linalg.qr(torch.cat([a for _, a in parts]).T, mode="r")[1]
        difference += float((left @ right.T).square().sum())
        if pair[1] is not None:
            own = torch.linalg.qr(pair[1].scaling * pair[1].B.double(), mode="r")[1]
            total += float(
                (own @ torch.linalg.qr(pair[1].A.double().T, mode="r")[1].T).square().sum()
            )
    return math.sqrt(difference / total) if total > 0 else math.inf if difference > 0 else 0.0


def check_compatible(adapters: Sequence[LoraAdapter]) -> None:
    """Refuse adapters that cannot be merged with each other.

    Adapters may have different target modules: where one has none its ΔW is 0. A module that its
    configuration names but its weights lack is a damaged file.

    Raises:
        AdapterError: bases or shapes differ, or weights are incomplete; names folders and module.
    """
    if not adapters:
        raise AdapterError("no adapter was given")
    first = adapters[0]
    for other in adapters[1:]:
        pair = f"{first.path} and {other.path}"
        if first.base_model and other.base_model and first.base_model != other.base_model:
            raise AdapterError(
                f"{pair} were trained on different bases: '{first.base_model}' and "
                f"'{other.base_model}'. Merge adapters of one base model only; where both names "
                "mean the same model, make base_model_name_or_path agree in their "
                "adapter_config.json"
            )
    found: dict[str, tuple[LoraAdapter, tuple[int, int]]] = {}
    for adapter in adapters:
        for name, factors in adapter.factors.items():
            shape = factors.d_out, factors.d_in
            other, expected = found.setdefault(name, (adapter, shape))
            if shape != expected:
                raise AdapterError(
                    f"{other.path} and {adapter.path}: ΔW of module '{name}' is {expected} in one "
                    f"and {shape} in the other; they belong to different base models"
                )
    for adapter in adapters:
        for name in sorted(set(found) - set(adapter.factors)):
            if peft_folder.targets(adapter.config, name):
                raise AdapterError(
                    f"{adapter.path}: module '{name}' is one of the target modules in "
                    f"{peft_folder.CONFIG}, but the weight file has no factors for it (as "
                    f"{found[name][0].path} has). The file is incomplete; copy it again"
                )
