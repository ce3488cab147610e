"""Methods by name: ``--method ties``, and ``method: ties`` in YAML, for the class TIES."""

from collections.abc import Sequence
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.modules.methods import find_method

HELP_FLAG = "--method.help"
FLAGS = ("--method", "--methods", "--methods+")
SECTIONS = ("merge", "compare")

_load_yaml = get_loader("yaml")


def accept_method_names() -> None:
    """Let the keys ``method`` and ``methods`` of YAML files hold names; call before parsing."""
    set_loader("yaml", _load, exceptions=(yaml.YAMLError,))


def complete_method_names(arguments: Sequence[str]) -> list[str]:
    """Replace names of methods in the values of ``--method`` and ``--methods`` by class paths.

    Class paths, names of files and classes that are not in the registry stay as they are.

    Raises:
        SSTMergeError: there is no method of that name; lists the names.
    """
    result: list[str] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if result and result[-1] in (*FLAGS, HELP_FLAG):
            argument = _value(argument)
        elif equals and flag in FLAGS:
            argument = f"{flag}={_value(value)}"
        result.append(argument)
    return result


def _load(stream: str) -> Any:
    """Load YAML and complete methods, at the top level and in the sections of subcommands.

    Anything with a ``class_path`` is an object's description, whose arguments have names of their
    own.
    """
    value = _load_yaml(stream)
    if isinstance(value, dict) and "class_path" not in value:
        for section in (value, *(value.get(name) for name in SECTIONS)):
            if isinstance(section, dict):
                for key in {"method", "methods"} & set(section):
                    section[key] = _complete(section[key])
    return value


def _value(text: str) -> str:
    """A name, an entry or a list of entries, completed; any other text as it is."""
    if _is_name(text):
        return _class_path(text)
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # the parser reports it, with the key
    return yaml.safe_dump(_complete(value), default_flow_style=True, width=10**9)


def _complete(entry: Any) -> Any:
    """Class path for a name, alone, in a list, or as ``class_path`` of an entry with arguments."""
    if isinstance(entry, list):
        return [_complete(item) for item in entry]
    if _is_name(entry):
        return {"class_path": _class_path(entry)}
    if isinstance(entry, dict) and _is_name(entry.get("class_path")):
        try:
            return {**entry, "class_path": _class_path(entry["class_path"])}
        except SSTMergeError:
            return entry  # a class of the user's own, which the parser finds or refuses
    return entry


def _is_name(text: Any) -> bool:
    return isinstance(text, str) and text.replace("_", "").isalnum()


def _class_path(method: str) -> str:
    found = find_method(method)
    return f"{found.__module__}.{found.__qualname__}"
