"""Methods by name: ``--method ties``, and ``method: ties`` in YAML, for the class TIES."""

from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from sst_lightning.modules.methods import find_method

FLAGS = ("--method", "--method.help")
LIST_FLAG = "--methods"

_load_yaml = get_loader("yaml")


def accept_method_names() -> None:
    """Let the keys ``method`` and ``methods`` of YAML files hold names; call before parsing."""
    set_loader("yaml", _load, exceptions=(yaml.YAMLError,))


def complete_method_names(arguments: Sequence[str]) -> list[str]:
    """Replace names of methods after ``--method`` and ``--methods`` by their class paths.

    Class paths stay as they are.

    Raises:
        SSTMergeError: there is no such method; lists the names.
    """
    result: list[str] = []
    for argument in arguments:
        if result and result[-1] in FLAGS:
            argument = _class_path(argument)
        elif argument.startswith("--method="):
            argument = "--method=" + _class_path(argument.removeprefix("--method="))
        elif result and result[-1] == LIST_FLAG:
            argument = _list(argument)
        elif argument.startswith(f"{LIST_FLAG}="):
            argument = f"{LIST_FLAG}=" + _list(argument.removeprefix(f"{LIST_FLAG}="))
        result.append(argument)
    return result


def _load(stream: str) -> Any:
    """Load YAML; methods may be given by name, at the top level and in a subcommand's section."""
    value = _load_yaml(stream)
    if isinstance(value, dict):
        for section in (value, *(part for part in value.values() if isinstance(part, dict))):
            if "method" in section:
                section["method"] = _complete(section["method"])
            if isinstance(section.get("methods"), list):
                section["methods"] = [_complete(entry) for entry in section["methods"]]
    return value


def _complete(entry: Any) -> Any:
    """Class path for a name, alone or as ``class_path`` of an entry with arguments."""
    if isinstance(entry, str):
        return {"class_path": _class_path(entry)}
    if isinstance(entry, dict) and isinstance(entry.get("class_path"), str):
        return {**entry, "class_path": _class_path(entry["class_path"])}
    return entry


def _list(text: str) -> str:
    """A YAML list of methods with class paths for names; any other text as it is."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # the parser reports it, with the key
    if not isinstance(value, list):
        return text
    return yaml.safe_dump([_complete(entry) for entry in value], default_flow_style=True)


def _class_path(method: str) -> str:
    if not method.replace("_", "").isalnum():
        return method
    found = find_method(method)
    return f"{found.__module__}.{found.__qualname__}"
