"""Callbacks that provoke a fault at a given place; YAML and command line name them."""

import os
import resource
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


class FullDiskAt(Callback):
    """From a batch of training on, no file can get larger than a few bytes.

    Args:
        batch: how many batches of training begin before.
        size: bytes a file may have.
    """

    def __init__(self, batch: int, size: int = 4096) -> None:
        self.left = batch
        self.size = size

    def on_train_batch_start(self, trainer, *arguments) -> None:
        """Set the limit of this process."""
        if self.left == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
        self.left -= 1


class NaNAt(Callback):
    """Makes the trained weights NaN before a batch of training, as a step that diverged would.

    Args:
        batch: how many batches of training begin before.
    """

    def __init__(self, batch: int) -> None:
        self.left = batch

    def on_train_batch_start(self, trainer, module, *arguments) -> None:
        """Spoil the weights."""
        if self.left == 0:
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(float("nan"))
        self.left -= 1
