"""From the examples of suites to the figures of a record, and to a table of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sst_lightning.algebra.groups import macro_mean
from sst_lightning.algebra.statistics import Array, Interval
from sst_lightning.data.rows import Kind
from sst_lightning.metrics.examples import Example
from sst_lightning.metrics.judge_errors import RULE_ERRORS, TRAINED_ERRORS, corrected_share
from sst_lightning.metrics.judges import Judge
from sst_lightning.metrics.refusal_judge import rules_fingerprint
from sst_lightning.report.entries import SUMMED, tested_difference, value_interval
from sst_lightning.report.records import Record
from sst_lightning.report.tables import (
    LEVEL,
    MARK,
    corrected_level,
    format_entry,
    inline,
    markdown_table,
)
from sst_lightning.suites.datamodule import SuiteTask

JUDGED = {"refusal": RULE_ERRORS, "trained_refusal": TRAINED_ERRORS}
"""Verdicts of judges whose errors were measured, and the file of the errors."""
GROUP_SIZE = 5
"""Groups are reported where they have this many examples on average."""
SUITES_FIGURE = "figures/suites.png"
FRACTION_DIGITS = 3


@dataclass(frozen=True)
class SuiteFacts:
    """What a report needs to know of a suite.

    Attributes:
        kind: what it says about a model.
        primary: the metric that stands for it.
        judges: metric to the fingerprint of the judge that gives it, beside the rules.
    """

    kind: Kind
    primary: str
    judges: Mapping[str, str] = field(default_factory=dict)


def suite_facts(tasks: Sequence[Any], judges: Sequence[Judge] = ()) -> dict[str, SuiteFacts]:
    """Return the facts of the suites among evaluation tasks, by name.

    Args:
        tasks: of the evaluation.
        judges: that scored the answers, beside the rules.
    """
    fingerprints = {f"{judge.name}_refusal": judge.fingerprint() for judge in judges}
    return {
        task.task: SuiteFacts(task.kind, task.suite.primary, fingerprints)
        for task in tasks
        if isinstance(task, SuiteTask)
    }


def suite_metrics(
    examples: Mapping[str, Sequence[Example]], facts: Mapping[str, SuiteFacts]
) -> dict[str, Interval]:
    """Return every figure of every suite of one model.

    ``<suite>/<metric>`` is over all examples (micro), ``<suite>/<metric>_macro`` the mean over
    groups and ``<suite>/<metric>/<group>`` each group, both of the primary metric alone and where
    groups are no handfuls. Beside the
    rate of a judge whose errors were measured, ``<suite>/<metric>_corrected`` is the rate corrected
    for them.

    Args:
        examples: of each suite.
        facts: of each suite.
    """
    metrics: dict[str, Interval] = {}
    for suite, own in examples.items():
        for name in _metric_names(own):
            metrics[f"{suite}/{name}"] = _interval(own, name)
            if name in JUDGED:
                judged = [example for example in own if name in example.scores]
                judges = {"refusal": rules_fingerprint(), **facts[suite].judges}
                metrics[f"{suite}/{name}_corrected"] = corrected_share(
                    np.array([example.scores[name] for example in judged]),
                    _clusters(judged),
                    JUDGED[name],
                    judges.get(name, ""),
                )
        primary = facts[suite].primary
        groups = sorted({example.group for example in own})
        scored = [example for example in own if primary in example.scores]
        if len(groups) < 2 or primary in SUMMED or len(scored) < GROUP_SIZE * len(groups):
            continue
        metrics[f"{suite}/{primary}_macro"] = macro_mean(
            np.array([example.scores[primary] for example in scored]),
            [example.group for example in scored],
            _clusters(scored),
        )
        for group in groups:
            part = [example for example in scored if example.group == group]
            metrics[f"{suite}/{primary}/{group or 'other'}"] = _interval(part, primary)
    return metrics


def add_suite_differences(
    models: Sequence[tuple[Record, Mapping[str, Sequence[Example]]]],
    reference: Mapping[str, Sequence[Example]],
    facts: Mapping[str, SuiteFacts],
) -> None:
    """Add to each record how its model differs from the reference on every suite.

    ``<suite>/<primary>_difference`` has the paired interval and the p-value of the paired test.

    Args:
        models: record of each model, changed in place, and its examples by suite.
        reference: examples by suite of the reference.
        facts: of each suite.
    """
    for record, examples in models:
        for suite, before in reference.items():
            name = facts[suite].primary
            scores, other, sizes, clusters = _paired(examples[suite], before, name)
            entry = tested_difference(scores, other, sizes, clusters)
            record["metrics"][f"{suite}/{name}_difference"] = entry


def suite_report(records: Sequence[Record], title: str) -> str:
    """Return the figures of suites as Markdown: all metrics, then the groups of primary metrics."""
    parts = [f"# {title}\n", f"![suites]({SUITES_FIGURE})\n"]
    for record in records:
        metrics = record["metrics"]
        whole = {name: entry for name, entry in metrics.items() if name.count("/") == 1}
        groups = {name: entry for name, entry in metrics.items() if name.count("/") > 1}
        parts.append(f"## {record['model']}\n")
        parts.append(_table(("suite", "metric"), whole))
        if groups:
            parts.append("### Groups\n")
            parts.append(_table(("suite", "metric", "group"), groups))
    parts.append(
        "Figures with their 95 % interval: Wilson's for proportions (of the effective size where items "
        "share a document or a base prompt), the bootstrap otherwise, over whole clusters. `_macro` is "
        "the mean over groups, `_corrected` a rate corrected for the judge's measured errors.\n"
    )
    return "\n".join(parts)


def suites_table(records: Sequence[Record]) -> str:
    """Return models against suites as Markdown, each suite by its primary metric; "" without suites.

    A dagger marks a difference from the utility model with a corrected p-value below .05.
    """
    primary: dict[str, str] = {}
    for record in records:
        settings = record.get("provenance", {}).get("evaluation", {}).get("suites", {})
        primary |= {suite: facts["primary"] for suite, facts in settings.items()}
    if not primary:
        return ""
    rows = []
    for record in records:
        cells = [inline(record["model"])]
        for suite, name in primary.items():
            entry = record["metrics"].get(f"{suite}/{name}")
            difference = record["metrics"].get(f"{suite}/{name}_difference", {})
            mark = MARK if difference.get("p_holm", 1) < LEVEL else ""
            cells.append(format_entry(entry, FRACTION_DIGITS) + mark)
        rows.append(cells)
    columns = ["model", *(f"{suite} {name}" for suite, name in primary.items())]
    return markdown_table(columns, rows) + (
        f"\n\n{MARK} differs from the utility model on the same items: McNemar or sign-flip test, "
        f"{corrected_level(records)}.\n"
    )


def _metric_names(examples: Sequence[Example]) -> list[str]:
    names = dict.fromkeys(name for example in examples for name in example.scores)
    return [name for name in names if name not in SUMMED.values()]


def _interval(examples: Sequence[Example], name: str) -> Interval:
    scored = [example for example in examples if name in example.scores]
    scores = np.array([example.scores[name] for example in scored])
    return value_interval(scores, _sizes(scored, name), _clusters(scored))


def _paired(
    examples: Sequence[Example], reference: Sequence[Example], name: str
) -> tuple[Array, Array, Array | None, list[str]]:
    """Scores on the common items, the reference's, denominators of a ratio of sums, and clusters."""
    before = {example.id: example for example in reference}
    common = [example for example in examples if name in example.scores and example.id in before]
    scores = np.array([example.scores[name] for example in common])
    other = np.array([before[example.id].scores[name] for example in common])
    return scores, other, _sizes(common, name), _clusters(common)


def _sizes(examples: Sequence[Example], name: str) -> Array | None:
    """Denominators of a ratio of sums."""
    if name not in SUMMED:
        return None
    return np.array([example.scores[SUMMED[name]] for example in examples])


def _clusters(examples: Sequence[Example]) -> list[str]:
    return [example.cluster for example in examples]


def _table(columns: Sequence[str], metrics: Mapping[str, dict[str, Any]]) -> str:
    rows = []
    for name, entry in metrics.items():
        # A group may have slashes of its own, and is the data's text.
        suite, metric, *group = name.split("/", 2)
        cells = [suite, metric, *map(inline, group)]
        rows.append([*cells, format_entry(entry, FRACTION_DIGITS), str(entry["n"])])
    return markdown_table([*columns, "value [95 %]", "n"], rows) + "\n"
