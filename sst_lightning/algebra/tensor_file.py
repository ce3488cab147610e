"""safetensors files tensor by tensor: nothing but the tensor at hand is in memory.

Format: an 8-byte little-endian header length, a JSON header with dtype, shape and offsets of each
tensor, then the bytes (https://github.com/huggingface/safetensors). The library reads one tensor at
a time, but writes only a dictionary that holds all of them.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sst_lightning.algebra.errors import SSTMergeError

ALIGNMENT = 8
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in a header."""


class TensorFile:
    """Reads one tensor at a time; the file is opened for each and not kept mapped.

    Args:
        path: safetensors file.

    Attributes:
        shapes: tensor name to shape.
        metadata: strings in the header.

    Raises:
        SSTMergeError: the file is missing, damaged or truncated.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise SSTMergeError(f"{self.path}: no such file")
        try:
            with safe_open(self.path, framework="pt") as file:
                names = list(file.keys())
                self.metadata: dict[str, str] = file.metadata() or {}
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise SSTMergeError(
                f"{self.path}: damaged or truncated safetensors file ({error})"
            ) from error

    def read(self, name: str) -> Tensor:
        """Return a copy of the tensor ``name``.

        Raises:
            SSTMergeError: the file has no such tensor, or was changed since it was opened.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                # The library's tensor may lie in the mapped file, which then counts as our memory.
                return torch.clone(file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise SSTMergeError(f"{self.path}: tensor '{name}' cannot be read ({error})") from error


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Write tensors one after the other, each as soon as it is there.

    Args:
        path: file to write; make the write atomic around this call.
        shapes: name and shape of every tensor, in the order of ``tensors``.
        tensors: name and tensor.
        metadata: strings for the header.
        dtypes: dtype that tensors are written in, by name; fp32 where none is given.

    Raises:
        SSTMergeError: a tensor is not the one announced, or one is missing.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    kinds = {name: (dtypes or {}).get(name, torch.float32) for name in shapes}
    offset = 0
    for name, shape in shapes.items():
        end = offset + kinds[name].itemsize * math.prod(shape)
        code = CODES[kinds[name]]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    announced = iter(shapes.items())
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            expected = next(announced, None)
            if expected != (name, tuple(tensor.shape)):
                raise SSTMergeError(
                    f"{path}: tensor '{name}' {tuple(tensor.shape)} was announced as {expected}"
                )
            # Flat, because a tensor without dimensions has no bytes to view.
            flat = tensor.detach().to(kinds[name]).contiguous().flatten()
            # Not ndarray.tofile: its last bytes are lost without an error where the disk is full.
            file.write(flat.view(torch.uint8).numpy().data)
        missing = next(announced, None)
    if missing is not None:
        raise SSTMergeError(f"{path}: tensor '{missing[0]}' was announced but not given")
