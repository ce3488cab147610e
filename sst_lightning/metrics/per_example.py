"""Metrics that keep one score per example, so that models can be compared on the same items."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


def row_key(row_id: str) -> int:
    """Hash a row id to an int64: strings cannot be gathered across processes."""
    return int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:8], "big", signed=True)


class PerExampleMetric(Metric):
    """Mean of per-example scores; the states are concatenated across processes.

    Subclasses call :meth:`add` from ``update``.
    """

    full_state_update = False
    higher_is_better: bool | None = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("keys", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.keys: list[Tensor]
        self.values: list[Tensor]

    def add(self, ids: Sequence[str], scores: Sequence[float] | Tensor) -> None:
        """Append scores, (B,) in fp64.

        Raises:
            ValueError: numbers of ids and scores differ.
        """
        if len(ids) != len(scores):
            raise ValueError(f"{len(ids)} ids for {len(scores)} scores")
        # Also of no examples: processes gather tensors of one type.
        keys = [row_key(row_id) for row_id in ids]
        self.keys.append(torch.tensor(keys, dtype=torch.int64, device=self.device))
        values = torch.as_tensor(scores, dtype=torch.float64, device=self.device)
        self.values.append(values.detach())

    def add_nothing(self) -> None:
        """Take part in gathering without examples."""
        self.add([], [])

    def compute(self) -> Tensor:
        """Return the mean score; NaN if there is none."""
        return self._all(self.values).mean()

    def scores(self) -> dict[int, float]:
        """Return each example's score by :func:`row_key`, over all processes.

        Raises:
            ValueError: an example was scored twice.
        """
        with self.sync_context(should_sync=self._is_distributed()):
            keys, values = self._all(self.keys).tolist(), self._all(self.values).tolist()
        result = dict(zip(keys, values, strict=True))
        if len(result) != len(keys):
            raise ValueError(f"{type(self).__name__}: an example was scored twice")
        return {int(key): float(value) for key, value in result.items()}

    def _all(self, state: list[Tensor] | Tensor) -> Tensor:
        if isinstance(state, Tensor):
            return state
        return dim_zero_cat(state) if state else torch.zeros(0, dtype=torch.float64)

    @staticmethod
    def _is_distributed() -> bool:
        return torch.distributed.is_available() and torch.distributed.is_initialized()


class ExampleScore(PerExampleMetric):
    """Mean of scores that were computed elsewhere, such as a judge's."""

    def update(self, ids: Sequence[str], scores: Sequence[float] | Tensor) -> None:
        """Add scores, one for each id."""
        self.add(ids, scores)
