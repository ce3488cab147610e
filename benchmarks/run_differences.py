"""What two runs of the same stages, in one process and in several, have otherwise."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sst_lightning.algebra.adapter import LoraAdapter


def differences(one: Path, other: Path) -> dict[str, float]:
    """Compare the outputs of two runs.

    Returns:
        ``loss``: largest difference of a step's loss; ``fisher`` and ``merged_adapter``: norm of the
        difference over the norm, the largest of all Fishers and of all modules; ``metrics``: largest
        difference of a number in results.json.
    """
    losses = [_losses(folder / "log" / "utility" / "metrics.csv") for folder in (one, other)]
    fishers = []
    for path in sorted((one / "fisher").glob("*.safetensors")):
        ours, theirs = load_file(path), load_file(other / "fisher" / path.name)
        fishers += [_relative(ours[name], theirs[name]) for name in ours]
    adapters = [LoraAdapter.open(folder / "merge" / "adapter") for folder in (one, other)]
    deltas = [
        _relative(*(adapter.factors[name].delta() for adapter in adapters))
        for name in adapters[0].factors
    ]
    numbers = [
        abs(dict(_numbers(_records(one / stage)))[key] - value)
        for stage in ("merge", "test")
        for key, value in _numbers(_records(other / stage))
    ]
    return {
        "loss": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "fisher": max(fishers),
        "merged_adapter": max(deltas),
        "metrics": max(numbers),
    }


def _losses(path: Path) -> list[float]:
    with path.open(encoding="utf-8", newline="") as file:
        return [float(line["train_loss"]) for line in csv.DictReader(file) if line["train_loss"]]


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).norm() / a.norm().clamp(min=torch.finfo(torch.double).tiny))


def _records(folder: Path) -> list[Any]:
    records: list[Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return [record["metrics"] for record in records]


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of nested lists and dictionaries with where it is."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from _numbers(item, f"{key}/{name}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, float(value)
