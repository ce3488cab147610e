"""The fault table: what a fault costs, and how long the next run takes to be where the first was.

    python benchmarks/faults.py --model smollm2-135m --write docs/faults.md

Every run is a process of its own, started from the command line. A fault is provoked at a fixed
batch by a callback in this file. ``lost`` is what the outputs of the interrupted and continued run
lack or have otherwise than those of a run that nothing happened to: adapters are compared byte by
byte, evaluations by every metric. Recovery is the time from the start of the next command to its
first new work; a start without anything to recover takes that long too, apart from the reading of
the checkpoint or the store. The last line is one JSON object.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lightning.pytorch import Callback

ROOT = Path(__file__).parents[1]
ADAPTER = "adapter/adapter_model.safetensors"
QUIET = [
    *("--trainer.accelerator=cpu", "--trainer.logger=false"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
]
PARTS = ["fit", "processes", "fisher", "merge"]
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]


class Fault(Callback):
    """Does something to its own process when a batch begins, and notes when work began.

    Args:
        kind: name of a signal, ``disk`` (the disk is filled), ``nan`` (the trained weights become
            NaN) or ``none``.
        batch: batches that begin before.
        rank: process it happens to.
        filler: file that fills the disk.
    """

    def __init__(
        self, kind: str = "none", batch: int = 0, rank: int = 0, filler: str | None = None
    ) -> None:
        self.kind = kind
        self.left = batch
        self.rank = rank
        self.filler = filler
        self.began = False

    def on_train_batch_start(self, trainer, module, *arguments) -> None:
        self._count(trainer, module)

    def on_test_batch_start(self, trainer, module, *arguments) -> None:
        self._count(trainer, module)

    def on_validation_batch_start(self, trainer, module, *arguments) -> None:
        if trainer.state.fn == "validate":
            self._count(trainer, module)

    def _count(self, trainer, module) -> None:
        if not self.began:
            self.began = True
            if trainer.is_global_zero:
                Path("began").write_text(repr(time.time()))
        if self.left == 0 and trainer.global_rank == self.rank:
            self._strike(module)
        self.left -= 1

    def _strike(self, module) -> None:
        if self.kind == "disk":
            with open(str(self.filler), "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    return
        if self.kind == "nan":
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(float("nan"))
        elif self.kind != "none":
            os.kill(os.getpid(), getattr(signal, self.kind))


class Bench:
    """Runs commands in a folder and measures them."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        self.options = options

    def run(self, name: str, arguments: list[str]) -> dict[str, object]:
        """Run one command in the folder ``name``: exit code, seconds to the first batch and in all."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "began").unlink(missing_ok=True)
        paths = f"{ROOT}{os.pathsep}{Path(__file__).parent}"
        with (folder / "output.txt").open("w") as log:
            start = time.time()
            code = subprocess.run(
                [sys.executable, "-m", "sst_lightning", *arguments],
                cwd=folder,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": paths},
                timeout=1800,
            ).returncode
        began = folder / "began"
        first = float(began.read_text()) - start if began.exists() else None
        return {
            "code": code if code >= 0 else 128 - code,
            "first": first,
            "seconds": time.time() - start,
        }

    def fit(self, name: str, *more: str, output: str = ".", **fault: object) -> dict[str, object]:
        callbacks = [
            {"class_path": "callbacks.AdapterExport", "init_args": {"path": f"{output}/adapter"}},
            {
                "class_path": "callbacks.FitCheckpoint",
                "init_args": {"dirpath": f"{output}/checkpoints", "every_n_train_steps": 2},
            },
            {"class_path": "faults.Fault", "init_args": fault},
        ]
        return self.run(
            name,
            [
                *("fit", f"--config={ROOT / 'configs' / 'a6_alpaca.yaml'}"),
                *(f"--model.base={self.options.model}", f"--model.r={self.options.rank}"),
                *(f"--data.max_samples={8 * self.options.steps}", "--data.calibration_samples=4"),
                *("--data.batch_size=2", "--trainer.accumulate_grad_batches=2"),
                *(f"--data.max_length={self.options.length}", "--trainer.max_epochs=2"),
                *(f"--trainer.callbacks={json.dumps(callbacks)}", *QUIET, *more),
            ],
        )

    def validate(self, name: str, **fault: object) -> dict[str, object]:
        collector = {"output": "fisher", "block_samples": 4}
        callbacks = [
            {"class_path": "callbacks.FisherCollector", "init_args": collector},
            {"class_path": "faults.Fault", "init_args": fault},
        ]
        return self.run(
            name,
            [
                *("validate", f"--config={ROOT / 'configs' / 'fisher_a6_a7.yaml'}"),
                *(f"--model.base={self.options.model}", "--data.batch_size=2"),
                f"--model.utility=[{self.folder}/calm/adapter]",
                f"--model.safety={self.folder}/other/adapter",
                f"--data.calibration_samples={self.options.samples}",
                *(f"--trainer.callbacks={json.dumps(callbacks)}", *QUIET),
            ],
        )

    def merge(self, name: str, *more: str, **fault: object) -> dict[str, object]:
        callbacks = json.dumps([{"class_path": "faults.Fault", "init_args": fault}])
        own = {
            name: {
                "class_path": "sst_lightning.suites.HeldOut",
                "init_args": {
                    "data": {"class_path": f"sst_lightning.data.{data}"},
                    "samples": self.options.samples,
                    "max_new_tokens": 8,
                },
            }
            for name, data in (("attacks", "Security"), ("alpaca", "Alpaca"))
        }
        suites = {
            "class_path": "sst_lightning.suites.SuiteData",
            "init_args": {"suites": own, "max_batch": 2},
        }
        samples = ("calibration", "test", "generation", "attack", "harmless")
        return self.run(
            name,
            [
                *("merge", f"--config={ROOT / 'configs' / 'merge_own.yaml'}"),
                *(f"--suites={json.dumps(suites)}", "--method=task_arithmetic"),
                *(f"--model.base={self.options.model}", "--output=out"),
                f"--model.utility=[{self.folder}/calm/adapter]",
                f"--model.safety={self.folder}/other/adapter",
                *("--model.max_new_tokens=4", f"--trainer.callbacks={callbacks}"),
                *(f"--data.{name}_samples={self.options.samples}" for name in samples),
                *QUIET,
                *more,
            ],
        )

    def adapter(self, name: str) -> bytes:
        path = self.folder / name / ADAPTER
        return path.read_bytes() if path.exists() else b""


def row(fault: str, how: str, broken: dict, next_run: dict, same: bool, calm: dict) -> dict:
    return {
        "fault": fault,
        "provoked": how,
        "exit": broken["code"],
        "exit_next": next_run["code"],
        "lost": "nothing" if same else "DIFFERS",
        "recovery": next_run["first"],
        "plain_start": calm["first"],
    }


def fit_faults(bench: Bench) -> list[dict]:
    """One row for each fault of ``fit``."""
    steps = bench.options.steps
    middle = 5 * steps // 2 + 1  # batches; 2 to a step, 4 * steps to an epoch
    calm = bench.fit("calm")
    assert calm["code"] == 0, (bench.folder / "calm" / "output.txt").read_text()
    rows = []
    for kind, fault, how in (
        ("SIGTERM", "SIGTERM in fit", "kill -TERM when a batch begins"),
        ("SIGINT", "Ctrl-C in fit", "kill -INT when a batch begins"),
        ("SIGKILL", "SIGKILL in fit", "kill -KILL when a batch begins, 2 steps to a checkpoint"),
        ("nan", "NaN loss", "the LoRA weights become NaN when a batch begins"),
    ):
        broken = bench.fit(kind, kind=kind, batch=middle)
        after = bench.fit(kind, "--ckpt_path=last")
        rows.append(
            row(fault, how, broken, after, bench.adapter(kind) == bench.adapter("calm"), calm)
        )
    bench.fit("damaged", kind="SIGKILL", batch=middle)
    last = bench.folder / "damaged" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    broken = bench.fit("damaged", "--ckpt_path=last")
    (other,) = last.parent.glob("epoch=*.ckpt")
    named = str(other) in (bench.folder / "damaged" / "output.txt").read_text()
    after = bench.fit("damaged", f"--ckpt_path={other}")
    rows.append(
        row(
            "corrupted checkpoint",
            "half of last.ckpt is cut off; the error names the one beside it",
            broken,
            after,
            named and bench.adapter("damaged") == bench.adapter("calm"),
            calm,
        )
    )
    full = full_disk(bench, middle, calm)
    return rows if full is None else [*rows, full]


def full_disk(bench: Bench, batch: int, calm: dict) -> dict | None:
    """A file system in memory that gets full; ``None`` where it may not be mounted."""
    disk = bench.folder / "disk"
    disk.mkdir()
    size = f"size={bench.options.disk}m"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        print("full disk: not measured, a file system cannot be mounted here", file=sys.stderr)
        return None
    try:
        filler = disk / "filler"
        broken = bench.fit("full", output=str(disk), kind="disk", batch=batch, filler=str(filler))
        whole = not list(disk.rglob("*.tmp"))
        filler.unlink()
        after = bench.fit("full", "--ckpt_path=last", output=str(disk))
        same = (disk / ADAPTER).read_bytes() == bench.adapter("calm")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return row(
        "full disk",
        "a file fills a mounted disk; then a checkpoint is due",
        broken,
        after,
        whole and same,
        calm,
    )


def process_faults(bench: Bench) -> list[dict]:
    """One of two processes is killed, or gets SIGTERM."""
    calm = bench.fit("two", *TWO)
    rows = []
    for kind, rank, fault in (
        ("SIGKILL", 1, "killed DDP process"),
        ("SIGTERM", 0, "SIGTERM to one of two DDP processes"),
    ):
        name = f"two-{kind}"
        batch = 5 * bench.options.steps // 4 + 1
        broken = bench.fit(name, *TWO, kind=kind, batch=batch, rank=rank)
        after = bench.fit(name, *TWO, "--ckpt_path=last")
        how = f"kill -{kind.removeprefix('SIG')} of process {rank} when a batch begins"
        rows.append(
            row(fault, how, broken, after, bench.adapter(name) == bench.adapter("two"), calm)
        )
    return rows


def fisher_faults(bench: Bench) -> list[dict]:
    """A Fisher collection in the middle of a set."""
    calm = bench.validate("validate")
    assert calm["code"] == 0, (bench.folder / "validate" / "output.txt").read_text()
    rows = []
    for kind in ("SIGTERM", "SIGKILL"):
        name = f"validate-{kind}"
        batch = 3 * bench.options.samples // 4
        broken = bench.validate(name, kind=kind, batch=batch)
        after = bench.validate(name)
        files = [
            {path.name: path.read_bytes() for path in (bench.folder / n / "fisher").glob("*.safe*")}
            for n in ("validate", name)
        ]
        how = f"kill -{kind.removeprefix('SIG')} when batch {batch} of validate begins"
        rows.append(row(f"{kind} in a Fisher pass", how, broken, after, files[0] == files[1], calm))
    return rows


def merge_faults(bench: Bench) -> list[dict]:
    """An evaluation in the middle of a suite."""
    calm = bench.merge("merge")
    assert calm["code"] == 0, (bench.folder / "merge" / "output.txt").read_text()
    rows = []
    for kind in ("SIGTERM", "SIGKILL"):
        name = f"merge-{kind}"
        broken = bench.merge(name, kind=kind, batch=bench.options.test_batch)
        stored = sum(
            len(path.read_text().splitlines())
            for path in (bench.folder / name).rglob("process-*.jsonl")
        )
        after = bench.merge(name, "--overwrite")
        metrics = [
            [
                record["metrics"]
                for record in json.loads((bench.folder / n / "out/results.json").read_text())
            ]
            for n in ("merge", name)
        ]
        how = f"kill -{kind.removeprefix('SIG')} in a suite, after {stored} stored answers"
        same = metrics[0] == metrics[1]
        rows.append(row(f"{kind} in an evaluation", how, broken, after, same, calm))
    return rows


def table(rows: list[dict]) -> str:
    head = "| fault | how provoked | exit code | lost | recovery (plain start), s |\n"
    return f"{head}|---|---|---|---|---|\n" + "".join(
        f"| {r['fault']} | {r['provoked']} | {r['exit']} | {r['lost']} | "
        f"{r['recovery']:.1f} ({r['plain_start']:.1f}) |\n"
        for r in rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of an epoch / 2")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--test_batch", type=int, default=16)
    parser.add_argument("--disk", type=int, default=400, help="MiB of the disk that gets full")
    parser.add_argument("--only", choices=PARTS, nargs="*")
    parser.add_argument("--write", type=Path, help="file whose table is replaced")
    options = parser.parse_args()
    chosen = options.only or PARTS
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        rows = []
        if "fit" in chosen:
            rows += fit_faults(bench)
        else:
            bench.fit("calm")
        if "merge" in chosen or "fisher" in chosen:
            bench.fit("other", "--seed_everything=1")
        if "processes" in chosen:
            rows += process_faults(bench)
        if "fisher" in chosen:
            rows += fisher_faults(bench)
        if "merge" in chosen:
            rows += merge_faults(bench)
    print(table(rows))
    if options.write:
        text = options.write.read_text(encoding="utf-8")
        before, _, rest = text.partition("<!-- table -->\n")
        after = rest.partition("<!-- end of table -->")[2]
        options.write.write_text(
            f"{before}<!-- table -->\n{table(rows)}<!-- end of table -->{after}", encoding="utf-8"
        )
    summary = {
        "faults": len(rows),
        "lost": sum(r["lost"] != "nothing" for r in rows),
        "zero_exits": sum(r["exit"] == 0 for r in rows),
        "recovery_over_plain_start": max(r["recovery"] / r["plain_start"] for r in rows),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
