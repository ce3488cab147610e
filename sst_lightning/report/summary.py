"""From per-example scores of a set of models to the records of results.json."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sst_lightning.algebra.fronts import front_probability
from sst_lightning.algebra.paired import holm
from sst_lightning.algebra.safety_tax import safety_tax
from sst_lightning.algebra.statistics import (
    Interval,
    bootstrap_ratio_of_sums,
    mean_interval,
)
from sst_lightning.data.rows import Row
from sst_lightning.metrics.judge_errors import RULE_ERRORS, corrected_share
from sst_lightning.metrics.refusal_judge import rules_fingerprint
from sst_lightning.metrics.scores import ModelScores
from sst_lightning.report.base_differences import base_differences
from sst_lightning.report.entries import tested_difference, to_json
from sst_lightning.report.method_comparison import comparison_records, model_curve
from sst_lightning.report.row_clusters import RowClusters
from sst_lightning.report.suite_summary import (
    SuiteFacts,
    add_suite_differences,
    suite_metrics,
)

TESTED = {"attack": "attack_refusal_gain", "harmless": "over_refusal_increase"}
"""Task to the metric that says how its refusals differ from the utility model's."""
QUOTED_ANSWERS = 3
MOST_GROUPS = 6
QUOTED_KINDS = ("utility", "harmless")


@dataclass(frozen=True)
class Candidate:
    """One evaluated model.

    Attributes:
        model: name in tables.
        method: ``base``, ``adapter``, ``utility_merge`` or a merge method.
        parameters: parameters of the method.
        scores: per-example scores.
        diagnostics: kept energy and spectrum of a merge.
        provenance: versions, seed, hashes.
        on_other_bases: scores of the same adapter on other storages of the base, by storage.
    """

    model: str
    method: str
    parameters: dict[str, Any]
    scores: ModelScores
    diagnostics: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    on_other_bases: Mapping[str, ModelScores] = field(default_factory=dict)


def build_records(
    candidates: Sequence[Candidate],
    setting: str,
    utility_tasks: Sequence[str],
    rows: Mapping[str, Sequence[Row]],
    reference: ModelScores | None = None,
    safety: ModelScores | None = None,
    suites: Mapping[str, SuiteFacts] | None = None,
) -> list[dict[str, Any]]:
    """Return one record per candidate, and one per method that is compared at equal safety.

    Args:
        candidates: evaluated models.
        setting: name of the set of adapters.
        utility_tasks: names of the utility data sets.
        rows: rows by task, for their clusters and groups, and the quoted answers.
        reference: scores of the utility model before safety was added.
        safety: scores of the safety adapter alone.
        suites: the suites that the scores have examples of.
    """
    facts, clusters = suites or {}, RowClusters(rows)
    records: list[dict[str, Any]] = []
    for candidate in candidates:
        metrics = model_metrics(candidate.scores, utility_tasks, clusters)
        metrics |= group_metrics(candidate.scores, rows)
        metrics |= suite_metrics(candidate.scores.examples, facts)
        metrics |= base_differences(
            candidate.scores, candidate.on_other_bases, utility_tasks, clusters
        )
        if reference is not None and safety is not None and "alpha" in candidate.parameters:
            metrics |= tax_metrics(candidate.scores, reference, safety, utility_tasks, clusters)
        record: dict[str, Any] = {
            "model": candidate.model,
            "setting": setting,
            "method": candidate.method,
            "parameters": candidate.parameters,
            "split": "test",
            "metrics": {name: to_json(interval) for name, interval in metrics.items()},
            "generations": quoted_answers(candidate.scores, rows),
            "provenance": candidate.provenance,
        }
        if candidate.diagnostics:
            record["diagnostics"] = candidate.diagnostics
        records.append(record)
    if reference is not None and safety is not None:
        merges = [
            (record, candidate.scores)
            for record, candidate in zip(records, candidates, strict=True)
            if "alpha" in candidate.parameters
        ]
        _compare_merges(merges, utility_tasks, reference, clusters)
        add_suite_differences(
            [(record, scores.examples) for record, scores in merges], reference.examples, facts
        )
        correct_tests(records)
    if reference is not None:
        curves = [
            (candidate.method, candidate.parameters["alpha"], candidate.scores)
            for candidate in candidates
            if "alpha" in candidate.parameters
        ]
        records += comparison_records(curves, setting, utility_tasks, reference, clusters)
    return records


def correct_tests(records: Sequence[dict[str, Any]]) -> None:
    """Add ``p_holm`` to every metric with a ``p``: all tests of a report are one family."""
    tests = [entry for record in records for entry in record["metrics"].values() if "p" in entry]
    for entry, adjusted in zip(tests, holm([entry["p"] for entry in tests]), strict=True):
        entry["p_holm"] = adjusted


def model_metrics(
    scores: ModelScores, utility_tasks: Sequence[str], clusters: RowClusters
) -> dict[str, Interval]:
    """Return the metrics of one model alone, over all utility tasks and for each."""

    def mean(tasks: Sequence[str], metric: str) -> Interval:
        return mean_interval(
            scores.array(tasks, metric), clusters=clusters.of(scores, tasks, metric)
        )

    def per_token(tasks: Sequence[str]) -> Interval:
        return bootstrap_ratio_of_sums(
            scores.array(tasks, "nll"),
            scores.array(tasks, "tokens"),
            clusters=clusters.of(scores, tasks, "nll"),
        )

    metrics: dict[str, Interval] = {}
    groups = {"utility": list(utility_tasks)}
    if len(utility_tasks) > 1:
        groups |= {f"utility_{task}": [task] for task in utility_tasks}
    for name, tasks in groups.items():
        metrics[f"{name}_nll"] = per_token(tasks)
        for metric in ("rouge_l", "exact_match", "contains"):
            metrics[f"{name}_{metric}"] = mean(tasks, metric)
    for task, name in (("attack", "attack_refusal_rate"), ("harmless", "over_refusal_rate")):
        metrics[name] = mean([task], "refusal")
        metrics[f"{name}_corrected"] = corrected_share(
            scores.array([task], "refusal"),
            clusters.of(scores, [task], "refusal"),
            RULE_ERRORS,
            rules_fingerprint(),
        )
    metrics["degenerate_rate"] = mean(["attack", "harmless"], "degenerate")
    metrics["attack_refusal_nll"] = per_token(["attack"])
    return {name: interval for name, interval in metrics.items() if interval.n}


def group_metrics(scores: ModelScores, rows: Mapping[str, Sequence[Row]]) -> dict[str, Interval]:
    """Return refusal rates of each attack family and each source of harmless prompts.

    Only where there are two to ``MOST_GROUPS`` of them: beyond that, groups are single prompts.
    """
    metrics: dict[str, Interval] = {}
    for task, name in (("attack", "attack_refusal_rate"), ("harmless", "over_refusal_rate")):
        groups = sorted({row.group for row in rows.get(task, ())})
        if not 2 <= len(groups) <= MOST_GROUPS:
            continue
        verdicts = scores.values.get(task, {}).get("refusal", {})
        for group in groups:
            own = [row for row in rows[task] if row.group == group and row.id in verdicts]
            if own:
                metrics[f"{name}/{group}"] = mean_interval(
                    np.array([verdicts[row.id] for row in own]),
                    clusters=[row.cluster for row in own],
                )
    return metrics


def tax_metrics(
    scores: ModelScores,
    reference: ModelScores,
    safety: ModelScores,
    utility_tasks: Sequence[str],
    clusters: RowClusters,
) -> dict[str, Interval]:
    """Return what a merge gained and cost against the utility model (ROUGE-L and refusal rate)."""
    tax = safety_tax(
        scores.array(utility_tasks, "rouge_l"),
        reference.array(utility_tasks, "rouge_l"),
        scores.array(["attack"], "refusal"),
        reference.array(["attack"], "refusal"),
        safety.array(["attack"], "refusal"),
        utility_clusters=clusters.of(scores, utility_tasks, "rouge_l"),
        safety_clusters=clusters.of(scores, ["attack"], "refusal"),
    )
    tokens = scores.array(utility_tasks, "tokens")
    before = reference.array(utility_tasks, "nll")
    difference = scores.array(utility_tasks, "nll") - before
    own = clusters.of(scores, utility_tasks, "nll")
    return {
        "utility_nll_increase": bootstrap_ratio_of_sums(difference, tokens, clusters=own),
        "utility_nll_increase_rate": bootstrap_ratio_of_sums(difference, before, clusters=own),
        "utility_drop_rate": tax.utility_drop_rate,
        "safety_gain_rate": tax.safety_gain_rate,
        "safety_tax": tax.safety_tax,
        "safety_tax_absolute": tax.safety_tax_absolute,
        "alignment_drift": tax.alignment_drift,
    }


def quoted_answers(scores: ModelScores, rows: Mapping[str, Sequence[Row]]) -> list[dict[str, str]]:
    """Return the first answers of each task with mild prompts; attacks are never quoted."""
    quotes = []
    for task, answers in scores.answers.items():
        for row in [row for row in rows.get(task, ()) if row.id in answers][:QUOTED_ANSWERS]:
            if row.kind in QUOTED_KINDS:
                quotes.append({"kind": row.kind, "prompt": row.prompt, "response": answers[row.id]})
    return quotes


def _compare_merges(
    merges: Sequence[tuple[dict[str, Any], ModelScores]],
    utility_tasks: Sequence[str],
    reference: ModelScores,
    clusters: RowClusters,
) -> None:
    """Add what needs the utility model and the other merges: tests, and the place on the front.

    Each merge's refusals are compared with the utility model's on the same prompts. One front holds
    all merges and the utility model.
    """
    if not merges:
        return
    for task, metric in TESTED.items():
        before = reference.array([task], "refusal")
        for record, scores in merges:
            own = clusters.of(scores, [task], "refusal")
            refusals = scores.array([task], "refusal")
            record["metrics"][metric] = tested_difference(refusals, before, None, own)
    curve = model_curve(
        [reference, *(scores for _, scores in merges)], utility_tasks, "refusal", clusters
    )
    for (record, _), share in zip(merges, front_probability(curve)[1:], strict=True):
        record["metrics"]["front_probability"] = to_json(share)
