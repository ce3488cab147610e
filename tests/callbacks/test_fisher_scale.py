"""FisherCollector with samples, early stop, budget and interruptions."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from callbacks import FisherCollector
from callbacks.fisher import COMPLETE, UNFINISHED
from sst_lightning.algebra.errors import FisherError, OutputExistsError
from sst_lightning.algebra.fisher_file import FisherStatistics
from sst_lightning.algebra.methods import SST
from sst_lightning.algebra.tensor_file import TensorFile
from sst_lightning.data.random_blocks import RandomBlocks
from sst_lightning.modules import calibration_set
from sst_lightning.modules.calibration_set import CalibrationSet
from sst_lightning.modules.collection_limits import CollectionLimits
from tests.small_merge import quiet_trainer, save_inputs, small_data, small_module

POINTS = {"utility": "utility", "safety": "safety"}
FILES = ["safety.safetensors", "utility.safetensors"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


class StopAfter(pl.Callback):
    """Raises after some batches of all sets together, and counts those that were computed."""

    def __init__(self, batches=None):
        self.left = batches
        self.computed = 0

    def on_validation_batch_end(self, trainer, module, outputs, batch, index, dataloader_idx=0):
        self.computed += "known_nll" not in batch
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def collect(inputs, output=None, stop=None, batch_size=2, points=POINTS, weights=None, **options):
    """Returns statistics, validation metrics and the number of batches computed."""
    module = small_module(inputs, utility_weights=weights)
    data = small_data(inputs.base, batch_size, calibration_samples=options.pop("rows", 6))
    data.select_validation(list(points))
    output = None if output is None else str(output)
    collector = FisherCollector(points, options.pop("estimator", "exact"), output, **options)
    watch = StopAfter(stop)
    trainer = quiet_trainer(callbacks=[collector, watch])
    try:
        trainer.validate(module, datamodule=data, verbose=False)
    except (KeyboardInterrupt, SystemExit):
        assert stop is not None
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    return collector.statistics, metrics, watch.computed


def files(folder):
    """Content of the files in a folder, all of which must be Fishers."""
    return {path.name: content(path) for path in sorted(folder.iterdir())}


def content(path):
    file = TensorFile(path)
    # The library writes the entries of a header in any order.
    return {name: file.read(name).numpy().tobytes() for name in file.shapes}, file.metadata


@pytest.mark.parametrize("estimator", ["exact", "kfac"])
@pytest.mark.parametrize("stop", [1, 3, 5, 6])
def test_an_interrupted_collection_gives_the_files_of_a_whole_one(
    inputs, tmp_path, stop, estimator
):
    options = {"block_samples": 4, "estimator": estimator}
    _, metrics, computed = collect(inputs, tmp_path / "whole", **options)
    assert computed == 6
    collect(inputs, tmp_path / "parts", stop, **options)
    assert not list((tmp_path / "parts").glob("*.safetensors"))
    _, again, computed = collect(inputs, tmp_path / "parts", **options)
    # A block of a set is two batches, its last one a single batch.
    assert computed == 6 - {1: 0, 3: 3, 5: 5, 6: 6}[stop]
    assert again == metrics
    assert sorted(files(tmp_path / "whole")) == FILES
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_files_of_a_run_killed_while_writing_are_its_own(inputs, tmp_path, monkeypatch):
    expected, output = tmp_path / "whole", tmp_path / "parts"
    collect(inputs, expected)
    finish = CalibrationSet.finish

    def killed(self, collection, path):
        if self.name == "safety":
            raise KeyboardInterrupt
        return finish(self, collection, path)

    monkeypatch.setattr(CalibrationSet, "finish", killed)
    collect(inputs, output, stop=100)
    monkeypatch.undo()
    assert (output / "utility.safetensors").exists()
    assert (output / UNFINISHED / COMPLETE).exists()
    assert collect(inputs, output)[2] == 0
    assert files(output) == files(expected)
    with pytest.raises(OutputExistsError):
        collect(inputs, output)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"points": {**POINTS, "utility": "base"}}, "another point .utility"),
        ({"weights": [0.5]}, "another point"),
        ({"estimator": "kfac"}, "another estimator .exact, now kfac"),
        ({"rows": 5}, "another data_fingerprint"),
        ({"batch_size": 3}, "another order of the rows"),
    ],
)
def test_an_unfinished_collection_of_something_else_is_refused(inputs, tmp_path, change, named):
    collect(inputs, tmp_path, stop=4, block_samples=2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(FisherError, match=rf"{named}.*delete"):
        collect(inputs, tmp_path, **{"block_samples": 2, **change})
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.warns(UserWarning, match="dropped, as FisherCollector.overwrite says"):
        _, _, computed = collect(inputs, tmp_path, overwrite=True, **{"block_samples": 2, **change})
    # What was collected of the other set is of use where the change is about this one.
    others = 5 if "points" in change or "weights" in change else 6
    assert computed == (4 if "batch_size" in change else others)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES


def test_samples_are_random_rows_in_their_order(inputs):
    whole = collect(inputs)[0]["utility"]
    assert whole.metadata.available == whole.metadata.count == 6
    assert whole.metadata.stopped == ""
    part = collect(inputs, max_samples=4)[0]["utility"]
    taken = part.metadata.sequences
    assert part.metadata.count == len(taken) == 4
    assert taken == sorted(taken) != [0, 1, 2, 3]
    assert part.metadata.available == 6
    assert part.metadata.stopped == "max_samples"
    for name, fisher in part.modules.items():
        expected = whole.modules[name].samples[taken]
        torch.testing.assert_close(fisher.samples, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("estimator", ["exact", "ekfac"])
def test_a_sample_is_accepted_by_the_merge_of_its_rows(inputs, tmp_path, estimator):
    collect(inputs, tmp_path, max_samples=4, estimator=estimator)
    statistics = FisherStatistics.open(tmp_path / "utility.safetensors")
    module, data = small_module(inputs), small_data(inputs.base)
    module.configure_model()
    identity = module.fisher_metadata("utility")
    identity.pop("base_model")
    assert identity.pop("point_fingerprint") == statistics.metadata.point_fingerprint
    rows = data.validation_fingerprint("utility")
    statistics.check_matches(**identity, data_fingerprint=rows, count=6)
    with pytest.raises(FisherError, match="count is 6, but this merge has 4"):
        statistics.check_matches(**identity, data_fingerprint=rows, count=4)
    if estimator == "exact":
        fisher = next(iter(statistics.modules.values()))
        assert fisher.numbers().tolist() == statistics.metadata.sequences


def test_a_set_stops_when_its_eigenspaces_have_converged(inputs, tmp_path):
    options = {"points": {"utility": "utility"}, "rows": 60, "block_samples": 8}
    statistics, metrics, computed = collect(inputs, stop_similarity=0.3, **options)
    metadata = statistics["utility"].metadata
    assert metadata.stopped == "converged"
    assert metadata.similarity >= 0.3
    assert 16 < metadata.count < 60
    assert metadata.count % 8 == 0
    assert computed == metadata.count // 2
    assert metadata.sequences != list(range(metadata.count))
    # The NLL that is logged is that of the sequences taken.
    sampled = collect(inputs, max_samples=metadata.count, **options)
    assert sampled[0]["utility"].metadata.sequences == metadata.sequences
    assert metrics["val_nll"] == pytest.approx(sampled[1]["val_nll"], rel=1e-5)
    strict = collect(inputs, stop_similarity=0.999, **options)[0]["utility"].metadata
    assert strict.stopped == ""
    assert strict.count == 60
    assert 0 < strict.similarity < 0.999


def test_gradients_beyond_the_budget_lie_in_a_temporary_folder(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    expected = collect(inputs)[0]
    assert list(tmp_path.iterdir()) == []
    found = collect(inputs, memory_budget_gib=1e-5)[0]
    assert len(list(tmp_path.iterdir())) == 2
    for name in POINTS:
        assert found[name].metadata == expected[name].metadata
        for module, fisher in expected[name].modules.items():
            assert torch.equal(found[name].modules[module].samples, fisher.samples)
    del found
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_cannot_work_are_refused(inputs):
    for options, message in (
        ({"max_samples": 0}, "max_samples must be at least 1"),
        ({"stop_similarity": 1.5}, "stop_similarity must be between 0 and 1"),
        ({"stop_similarity": 0.9, "estimator": "kfac"}, "'kfac' does not keep: use exact or ekfac"),
        ({"block_samples": 0}, "must be positive"),
        ({"memory_budget_gib": 0}, "must be positive"),
    ):
        with pytest.raises(MisconfigurationException, match=message):
            FisherCollector(**options)
    with pytest.raises(MisconfigurationException, match="too little for the 64 sequences"):
        collect(inputs, stop_similarity=0.9, memory_budget_gib=1e-4)


def test_random_order_is_asked_of_data_that_can_give_it(inputs):
    data = small_data(inputs.base)
    collector = FisherCollector(POINTS, max_samples=3, block_samples=5)
    trainer = quiet_trainer(callbacks=[collector])
    trainer.validate(small_module(inputs), datamodule=data, verbose=False)
    assert data.random_blocks == dict.fromkeys(POINTS, RandomBlocks(3, 3))
    collector = FisherCollector(POINTS)
    quiet_trainer(callbacks=[collector]).validate(
        small_module(inputs), datamodule=data, verbose=False
    )
    assert data.random_blocks == {}


def test_blocks_are_those_of_the_sampler_where_a_remainder_joins_a_batch(inputs, monkeypatch):
    """Else the rows between two checks would be the longest of a block, not a random sample."""
    sizes = []

    def block_batches(limits, batch_size, processes, space=None):
        sizes.append(batch_size)
        return 2

    monkeypatch.setattr(CollectionLimits, "block_batches", block_batches)
    # What two processes have of batches of two rows, when the last one has five rows of both.
    monkeypatch.setattr(calibration_set, "gather", lambda own, trainer: [own + 1, own])
    collect(inputs, stop_similarity=0.9)
    assert set(sizes) == {2}


KILLED = """
import os, signal, sys
import lightning.pytorch as pl
from callbacks import FisherCollector
from sst_lightning.algebra.methods import SST
from tests.small_merge import Inputs, quiet_trainer, small_data, small_module

class Kill(pl.Callback):
    left = int(sys.argv[3])
    def on_validation_batch_end(self, trainer, module, outputs, batch, index, dataloader_idx=0):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

command, output = sys.argv[1:3]
inputs = Inputs(*sys.argv[4:])
module, data = small_module(inputs), small_data(inputs.base, 2)
callbacks = [Kill()]
if command == "validate":
    callbacks.insert(0, FisherCollector(output=output, block_samples=2))
    quiet_trainer(callbacks=callbacks).validate(module, datamodule=data)
else:
    trainer = quiet_trainer(callbacks=callbacks)
    trainer.merge(module, data, method=SST(iterations=1), output=output, evaluate=False)
"""


def killed_process(inputs, command, output, batches):
    arguments = [command, str(output), str(batches), *vars(inputs).values()]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        env=environment,
        capture_output=True,
        check=False,
    )


@pytest.mark.slow
def test_a_killed_validate_goes_on(inputs, tmp_path):
    process = killed_process(inputs, "validate", tmp_path / "parts", batches=8)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    # Eight of nine batches; that in which it was killed was written already, or not.
    points = {**POINTS, "harmless": "utility"}
    _, _, computed = collect(inputs, tmp_path / "parts", points=points, block_samples=2)
    assert computed in (1, 2)
    collect(inputs, tmp_path / "whole", points=points, block_samples=2)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_merge_goes_on(inputs, tmp_path):
    """Killed in its second pass, at the first merge: the first pass is not repeated."""
    process = killed_process(inputs, "merge", tmp_path / "parts", batches=12)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    watch, results = StopAfter(), []
    for output, callbacks in ((tmp_path / "parts", [watch]), (tmp_path / "whole", [])):
        trainer = quiet_trainer(callbacks=callbacks)
        module, data = small_module(inputs), small_data(inputs.base, 2)
        trainer.merge(module, data, method=SST(iterations=1), output=str(output), evaluate=False)
        results.append((output / "adapter" / "adapter_model.safetensors").read_bytes())
        assert [path.name for path in output.iterdir()] == ["adapter"]
    assert results[0] == results[1]
    # Nine batches at the adapters were there; of the six at the merge their block was not.
    assert watch.computed == 6
