"""Tables of a report, in Markdown."""

import html
import re
from collections.abc import Sequence
from typing import Any

from sst_lightning.report.records import Record

COLUMNS = (
    ("utility_nll", "utility NLL", 3),
    ("utility_nll_increase", "NLL cost", 3),
    ("utility_rouge_l", "ROUGE-L", 2),
    ("utility_contains", "contains", 2),
    ("attack_refusal_rate", "refuses attacks", 2),
    ("attack_refusal_nll", "refusal NLL", 2),
    ("over_refusal_rate", "over-refusal", 2),
    ("degenerate_rate", "degenerate", 2),
    ("front_probability", "on the front", 2),
    ("safety_tax", "safety tax", 2),
    ("safety_tax_absolute", "absolute tax", 2),
    ("utility_drop_rate", "utility drop rate", 2),
    ("safety_gain_rate", "safety gain rate", 2),
    ("alignment_drift", "alignment drift", 2),
)
DIFFERENCES = {
    "attack_refusal_rate": "attack_refusal_gain",
    "over_refusal_rate": "over_refusal_increase",
}
"""Rates that are marked where they differ from the utility model's, by the metric that says so."""
MARK, LEVEL = "†", 0.05
COMPARED = (
    ("front_area", "front area", 2),
    ("front_area_difference", "difference in area", 2),
    ("over_refusal_front_area", "over-refusal front area", 2),
    ("over_refusal_front_area_difference", "difference in over-refusal area", 2),
    ("cost_ratio_at_equal_refusal", "cost ratio", 2),
    ("cost_difference_at_equal_refusal", "cost difference (nats)", 3),
    ("over_refusal_difference_at_equal_refusal", "over-refusal difference", 2),
)


def models_table(records: Sequence[Record]) -> str:
    """Models of one setting with their figures, and what the marks mean."""
    used = [c for c in COLUMNS if any(c[0] in r["metrics"] for r in records)]
    rows = [
        [
            inline(record["model"]),
            *(
                format_entry(record["metrics"].get(name), digits) + _mark(record["metrics"], name)
                for name, _, digits in used
            ),
        ]
        for record in records
    ]
    counts = sorted({e["n"] for r in records for e in r["metrics"].values()})
    legend = f"Examples per figure: {counts[0]} to {counts[-1]} (n in results.json)."
    if any("p_holm" in entry for r in records for entry in r["metrics"].values()):
        legend += (
            f" {MARK}: differs from the utility model on the same prompts (exact McNemar test, sign "
            "flips of whole clusters where prompts share a request; "
            f"{corrected_level(records)})."
        )
    if any("front_probability" in r["metrics"] for r in records):
        legend += (
            " *On the front*: share of resamples in which no other merge, nor the utility model, is at "
            "least as good in refused attacks, utility NLL and over-refusal and better in one of "
            "them; its interval is the Monte-Carlo error of the share."
        )
    return markdown_table(["model", *(label for _, label, _ in used)], rows) + f"\n\n{legend}\n"


def corrected_level(records: Sequence[Record]) -> str:
    """Say over which tests p-values were corrected."""
    tests = sum("p_holm" in entry for r in records for entry in r["metrics"].values())
    return (
        f"p < {LEVEL} after Holm's correction over all {tests} tests of the setting: each merge's "
        f"attacks, harmless prompts and suites (`plan-eval --comparisons {tests}`)"
    )


def _mark(metrics: dict[str, Any], name: str) -> str:
    p = metrics.get(DIFFERENCES.get(name, ""), {}).get("p_holm")
    return f" {MARK}" if p is not None and p < LEVEL else ""


def comparisons_table(records: Sequence[Record]) -> str:
    """Methods side by side, by the area under their fronts."""
    if not records:
        return ""
    areas = {r["model"]: r["metrics"].get("front_area", {}).get("value") for r in records}
    records = sorted(records, key=lambda r: -(areas[r["model"]] or 0.0))
    against = records[0]["parameters"]["against"]
    rows = [
        [
            inline(record["parameters"]["method"]),
            *(format_entry(record["metrics"].get(name), digits) for name, _, digits in COMPARED),
        ]
        for record in records
    ]
    table = markdown_table(["method", *(label for _, label, _ in COMPARED)], rows)
    return f"Methods against {against}:\n\n{table}" + (
        "\n\n*Front area*: area under the front of refused attacks over utility cost, above the "
        f"utility model's own refusal rate, up to the cost at which {against} first reaches its "
        "highest refusal rate; *over-refusal front area*: the same over refused harmless prompts. 1 "
        "is safety for nothing. Cost ratio and the columns after it are at equal refusal of attacks.\n"
    )


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [columns, *rows]
    cells = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([cells[0], "|---" * len(columns) + "|", *cells[1:]])


def format_entry(entry: dict[str, Any] | None, digits: int) -> str:
    """Return ``value [low, high]``, or why there is none."""
    if entry is None:
        return "–"
    if entry["value"] is None:
        return str(entry["note"])
    value, low, high = (f"{entry[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def inline(text: str) -> str:
    """Generated text as it is: neither HTML nor Markdown (an image would be fetched) in it works."""
    escaped = html.escape(" ".join(text.split()))
    return re.sub(r"[|*`\[\]!_~\\]", lambda m: f"&#{ord(m[0])};", escaped) or "(empty)"
