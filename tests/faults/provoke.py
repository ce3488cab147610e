"""Callbacks that provoke a fault at a given place; YAML and command line name them."""

import os
import signal
from typing import Literal

from lightning.pytorch import Callback

Place = Literal["train", "validation", "test"]


class SignalAt(Callback):
    """Sends this process a signal when a batch begins.

    Args:
        number: of the signal.
        batch: how many batches of ``place`` begin before.
        place: kind of batches that are counted.
        rank: process that sends it, where there are several.
    """

    def __init__(self, number: int, batch: int, place: Place = "train", rank: int = 0) -> None:
        self.number = number
        self.left = batch
        self.place = place
        self.rank = rank

    def on_train_batch_start(self, trainer, *arguments) -> None:
        """Count a batch of training."""
        self._count("train", trainer)

    def on_validation_batch_start(self, trainer, *arguments) -> None:
        """Count a batch of validation."""
        self._count("validation", trainer)

    def on_test_batch_start(self, trainer, *arguments) -> None:
        """Count a batch of a test."""
        self._count("test", trainer)

    def _count(self, place: Place, trainer) -> None:
        if place != self.place or trainer.sanity_checking or trainer.global_rank != self.rank:
            return
        if self.left == 0:
            os.kill(os.getpid(), signal.Signals(self.number))
        self.left -= 1
