"""Benchmarks run to their last line, at a fraction of their size; nothing is said about times."""

import csv
import io
import json
import mmap
import os
import shutil
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sst_lightning.algebra.methods import METHODS
from sst_lightning.cli.main import main as command_line
from tests.faults.processes import run_child
from tests.nano import save_nano

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# RegMean takes other Fishers; concatenation is task arithmetic in other factors.
NOT_MEASURED = {"regmean", "concatenation"}


def test_merge_8b_shape(tmp_path, monkeypatch, capsys):
    """In this process: a process for each measurement takes minutes to start them all."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("merge_8b_shape")

    def measure(job, /, **arguments):
        return benchmark.run_job(job, json.loads(json.dumps(arguments, default=str)))

    monkeypatch.setattr(benchmark, "measure", measure)
    options = ["--folder", str(tmp_path), "--layers=1", "--adapters", "2", "--shrink=16"]
    monkeypatch.setattr(sys, "argv", ["merge_8b_shape.py", *options])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    for name in ("truncate_speedup_vs_peft_svd", "sst_seconds", "sst_peak_gib", "ties_peak_gib"):
        assert summary[name] > 0
    measured = {row.split(" | ")[0].removeprefix("| ").partition(" (")[0] for row in lines}
    assert set(METHODS) - measured == NOT_MEASURED
    assert {"mergekit ties, full models", "PEFT svd, all 7 modules"} <= measured


def test_mmlu_vs_lm_eval(tmp_path, monkeypatch, capsys):
    """Answers of a random model: log-likelihoods of the two sides agree to rounding, or not at all."""
    for split, rows in (("dev", 5), ("test", 3)):
        (tmp_path / "tree" / split).mkdir(parents=True)
        for subject in ("anatomy", "world_religions"):
            lines = [
                [
                    f"{subject[row]}, {split} {row}?",
                    *("None", "0.50", "NA", f"{row}"),
                    "ABCD"[row % 4],
                ]
                for row in range(rows)
            ]
            with (tmp_path / "tree" / split / f"{subject}_{split}.csv").open(
                "w", newline=""
            ) as file:
                csv.writer(file).writerows(lines)
    model = save_nano(tmp_path / "nano")
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("mmlu_vs_lm_eval")
    options = [f"--data={tmp_path / 'tree'}", f"--model={model}", "--questions=5", "--threads=1"]
    options += ["--batch_sizes", "1", "2", "--blocks=2"]
    monkeypatch.setattr(sys, "argv", ["mmlu_vs_lm_eval.py", *options])
    benchmark.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["items"] == summary["agree"] == 5
    for shots in ("0shot", "5shot"):
        assert summary[f"agree_{shots}"] == 5
        assert summary[f"largest_difference_{shots}"] < 1e-4
        assert summary[f"smallest_margin_{shots}"] > summary[f"largest_difference_{shots}"]
        assert summary[f"speedup_{shots}"] > 0
        assert summary[f"batch_size_lm_eval_{shots}"] in (1, 2)


def test_nf4_vs_bf16(tmp_path, monkeypatch, capsys):
    """Everything on the nano model; what it says on itself must be 1."""
    model = save_nano(tmp_path / "nano")
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("nf4_vs_bf16")
    options = [f"--model={model}", f"--output={tmp_path / 'out'}", "--steps=2", "--r=2"]
    options += ["--batch=2", "--max_length=160", "--calibration=6", "--test=4"]
    monkeypatch.setattr(sys, "argv", ["nf4_vs_bf16.py", *options, "--max_new_tokens=2"])
    benchmark.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    for values in (summary["fisher_cosine"], summary["trained_adapter_cosine"]):
        assert all(0 < value <= 1 for value in values.values())
    assert 0 < summary["merged_adapter_cosine"] <= 1
    entry = summary["merge_utility_nll_bfloat16_less_nf4"]
    assert entry["low"] <= entry["value"] <= entry["high"]
    assert 0 < summary["export"]["nf4"]["quantization_of_weight"] < 1
    text = (tmp_path / "out/merge_nf4/report.md").read_text()
    assert "The same adapters on the base in bfloat16: difference" in text


def test_fit_vs_trl_trains_on_the_rows_that_it_writes_for_trl(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("fit_vs_trl")
    options = Namespace(model=str(save_nano(tmp_path / "nano")), rows=10, batch_size=4, warmup=1)
    benchmark.write_inputs(tmp_path, options)
    rows = json.loads((tmp_path / "inputs.json").read_text())["rows"]
    assert len(rows) == 10
    assert all(0 < sum(row["completion_mask"]) < len(row["input_ids"]) for row in rows)
    run = benchmark.run_fit(options)
    assert run["steps"] == len(run["losses"]) == 3
    assert run["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert run["tokens_per_second"] > 0


def test_fit_vs_trl_counts_tokens_after_warm_up(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("fit_vs_trl")
    steps = [
        {"tokens": tokens, "loss": 1.0, "seconds": seconds, "cpu_seconds": 2 * seconds}
        for tokens, seconds in ((100, 50), (10, 52), (20, 54), (30, 56))
    ]
    run = benchmark.record(steps, warmup=2)
    assert (run["tokens_per_second"], run["tokens_per_cpu_second"]) == (50 / 4, 50 / 8)
    assert run["tokens"] == 160


def test_fit_vs_trl_says_how_to_install_trl(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("fit_vs_trl")
    monkeypatch.setattr(sys, "argv", ["fit_vs_trl.py", "--trl_python=/bin/false"])
    with pytest.raises(SystemExit, match="pip install --constraint"):
        benchmark.main()


@pytest.mark.slow
@pytest.mark.skipif("TRL_PYTHON" not in os.environ, reason="TRL_PYTHON names no Python with TRL")
def test_fit_vs_trl(tmp_path, monkeypatch, capsys):
    """The same batches from the same weights: the same losses but for rounding to bf16."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("fit_vs_trl")
    model = save_nano(tmp_path / "nano")
    options = [f"--model={model}", f"--trl_python={os.environ['TRL_PYTHON']}", "--rows=16"]
    options += ["--rounds=1", "--warmup=1", "--threads=1", "--trl_rows", "ordinary", "same batches"]
    monkeypatch.setattr(sys, "argv", ["fit_vs_trl.py", *options])
    benchmark.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["steps"] == 4
    assert summary["speedup"] > 0
    assert summary["largest_loss_difference"] < 0.02


def in_this_process(arguments):
    """Run a command without a process of its own, which takes seconds to start."""
    assert command_line(arguments) == 0
    return {"peak": 1 << 30, "anonymous": 1 << 28, "libraries": 1 << 20, "cpu_seconds": 1.0}


def captured(arguments):
    """The same, for what it prints."""
    output = io.StringIO()
    with redirect_stdout(output):
        assert command_line(arguments[2:]) == 0
    return output.getvalue()


def test_pages_of_files_are_told_from_other_memory(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("measured_run")
    size = 64 << 20
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    before = benchmark.resident()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert not any(mapped[:: mmap.PAGESIZE])
        # Not from the heap, which may have that much free.
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
            block.write(b"1" * size)
            after = benchmark.resident()
    pages, files = (new - old for new, old in zip(after, before, strict=True))
    # A byte of every page was read one by one, so their objects and other threads move some pages.
    assert files == pytest.approx(size, rel=0.05)
    assert pages - files == pytest.approx(size, rel=0.05)


def test_a_measured_run():
    """A command that loads no model."""
    command = [sys.executable, str(BENCHMARKS / "measured_run.py"), "methods"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    assert list(figures) == ["peak", "anonymous", "libraries", "cpu_seconds"]
    assert 0 < figures["anonymous"] < figures["peak"]
    assert 0 < figures["libraries"] < figures["peak"]
    # torch's library alone.
    assert figures["libraries"] > 32 << 20
    assert figures["cpu_seconds"] > 0


def test_plan_vs_measured(tmp_path, monkeypatch, capsys):
    model = save_nano(tmp_path / "nano")
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("plan_vs_measured")
    monkeypatch.setattr(benchmark, "measure", in_this_process)
    monkeypatch.setattr(benchmark, "python", captured)
    runs = ["fit", "fit, other seed", "validate", "merge, Fishers read, not evaluated"]
    options = ["--folder", str(tmp_path / "out"), f"--base={model}", "--tokens=200"]
    options += ["--batch_size=2", "--rank=4", "--samples=4", "--only", *runs]
    monkeypatch.setattr(sys, "argv", ["plan_vs_measured.py", *options])
    benchmark.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(summary["runs"]) == runs
    for entry in summary["runs"].values():
        assert entry["measured"] == 1 << 30
        assert entry["ratio"] == entry["predicted"] / (1 << 30) > 0
    assert summary["worst"] == max(abs(e["ratio"] - 1) for e in summary["runs"].values())


def test_llama_8b_slice(tmp_path, monkeypatch, capsys):
    """Widths and vocabulary far smaller, the nano tokenizer; a full model is the sum of its layers."""
    tokenizer = save_nano(tmp_path / "nano")
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("llama_8b_slice")
    monkeypatch.setattr(benchmark, "measure", in_this_process)
    monkeypatch.setattr(benchmark, "VOCABULARY", 128)
    monkeypatch.setattr(import_module("plan_vs_measured"), "python", captured)
    options = ["--folder", str(tmp_path / "out"), f"--tokenizer={tokenizer}", "--shrink=16"]
    options += ["--tokens=120", "--rows=4", "--storage=bf16", "--stages", "fit", "validate"]
    monkeypatch.setattr(sys, "argv", ["llama_8b_slice.py", *options])
    benchmark.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(summary) == ["bf16"]
    assert list(summary["bf16"]) == ["fit", "validate"]
    files = [(tmp_path / f"out/model-{n}/model.safetensors").stat().st_size for n in (1, 2)]
    for entry in summary["bf16"].values():
        assert entry["peak_1"] == 1 << 30
        assert entry["measured_1"] == (1 << 28) + (1 << 20) + files[0]
        assert entry["measured_layer"] == files[1] - files[0] > 0
        assert entry["measured_32"] == entry["measured_1"] + 31 * entry["measured_layer"]
        assert entry["predicted_layer"] > 0
        assert entry["predicted_32"] > entry["predicted_2"] > entry["predicted_1"]


def test_fisher_overhead(tmp_path, monkeypatch, capsys):
    """With the other two packages where they are installed."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("fisher_overhead")
    installed = all(find_spec(name) for name in benchmark.PACKAGES)
    options = [f"--model={save_nano(tmp_path / 'nano')}", "--dtype=float32", "--rank=2"]
    options += ["--sequences=4", "--batch_size=2", "--rounds=1"]
    options += [] if installed else ["--ours_only"]
    monkeypatch.setattr(sys, "argv", ["fisher_overhead.py", *options])
    benchmark.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    names = ["overhead_exact", "overhead_kfac"]
    names += ["speedup_vs_kronfluence", "speedup_vs_dattri"] if installed else []
    for name in names:
        assert summary[name] > 0
    if not installed:
        monkeypatch.setattr(sys, "argv", ["fisher_overhead.py", *options[:-1]])
        benchmark.main()
        lines = capsys.readouterr().out.splitlines()
        assert "skipped" in json.loads(lines[-1])
        assert "pip install" in lines[-2]


def test_fisher_memory(tmp_path, monkeypatch, capsys):
    """In this process: what was most before hides a peak, so only the way is tested."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("fisher_memory")
    for case in ("memory", "disk"):
        options = ["--sequences=20", "--modules=2", "--core=4", "--block_samples=8", "--run", case]
        monkeypatch.setattr(sys, "argv", ["fisher_memory.py", *options])
        benchmark.main()
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["gib"] >= 0


def test_gpu_check_is_skipped_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("gpu_check")
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", f"--folder={tmp_path / 'new'}"])
    benchmark.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"skipped": "no CUDA GPU"}
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_gpu_check_on_the_cpu(tmp_path, monkeypatch, capsys):
    """In this process, and one process compared with itself: DDP's own tests start several."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("gpu_check")
    stages = []

    def start(arguments):
        stages.append(arguments[0])
        return json.loads(json.dumps(benchmark.run_stage(arguments)))

    monkeypatch.setattr(benchmark, "start", start)
    monkeypatch.setattr(import_module("plan_vs_measured"), "python", captured)
    model = save_nano(tmp_path / "nano")
    options = [f"--folder={tmp_path / 'runs'}", f"--model={model}", "--device=cpu", "--tokens=48"]
    options += ["--rows=8", "--samples=3", "--batch_size=4"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *options])
    benchmark.main()
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert stages == 2 * ["fit", "fit", "validate", "merge", "test"]
    for storage in benchmark.STORAGES:
        assert list(summary[storage]) == ["fit", "fit, safety", "validate", "merge", "test"]
        assert summary[storage]["fit"]["tokens_per_second"] > 0
        for figures in summary[storage].values():
            assert figures["resident"] > 0
            assert figures["predicted"] > 0

    check = benchmark.Check(Namespace(folder=tmp_path / "runs", rows=8))
    for stage in benchmark.STAGES:
        name = "fit-utility" if stage == "fit" else stage
        path = tmp_path / "runs" / f"bfloat16-{name}.yaml"
        divided = check.with_processes(path, 2).read_text()
        assert "strategy: ddp" in divided
        assert "\n    batch_size: 2\n" in divided
        start([stage, f"--config={check.with_processes(path, 1)}"])
    one, other = tmp_path / "runs" / "processes-1", tmp_path / "runs" / "other"
    shutil.copytree(one, other)
    assert set(benchmark.differences(one, other).values()) == {0}

    (fisher, *_) = sorted((other / "fisher").glob("*.safetensors"))
    tensors = load_file(fisher)
    name = next(name for name, tensor in tensors.items() if tensor.norm() > 0)
    save_file({**tensors, name: 1.5 * tensors[name]}, fisher)
    adapter = other / "merge" / "adapter" / "adapter_model.safetensors"
    tensors = load_file(adapter)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({**tensors, name: 1.25 * tensors[name]}, adapter)
    losses = other / "log" / "utility" / "metrics.csv"
    with losses.open(newline="") as file:
        lines = list(csv.DictReader(file))
    with losses.open("w", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows({**line, "train_loss": float(line["train_loss"]) + 2} for line in lines)
    found = benchmark.differences(one, other)
    assert found == {
        "loss": pytest.approx(2),
        "fisher": pytest.approx(0.5),
        "merged_adapter": pytest.approx(0.25, rel=1e-3),
        "metrics": 0,
    }


@pytest.mark.slow
def test_faults(tmp_path, monkeypatch, capsys):
    """The rows of an evaluation; forked children in the place of processes that import all again."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = import_module("faults")

    def run(self, name, arguments):
        start = time.time()
        ended = run_child(self.folder / name, arguments)
        began = self.folder / name / "began"
        first = float(began.read_text()) - start
        began.unlink()
        return {"code": ended.code, "first": first, "seconds": time.time() - start}

    monkeypatch.setattr(benchmark.Bench, "run", run)
    options = [f"--model={save_nano(tmp_path / 'nano')}", "--steps=1", "--rank=2"]
    options += ["--only", "merge", "fisher", "--length=120", "--samples=2", "--test_batch=6"]
    monkeypatch.setattr(sys, "argv", ["faults.py", *options])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    summary = json.loads(lines[-1])
    assert summary["faults"] == 4
    assert summary["lost"] == summary["zero_exits"] == 0
    assert any("SIGKILL in an evaluation" in line and "| 137 | nothing |" in line for line in lines)
