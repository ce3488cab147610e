"""Atomic output: after a kill, a path holds either the old content or the new, never a part."""

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sst_lightning.algebra.errors import DiskFullError, OutputExistsError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# linux/fcntl.h and linux/fs.h
AT_FDCWD = -100
RENAME_EXCHANGE = 2


def refuse_overwrite(path: str | Path, overwrite: bool, flag: str = "--overwrite") -> None:
    """Stop before any work when ``path`` is already there.

    Raises:
        OutputExistsError: ``path`` exists (as a folder: with files in it) and ``overwrite`` is false.
    """
    path = Path(path)
    taken = any(path.iterdir()) if path.is_dir() else path.exists()
    if taken and not overwrite:
        raise OutputExistsError(f"{path} already exists: choose another output or pass {flag}")


@contextmanager
def atomic_file(path: str | Path, size: int | None = None) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` in one step.

    Args:
        path: the file.
        size: its bytes, where they are known before, for the error.

    Raises:
        DiskFullError: the file does not fit on its disk.
    """
    path = Path(path)
    with _says_when_full(path, lambda: size or 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with _says_when_full(path, lambda: size or temporary.stat().st_size):
            yield temporary
        # mkstemp makes the file private; outputs follow the umask like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes the place of ``path``.

    Raises:
        DiskFullError: the folder does not fit on its disk.
    """
    path = Path(path)
    with _says_when_full(path, lambda: 0):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with _says_when_full(path, lambda: _size(temporary)):
            yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        move_folder(temporary, path)
    except DiskFullError as error:
        # A file in it that was written atomically names the temporary folder.
        raise DiskFullError(str(error).replace(str(temporary), str(path))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_folder(source: Path, path: Path) -> None:
    """Make ``source``, a folder beside ``path``, take the place of ``path``.

    On Linux the two change places in one system call. Where the file system cannot do that, the old
    folder is moved aside first: a kill in between leaves both complete, under other names.
    """
    if not path.exists():
        source.replace(path)
        return
    if _exchange(source, path):
        shutil.rmtree(source)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    path.replace(old / path.name)
    source.replace(path)
    shutil.rmtree(old)


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places (renameat2); False where that is not to be had."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(rename(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)


def remove_outputs(folder: Path, names: Sequence[str]) -> None:
    """Remove the files and folders of these names below ``folder``, those that are there.

    A kill in between leaves no folder that lacks some of its files.
    """
    for name in names:
        path = folder / name
        if path.is_dir():
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
            path.replace(aside)
            shutil.rmtree(aside)
        else:
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def disk_is_full(error: BaseException) -> bool:
    """Whether an error, of this program or of a library that writes files, is a full disk."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    # safetensors (Rust) tells it by its message alone.
    text = str(error)
    return any(os.strerror(number) in text for number in FULL)


@contextmanager
def _says_when_full(path: Path, size: Callable[[], int]) -> Iterator[None]:
    """Turn the errors of a full disk into one that says what is needed and what there is."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskFullError) or not disk_is_full(error):
            raise
        folder = next(parent for parent in path.absolute().parents if parent.is_dir())
        raise DiskFullError(
            f"{path}: does not fit on its disk ({error}): it needs {size():,} bytes or more, and "
            f"{shutil.disk_usage(folder).free:,} are free. What was there before is unchanged: free "
            "space or choose another output, and run again"
        ) from error


def _size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
