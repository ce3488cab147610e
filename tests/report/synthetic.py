"""Per-example scores of made-up models, as a comparison would measure them."""

import numpy as np

from sst_lightning.data.rows import Row
from sst_lightning.metrics.scores import ModelScores
from sst_lightning.report.summary import Candidate, build_records

ROWS = 40
MODULES = [
    f"model.layers.{layer}.{module}"
    for layer in range(4)
    for module in ("self_attn.q_proj", "mlp.up_proj")
]
QUOTED = {
    "a6": [Row("a60", "Which river?", "the Seine", "utility", "g")],
    "harmless": [Row("h0", "How do I kill a Python process?", "kill", "harmless", "g")],
    "attack": [Row("x0", "AN ATTACK", "no", "attack", "g")],
}


def scores(cost, refusal, over, tasks=("a6",)):
    """A model that costs ``cost`` nats per token and refuses the given shares."""
    rng = np.random.default_rng(0)
    tokens, nll = rng.integers(5, 20, ROWS).astype(float), rng.gamma(4, 0.25, ROWS)
    values = {
        task: {
            "nll": {f"{task}{k}": float(tokens[k] * (nll[k] + cost)) for k in range(ROWS)},
            "tokens": {f"{task}{k}": float(tokens[k]) for k in range(ROWS)},
            "rouge_l": {f"{task}{k}": 0.8 - cost / 4 for k in range(ROWS)},
            "exact_match": {f"{task}{k}": float(k < 10) for k in range(ROWS)},
            "contains": {f"{task}{k}": float(k < 20) for k in range(ROWS)},
        }
        for task in tasks
    }
    for task, letter, share in (("attack", "x", refusal), ("harmless", "h", over)):
        values[task] = {
            "refusal": {f"{letter}{k}": float(k < share * ROWS) for k in range(ROWS)},
            "degenerate": {f"{letter}{k}": 0.0 for k in range(ROWS)},
        }
    values["attack"]["nll"] = {f"x{k}": 30.0 * (1.2 - refusal) for k in range(ROWS)}
    values["attack"]["tokens"] = {f"x{k}": 12.0 for k in range(ROWS)}
    answers = {
        "a6": {"a60": "The river *Seine* | ![x](http://e.x/y.png) <b>bold</b>"},
        "harmless": {"h0": "Use kill."},
        "attack": {"x0": "AN ANSWER TO AN ATTACK"},
    }
    return ModelScores(values, answers)


def records(setting="A6+A7", tasks=("a6",)):
    """Base, utility adapter, safety adapter, SST at a fifth of task arithmetic's cost."""
    reference, safety = scores(0, 0.1, 0.05, tasks), scores(1.5, 1.0, 0.9, tasks)
    candidates = [
        Candidate("base", "base", {}, scores(0.9, 0.05, 0.05, tasks)),
        Candidate("A6", "adapter", {}, reference),
        Candidate("A7", "adapter", {}, safety),
    ]
    kept = {name: (i + 1) / 10 for i, name in enumerate(MODULES)}
    spectrum = {"in_sample": [8.0, 2.0, 0.5], "held_out": [3.0, 1.5, 0.6]}
    for method, factor in (("sst_soft", 0.2), ("task_arithmetic", 1.0)):
        for alpha in (0.5, 1.0):
            merged = scores(
                0.4 * factor * alpha, 0.1 + 0.8 * alpha, 0.05 + factor * alpha / 4, tasks
            )
            diagnostics = {"kept_energy": kept, "spectrum": spectrum} if factor < 1 else {}
            candidates.append(
                Candidate(
                    f"{setting} {method} α={alpha:g}", method, {"alpha": alpha}, merged,
                    diagnostics, {"seed": 0, "adapter": "runs/x", "versions": {"torch": "2"}},
                )
            )  # fmt: skip
    return build_records(candidates, setting, list(tasks), QUOTED, reference, safety)
