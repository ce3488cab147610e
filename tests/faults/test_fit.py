"""``fit`` that is killed, starved of disk or fed NaN: the next run ends with the same adapter.

The oracle is the adapter of a run that nothing happened to, byte by byte.
"""

import shutil
import signal
from pathlib import Path

import pytest
import torch

from sst_lightning.algebra import files
from tests.cli.commands import TINY
from tests.faults.processes import run_child, run_ranks
from tests.nano import save_nano

pytestmark = pytest.mark.slow
ADAPTER = "runs/a6_alpaca/adapter/adapter_model.safetensors"
CHECKPOINTS = "runs/a6_alpaca/checkpoints"
# 40 rows in batches of 4, 4 batches to a step, 3 steps to an epoch.
FIT = [
    "fit", "--config=configs/a6_alpaca.yaml", "--model.base=../nano", "--model.r=2",
    "--data.max_samples=40", "--data.calibration_samples=4", "--data.max_length=120",
    "--trainer.max_epochs=2", "--trainer.logger=false", *TINY["trainer"],
]  # fmt: skip
CALLBACKS = [
    {"class_path": "callbacks.AdapterExport", "init_args": {"path": "runs/a6_alpaca/adapter"}},
    {
        "class_path": "callbacks.FitCheckpoint",
        "init_args": {"dirpath": CHECKPOINTS, "every_n_train_steps": 2},
    },
]


def fit(folder, *more, fault=None, before=None, ranks=False):
    """One process; ``fault`` is a callback of tests/faults/provoke.py with its arguments."""
    callbacks = list(CALLBACKS)
    if fault is not None:
        name, arguments = fault
        callbacks.append({"class_path": f"tests.faults.provoke.{name}", "init_args": arguments})
    text = str(callbacks).replace("'", '"')
    arguments = [*FIT, f"--trainer.callbacks={text}", *more]
    return run_ranks(folder, arguments) if ranks else run_child(folder, arguments, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder with the nano base and a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("fit")
    save_nano(folder / "nano")
    ended = fit(folder / "whole")
    assert ended.code == 0, ended.output
    return folder


def steps(folder):
    """The optimizer step of each checkpoint; every one must be whole."""
    paths = sorted((folder / CHECKPOINTS).glob("*.ckpt"))
    return [torch.load(path, weights_only=True)["global_step"] for path in paths]


def assert_goes_on(whole, folder, *more):
    ended = fit(folder, *(more or ["--ckpt_path=last"]))
    assert ended.code == 0, ended.output
    assert "Restored all states" in ended.output
    assert (folder / ADAPTER).read_bytes() == (whole / "whole" / ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("number", "place", "batch", "saved"),
    [
        (signal.SIGTERM, "train", 5, 1),  # between two optimizer steps: back to the first
        (signal.SIGTERM, "validation", 0, 3),
        (signal.SIGINT, "train", 13, 4),
        (signal.SIGKILL, "train", 13, 2),  # step 3 is made again
    ],
)
def test_a_signal(whole, tmp_path, number, place, batch, saved):
    folder = whole / tmp_path.name
    fault = {"number": int(number), "batch": batch, "place": place}
    ended = fit(folder, fault=("SignalAt", fault))
    assert ended.code == 128 + number, ended.output
    assert "Traceback" not in ended.output
    assert not (folder / ADAPTER).exists()
    assert set(steps(folder)) == {saved}
    if number != signal.SIGKILL:
        assert (
            f"stopped by {number.name}; to go on, run the same command with --ckpt_path last"
            in (ended.output)
        )
    assert_goes_on(whole, folder)


def signal_in_saving(number, name):
    """Send the process a signal when the file ``name`` is written but not yet in its place."""
    replace = Path.replace

    def trap(path, target):
        if Path(target).name == name:
            signal.raise_signal(number)
        return replace(path, target)

    files.Path.replace = trap


def test_sigkill_while_a_checkpoint_is_saved(whole, tmp_path):
    folder = whole / tmp_path.name
    ended = fit(folder, before=lambda: signal_in_saving(signal.SIGKILL, "last.ckpt"))
    assert ended.code == 128 + signal.SIGKILL, ended.output
    # The file beside last.ckpt was finished before.
    assert steps(folder) == [2]
    assert_goes_on(whole, folder, f"--ckpt_path={CHECKPOINTS}/epoch=0-step=2.ckpt")


def test_a_second_sigterm_while_the_checkpoint_of_the_first_is_saved(whole, tmp_path):
    folder = whole / tmp_path.name
    ended = fit(
        folder,
        fault=("SignalAt", {"number": int(signal.SIGTERM), "batch": 5}),
        before=lambda: signal_in_saving(signal.SIGTERM, "last.ckpt"),
    )
    assert ended.code == 128 + signal.SIGTERM, ended.output
    assert steps(folder) == [1, 1]
    assert_goes_on(whole, folder)


def test_a_full_disk(whole, tmp_path):
    folder = whole / tmp_path.name
    ended = fit(folder, fault=("FullDiskAt", {"batch": 12}))
    assert ended.code == 2, ended.output
    assert "epoch=1-step=4.ckpt: does not fit on its disk" in ended.output
    assert "bytes or more, and" in ended.output
    assert "Traceback" not in ended.output
    assert steps(folder) == [2, 2]
    assert not list(folder.rglob("*.tmp"))
    assert_goes_on(whole, folder)


def test_a_loss_that_is_not_finite(whole, tmp_path):
    folder = whole / tmp_path.name
    ended = fit(folder, fault=("NaNAt", {"batch": 9}))
    assert ended.code == 2, ended.output
    assert "the loss of batch 9 is nan at step 2, from rows [" in ended.output
    assert steps(folder) == [2, 2]
    assert_goes_on(whole, folder)


def test_a_damaged_checkpoint(whole, tmp_path):
    """The error names the checkpoint beside it that is whole; nothing starts from the beginning."""
    folder = whole / tmp_path.name
    fit(folder, fault=("SignalAt", {"number": int(signal.SIGKILL), "batch": 13}))
    last = folder / CHECKPOINTS / "last.ckpt"
    good = last.read_bytes()
    middle = len(good) // 2
    damages = [
        b"", good[:middle], b"not a checkpoint", good[:middle] + bytes(99) + good[middle + 99 :]
    ]  # fmt: skip
    other = f"{CHECKPOINTS}/epoch=0-step=2.ckpt"
    for damaged in damages:
        last.write_bytes(damaged)
        ended = fit(folder, "--ckpt_path=last")
        assert ended.code == 2, ended.output
        assert "last.ckpt: damaged, or no checkpoint" in ended.output
        assert f"--ckpt_path {folder / other}" in ended.output
        assert not (folder / ADAPTER).exists()
    torch.save({"state_dict": {}}, last)
    missing = fit(folder, "--ckpt_path=last")
    assert missing.code == 2
    assert "it has no 'pytorch-lightning_version'" in missing.output
    rank = fit(folder, f"--ckpt_path={other}", "--model.r=3")
    assert rank.code == 2
    assert "the checkpoint was made with another r" in rank.output
    shutil.copy(folder / other, last)
    assert_goes_on(whole, folder, f"--ckpt_path={other}")


def test_one_of_two_processes_is_killed(whole, tmp_path):
    """The other one ends, and both go on together; SIGTERM to one of them ends both."""
    folder, calm = whole / tmp_path.name, whole / "two processes"
    assert [ended.code for ended in fit(calm, ranks=True)] == [0, 0]
    killed = {"number": int(signal.SIGKILL), "batch": 6, "rank": 1}
    first, second = fit(folder, fault=("SignalAt", killed), ranks=True)
    assert second.code == 137
    assert first.code == 1, first.output
    assert steps(folder) == [2, 2]
    stopped = {"number": int(signal.SIGTERM), "batch": 1, "rank": 1}
    ended = fit(folder, "--ckpt_path=last", fault=("SignalAt", stopped), ranks=True)
    assert [process.code for process in ended] == [143, 143], ended[0].output
    ended = fit(folder, "--ckpt_path=last", ranks=True)
    assert [process.code for process in ended] == [0, 0], ended[0].output
    assert "Restored all states" in ended[0].output
    assert (folder / ADAPTER).read_bytes() == (calm / ADAPTER).read_bytes()
