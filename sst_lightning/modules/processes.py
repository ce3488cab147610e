"""What processes tell each other beside gradients."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.pytorch import Trainer

Value = TypeVar("Value")


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
    result: Value | None = None
    error: Exception | None = None
    if trainer.is_global_zero:
        try:
            result = function()
        except Exception as raised:
            error = raised
    result, error = trainer.strategy.broadcast((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
