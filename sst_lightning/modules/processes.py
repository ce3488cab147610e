"""Several processes: how they start, and what they tell each other beside gradients."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer

Value = TypeVar("Value")


def start_processes(trainer: Trainer) -> None:
    """Start the strategy's other processes and connect them, as the Trainer's entry points do.

    Lightning starts a process by running the command line again from its beginning. An entry point
    that is made of several of Lightning's calls this after its checks and before it writes: else
    the checks of the other processes would find what rank zero has written meanwhile.
    """
    launcher = trainer.strategy.launcher
    if launcher is not None:
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)


def gather(own: Value, trainer: Trainer) -> list[Value]:
    """Return what each process has, in the order of ranks; every process must call it."""
    if trainer.world_size == 1:
        return [own]
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, own)
    return parts


def gather_by_id(own: dict[str, Value], trainer: Trainer) -> dict[str, Value]:
    """Return what all processes have, by id; every process must call it."""
    return {key: value for part in gather(own, trainer) for key, value in part.items()}


def on_rank_zero(function: Callable[[], Value], trainer: Trainer) -> Value:
    """Call ``function`` on rank zero alone; every process returns its result or raises its error.

    For what only one process can do (write, then look at what was written), what must be decided
    once, and what need not be computed again: no process goes on, or waits, without the others.

    Raises:
        Exception: what ``function`` raised.
    """
    if trainer.world_size == 1:
        return function()
    outcome: tuple[Any, Exception | None] = None, None
    if trainer.is_global_zero:
        try:
            outcome = function(), None
        except Exception as raised:
            # With its traceback here; the other processes get the error alone.
            trainer.strategy.broadcast((None, raised))
            raise
    result, error = trainer.strategy.broadcast(outcome)
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]
