"""The models of one report: base, inputs, their utility merge and the merges, each with its name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.methods import MergeMethod
from sst_lightning.modules.merge import MergeModule
from sst_lightning.report.figures import slug


@dataclass
class Merge:
    """One merge that was saved."""

    method: MergeMethod
    alpha: float | None
    adapter: LoraAdapter
    folder: Path
    recipe: dict[str, Any]
    diagnostics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparedModel:
    """One model of a report.

    Attributes:
        name: in tables, unique.
        folder: name of the folder of its examples.
        method: ``base``, ``adapter``, ``utility_merge`` or a merge method.
        adapter: on the base; ``None`` is the bare base.
        parameters: of the method.
        diagnostics: of a merge.
        recipe: of a merge.
    """

    name: str
    folder: str
    method: str
    adapter: LoraAdapter | None
    parameters: dict[str, Any] = field(default_factory=dict)
    diagnostics: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None


def input_models(model: MergeModule, data_sets: Sequence[str]) -> list[ComparedModel]:
    """Return base, utility adapters, their merge where there is one, and last the safety adapter.

    Args:
        model: the adapters.
        data_sets: names of the utility data sets.
    """
    names = _utility_names(model.utility_adapters, data_sets)
    result = [ComparedModel("base", "base", "base", None)]
    result += [
        ComparedModel(name, slug(name), "adapter", adapter)
        for name, adapter in zip(names, model.utility_adapters, strict=True)
    ]
    if model.has_utility_merge:
        name = "+".join(names) if len(names) > 1 else f"{names[0]} weighted"
        parameters = {"weights": model.utility_weights}
        merge = model.utility_merge()
        result.append(ComparedModel(name, slug(name), "utility_merge", merge, parameters))
    return [*result, ComparedModel("A7", slug("A7"), "adapter", model.safety_adapter)]


def merge_model(merge: Merge, setting: str) -> ComparedModel:
    """Return a merge as a model of the report of ``setting``."""
    name = merge_name(merge.method, merge.alpha)
    return ComparedModel(
        f"{setting} {name}",
        slug(name),
        merge.method.label(),
        merge.adapter,
        {**merge.method.parameters(), "alpha": merge.alpha},
        merge.diagnostics,
        {"adapter": str(merge.folder), **merge.recipe},
    )


def merge_name(method: MergeMethod, alpha: float | None) -> str:
    """Name of one merge in reports: the method's label, with α where it has one."""
    return method.label() if alpha is None else f"{method.label()} α={alpha:g}"


def check_names(data_sets: Iterable[str]) -> None:
    """Refuse names under which two models of the report would be one.

    Args:
        data_sets: names of the utility data sets.

    Raises:
        SSTMergeError: names the data set.
    """
    names = [name.casefold() for name in data_sets]
    for name in names:
        if name in ("base", "a7") or names.count(name) > 1:
            raise SSTMergeError(
                f"data.utility: the name '{name}' is taken in the report (upper and lower case "
                "are the same there). Use another name"
            )


def _utility_names(adapters: Sequence[LoraAdapter], data_sets: Sequence[str]) -> list[str]:
    """Names of the utility adapters.

    With one data set for each they are the data sets', in the same order; else the folders'.
    """
    if len(data_sets) == len(adapters):
        return [name.upper() for name in data_sets]
    # The folder's name; the one above it where that says no more than "adapter".
    paths = [adapter.path or Path(f"utility-{i}") for i, adapter in enumerate(adapters, 1)]
    names = [path.parent.name if path.name == "adapter" else path.name for path in paths]
    if len({*names, "base", "A7"}) < len(names) + 2:
        return [f"utility {number}" for number in range(1, len(names) + 1)]
    return names
