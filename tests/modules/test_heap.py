"""What a pass frees goes back to the system."""

import mmap
from pathlib import Path

import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from sst_lightning.modules import heap
from sst_lightning.modules.trainer import SSTTrainer

MIB = 1 << 20


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_free_blocks_between_others_go_back():
    # Below 128 KiB, glibc's first threshold, so that no block is a mapping of its own.
    blocks = [torch.ones(25 << 10) for _ in range(2000)]
    kept = blocks[::20]
    full = resident()
    del blocks
    heap.release_free_memory()
    # 200 MB were filled; pages that a kept block shares stay.
    assert full - resident() > 150 * MIB
    assert all(bool((block == 1).all()) for block in kept)


def test_every_run_of_a_trainer_releases_once_all_callbacks_are_done(monkeypatch, tmp_path):
    order = []
    monkeypatch.setattr(heap, "release_free_memory", lambda: order.append("released"))

    class Model(BoringModel):
        def on_validation_end(self):
            order.append("validated")

        def on_test_end(self):
            order.append("tested")

        def on_train_end(self):
            order.append("trained")

    trainer = SSTTrainer(
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=1,
        limit_val_batches=1,
        limit_test_batches=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    for run, last in ((trainer.validate, "validated"), (trainer.test, "tested")):
        order.clear()
        run(Model(), verbose=False)
        assert last in order
        assert order[-1] == "released"
    order.clear()
    trainer.fit(Model())
    # After the validation pass in it, which is not the end of a run.
    assert order == ["released", "validated", "trained", "released"]
