"""Predicted against measured peak memory of fit, validate, merge and test, on the CPU.

    python benchmarks/plan_vs_measured.py --folder /tmp/plan

Each run is a process of its own, and so is each prediction, which is made before anything has run.
Measured is the peak of resident memory (``measured_run.py``). It includes Python and its libraries,
and so does the prediction, as its term "program"; "net" is without it. Ratios are predicted /
measured. The last line is one JSON object.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MIB = 1 << 20
CONFIGS = Path(__file__).parents[1] / "configs"
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def write_data(folder: Path, rows: int) -> None:
    """Write rows whose answers are longer than any max_length that is used here."""
    words = "one two three four five six seven eight nine ten "
    answer = words * 60
    alpaca = [{"instruction": f"count, {n}", "output": answer} for n in range(rows)]
    attacks = [
        {"prompt": f"attack {n}", "response": answer, "family": f"f{n % 5}"} for n in range(rows)
    ]
    harmless = [{"prompt": f"harmless {n}", "response": answer} for n in range(rows)]
    for name, content in (("alpaca", alpaca), ("attacks", attacks), ("harmless", harmless)):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def alpaca(folder: Path, tokens: int) -> dict[str, Any]:
    """Return the data section of the instruction rows."""
    arguments = {"source": "local", "path": str(folder / "alpaca.jsonl"), "max_length": tokens}
    return {"class_path": "sst_lightning.data.Alpaca", "init_args": arguments}


def both(folder: Path, tokens: int, samples: int) -> list[str]:
    """Return the arguments of the data of validate, merge and test."""
    safety = {
        "class_path": "sst_lightning.data.Security",
        "init_args": {
            "source": "local",
            "path": str(folder / "attacks.jsonl"),
            "harmless_path": str(folder / "harmless.jsonl"),
            "max_length": tokens,
        },
    }
    return [
        "--data.utility=" + json.dumps({"a6": alpaca(folder, tokens)}),
        "--data.safety=" + json.dumps(safety),
        *(f"--data.{n}_samples={samples}" for n in ("calibration", "test", "generation")),
        *(f"--data.{n}_samples={samples}" for n in ("attack", "harmless")),
    ]


def runs(folder: Path, base: str, options: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command line of each run."""
    tokens, samples = options.tokens, options.samples
    fit_data = alpaca(folder, tokens)["init_args"]
    data = both(folder, tokens, samples)
    inputs = [
        f'--model.utility=["{folder}/utility/adapter"]',
        f"--model.safety={folder}/safety/adapter",
    ]

    def fit(name: str, *more: str) -> list[str]:
        callbacks = [
            {
                "class_path": "callbacks.AdapterExport",
                "init_args": {"path": f"{folder}/{name}/adapter"},
            },
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": f"{folder}/{name}/checkpoints", "save_last": True},
            },
        ]
        return [
            "fit",
            f"--config={CONFIGS / 'a6_alpaca.yaml'}",
            *(f"--data.{key}={value}" for key, value in fit_data.items()),
            f"--data.max_samples={2 * options.batch_size}",
            f"--data.calibration_samples={options.batch_size}",
            f"--data.batch_size={options.batch_size}",
            "--trainer.max_epochs=1",
            "--trainer.accumulate_grad_batches=2",
            "--trainer.logger=false",
            "--trainer.callbacks=" + json.dumps(callbacks),
            f"--model.base={base}",
            f"--model.r={options.rank}",
            *QUIET,
            *more,
        ]

    def collector(estimator: str) -> dict[str, Any]:
        arguments = {"output": f"{folder}/fisher-{estimator}", "estimator": estimator}
        return {"class_path": "callbacks.FisherCollector", "init_args": arguments}

    common = [f"--model.base={base}", *data, *QUIET]
    batches = [f"--data.batch_size={options.batch_size}"]
    answers = [f"--data.generation_batch_size={options.batch_size}"]
    return {
        "fit": fit("utility"),
        "fit, other seed": fit("safety", "--seed_everything=1", "--model.learning_rate=0.001"),
        "fit, gradient checkpointing": fit("ckpt", "--model.gradient_checkpointing=true"),
        "fit, sdpa, fp32": fit("sdpa", "--model.attention=sdpa", "--model.dtype=float32"),
        "fit, nf4": fit("nf4", "--model.quantization=nf4", "--model.dtype=float32"),
        "validate": [
            *("validate", f"--config={CONFIGS / 'fisher_a6_a7.yaml'}", *common, *inputs, *batches),
            "--trainer.callbacks=" + json.dumps([collector("exact")]),
        ],
        "validate, kfac": [
            *("validate", f"--config={CONFIGS / 'fisher_a6_a7.yaml'}", *common, *inputs, *batches),
            "--trainer.callbacks=" + json.dumps([collector("kfac")]),
        ],
        "merge": [
            *("merge", f"--config={CONFIGS / 'merge_a6_a7.yaml'}", *common, *inputs, *batches),
            *(*answers, f"--output={folder}/merge"),
        ],
        "merge, Fishers read, not evaluated": [
            *("merge", f"--config={CONFIGS / 'merge_a6_a7.yaml'}", *common, *inputs, *batches),
            *(f"--fisher={folder}/fisher-exact", "--evaluate=false", f"--output={folder}/merge2"),
        ],
        "test": [
            *("test", f"--config={CONFIGS / 'test.yaml'}", *common, *batches, *answers),
            f"--model.adapter={folder}/utility/adapter",
        ],
    }


def measure(arguments: list[str]) -> dict[str, float]:
    """Run a command in a new process; return what ``measured_run.py`` says of it."""
    output = python([str(Path(__file__).with_name("measured_run.py")), *arguments])
    figures: dict[str, float] = json.loads(output.splitlines()[-1])
    return figures


def predict(arguments: list[str]) -> dict[str, Any]:
    """Plan a command in a new process."""
    stage, config, *changes = arguments
    own = [change for change in changes if change.startswith("--rank=")]
    values = [change.removeprefix("--") for change in changes if change not in own]
    output = python(
        [
            *("-m", "sst_lightning", "plan", "--json", f"--stage={stage}", config, *own),
            *("--set", *values),
        ]
    )
    record: dict[str, Any] = json.loads(output[output.index("[") :])[0]
    return record


def python(arguments: list[str]) -> str:
    """Run Python and return what it printed.

    Raises:
        SystemExit: it failed.
    """
    process = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if process.returncode:
        raise SystemExit(f"{arguments[:4]} failed:\n{process.stderr[-3000:]}")
    return process.stdout


def main() -> None:
    """Predict and measure every run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True, help="empty folder for data and outputs")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=256, help="max_length; all rows are longer")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--only", nargs="+", help="runs, by name")
    options = parser.parse_args()
    folder = Path(options.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, 200)
    results = {}
    print("| run | predicted MiB | measured MiB | ratio | net ratio | largest term |")
    print("|---|---|---|---|---|---|")
    for name, arguments in runs(folder, options.base, options).items():
        if options.only and name not in options.only:
            continue
        record = predict(arguments)
        measured = measure(arguments)["peak"]
        program = next(
            term["size"]
            for term in record["phases"][0]["terms"]
            if term["name"].startswith("program")
        )
        predicted = record["memory"]
        ratio = predicted / measured
        net = (predicted - program) / (measured - program)
        results[name] = {
            "predicted": predicted,
            "measured": measured,
            "program": program,
            "ratio": ratio,
            "net_ratio": net,
            "phase": record["peak_phase"],
        }
        print(
            f"| {name} | {predicted / MIB:.0f} | {measured / MIB:.0f} | {ratio:.3f} | {net:.3f} "
            f"| {record['largest_term']['name']} in {record['peak_phase']} |",
            flush=True,
        )
    worst = max(abs(result["ratio"] - 1) for result in results.values())
    print(json.dumps({"within_15_percent": worst <= 0.15, "worst": worst, "runs": results}))


if __name__ == "__main__":
    main()
