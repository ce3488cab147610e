"""Checkpoints on disk: written in one step, and read with an error that says how to go on."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from sst_lightning.algebra.errors import CheckpointError
from sst_lightning.algebra.files import atomic_file

# Whatever zipfile and torch.load raise on bytes that are no checkpoint.
UNREADABLE = (
    *(zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError),
    *(ValueError, LookupError),
)
KEYS = ("state_dict", "pytorch-lightning_version")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its path and renames it; reads data only, never code.

    Lightning's own writes to the folder for temporary files and moves the file. Where that folder
    is on another disk the move is a copy, and a kill in it leaves a part under the final name.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises:
            DiskFullError: it does not fit on its disk; an earlier file of this name is unchanged.
        """
        if _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic_file(path, buffer.getbuffer().nbytes) as temporary:
            temporary.write_bytes(buffer.getbuffer())

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint, with ``weights_only=True`` whatever was asked for.

        Raises:
            CheckpointError: there is none, or it is damaged; names the newest one beside it that is
                whole.
        """
        if _is_remote(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(f"{path}: no such checkpoint. {_alternative(path)}")
        try:
            _check_bytes(path)
            checkpoint = super().load_checkpoint(path, map_location, weights_only=True)
            missing = [key for key in KEYS if key not in checkpoint]
        except UNREADABLE as error:
            reason = str(error).partition("\n")[0].partition(". ")[0]
            raise CheckpointError(
                f"{path}: damaged, or no checkpoint ({reason}). {_alternative(path)}"
            ) from error
        if missing:
            raise CheckpointError(
                f"{path}: no checkpoint of a training run: it has no '{missing[0]}'. "
                f"{_alternative(path)}"
            )
        return checkpoint


def _alternative(path: Path) -> str:
    """Say which checkpoint to use in the place of ``path``."""
    others = [other for other in path.parent.glob("*.ckpt") if other != path and other.is_file()]
    for other in sorted(others, key=lambda file: file.stat().st_mtime, reverse=True):
        if _is_whole(other):
            return f"The newest checkpoint beside it that is whole: --ckpt_path {other}"
    return (
        "No other checkpoint is beside it; without --ckpt_path training starts from the beginning"
    )


def _check_bytes(path: Path) -> None:
    """Compare a checkpoint, a zip file, with its checksums: torch.load does not.

    Raises:
        zipfile.BadZipFile: they differ, or it is no zip file.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} is not what was written")


def _is_whole(path: Path) -> bool:
    try:
        _check_bytes(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE:
        return False
    return isinstance(content, dict) and all(key in content for key in KEYS)


def _is_remote(path: str | Path) -> bool:
    return "://" in str(path)
