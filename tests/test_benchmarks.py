"""Benchmarks run to their last line, at a fraction of their size; nothing is said about times."""

import json
import sys
from importlib import import_module
from pathlib import Path

from sst_lightning.algebra.methods import METHODS

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
