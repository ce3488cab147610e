"""Two gloo processes give what one gives: losses, weights, Fishers, spectra, merges and scores.

Equal is up to the order in which fp32 numbers are added up. What has no such sum behind it (task
arithmetic, answers, verdicts, numbers of examples) is equal bit by bit.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import scipy.linalg
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sst_lightning.algebra.adapter import LoraAdapter, relative_distance
from sst_lightning.algebra.fisher_file import FisherStatistics
from sst_lightning.planner.architecture import find_architecture
from sst_lightning.planner.stages import plan_stage
from tests.cli.test_evaluation import write_suites, write_test_config
from tests.distributed import stages
from tests.planner.jobs import fit_job
from tests.small_merge import save_inputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The outputs of all stages: of one process (this one) in folder 1, of two in folder 2."""
    folder = tmp_path_factory.mktemp("distributed")
    made = save_inputs(folder / "made")
    stages.write_rows(folder)
    inputs = {
        **asdict(made),
        "suites": write_test_config(folder, made, write_suites(folder)),
        "poisoned": stages.save_poisoned(folder / "poisoned"),
    }
    (folder / "made.json").write_text(json.dumps(inputs))
    stages.run(folder, 1)
    subprocess.run(
        [sys.executable, "-m", "tests.distributed.stages"],
        check=True,
        timeout=400,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "SST_TEST_FOLDER": str(folder), "SST_TEST_PROCESSES": "2"},
    )
    return folder


@pytest.fixture(scope="module")
def notes(folder):
    """What each process noted."""
    paths = ("1/process-0.json", "2/process-0.json", "2/process-1.json")
    return [json.loads((folder / path).read_text()) for path in paths]


def both(folder, path, read):
    return read(folder / "1" / path), read(folder / "2" / path)


def test_every_process_succeeds_or_fails_with_the_others(notes):
    """The last two commands fail: in the verification, on rank zero, and before the start."""
    assert [note["codes"] for note in notes] == [[0, 0, 0, 0, 0, 0, 0, 2, 2]] * 3


@pytest.mark.parametrize("tag", ["train_loss", "val_nll"])
def test_curves(folder, tag):
    def curve(path):
        events = EventAccumulator(str(path))
        events.Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]

    one, two = both(folder, "tensorboard/version_0", curve)
    assert len(one) == (6 if tag == "train_loss" else 3)
    assert [step for step, _ in two] == [step for step, _ in one]
    assert [value for _, value in two] == pytest.approx([value for _, value in one], rel=1e-6)


def test_checkpoints(folder):
    for step in (1, 6):
        one, two = both(
            folder,
            f"checkpoints/step={step}.ckpt",
            lambda path: torch.load(path, weights_only=True),
        )
        assert set(one["state_dict"]) == set(two["state_dict"])
        for name, value in one["state_dict"].items():
            torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-5, atol=1e-6)
        progress = [c["loops"]["fit_loop"]["epoch_loop.batch_progress"] for c in (one, two)]
        assert progress[0] == progress[1]


@pytest.mark.parametrize(
    ("path", "tolerance"),
    [
        ("adapter", 1e-5),
        ("first/adapter", 0),
        ("compare/adapters/task_arithmetic-alpha-0.5", 0),
        ("compare/adapters/sst_soft-alpha-0.5", 1e-5),
        ("budget/adapter", 1e-5),
    ],
)
def test_adapters(folder, path, tolerance):
    one, two = both(folder, path, LoraAdapter.load)
    if tolerance:
        assert 0 <= relative_distance(one, two) < tolerance
    else:
        assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize("processes", ["2", "2/sharded"])
@pytest.mark.parametrize(
    "path", ["fisher/utility", "fisher/harmless", "fisher/safety", "fisher_in_fit/calibration"]
)
def test_fishers(folder, path, processes):
    one, two = (
        FisherStatistics.load(folder / number / f"{path}.safetensors")
        for number in ("1", processes)
    )
    assert one.metadata.count == two.metadata.count == 7
    assert one.metadata.data_fingerprint == two.metadata.data_fingerprint
    for name, fisher in one.modules.items():
        expected = fisher.dense()
        assert (two.modules[name].dense() - expected).norm() < 1e-4 * expected.norm(), name
        # Also in the same order: the report's spectrum is fitted on every other sequence.
        samples, others = fisher.samples, two.modules[name].samples
        assert (others - samples).norm() < 1e-4 * samples.norm(), name


def test_blocks_end_together_where_batches_are_uneven(folder):
    """Processes that closed a block at different batches waited for each other for ever."""
    for name in ("utility", "harmless", "safety"):
        one, two = both(folder, f"monitored/{name}.safetensors", FisherStatistics.load)
        assert one.metadata.count == two.metadata.count == 9
        for module, fisher in one.modules.items():
            expected = fisher.dense()
            assert (two.modules[module].dense() - expected).norm() < 1e-4 * expected.norm()


def test_generalised_eigenvalues(folder):
    def spectra(path):
        utility, safety = (
            FisherStatistics.load(path / f"{name}.safetensors") for name in ("utility", "safety")
        )
        for name, fisher in safety.modules.items():
            metric = utility.modules[name].dense()
            metric += 0.1 * metric.diagonal().mean() * torch.eye(len(metric))
            yield scipy.linalg.eigh(fisher.dense(), metric, eigvals_only=True)

    for one, two in zip(*both(folder, "fisher", spectra), strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-6 * one.max())


@pytest.mark.parametrize("path", ["compare", "test"])
def test_metrics(folder, path):
    def records(path):
        return json.loads((path / "results.json").read_text())

    one, two = both(folder, path, records)
    assert [record["model"] for record in one] == [record["model"] for record in two]
    for expected, record in zip(one, two, strict=True):
        assert set(record["metrics"]) == set(expected["metrics"])
        for name, entry in expected["metrics"].items():
            assert record["metrics"][name]["n"] == entry["n"], name
            assert record["metrics"][name]["value"] == pytest.approx(entry["value"], abs=1e-5), name
        spectrum = expected.get("diagnostics", {}).get("spectrum", {})
        assert ("sst" in record["method"] and path == "compare") == bool(spectrum)
        for part, values in spectrum.items():
            assert record["diagnostics"]["spectrum"][part] == pytest.approx(values, rel=1e-3), part


def test_sharded_exit_codes(notes):
    """Training, resumption and validation work; the rest is refused."""
    assert [note.get("sharded") for note in notes] == [None, *[[0, 0, 0, 0, 2, 2]] * 2]


def test_sharded_training(folder):
    one, many, resumed = (
        LoraAdapter.load(folder / path / "adapter")
        for path in ("1", "2/sharded", "2/sharded/resumed")
    )
    assert relative_distance(one, many) < 1e-5
    assert relative_distance(one, resumed) < 1e-5
    files = [folder / path / "checkpoints/step=6.ckpt" for path in ("1", "2/sharded")]
    expected, state = (torch.load(file, weights_only=True) for file in files)
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(state["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    moments, others = (c["optimizer_states"][0]["state"] for c in (expected, state))
    assert set(moments) == set(others)
    for key, moment in moments.items():
        torch.testing.assert_close(others[key]["exp_avg"], moment["exp_avg"], rtol=1e-3, atol=1e-6)


def test_each_process_holds_the_share_that_is_planned(folder):
    """At rank 4, as ``fit_job``; two divides all shapes, so both hold the same."""
    base = json.loads((folder / "made.json").read_text())["base"]
    plan = plan_stage(fit_job(base, processes=2, sharded=True), find_architecture(base), 0)
    step = next(phase for phase in plan.phases if phase.name == "optimizer step")
    planned = {term.name: term.size for term in step.terms}
    for rank in range(2):
        held = json.loads((folder / f"2/sharded/share-{rank}.json").read_text())
        assert held == {name: planned[name] for name in held}


def test_budget(folder):
    one, two = both(folder, "budget/adapter/merge.json", lambda path: json.loads(path.read_text()))
    drops, others = ([t["utility_drop"] for t in r["budget"]["trials"]] for r in (one, two))
    assert len(drops) > 3
    assert others == pytest.approx(drops, abs=1e-5)
    assert two["parameters"]["alpha"] == one["parameters"]["alpha"]


def test_training_where_a_process_has_no_completion_token(notes):
    losses, error = notes[0]["uneven"]
    assert error is None
    for note in notes[1:]:
        assert note["uneven"][1] is None
        assert note["uneven"][0] == pytest.approx(losses, rel=1e-5)


def test_errors_of_one_process_are_those_of_all(notes):
    for note in notes:
        assert "batch 1 has no completion tokens" in note["silent"][1]
        assert all(f"row-{n}" in note["silent"][1] for n in range(3))
        assert "the loss of batch 1 is nan" in note["broken"][1]
        assert "from rows ['row-1']" in note["broken"][1]
