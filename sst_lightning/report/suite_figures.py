"""Figure of the suites of one model."""

from matplotlib.figure import Figure

from sst_lightning.report.entries import SUMMED
from sst_lightning.report.figures import COLOURS, MARKERS
from sst_lightning.report.records import Record

KINDS = {
    "attack": "attacks: higher is safer",
    "harmless": "harmless prompts: lower is better",
    "utility": "utility: higher is better",
}


def suites_figure(record: Record) -> Figure:
    """Primary metric of each suite with its interval, one colour for what it says about a model.

    Metrics without upper bound (NLL) are left to the table.

    Args:
        record: of a model with suites.
    """
    suites = record["provenance"]["evaluation"]["suites"]
    shown = {name: facts for name, facts in suites.items() if facts["primary"] not in SUMMED}
    rows = [
        (name, facts) for kind in KINDS for name, facts in shown.items() if facts["kind"] == kind
    ]
    figure = Figure(figsize=(8, 1.4 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (kind, label) in enumerate(KINDS.items()):
        own = [
            (row, record["metrics"][f"{name}/{facts['primary']}"])
            for row, (name, facts) in enumerate(rows)
            if facts["kind"] == kind
        ]
        own = [(row, entry) for row, entry in own if entry["value"] is not None]
        if not own:
            continue
        values = [entry["value"] for _, entry in own]
        axes.errorbar(
            values,
            [row for row, _ in own],
            xerr=[
                [entry["value"] - entry["low"] for _, entry in own],
                [entry["high"] - entry["value"] for _, entry in own],
            ],
            fmt=MARKERS[place],
            color=COLOURS[place],
            capsize=3,
            label=label,
        )
    axes.set_yticks(
        range(len(rows)),
        [
            f"{name} {facts['primary']} (n = {record['metrics'][name + '/' + facts['primary']]['n']})"
            for name, facts in rows
        ],
    )
    axes.set_xlim(-0.02, 1.02)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(f"{record['model']}, 95 % intervals")
    figure.legend(loc="outside upper center", ncols=len(KINDS), frameon=False)
    return figure
