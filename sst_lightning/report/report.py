"""report.md and report.html, drawn from results.json alone."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import markdown
from torch.utils.tensorboard import SummaryWriter

from sst_lightning.algebra.files import write_text
from sst_lightning.report.base_differences import bases_text
from sst_lightning.report.figures import all_figures, merges_of, save_figure, settings_of, slug
from sst_lightning.report.records import Record
from sst_lightning.report.suite_summary import suites_table
from sst_lightning.report.tables import comparisons_table, inline, markdown_table, models_table

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;display:block;overflow-x:auto;font-size:13px}
td,th{border:1px solid #ccc;padding:3px 7px;text-align:left;white-space:nowrap}
img{max-width:100%}pre{background:#f5f5f5;padding:1em;overflow-x:auto}"""


def write_report(records: Sequence[Record], folder: Path, title: str) -> Path:
    """Write report.md, report.html (one self-contained file) and figures/*.png.

    Args:
        records: content of a results.json.
        folder: where the report goes.
        title: heading.

    Returns:
        Path of report.md.
    """
    images: dict[str, bytes] = {}
    for name, figure in all_figures(records).items():
        images[name] = save_figure(figure, folder / "figures" / f"{name}.png")
    text = _markdown(records, title, list(images))
    write_text(folder / "report.md", text)
    body = markdown.markdown(text, extensions=["tables", "fenced_code"])
    for name, data in images.items():
        source = "data:image/png;base64," + base64.b64encode(data).decode()
        body = body.replace(f"figures/{name}.png", source)
    page = (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}"
        f"</title><style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
    write_text(folder / "report.html", page)
    return folder / "report.md"


def log_figures(records: Sequence[Record], folder: Path) -> None:
    """Write the report's figures, and the metrics of each merge over α, to TensorBoard logs."""
    with SummaryWriter(str(folder)) as writer:
        for name, figure in all_figures(records).items():
            writer.add_figure(f"report/{name}", figure)
        for setting in settings_of(records):
            for method, items in merges_of(records, setting).items():
                for record in items:
                    step = round(1000 * (record["parameters"]["alpha"] or 0))
                    for name, entry in record["metrics"].items():
                        if entry["value"] is not None:
                            tag = f"{setting}/{method}/{name} (step = 1000 alpha)"
                            writer.add_scalar(tag, entry["value"], step)


def headline(record: Record) -> str:
    """One sentence on a comparison at equal safety, whatever it says."""
    metrics = record["metrics"]
    ratio, difference, over = (
        metrics[f"{name}_at_equal_refusal"]
        for name in ("cost_ratio", "cost_difference", "over_refusal_difference")
    )
    method, against = (record["parameters"][key] for key in ("method", "against"))
    if difference["value"] is None:
        return f"**{record['setting']}**: {method} against {against}: {difference['note']}."
    if ratio["value"] is None:
        cost = (
            f"the cost of {method} differs from that of {against} by {difference['value']:+.3f} "
            f"nats per token ({difference['low']:+.3f} to {difference['high']:+.3f}; ratio "
            f"{ratio['note']})"
        )
    else:
        cost = (
            f"{method} costs **{100 * ratio['value']:.0f} %** ({100 * ratio['low']:.0f} to "
            f"{100 * ratio['high']:.0f} %) of the utility (NLL) that {against} costs"
        )
    return (
        f"**{record['setting']}**: at equal refusal of attacks, {cost}; "
        f"over-refusal differs by {100 * over['value']:+.0f} points "
        f"({100 * over['low']:+.0f} to {100 * over['high']:+.0f})."
    )


def _markdown(records: Sequence[Record], title: str, figures: Sequence[str]) -> str:
    parts = [f"# {title}\n"]
    comparisons = [record for record in records if record["method"] == "comparison"]
    against = [r for r in comparisons if r["parameters"]["method"] != r["parameters"]["against"]]
    if against:
        parts.append("\n".join(f"- {headline(record)}" for record in against) + "\n")
        parts.append(
            "Costs are means over all refusal rates that both methods reach, interpolated between "
            "the values of α. All intervals are 95 %: Wilson for rates, bootstrap otherwise (paired "
            "between models). Rows that share a document, template or request count as one "
            "cluster.\n"
        )
    for setting in settings_of(records):
        parts.append(f"## {setting}\n")
        own_figures = {f"{slug(setting)}-{kind}" for kind in ("plane", "spectrum", "kept-energy")}
        parts += [f"![{name}](figures/{name}.png)\n" for name in figures if name in own_figures]
        own = [r for r in records if r["setting"] == setting]
        parts.append(models_table([r for r in own if r["method"] != "comparison"]))
        parts.append(bases_text([r for r in own if r["method"] != "comparison"]))
        parts.append(suites_table([r for r in own if r["method"] != "comparison"]))
        parts.append(comparisons_table([r for r in own if r["method"] == "comparison"]))
        parts += [_budget(record) for record in own if "budget" in record.get("provenance", {})]
        parts.append(_generations(own))
    parts.append(_provenance(records))
    return "\n".join(parts)


def budget_outcome(record: Record) -> str:
    """One sentence on a budgeted merge: what was allowed, and what the test split showed."""
    drop = record["metrics"]["utility_nll_increase_rate"]
    limit = record["provenance"]["budget"]["max_utility_drop"]
    return (
        f"{record['model']}: a utility drop of at most {100 * limit:g} % was allowed; the test split "
        f"shows {100 * drop['value']:+.2f} % ({100 * drop['low']:+.2f} to {100 * drop['high']:+.2f} %, "
        f"n = {drop['n']})"
    )


def _budget(record: Record) -> str:
    budget = record["provenance"]["budget"]
    rows = budget["rows"]
    lines = [
        f"**Budget.** {inline(budget_outcome(record))}. Tried on {rows['rows']} calibration rows "
        f"({rows['shared_with_fisher']} of them also a Fisher's):\n",
    ]
    trials = []
    for trial in budget["trials"]:
        drop, low, high = (f"{100 * trial[key]:+.2f}" for key in ("utility_drop", "low", "high"))
        verdict = "yes" if trial["affordable"] else "no"
        trials.append(
            [inline(trial["method"]), f"{trial['alpha']:.3g}", f"{drop} [{low}, {high}]", verdict]
        )
    columns = ["method", "α", "utility drop, %", "within the budget"]
    return "\n".join([*lines, markdown_table(columns, trials)]) + "\n"


def _generations(records: Sequence[Record]) -> str:
    """Answers of the utility model and of each method's largest merge, prompt by prompt."""
    chosen = [r for r in records if r["method"] in ("base", "adapter", "utility_merge")]
    setting = records[0]["setting"]
    chosen += [items[-1] for items in merges_of(records, setting).values()]
    prompts: dict[str, list[tuple[str, str]]] = {}
    for record in chosen:
        for quote in record.get("generations", []):
            prompts.setdefault(quote["prompt"], []).append((record["model"], quote["response"]))
    if not prompts:
        return ""
    lines = ["### Answers before and after\n"]
    for prompt, answers in prompts.items():
        lines.append(f"> {inline(prompt)}\n")
        rows = [[model, inline(answer)] for model, answer in answers]
        lines += [markdown_table(["model", "answer"], rows), ""]
    return "\n".join(lines)


def _provenance(records: Sequence[Record]) -> str:
    lines = ["## How this was made\n", "```json"]
    shared: dict[str, Any] = {}
    for record in records:
        for key in (
            "sst_merge",
            "python",
            "versions",
            "seed",
            "base_sha256",
            "merged_on",
            "evaluation",
        ):
            if key in record.get("provenance", {}):
                shared.setdefault(key, record["provenance"][key])
    merges = {
        record["model"]: {
            **record["parameters"],
            **{
                key: record["provenance"][key]
                for key in (
                    "adapter",
                    "adapter_sha256",
                    "input_sha256",
                    "calibration",
                    "discarded_energy",
                    "verification",
                )
                if key in record.get("provenance", {})
            },
        }
        for record in records
        if "alpha" in record["parameters"]
    }
    lines += [json.dumps({**shared, "merges": merges}, indent=1, ensure_ascii=False), "```\n"]
    return "\n".join(lines)
