"""SIGTERM and Ctrl-C: a run ends where it can be continued, with the exit code of its signal."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(SystemExit):
    """A signal asked the run to stop; the exit code is 128 + its number, as shells have it.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise :class:`Interrupted` at SIGTERM or Ctrl-C, so that temporary files are removed.

    The default action of SIGTERM ends a process without unwinding it. A signal that the process
    ignores (Ctrl-C in a background job of a script) stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in _heard():
        signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopOnSignal(Callback):
    """Ends a Trainer's run that gets SIGTERM or Ctrl-C.

    ``fit`` ends after the batch under way, on all processes after the same one, so that a checkpoint
    can be saved that training continues from; a second Ctrl-C ends it at once, without a checkpoint.
    Other runs end at once: what they have finished is on disk.

    It takes the place of Lightning's handler, after which the program exits with 0, which lets runs
    go on that get the signal in their last batch, and which waits for the other processes inside the
    handler (Lightning 2.6).
    """

    def __init__(self) -> None:
        self._received: int | None = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning, which gives them back at the end of the run."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over."""
        self._listen(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over."""
        self._listen(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over."""
        self._listen(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Stop ``fit`` if any process got a signal."""
        self._stop_together(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop ``fit`` after a validation pass if any process got a signal."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._stop_together(trainer)

    def _listen(self, trainer: Trainer) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in _heard():
                signal.signal(number, partial(self._receive, trainer))

    def _receive(self, trainer: Trainer, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            # The first one is being obeyed. Only a person who presses Ctrl-C twice means "at once".
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._received = number
        if trainer.strategy.launcher is not None:
            # A terminal sends Ctrl-C to all of them; a second one would end them without a checkpoint.
            trainer.strategy.launcher.kill(signal.SIGTERM)
        if trainer.state.fn != TrainerFn.FITTING:
            raise Interrupted(number)

    def _stop_together(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            raise Interrupted(self._received or signal.SIGTERM)


def _heard() -> list[signal.Signals]:
    """The signals that the process does not ignore."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def _raise(number: int, frame: FrameType | None) -> None:
    raise Interrupted(number)
