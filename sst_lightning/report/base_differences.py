"""The base that models were measured on, and what another storage of it changes."""

from collections.abc import Mapping, Sequence
from typing import Any

from sst_lightning.algebra.paired_difference import paired_difference
from sst_lightning.algebra.statistics import Interval, bootstrap_ratio_of_sums
from sst_lightning.metrics.scores import ModelScores
from sst_lightning.report.records import Record
from sst_lightning.report.row_clusters import RowClusters
from sst_lightning.report.tables import format_entry, inline, markdown_table

DIFFERENCE = "_difference/"
"""Between a metric and the storage of the base that its difference is of."""
PER_TOKEN = {"utility_nll": "utility NLL", "attack_refusal_nll": "refusal NLL"}
RATES = {"attack_refusal_rate": "refuses attacks", "over_refusal_rate": "over-refusal"}
TASK = {
    "attack_refusal_nll": "attack",
    "attack_refusal_rate": "attack",
    "over_refusal_rate": "harmless",
}
STORAGES = {"nf4": "4 bits (NF4, double quantisation)"}


def base_differences(
    scores: ModelScores,
    others: Mapping[str, ModelScores],
    utility_tasks: Sequence[str],
    clusters: RowClusters,
) -> dict[str, Interval]:
    """Return figures on other storages of the base less those on the one it is served on.

    Both models read the same rows: the intervals are paired by row.

    Args:
        scores: of a model on the base that it is served on.
        others: scores of the same adapter by storage of the base.
        utility_tasks: names of the utility data sets.
        clusters: of the rows.
    """
    metrics: dict[str, Interval] = {}
    for storage, other in others.items():
        for name in PER_TOKEN:
            tasks = [TASK[name]] if name in TASK else list(utility_tasks)
            metrics[f"{name}{DIFFERENCE}{storage}"] = bootstrap_ratio_of_sums(
                other.array(tasks, "nll") - scores.array(tasks, "nll"),
                scores.array(tasks, "tokens"),
                clusters=clusters.of(scores, tasks, "nll"),
            )
        for name in RATES:
            task = TASK[name]
            metrics[f"{name}{DIFFERENCE}{storage}"] = paired_difference(
                other.array([task], "refusal"),
                scores.array([task], "refusal"),
                clusters=clusters.of(scores, [task], "refusal"),
            )
    return {name: interval for name, interval in metrics.items() if interval.n}


def bases_text(records: Sequence[Record]) -> str:
    """Say which base the records of one setting were measured on; with a table of differences.

    Args:
        records: models of one setting, those of a comparison of methods left out.
    """
    facts = [record.get("provenance", {}) for record in records]
    measured = {_storage(fact["evaluation"]) for fact in facts if "evaluation" in fact}
    merged = {fact["merged_on"]["storage"] for fact in facts if "merged_on" in fact}
    if not measured:
        return ""
    text = f"Measured on the base in {_listed(measured)}"
    if merged and merged != measured:
        text += f"; merged, with its Fishers, on the base in {_listed(merged)}"
    parts = [f"{text}.\n"]
    storages = dict.fromkeys(
        name.partition(DIFFERENCE)[2]
        for record in records
        for name in record["metrics"]
        if DIFFERENCE in name
    )
    for storage in storages:
        parts.append(
            f"The same adapters on the base in {_listed({storage})}: difference to the figures on "
            f"{_listed(measured)}, paired by row.\n\n{_table(records, storage)}\n"
        )
    return "\n".join(parts)


def _table(records: Sequence[Record], storage: str) -> str:
    columns = PER_TOKEN | RATES
    rows = [
        [
            inline(record["model"]),
            *(
                format_entry(record["metrics"].get(f"{name}{DIFFERENCE}{storage}"), 3)
                for name in columns
            ),
        ]
        for record in records
    ]
    return markdown_table(["model", *columns.values()], rows)


def _storage(evaluation: Mapping[str, Any]) -> str:
    return str(evaluation["quantization"] or evaluation["dtype"])


def _listed(storages: set[str]) -> str:
    return ", ".join(STORAGES.get(name, name) for name in sorted(storages))
