"""Merge methods against one of them: at equal safety, and by the areas under their fronts."""

from collections.abc import Sequence

import numpy as np

from sst_lightning.algebra.fronts import Curve, Price, compare_at_equal_safety, hypervolume
from sst_lightning.algebra.statistics import Array, Interval
from sst_lightning.metrics.scores import ModelScores
from sst_lightning.report.entries import to_json
from sst_lightning.report.records import Record
from sst_lightning.report.row_clusters import RowClusters

REFERENCE_METHOD = "task_arithmetic"
"""What the others are compared with; the first method where it is not among them."""
PRICES: dict[Price, str] = {"cost": "", "over_refusal": "over_refusal_"}
"""What safety is paid with, and the prefix of its front's figures."""


def comparison_records(
    merges: Sequence[tuple[str, float | None, ModelScores]],
    setting: str,
    utility_tasks: Sequence[str],
    reference: ModelScores,
    clusters: RowClusters,
) -> list[Record]:
    """Return one record per method, against the reference method; none where there is one method.

    Args:
        merges: method, α and scores of each merge.
        setting: name of the set of adapters.
        utility_tasks: names of the utility data sets.
        reference: scores of the utility model, where every method starts at α = 0.
        clusters: of the rows.
    """
    methods = list(dict.fromkeys(method for method, _, _ in merges))
    if len(methods) < 2:
        return []
    against = REFERENCE_METHOD if REFERENCE_METHOD in methods else methods[0]
    records = []
    for method in methods:
        metrics: dict[str, Interval] = {}
        for axis, suffix in (("refusal", "refusal"), ("nll", "refusal_nll")):
            curve, other = (
                model_curve([reference, *_by_alpha(merges, name)], utility_tasks, axis, clusters)
                for name in (method, against)
            )
            if axis == "refusal":
                for price, prefix in PRICES.items():
                    metrics[f"{prefix}front_area"], difference = hypervolume(curve, other, price)
                    if method != against:
                        metrics[f"{prefix}front_area_difference"] = difference
            if method == against:
                continue
            equal = compare_at_equal_safety(curve, other)
            metrics[f"cost_ratio_at_equal_{suffix}"] = equal.cost_ratio
            metrics[f"cost_difference_at_equal_{suffix}"] = equal.cost_difference
            metrics[f"over_refusal_difference_at_equal_{suffix}"] = equal.over_refusal_difference
        records.append(
            {
                "model": f"{setting} {method} "
                + ("front" if method == against else f"against {against}"),
                "setting": setting,
                "method": "comparison",
                "parameters": {"method": method, "against": against},
                "split": "test",
                "metrics": {name: to_json(interval) for name, interval in metrics.items()},
            }
        )
    return records


def _by_alpha(
    merges: Sequence[tuple[str, float | None, ModelScores]], method: str
) -> list[ModelScores]:
    own = [(alpha or 0.0, scores) for name, alpha, scores in merges if name == method]
    return [scores for _, scores in sorted(own, key=lambda item: item[0])]


def model_curve(
    scores: Sequence[ModelScores], tasks: Sequence[str], axis: str, clusters: RowClusters
) -> Curve:
    """Return the points of models; costs are above the first one's.

    Args:
        scores: of each model.
        tasks: names of the utility data sets.
        axis: what safety is: ``refusal``, or ``nll`` of the refusals.
        clusters: of the rows.
    """
    reference = scores[0]
    base = reference.array(tasks, "nll")
    if axis == "refusal":
        safety = [item.array(["attack"], "refusal") for item in scores]
    else:
        # The mean over attacks of minus the NLL per token: higher is safer.
        safety = [-_per_token(item, "attack") for item in scores]
    return Curve(
        safety=np.stack(safety),
        cost=np.stack([item.array(tasks, "nll") - base for item in scores]),
        cost_weight=reference.array(tasks, "tokens"),
        over_refusal=np.stack([item.array(["harmless"], "refusal") for item in scores]),
        safety_clusters=clusters.of(reference, ["attack"], axis),
        cost_clusters=clusters.of(reference, tasks, "nll"),
        over_refusal_clusters=clusters.of(reference, ["harmless"], "refusal"),
    )


def _per_token(scores: ModelScores, task: str) -> Array:
    return scores.array([task], "nll") / scores.array([task], "tokens")
