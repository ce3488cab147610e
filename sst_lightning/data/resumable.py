"""A DataLoader that a training run can be resumed with inside an epoch."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from sst_lightning.data.batching import Batch


class ResumableLoader(DataLoader[Batch]):
    """Remembers how many batches of which epoch it has yielded.

    Lightning stores ``state_dict`` in checkpoints. After ``load_state_dict`` the loader leaves out
    the batches of that epoch that were already yielded; later epochs are complete. The
    sampler's order must follow from seed and epoch alone
    (:class:`sst_lightning.data.batching.LengthBucketBatchSampler`).
    """

    _epoch = 0
    _yielded = 0
    _resume: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: its body runs at the first batch, when Lightning has set the epoch.
        self._epoch = int(getattr(self.sampler, "epoch", 0))
        self._yielded = 0
        skip = 0
        if self._resume is not None and self._resume[0] == self._epoch:
            skip = self._resume[1]
        self._resume = None
        for batch in super().__iter__():
            self._yielded += 1
            if self._yielded > skip:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch of the last batch, and how many of its batches were yielded."""
        return {"epoch": self._epoch, "batches": self._yielded}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that ``state`` counts."""
        self._resume = (state["epoch"], state["batches"])
        self._epoch, self._yielded = self._resume
