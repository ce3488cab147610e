"""YAML files: those that travel with the program, and the users' own."""

from pathlib import Path
from typing import Any

import yaml

import sst_lightning.configs
from sst_lightning.algebra.errors import SSTMergeError


def shipped_folder() -> Path:
    """Return the folder of the shipped configs: ``configs/`` in a checkout, in a wheel the package."""
    return Path(next(iter(sst_lightning.configs.__path__)))


def shipped_configs() -> list[str]:
    """Return the names of the shipped configs, relative to their folder."""
    folder = shipped_folder()
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.yaml"))


def find_config(name: str) -> str:
    """Return the path of a config: the file itself, or the shipped one of that name.

    Raises:
        SSTMergeError: there is neither.
    """
    if Path(name).exists() or name.lstrip().startswith(("{", "[")):
        return name
    shipped = shipped_folder() / name.removeprefix("configs/")
    if shipped.is_file():
        return str(shipped)
    raise SSTMergeError(
        f"--config {name}: no such file. Shipped configs: {', '.join(shipped_configs())}"
    )


def load_config(name: str, what: str) -> dict[str, Any]:
    """Read the YAML file that :func:`find_config` finds.

    Args:
        name: of the file.
        what: it is to be, for errors.

    Raises:
        SSTMergeError: there is no such file, it is not YAML, or no mapping.
    """
    path = find_config(name)
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SSTMergeError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(content, dict):
        raise SSTMergeError(f"{path}: not {what}")
    return content
