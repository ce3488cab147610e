"""What it takes to make a result again: versions, seeds, hashes."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import sst_lightning

PACKAGES = ("torch", "lightning", "transformers", "peft", "torchmetrics", "scipy")


def provenance(
    base_fingerprint: str,
    settings: Mapping[str, Any],
    recipe: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the ``provenance`` of a record.

    Args:
        base_fingerprint: hash of the base model.
        settings: what the evaluation ran with: precision, answer length, rows.
        recipe: recipe of the merge, where the record is one.
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "sst_merge": sst_lightning.__version__,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "seed": None if seed is None else int(seed),
        "base_sha256": base_fingerprint,
        "evaluation": dict(settings),
        **dict(recipe or {}),
    }
