"""A study that is killed in the training of an adapter: it goes on from the last checkpoint."""

import signal

import pytest
import yaml

from callbacks import FitCheckpoint
from tests.cli.commands import TINY
from tests.faults.processes import run_child
from tests.nano import save_nano

pytestmark = pytest.mark.slow
ADAPTER = "out/a6/adapter/adapter_model.safetensors"


def write_study(folder):
    folder.mkdir()
    trainer = {key.removeprefix("--").split("=")[0]: False for key in TINY["trainer"][1:]}
    callbacks = [
        {
            "class_path": "callbacks.AdapterExport",
            "init_args": {"path": "{output}/{stage}/adapter"},
        },
        {
            "class_path": "callbacks.FitCheckpoint",
            "init_args": {"dirpath": "{output}/{stage}/checkpoints", "every_n_train_steps": 1},
        },
    ]
    arguments = {
        "model.base": "../nano", "model.r": 2, "data.max_samples": 16, "data.calibration_samples": 4,
        "data.max_length": 120, "data.batch_size": 2, "trainer.accumulate_grad_batches": 2,
        "trainer.max_epochs": 1, "trainer.logger": False, "trainer.accelerator": "cpu",
        **trainer, "trainer.callbacks": callbacks,
    }  # fmt: skip
    stage = {"command": "fit", "config": "a6_alpaca.yaml", "arguments": arguments}
    study = {"title": "Nano", "output": "out", "seed": 0, "stages": {"a6": stage}}
    (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))


def test_a_study_is_killed_while_it_trains(tmp_path):
    save_nano(tmp_path / "nano")
    for name in ("whole", "killed"):
        write_study(tmp_path / name)
    words = ["study", "--config=study.yaml"]

    def trap():
        hook = FitCheckpoint.on_train_batch_end

        def kill(self, trainer, *arguments):
            hook(self, trainer, *arguments)
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGKILL)

        FitCheckpoint.on_train_batch_end = kill

    killed = run_child(tmp_path / "killed", words, before=trap)
    assert killed.code == 137, killed.output
    assert not (tmp_path / "killed" / ADAPTER).exists()
    last = run_child(tmp_path / "killed", words)
    assert "Restored all states" in last.output
    whole = run_child(tmp_path / "whole", words)
    assert last.code == whole.code == 0, last.output + whole.output
    adapters = [(tmp_path / name / ADAPTER).read_bytes() for name in ("killed", "whole")]
    assert adapters[0] == adapters[1]
