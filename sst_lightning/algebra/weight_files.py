"""Weights of a base model on disk, read one module at a time."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sst_lightning.algebra.errors import BackboneError
from sst_lightning.algebra.tensor_file import CODES

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {code: dtype for dtype, code in CODES.items()}
# Others (8-bit and 4-bit formats) hold codes that are no weights without their scales.
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")


class WeightFiles:
    """The weights in a transformers model folder.

    Only headers are read until a weight is asked for, and no file stays mapped after that.

    Args:
        folder: with ``model.safetensors``, or with shards and ``model.safetensors.index.json``.

    Attributes:
        files: file of each tensor, by its key.

    Raises:
        BackboneError: the folder or a file is missing, damaged or truncated; names it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.files = _files_by_key(self.folder)

    def shape(self, module: str) -> tuple[int, int]:
        """Return (d_out, d_in) of a module's weight, from the file's header.

        Args:
            module: name in the base model, such as ``model.layers.0.self_attn.q_proj``.

        Raises:
            BackboneError: the module has no weight here, or not one of plain numbers.
        """
        with self._entry(module) as (_, _, shape):
            return shape

    def weight(self, module: str) -> Tensor:
        """Return a module's weight, (d_out, d_in) fp32, in memory of its own.

        Args:
            module: name in the base model.

        Raises:
            BackboneError: as for :meth:`shape`, or the weight is not finite.
        """
        with self._entry(module) as (file, key, _):
            # A tensor that shares the file's memory would keep all of it mapped.
            weight: Tensor = file.get_tensor(key).to(torch.float32, copy=True)
        if not torch.isfinite(weight).all():
            raise BackboneError(
                f"{self.files[key]}: '{key}' has NaN or infinite values; copy the model again"
            )
        return weight

    def shape_of(self, key: str) -> tuple[int, ...]:
        """Return the shape of any tensor, from the file's header."""
        with _opened(self.files[key]) as file:
            return tuple(file.get_slice(key).get_shape())

    def dtype_of(self, key: str) -> torch.dtype:
        """Return the dtype that any tensor is stored in, from the file's header.

        Raises:
            BackboneError: the file has it in a format such as 8-bit floats.
        """
        with _opened(self.files[key]) as file:
            code = file.get_slice(key).get_dtype()
        if code not in DTYPES:
            raise BackboneError(
                f"{self.files[key]}: '{key}' is {code}, which is not supported here; give the "
                "model that is not quantised"
            )
        return DTYPES[code]

    def tensor(self, key: str) -> Tensor:
        """Return any tensor in the dtype that it is stored in, in memory of its own."""
        with _opened(self.files[key]) as file:
            return torch.clone(file.get_tensor(key))

    @contextmanager
    def _entry(self, module: str) -> Iterator[tuple[Any, str, tuple[int, int]]]:
        """Yield the opened file, the key and the shape of a module's weight."""
        key = f"{module}.weight"
        if key not in self.files:
            raise BackboneError(
                f"{self.folder}: no weight '{key}' for module '{module}'; there are "
                f"{_few(self.files)}. Give a model of the architecture that the adapters were "
                "trained on (a tied weight is stored under one of its names only)"
            )
        path = self.files[key]
        with _opened(path) as file:
            part = file.get_slice(key)
            kind, shape = part.get_dtype(), part.get_shape()
            if kind not in PLAIN_TYPES or len(shape) != 2:
                raise BackboneError(
                    f"{path}: '{key}' is {kind} of shape {shape}, not a matrix of plain numbers; "
                    "give the model that is not quantised"
                )
            yield file, key, (shape[0], shape[1])


def _files_by_key(folder: Path) -> dict[str, Path]:
    """Map each tensor's key to its file."""
    if not folder.is_dir():
        raise BackboneError(
            f"{folder}: no such model folder; give the path of a local folder with {WEIGHTS} (for "
            "a model of the hub, the folder that hf download prints)"
        )
    if (folder / WEIGHTS).is_file():
        return dict.fromkeys(_keys(folder / WEIGHTS), folder / WEIGHTS)
    index = folder / INDEX
    if not index.is_file():
        raise BackboneError(
            f"{folder}: has neither {WEIGHTS} nor {INDEX}; save the model with "
            "save_pretrained(...), which writes safetensors"
        )
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(key): folder / shard for key, shard in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{index}: not an index with a weight_map ({error}); copy the model again"
        ) from error
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise BackboneError(f"{path}: {INDEX} names this file, but it is missing; copy it")
        missing = {key for key, file in files.items() if file == path} - set(_keys(path))
        if missing:
            raise BackboneError(
                f"{path}: has no '{min(missing)}', which {INDEX} says is there; copy the model again"
            )
    return files


def _keys(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise BackboneError(
            f"{path}: damaged, truncated or no safetensors file ({error}); copy it again"
        ) from error


def _few(keys: dict[str, Path]) -> str:
    """Name the first few linear weights."""
    names = [key for key in keys if key.endswith("_proj.weight")] or list(keys)
    return ", ".join(f"'{key}'" for key in names[:3]) + (", …" if len(names) > 3 else "")
