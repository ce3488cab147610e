"""LoRA factors on disk, for results that need not fit in memory."""

from collections.abc import Iterator, MutableMapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from sst_lightning.algebra.adapter import LoraFactors


class FactorStore(MutableMapping[str, LoraFactors]):
    """Keeps the factors of each module in a file of its own.

    What is read is mapped from the file: shapes cost nothing, and memory is needed for the module at
    hand.

    Args:
        folder: empty folder for the files; delete it when the store is no longer needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: dict[str, tuple[Path, float]] = {}
        self._files = 0

    def __setitem__(self, name: str, factors: LoraFactors) -> None:
        """Write the factors of a module."""
        path = self.folder / f"{self._files}.safetensors"
        save_file({"A": factors.A.contiguous(), "B": factors.B.contiguous()}, path)
        self._files += 1
        if name in self._entries:
            self._entries[name][0].unlink()
        self._entries[name] = path, factors.scaling

    def __getitem__(self, name: str) -> LoraFactors:
        """Return the factors of a module, mapped from its file."""
        path, scaling = self._entries[name]
        with safe_open(path, framework="pt") as file:
            return LoraFactors(file.get_tensor("A"), file.get_tensor("B"), scaling)

    def __delitem__(self, name: str) -> None:
        """Delete the file of a module."""
        self._entries.pop(name)[0].unlink()

    def __iter__(self) -> Iterator[str]:
        """Return the names of the modules, in the order in which they came."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Return the number of modules."""
        return len(self._entries)
