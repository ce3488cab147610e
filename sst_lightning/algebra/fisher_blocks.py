"""What one process has collected of a Fisher, in blocks of batches: in memory or on disk.

A block is written when it is complete and never changes after that, so a process that is killed
loses the block it was at and no other. Sums are those of the block alone: adding up the blocks in
their order gives the same numbers whether or not a collection was interrupted.
"""

import json
import os
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sst_lightning.algebra.errors import FisherError, SSTMergeError
from sst_lightning.algebra.files import atomic_file
from sst_lightning.algebra.lazy import LazyMapping
from sst_lightning.algebra.tensor_file import TensorFile

FORMAT = "sst-merge fisher block 1"
GIBIBYTE = 2**30


@dataclass(frozen=True)
class Block:
    """Consecutive batches of one process.

    Attributes:
        indices: number of each sequence in its calibration set, (n,).
        nll: summed completion NLL of each sequence in nats, (n,).
        tokens: number of completion tokens of each sequence, (n,).
        states: module to :meth:`~sst_lightning.algebra.accumulators.FisherAccumulator.state`.
    """

    indices: Tensor
    nll: Tensor
    tokens: Tensor
    states: Mapping[str, Sequence[Tensor]]

    def release(self, module: str) -> None:
        """Forget the state of a module that is in memory: it has been used."""
        if isinstance(self.states, MutableMapping):
            del self.states[module]

    def bytes(self) -> int:
        """Memory of the states; meant for a block that is not on disk."""
        return sum(t.numel() * t.element_size() for state in self.states.values() for t in state)


class BlockStore(Sequence[Block]):
    """Blocks in the order they were collected.

    With a folder every block goes to disk at once. Without one blocks stay in memory up to a
    budget; past it all of them go to a temporary folder, which lives as long as this object. Blocks
    on disk are read module by module.

    Args:
        folder: where blocks are kept; a later run of the same collection finds them there.
        identity: what must be equal for blocks found in ``folder`` to be of this collection.
        process: index of this process, which names its files.
        memory_budget_gib: GiB that blocks in memory may take, without a folder.

    Raises:
        FisherError: ``folder`` holds blocks of another collection; names the first difference.
    """

    def __init__(
        self,
        folder: Path | None,
        identity: Mapping[str, object],
        process: int = 0,
        memory_budget_gib: float = 1.0,
    ) -> None:
        self.folder = folder
        self.identity = dict(identity)
        self.process = process
        self.budget = memory_budget_gib * GIBIBYTE
        self._blocks: list[Block] = []
        if folder is not None:
            self._find()

    @property
    def on_disk(self) -> bool:
        """Whether blocks are in files."""
        return self.folder is not None

    def append(self, block: Block) -> None:
        """Add the next block.

        Raises:
            FisherError: it cannot be written.
        """
        self._blocks.append(block)
        if self.folder is None:
            # One more block of this size must fit.
            if sum(item.bytes() for item in self._blocks) + block.bytes() <= self.budget:
                return
            self.folder = Path(tempfile.mkdtemp(prefix="sst-merge-fisher-"))
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
            first = 0
        else:
            first = len(self._blocks) - 1
        for number in range(first, len(self._blocks)):
            self._blocks[number] = self._write(number, self._blocks[number])

    def keep(self, count: int) -> None:
        """Forget all blocks after the first ``count``: another process does not have them."""
        for number in range(count, len(self._blocks)):
            self._path(number).unlink(missing_ok=True)
        del self._blocks[count:]

    def remove(self) -> None:
        """Delete the files of this process, and the folder where no other file is left."""
        if self.folder is None:
            return
        remove_blocks(self.folder, self.process)

    def __len__(self) -> int:
        """Return the number of blocks."""
        return len(self._blocks)

    def __getitem__(self, number):  # type: ignore[no-untyped-def]
        """Return a block."""
        return self._blocks[number]

    def __iter__(self) -> Iterator[Block]:
        """Return the blocks in order."""
        return iter(list(self._blocks))

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"process-{self.process}-block-{number:05d}.safetensors"

    def _write(self, number: int, block: Block) -> Block:
        tensors = {"indices": block.indices, "nll": block.nll, "tokens": block.tokens}
        for module, state in block.states.items():
            for place, tensor in enumerate(state):
                tensors[f"{place}/{module}"] = tensor.contiguous()
        header = {"format": FORMAT, "identity": json.dumps(self.identity, sort_keys=True)}
        path = self._path(number)
        try:
            with atomic_file(path) as temporary:
                save_file(tensors, temporary, metadata=header)
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
        except (OSError, SafetensorError) as error:
            raise FisherError(
                f"{path}: cannot be written ({error}). Free disk space or choose another output; "
                "what is there is kept, and the next run goes on from it"
            ) from error
        return self._open(path)

    def _open(self, path: Path) -> Block:
        file = TensorFile(path)
        if file.metadata.get("format") != FORMAT:
            raise SSTMergeError(f"{path}: not a block of a Fisher ('{FORMAT}' expected)")
        found = json.loads(file.metadata["identity"])
        expected = json.loads(json.dumps(self.identity))
        for key in sorted({*found, *expected}):
            if found.get(key) != expected.get(key):
                raise FisherError(
                    f"{path}: belongs to an unfinished collection with another {key} "
                    f"({_short(found.get(key))}, now {_short(expected.get(key))}). Finish that one, "
                    f"choose another output, or delete {path.parent}"
                )
        places: dict[str, int] = {}
        for key in file.shapes:
            place, _, module = key.partition("/")
            if module:
                places[module] = max(places.get(module, 0), int(place) + 1)

        def read(module: str) -> list[Tensor]:
            return [file.read(f"{place}/{module}") for place in range(places[module])]

        indices, nll, tokens = (file.read(key) for key in ("indices", "nll", "tokens"))
        return Block(indices, nll, tokens, LazyMapping(places, read))

    def _find(self) -> None:
        """Open the blocks that an interrupted collection has left."""
        while (path := self._path(len(self._blocks))).exists():
            try:
                self._blocks.append(self._open(path))
            except FisherError:
                raise
            except SSTMergeError as error:
                warnings.warn(
                    f"{error}: its sequences, and those after them, are collected again",
                    stacklevel=2,
                )
                return


def remove_blocks(folder: Path, process: int) -> None:
    """Delete the blocks of a process, and the folder where no other file is left."""
    for path in folder.glob(f"process-{process}-block-*"):
        path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        return  # never made, or another process still has blocks there


def join_states(sums: int, states: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the state of several parts of a collection together.

    Args:
        sums: number of tensors at the start of a state that add up; rows are joined.
        states: at least one, none empty.
    """
    joined = [torch.stack([state[place] for state in states]).sum(0) for place in range(sums)]
    rows = [state[place] for state in states for place in range(sums, len(state))]
    return joined + ([torch.cat(rows)] if rows else [])


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:24]}…"
