"""Figures of a report, drawn from records alone."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.files import atomic_file
from sst_lightning.algebra.fronts import pareto_front
from sst_lightning.report.records import Record

# Okabe and Ito's palette: distinct for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
COLLAPSED = 0.5
MOST_NAMED = 8
"""Methods beyond which the figures at the points would be a blot."""
SINGLE = ("base", "adapter", "utility_merge")


def settings_of(records: Sequence[Record]) -> list[str]:
    """Names of the settings, in order of appearance."""
    return list(dict.fromkeys(record["setting"] for record in records))


def merges_of(records: Sequence[Record], setting: str) -> dict[str, list[Record]]:
    """Merge records of a setting by method, each sorted by α."""
    merges: dict[str, list[Record]] = {}
    for record in records:
        if record["setting"] == setting and "alpha" in record["parameters"]:
            merges.setdefault(record["method"], []).append(record)
    return {
        method: sorted(items, key=lambda record: record["parameters"]["alpha"] or 0)
        for method, items in merges.items()
    }


def slug(setting: str) -> str:
    """Name of a setting in file names."""
    return re.sub(r"[^A-Za-z0-9]+", "-", setting).strip("-").lower()


def save_figure(figure: Figure, path: Path) -> bytes:
    """Write a figure as PNG, atomically, and return the PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    with atomic_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def plane(records: Sequence[Record], setting: str) -> Figure:
    """Refusal of attacks against utility cost and against over-refusal, with the Pareto front.

    The cost's intervals are those of the paired difference from the utility model: intervals of
    each model's own NLL are many times wider and say nothing about the difference.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    singles = [r for r in records if r["setting"] == setting and r["method"] in SINGLE]
    merges = merges_of(records, setting)
    every = [record for items in merges.values() for record in items]
    paired = [r for r in every if _value(r, "utility_nll_increase") is not None]
    cost, start = ("utility_nll_increase", 0.0) if paired else ("utility_nll", None)
    if paired:
        # Σ(nll − reference) / Σ tokens = the merge's NLL minus the reference's.
        start = (_value(paired[0], "utility_nll") or 0) - (_value(paired[0], cost) or 0)
    labels = {
        "utility_nll_increase": "utility cost: NLL per token above the utility model's (nats)",
        "utility_nll": "utility NLL per token (nats; lower is better)",
        "over_refusal_rate": "over-refusal: harmless prompts refused",
    }
    for axis, metric in zip(axes, (cost, "over_refusal_rate"), strict=True):
        for index, (method, items) in enumerate(merges.items()):
            # Each turn of the colours starts at another marker.
            marker = MARKERS[(index + index // 7) % 7]
            _curve(
                axis, items, metric, COLOURS[index % 7], marker, method, len(merges) <= MOST_NAMED
            )
        _front(axis, every, metric)
        axis.set_xlabel(labels[metric])
        axis.grid(alpha=0.25)
        axis.margins(x=0.12)
        points = []
        for record in singles:
            x = _value(record, "utility_nll" if metric == cost else metric)
            y = _value(record, "attack_refusal_rate")
            if x is not None and y is not None:
                points.append((record["model"], x - start if metric == cost and start else x, y))
        _singles(axis, points, cut=metric == cost and bool(every))
    if paired and max(_value(r, cost) or 0.0 for r in paired) > COLLAPSED:
        # A collapsed merge, whole nats away, must not make one blot of all others.
        axes[0].set_xscale("symlog", linthresh=0.1, linscale=2)
        ticks = [0, 0.05, 0.1, 0.5, 1, 5, 10]
        axes[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes[0].minorticks_off()
        axes[0].set_xlim(left=min(-0.02, *(_value(r, cost) or 0.0 for r in paired)))
    axes[0].set_ylabel("attacks refused (test split)")
    axes[0].set_ylim(-0.06, 1.06)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4))
    figure.suptitle(f"{setting}: safety against utility and over-refusal (95 % intervals)")
    return figure


def spectrum(records: Sequence[Record], setting: str) -> Figure | None:
    """Generalised eigenvalues, in-sample and on held-out sequences; ``None`` if not recorded."""
    values = _first_diagnostic(records, setting, "spectrum")
    if values is None:
        return None
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for index, key in enumerate(("in_sample", "held_out")):
        series = values[key]
        label = key.replace("_", "-") + " sequences"
        axis.semilogy(
            range(1, len(series) + 1),
            series,
            MARKERS[index],
            color=COLOURS[index],
            label=label,
            markersize=4,
            linestyle="-",
        )
    axis.axhline(1, color="grey", linewidth=0.8)
    axis.set_xlabel("direction (sorted by in-sample λ)")
    axis.set_ylabel("λ: safety over utility curvature")
    axis.set_title(f"{setting}: GEVP spectrum, geometric mean over modules")
    axis.legend()
    axis.grid(alpha=0.25)
    return figure


def kept_energy(records: Sequence[Record], setting: str) -> Figure | None:
    """Share of the safety adapter's energy kept, layer by module; ``None`` if not recorded."""
    figure = None
    shown: dict[str, dict[str, float]] = {}
    for method, items in merges_of(records, setting).items():
        energy = items[0].get("diagnostics", {}).get("kept_energy")
        if energy and method != "task_arithmetic":
            shown[method] = energy
    if not shown:
        return None
    figure = Figure(figsize=(1.5 + 4.4 * len(shown), 5.4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    image = None
    for axis, (method, energy) in zip(axes, shown.items(), strict=True):
        layers, modules, grid = _grid(energy)
        image = axis.imshow(
            grid,
            aspect="auto",
            vmin=0,
            vmax=max(1.0, np.nanmax(grid)),
            cmap="viridis",
            origin="lower",
        )
        axis.set_xticks(range(len(modules)), modules, rotation=45, ha="right")
        axis.set_yticks(range(0, len(layers), max(1, len(layers) // 10)))
        axis.set_yticklabels([layers[i] for i in axis.get_yticks()])
        axis.set_title(method)
    axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(axes), label="share of the safety adapter's δᵀF_s δ")  # type: ignore[arg-type]
    figure.suptitle(f"{setting}: kept safety energy")
    return figure


def all_figures(records: Sequence[Record]) -> dict[str, Figure]:
    """Return every figure of a report by file name without suffix."""
    figures: dict[str, Figure] = {}
    for setting in settings_of(records):
        if not merges_of(records, setting):
            continue
        prefix = slug(setting)
        if f"{prefix}-plane" in figures:
            raise SSTMergeError(f"settings '{setting}' and another have the same file names")
        figures[f"{prefix}-plane"] = plane(records, setting)
        for name, draw in (("spectrum", spectrum), ("kept-energy", kept_energy)):
            figure = draw(records, setting)
            if figure is not None:
                figures[f"{prefix}-{name}"] = figure
    return figures


def _value(record: Record, metric: str) -> float | None:
    entry = record["metrics"].get(metric)
    return None if entry is None else entry["value"]


def _error(entries: Sequence[dict[str, Any]]) -> np.ndarray:
    below = [max(0.0, e["value"] - e["low"]) for e in entries]
    above = [max(0.0, e["high"] - e["value"]) for e in entries]
    return np.array([below, above])


def _curve(
    axis: Axes,
    items: Sequence[Record],
    metric: str,
    colour: str,
    marker: str,
    label: str,
    named: bool,
) -> None:
    items = [r for r in items if _value(r, metric) is not None]
    points = [(r["metrics"][metric], r["metrics"]["attack_refusal_rate"]) for r in items]
    x, y = [a["value"] for a, _ in points], [b["value"] for _, b in points]
    axis.errorbar(
        x,
        y,
        xerr=_error([a for a, _ in points]),
        yerr=_error([b for _, b in points]),
        color=colour,
        marker=marker,
        label=label,
        linewidth=1.5,
        elinewidth=0.5,
        capsize=2,
        alpha=0.9,
    )
    for record, a, b in zip(items, x, y, strict=True) if named else ():
        alpha = record["parameters"]["alpha"]
        axis.annotate(
            "" if alpha is None else f"{alpha:g}",
            (a, b),
            textcoords="offset points",
            xytext=(5, -10),
            fontsize=8,
            color=colour,
        )


def _singles(axis: Axes, points: Sequence[tuple[str, float, float]], cut: bool) -> None:
    """Mark models that are no merge; with ``cut`` those right of all merges only at the edge.

    Base and safety adapter can be so far away that the merges would be one blot.
    """
    low, high = axis.get_xlim()
    limit = high if cut else np.inf
    inside = [point for point in points if point[1] <= limit]
    if inside:
        low = min(low, min(x for _, x, _ in inside) - 0.08 * (high - low))
        high = max(high, max(x for _, x, _ in inside) + 0.04 * (high - low))
    axis.set_xlim(low, high)
    groups: list[list[tuple[str, float, float]]] = []
    for point in inside:
        axis.plot(
            point[1], point[2], marker="*", markersize=11, color="grey", mec="black", linestyle=""
        )
        # Models without safety lie on top of each other: one label for those.
        for group in groups:
            near = abs(group[0][1] - point[1]) < 0.08 * (high - low)
            if near and abs(group[0][2] - point[2]) < 0.06:
                group.append(point)
                break
        else:
            groups.append([point])
    for group in groups:
        x, y = min(p[1] for p in group), min(p[2] for p in group)
        right = x > (low + high) / 2
        axis.annotate(
            ", ".join(name for name, _, _ in group),
            (x, y),
            textcoords="offset points",
            xytext=(6 if right else -6, -15),
            ha="right" if right else "left",
            fontsize=9,
            zorder=5,
        )
    height = -np.inf
    for name, x, y in sorted((p for p in points if p[1] > limit), key=lambda p: p[2]):
        # Above the label below it, where both are at the same height.
        height = max(y, height + 0.06)
        axis.annotate(
            f"{name} at {x:.2f} →",
            (high, height),
            textcoords="offset points",
            xytext=(-4, 0),
            ha="right",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        )


def _front(axis: Axes, records: Sequence[Record], metric: str) -> None:
    points = [(_value(r, metric), _value(r, "attack_refusal_rate")) for r in records]
    known = np.array([p for p in points if None not in p], dtype=np.float64)
    if len(known) < 2:
        return
    front = known[pareto_front(known[:, 0], known[:, 1])]
    front = front[np.argsort(front[:, 0])]
    axis.step(
        front[:, 0],
        front[:, 1],
        where="post",
        color="grey",
        linestyle=":",
        linewidth=1.5,
        label="Pareto front",
    )


def _first_diagnostic(records: Sequence[Record], setting: str, name: str) -> Any:
    for record in records:
        if record["setting"] == setting and name in record.get("diagnostics", {}):
            return record["diagnostics"][name]
    return None


def _grid(energy: dict[str, float]) -> tuple[list[str], list[str], np.ndarray]:
    """Arrange ``model.layers.<layer>.….<module>`` values as (layers, modules)."""
    cells: dict[tuple[str, str], float] = {}
    for name, value in energy.items():
        match = re.search(r"\.(\d+)\.", name)
        cells[(match[1] if match else "-", name.rpartition(".")[2])] = value
    layers = sorted(
        {layer for layer, _ in cells}, key=lambda layer: (not layer.isdigit(), layer.zfill(4))
    )
    modules = list(dict.fromkeys(module for _, module in cells))
    grid = np.array([[cells.get((la, mo), np.nan) for mo in modules] for la in layers])
    return layers, modules, grid
