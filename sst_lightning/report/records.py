"""results.json: the stable, documented form of all results.

The file is a JSON list of records. Every record has

- ``model``: name in tables, unique within a setting;
- ``setting``: the set of adapters it belongs to, such as ``A5+A7``;
- ``method``: ``base``, ``adapter``, ``utility_merge``, the name of a merge method, or
  ``comparison`` (one method against another at equal safety);
- ``parameters``: the method's parameters (of a merge: with ``alpha``);
- ``split``: the rows it was measured on;
- ``metrics``: name to ``{"value", "low", "high", "n"}``: the figure, its 95 % interval and the
  number of examples; where the figure is undefined the first three are null and ``note`` says why.
  ``note`` may also say how an interval was made. A difference from the utility model has ``p``, of
  the paired test on the same examples (exact McNemar for independent scores of 0 and 1, else sign
  flips), and ``p_holm``, the same corrected over all tests of the setting: merges × (attacks,
  harmless prompts, primary metric of each suite).
  ``front_probability`` is the share of resamples in which a merge is on the Pareto front of refused
  attacks, utility cost and over-refusal; its interval is the Monte-Carlo error of that share.
  ``<metric>_difference/<storage>`` is the metric on the base in another storage (such as ``nf4``)
  less that on the base it was measured on, paired by row.

Optional: ``diagnostics`` (``kept_energy`` by module; ``spectrum`` with ``in_sample`` and
``held_out``), ``generations`` (``kind``, ``prompt``, ``response``; mild ones) and ``provenance``
(versions, seed, hashes, recipe; ``merged_on``: the base that Fishers were taken on).
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.files import write_text

Record = dict[str, Any]

REQUIRED: dict[str, type] = {
    "model": str,
    "setting": str,
    "method": str,
    "parameters": dict,
    "split": str,
    "metrics": dict,
}


def write_records(records: Sequence[Record], path: Path) -> None:
    """Check the records and write them to ``path``, atomically.

    Raises:
        SSTMergeError: a record does not follow the schema.
    """
    check_records(records, str(path))
    write_text(
        path, json.dumps(list(records), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )


def read_records(path: Path) -> list[Record]:
    """Read and check the records of a results.json.

    Raises:
        SSTMergeError: the file is missing, not JSON, or does not follow the schema.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SSTMergeError(f"{path}: no such file; make it with sst-merge compare") from error
    except (ValueError, OSError) as error:
        raise SSTMergeError(f"{path}: cannot be read as JSON ({error})") from error
    check_records(records, str(path))
    return list(records)


def check_records(records: Any, source: str) -> None:
    """Check records against the schema.

    Args:
        records: what should be a list of records.
        source: named in the error.

    Raises:
        SSTMergeError: names the record, the key and what is wrong.
    """
    if not isinstance(records, list | tuple):
        raise SSTMergeError(f"{source}: not a list of records")
    seen: set[tuple[str, str]] = set()
    for number, record in enumerate(records):
        where = f"{source}: record {number}"
        if not isinstance(record, dict):
            raise SSTMergeError(f"{where} is not an object")
        for key, kind in REQUIRED.items():
            if not isinstance(record.get(key), kind):
                raise SSTMergeError(f"{where}: key '{key}' is missing or not a {kind.__name__}")
        names = (record["setting"], record["model"])
        if names in seen:
            raise SSTMergeError(f"{where}: setting '{names[0]}' has two models '{names[1]}'")
        seen.add(names)
        for name, entry in record["metrics"].items():
            _check_metric(entry, f"{where}: metric '{name}'")


def _check_metric(entry: Any, where: str) -> None:
    if not isinstance(entry, dict) or not {"value", "low", "high", "n"} <= set(entry):
        raise SSTMergeError(f"{where} needs value, low, high and n")
    if not isinstance(entry["n"], int) or entry["n"] < 0:
        raise SSTMergeError(f"{where}: n must be a number of examples")
    figures = [entry[key] for key in ("value", "low", "high")]
    if any(figure is None for figure in figures):
        if figures != [None] * 3 or not entry.get("note"):
            raise SSTMergeError(f"{where}: an undefined figure is all null, with a note")
        return
    if not all(isinstance(figure, int | float) and math.isfinite(figure) for figure in figures):
        raise SSTMergeError(f"{where}: figures must be finite numbers")
    tests = [entry[key] for key in ("p", "p_holm") if key in entry]
    if tests and not (
        len(tests) == 2
        and all(isinstance(p, int | float) for p in tests)
        and 0 <= tests[0] <= tests[1] <= 1
    ):
        raise SSTMergeError(f"{where}: p and p_holm come together, 0 <= p <= p_holm <= 1")
