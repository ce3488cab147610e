"""Paired comparisons as a table, as JSON and as a forest plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sst_lightning.algebra.files import refuse_overwrite, write_text
from sst_lightning.algebra.statistics import CONFIDENCE
from sst_lightning.report.entries import SUMMED
from sst_lightning.report.figures import COLOURS, MARKERS, save_figure
from sst_lightning.report.paired import PairedComparison
from sst_lightning.report.tables import LEVEL, MARK, format_entry, inline, markdown_table

FILES = ("paired.json", "paired.md", "paired.png")
COLUMNS = (
    *("suite", "metric", "model", "n", "reference", "value", "difference"),
    *("higher / lower", "p", "p (Holm)"),
)
DIGITS = 3
DESCRIPTIVE = "descriptive"


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse to replace a comparison, before any work.

    Raises:
        OutputExistsError: one of its files is in ``folder`` and ``overwrite`` is false.
    """
    for name in FILES:
        refuse_overwrite(folder / name, overwrite)


def write_paired(comparisons: Sequence[PairedComparison], reference: str, folder: Path) -> None:
    """Write paired.json, paired.md and paired.png to ``folder``, each atomically.

    Args:
        comparisons: of all models.
        reference: folder of the model they are compared with.
        folder: is made where it does not exist.
    """
    content = {
        "reference": reference,
        "confidence": CONFIDENCE,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    save_figure(forest(comparisons, reference), folder / "paired.png")
    text = paired_table(comparisons, reference)
    write_text(folder / "paired.md", f"# Models against {inline(reference)}\n\n{text}")
    write_text(
        folder / "paired.json",
        json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )


def paired_table(comparisons: Sequence[PairedComparison], reference: str) -> str:
    """Return the comparisons as a Markdown table with its legend."""
    rows = []
    for c in comparisons:
        figures = [
            format_entry(asdict(interval), DIGITS)
            for interval in (c.reference, c.value, c.difference)
        ]
        mark = f" {MARK}" if is_significant(c) else ""
        cells = [
            *(inline(text) for text in (c.task, c.metric, c.model)),
            str(c.difference.n),
            *figures[:2],
            figures[2] + mark,
            f"{c.higher} / {c.lower}",
            f"{c.test.p:.2g}",
            DESCRIPTIVE if c.p_holm is None else f"{c.p_holm:.2g}",
        ]
        rows.append(cells)
    tests = {c.test.test for c in comparisons}
    meanings = {
        "McNemar": "exact McNemar test for scores of 0 and 1",
        "sign flips": "sign-flip permutation test for other scores",
        "sign flips by cluster": "sign flips of whole clusters where items share a base prompt or "
        "document",
    }
    used = "; ".join(meaning for name, meaning in meanings.items() if name in tests)
    notes = [(c.task, c.difference.note) for c in comparisons if c.difference.note]
    tested = [c for c in comparisons if c.p_holm is not None]
    number = f"{len(tested)} test{'s' if len(tested) != 1 else ''}"
    names = ", ".join(dict.fromkeys(f"{inline(c.task)} {inline(c.metric)}" for c in tested))
    legend = (
        f"Reference: {inline(reference)}. Intervals are 95 %: Wilson for proportions and Tango for "
        "their differences, of independent items, the bootstrap otherwise; that of a difference is "
        "paired by item, and holds 0 where p is above "
        f"{1 - CONFIDENCE:.2f}. *Higher / lower*: items on which the model, or the reference, scores "
        f"higher. p: {used}. {MARK}: p < {LEVEL} after Holm's correction over {number} of "
        f"{names} (`plan-eval --comparisons {len(tested)}`)."
    )
    if len(tested) < len(comparisons):
        legend += f" Other metrics are {DESCRIPTIVE}: their p is not corrected and decides nothing."
    if notes:
        parts = [f"{inline(task)}: {note}" for task, note in dict.fromkeys(notes)]
        legend += f" Intervals of differences made in other ways: {'; '.join(parts)}."
    return markdown_table(COLUMNS, rows) + f"\n\n{legend}\n"


def is_significant(comparison: PairedComparison) -> bool:
    """Whether the model differs from the reference after the correction."""
    return comparison.p_holm is not None and comparison.p_holm < LEVEL


def forest(comparisons: Sequence[PairedComparison], reference: str) -> Figure:
    """Differences with their intervals, one row for each suite and metric, one colour a model.

    Scores from 0 to 1 and negative log-likelihoods are in panels of their own. Filled points differ
    from the reference after Holm's correction.
    """
    panels = {
        "difference of scores from 0 to 1": [c for c in comparisons if c.metric not in SUMMED],
        "difference of NLL in nats (lower is better)": [
            c for c in comparisons if c.metric in SUMMED
        ],
    }
    panels = {label: own for label, own in panels.items() if own}
    models = list(dict.fromkeys(c.model for c in comparisons))
    rows = [len(dict.fromkeys((c.task, c.metric) for c in own)) for own in panels.values()]
    height = 1.5 + sum(rows) * (0.25 + 0.15 * len(models))
    figure = Figure(figsize=(8, max(3.0, height)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axis, (label, own) in zip(axes, panels.items(), strict=True):
        _panel(axis, own, models)
        axis.set_xlabel(label)
    handles: dict[str, Any] = {}
    for axis in axes:
        lines, names = axis.get_legend_handles_labels()
        handles = {**dict(zip(names, lines, strict=True)), **handles}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center")
    figure.suptitle(
        f"against {reference}, paired by item (95 % intervals; filled: p < {LEVEL} after Holm)"
    )
    return figure


def _panel(axis: Axes, comparisons: Sequence[PairedComparison], models: Sequence[str]) -> None:
    names = list(dict.fromkeys((c.task, c.metric) for c in comparisons))
    step = 0.7 / len(models)
    for index, model in enumerate(models):
        colour, marker = COLOURS[index % 7], MARKERS[(index + index // 7) % 7]
        label: str | None = model
        for c in comparisons:
            d = c.difference
            if c.model != model or d.value is None or d.low is None or d.high is None:
                continue
            axis.errorbar(
                d.value,
                names.index((c.task, c.metric)) + (index - (len(models) - 1) / 2) * step,
                xerr=[[d.value - d.low], [d.high - d.value]],
                color=colour,
                marker=marker,
                markerfacecolor=colour if is_significant(c) else "white",
                capsize=2,
                linestyle="",
                label=label,
            )
            label = None
    axis.axvline(0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(names)), [f"{task} · {metric}" for task, metric in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.25)
