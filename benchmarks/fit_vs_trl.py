"""Speed of ``fit`` against TRL's SFTTrainer: the same model, rows, adapter, optimizer and dtypes.

    python -m venv trl && trl/bin/pip install --constraint constraints.txt torch transformers peft trl
    python benchmarks/fit_vs_trl.py --trl_python trl/bin/python

Both sides train a LoRA adapter (fp32, rank 32, seven projections, the same initial weights) on a bf16
base for one epoch: completion-only loss, AdamW with gradient clipping and linear decay, no packing,
no gradient checkpointing, no autocast. Each run is a process of its own, and the sides take turns.
``fit`` is SupervisedLoRA under the Lightning Trainer with the loader of its data module. TRL runs

- ordinary: rows in random order, its default;
- grouped: its batches of similar lengths (``train_sampling_strategy="group_by_length"``);
- same batches: exactly the batches of ``fit``, in its order, so that losses can be compared;
- same batches, eager: likewise with eager attention in place of its default sdpa.

Tokens per second are tokens that are no padding, trained on after --warmup steps, by the clock; how
many there are is TRL's own count on its side. The last line is one JSON object: ``speedup`` is over
"ordinary", ``speedup_vs_best`` over the fastest row of TRL.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
LORA = {"r": 32, "lora_alpha": 64}
LEARNING_RATE, WEIGHT_DECAY, CLIP = 2e-4, 0.01, 1.0
ROWS = {
    "ordinary": {"train_sampling_strategy": "random", "attention": "sdpa"},
    "grouped": {"train_sampling_strategy": "group_by_length", "attention": "sdpa"},
    "same batches": {"train_sampling_strategy": "sequential", "attention": "sdpa"},
    "same batches, eager": {"train_sampling_strategy": "sequential", "attention": "eager"},
}
INSTALL = (
    "TRL is not there: make a virtual environment of its own\n"
    "    python -m venv trl\n"
    "    trl/bin/pip install --constraint constraints.txt torch transformers peft trl\n"
    "and give --trl_python trl/bin/python"
)


def write_inputs(folder: Path, options: argparse.Namespace) -> None:
    """Write the rows in the order in which ``fit`` takes them, and where the model is."""
    from sst_lightning.data.tokenization import IGNORED
    from sst_lightning.modules.backbone import resolve
    from sst_lightning.modules.lora import SEVEN_PROJECTIONS

    module = data_module(options)
    module.setup("fit")
    loader = module.train_dataloader()
    batches = [loader.dataset[indices] for indices in loader.sampler]
    inputs = {
        "base": str(resolve(options.model)),
        "target_modules": list(SEVEN_PROJECTIONS),
        "batch_size": options.batch_size,
        "rows": [
            {
                "input_ids": item.input_ids,
                "completion_mask": [int(label != IGNORED) for label in item.labels],
            }
            for batch in batches
            for item in batch
        ],
    }
    (folder / "inputs.json").write_text(json.dumps(inputs), encoding="utf-8")


def data_module(options: argparse.Namespace) -> Any:
    """Return a data module of embedded rows: instructions, and attacks with refusals."""
    from sst_lightning.data import Alpaca, Security

    class Mixed(Alpaca):
        def embedded_rows(self) -> dict[str, list[Any]]:
            attacks = Security(tokenizer=options.model).embedded_rows()
            return {split: rows + attacks[split] for split, rows in super().embedded_rows().items()}

    return Mixed(tokenizer=options.model, max_samples=options.rows, batch_size=options.batch_size)


def run_fit(options: argparse.Namespace) -> dict[str, Any]:
    """Train with SupervisedLoRA; return what :func:`record` makes of it."""
    from lightning.pytorch import Callback, Trainer, seed_everything

    from sst_lightning.modules.supervised import SupervisedLoRA

    class Clock(Callback):
        def __init__(self) -> None:
            self.steps: list[dict[str, float]] = []

        def on_train_batch_end(
            self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            tokens, loss = int(batch["attention_mask"].sum()), float(outputs["loss"])
            self.steps.append({"tokens": tokens, "loss": loss, **clock()})

    seed_everything(0, verbose=False)
    counter = Clock()
    trainer = Trainer(
        max_epochs=1,
        gradient_clip_val=CLIP,
        precision="32-true",
        limit_val_batches=0,
        logger=False,
        callbacks=[counter],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = SupervisedLoRA(
        options.model,
        **LORA,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        warmup_ratio=0.0,
    )
    trainer.fit(model, datamodule=data_module(options))
    return record(counter.steps, options.warmup)


def run_trl(folder: Path, row: str, warmup: int) -> dict[str, Any]:
    """Train with SFTTrainer; nothing of this project is imported."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[dict[str, float]] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.times.append(clock())

    inputs = json.loads((folder / "inputs.json").read_text(encoding="utf-8"))
    settings = ROWS[row]
    base = AutoModelForCausalLM.from_pretrained(
        inputs["base"], dtype=torch.bfloat16, attn_implementation=settings["attention"]
    )
    torch.manual_seed(0)
    # SFTTrainer itself would make the adapter bf16; a PeftModel it takes as it is.
    config = LoraConfig(**LORA, target_modules=inputs["target_modules"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    counter = Clock()
    trainer = SFTTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(inputs["base"]),
        train_dataset=Dataset.from_list(inputs["rows"]),
        callbacks=[counter],
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            per_device_train_batch_size=inputs["batch_size"],
            num_train_epochs=1,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            lr_scheduler_type="linear",
            warmup_steps=0,
            max_length=512,
            completion_only_loss=True,
            bf16=False,
            gradient_checkpointing=False,
            train_sampling_strategy=settings["train_sampling_strategy"],
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=0,
        ),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = [0, *(int(entry["num_tokens"]) for entry in logs)]
    steps = [
        {"tokens": after - before, "loss": entry["loss"], **times}
        for before, after, entry, times in zip(
            seen[:-1], seen[1:], logs, counter.times, strict=True
        )
    ]
    return record(steps, warmup)


def clock() -> dict[str, float]:
    """Return the time by the clock, and the CPU time of this process."""
    return {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}


def record(steps: list[dict[str, float]], warmup: int) -> dict[str, Any]:
    """Return tokens per second after ``warmup`` steps, all tokens, and the loss of every step."""
    start, end = steps[warmup - 1], steps[-1]
    tokens = sum(step["tokens"] for step in steps[warmup:])
    return {
        "tokens_per_second": tokens / (end["seconds"] - start["seconds"]),
        "tokens_per_cpu_second": tokens / (end["cpu_seconds"] - start["cpu_seconds"]),
        "tokens": sum(int(step["tokens"]) for step in steps),
        "steps": len(steps),
        "losses": [step["loss"] for step in steps],
    }


def measure(side: str, folder: Path, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    fit = side not in ROWS
    python = sys.executable if fit else options.trl_python
    command = [python, __file__, f"--side={side}", f"--folder={folder}"]
    for name in ("model", "rows", "batch_size", "warmup"):
        command.append(f"--{name}={getattr(options, name)}")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if fit:
        environment["PYTHONPATH"] = str(ROOT if side == "fit" else options.against)
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def compare(folder: Path, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run all sides in turn, ``--rounds`` times; print a table and return the figures.

    Raises:
        SystemExit: the sides did not train on the same number of tokens.
    """
    sides = ["fit", *options.trl_rows, *(["against"] if options.against else [])]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side in sides if number % 2 == 0 else sides[::-1]:
            runs[side].append(measure(side, folder, threads, options))
            speed = runs[side][-1]["tokens_per_second"]
            print(f"{threads} threads, round {number + 1}, {side}: {speed:.1f}", flush=True)
    if len(totals := {run["tokens"] for side in sides for run in runs[side]}) > 1:
        raise SystemExit(f"the sides trained on different numbers of tokens: {sorted(totals)}")

    def rate(side: str, name: str = "tokens_per_second") -> float:
        return median(run[name] for run in runs[side])

    print("| | tokens/s | by CPU time | fit is faster by | first loss | mean of the last ten |")
    print("|---|---|---|---|---|---|")
    for side in sides:
        losses = runs[side][0]["losses"]
        print(
            f"| {side} | {rate(side):.1f} | {rate(side, 'tokens_per_cpu_second'):.1f} "
            f"| {rate('fit') / rate(side):.2f} | {losses[0]:.4f} | {mean(losses[-10:]):.4f} |"
        )
    best = max(options.trl_rows, key=rate)
    figures: dict[str, Any] = {
        "speedup": rate("fit") / rate(options.trl_rows[0]),
        "speedup_vs_best": rate("fit") / rate(best),
        "best": best,
        "cpu_speedup": rate("fit", "tokens_per_cpu_second")
        / rate(options.trl_rows[0], "tokens_per_cpu_second"),
        "tokens_per_second": {side: rate(side) for side in sides},
        "tokens": totals.pop(),
        "steps": runs["fit"][0]["steps"],
    }
    same = [side for side in options.trl_rows if side.startswith("same batches")]
    if same:
        ours, theirs = (runs[side][0]["losses"] for side in ("fit", same[0]))
        figures["first_loss"] = {"fit": ours[0], "trl": theirs[0]}
        figures["largest_loss_difference"] = max(
            abs(a - b) for a, b in zip(ours, theirs, strict=True)
        )
        figures["last_losses"] = {"fit": mean(ours[-10:]), "trl": mean(theirs[-10:])}
    return figures


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl_python", default=sys.executable, help="a Python that has TRL")
    parser.add_argument("--model", default="smollm2-135m", help="alias or folder")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=5, help="steps that are not timed")
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1, 1])
    parser.add_argument("--trl_rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--against", type=Path, help="another checkout, as a further row")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        trl = options.side in ROWS
        run = run_trl(options.folder, options.side, options.warmup) if trl else run_fit(options)
        print(json.dumps(run))
        return
    find = [options.trl_python, "-c", "import trl; print(trl.__version__)"]
    found = subprocess.run(find, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{INSTALL}\n{found.stderr.strip()[-300:]}")
    version = found.stdout.split()[-1]
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_inputs(folder, options)
        by_threads = {
            threads: compare(folder, threads, options) for threads in dict.fromkeys(options.threads)
        }
    first, *others = by_threads
    summary = {"trl": version, "threads": first, **by_threads[first]}
    for threads in others:
        summary[f"with_{threads}_threads"] = by_threads[threads]
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
