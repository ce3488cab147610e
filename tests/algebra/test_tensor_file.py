"""Streaming against the safetensors library."""

import resource

import pytest
import torch
from safetensors.torch import load_file, save_file

from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.tensor_file import CODES, TensorFile, write_tensors

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a.weight": torch.randn(5),
    "empty": torch.zeros(0, 4),
    "ünï": torch.tensor(3.5),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("metadata", [{}, {"format": "pt", "note": "α"}])
def test_the_library_reads_what_was_written(tmp_path, metadata):
    path = tmp_path / "x.safetensors"
    write_tensors(path, SHAPES, TENSORS.items(), metadata)
    loaded = load_file(path)
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)
    assert TensorFile(path).metadata == metadata


def test_other_layouts_are_written_by_value(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"t": torch.arange(6).reshape(2, 3).T, "h": torch.ones(2, dtype=torch.bfloat16)}
    write_tensors(path, {"t": (3, 2), "h": (2,)}, tensors.items(), {})
    loaded = load_file(path)
    assert torch.equal(loaded["t"], tensors["t"].float())
    assert torch.equal(loaded["h"], torch.ones(2))


@pytest.mark.parametrize("dtype", CODES, ids=CODES.get)
def test_tensors_are_written_in_the_dtype_asked_for(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    tensors = {"one": torch.tensor([[0.0, 1.0], [1.0, 0.0]]), "plain": torch.ones(3)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_tensors(path, shapes, tensors.items(), {}, {"one": dtype})
    loaded = load_file(path)
    assert loaded["one"].dtype == dtype
    assert torch.equal(loaded["one"], tensors["one"].to(dtype))
    assert torch.equal(loaded["plain"], tensors["plain"])


def test_a_file_of_the_library_is_read_tensor_by_tensor(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    file = TensorFile(path)
    assert file.shapes == SHAPES
    for name, tensor in TENSORS.items():
        assert torch.equal(file.read(name), tensor)
    with pytest.raises(SSTMergeError, match=r"x\.safetensors: tensor 'c' cannot be read"):
        file.read("c")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("b", torch.zeros(3, 2))], r"'b' \(3, 2\) was announced as \('b', \(2, 3\)\)"),
        ([("b", torch.zeros(2, 3))], r"'a.weight' was announced but not given"),
        ([*TENSORS.items(), ("more", torch.zeros(1))], r"'more' .* announced as None"),
    ],
)
def test_tensors_that_are_not_those_announced(tmp_path, given, message):
    with pytest.raises(SSTMergeError, match=message):
        write_tensors(tmp_path / "x.safetensors", SHAPES, given, {})


def test_missing_and_truncated_files(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(SSTMergeError, match=r"x\.safetensors: no such file"):
        TensorFile(path)
    save_file(TENSORS, path)
    file = TensorFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SSTMergeError, match="cannot be read"):
        file.read("b")
    with pytest.raises(SSTMergeError, match="damaged or truncated"):
        TensorFile(path)


def test_no_byte_is_lost_without_an_error_where_the_disk_is_full(tmp_path):
    """Wherever in the file the disk ends, in the header, in a tensor or in the last bytes."""
    path = tmp_path / "x.safetensors"
    write_tensors(path, SHAPES, TENSORS.items(), {})
    whole = path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, whole, 7):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                write_tensors(path, SHAPES, TENSORS.items(), {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
