"""Learning-rate schedule: linear warm-up, then decay to zero."""

import math
from collections.abc import Callable
from typing import Literal

Decay = Literal["linear", "cosine"]


def warmup_then_decay(steps: int, warmup_ratio: float, decay: Decay) -> Callable[[int], float]:
    """Return the factor on the learning rate as a function of the optimizer step (from 0).

    Args:
        steps: optimizer steps of the whole run.
        warmup_ratio: share of the steps in which the factor rises linearly to 1.
        decay: shape of the way down to 0, which is reached after the last step.
    """
    warmup = math.ceil(steps * warmup_ratio)

    def factor(step: int) -> float:
        if step < warmup:
            # The first step is not wasted on a learning rate of zero.
            return (step + 1) / warmup
        left = max(0.0, (steps - step) / max(1, steps - warmup))
        return left if decay == "linear" else 0.5 * (1 - math.cos(math.pi * left))

    return factor
