"""How much of a calibration set a Fisher collection sees, and how much of it is in memory."""

from dataclasses import dataclass

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from sst_lightning.algebra.accumulators import Estimator
from sst_lightning.algebra.fisher_blocks import GIBIBYTE
from sst_lightning.data.random_blocks import RandomBlocks

KEEPS_GRADIENTS = ("exact", "ekfac")
"""Estimators that keep every sequence's gradient until the end."""

BLOCK_SHARE = 0.25
"""Part of the memory budget that one block may take: others are being joined or written."""


@dataclass(frozen=True)
class CollectionLimits:
    """Limits of a collection; the attributes are the arguments of ``FisherCollector``.

    Raises:
        MisconfigurationException: a limit cannot be met.
    """

    estimator: Estimator = "exact"
    max_samples: int | None = None
    stop_similarity: float | None = None
    block_samples: int = 64
    memory_budget_gib: float = 4.0

    def __post_init__(self) -> None:
        if self.max_samples is not None and self.max_samples < 1:
            raise MisconfigurationException(
                f"FisherCollector.max_samples must be at least 1, got {self.max_samples}"
            )
        if self.stop_similarity is not None:
            if not 0 < self.stop_similarity < 1:
                raise MisconfigurationException(
                    "FisherCollector.stop_similarity must be between 0 and 1, got "
                    f"{self.stop_similarity}"
                )
            if self.estimator not in KEEPS_GRADIENTS:
                raise MisconfigurationException(
                    "FisherCollector.stop_similarity looks at gradients, which estimator "
                    f"'{self.estimator}' does not keep: use {' or '.join(KEEPS_GRADIENTS)}, or "
                    "max_samples"
                )
        if self.block_samples < 1 or not self.memory_budget_gib > 0:
            raise MisconfigurationException(
                "FisherCollector.block_samples and memory_budget_gib must be positive, got "
                f"{self.block_samples} and {self.memory_budget_gib}"
            )

    @property
    def wants_random_order(self) -> bool:
        """Whether a part of the set is to stand for all of it."""
        return self.max_samples is not None or self.stop_similarity is not None

    def random_blocks(self, batch_size: int, processes: int) -> RandomBlocks:
        """Return the order of rows in which any number of whole blocks is a random sample.

        Args:
            batch_size: sequences of a process's batch.
            processes: number of them.
        """
        size = self.block_batches(batch_size, processes) * batch_size * processes
        # Without checks in between a sample is sorted by length as a whole.
        return RandomBlocks(
            size if self.stop_similarity else self.max_samples or 1, self.max_samples
        )

    def block_batches(
        self, batch_size: int, processes: int, sequence_bytes: int | None = None
    ) -> int:
        """Return the number of batches of one process in a block.

        Args:
            batch_size: sequences of a process's batch.
            processes: number of them.
            sequence_bytes: of one sequence's gradients; without it the memory budget is left out.

        Raises:
            MisconfigurationException: the sequences between two checks exceed the memory budget.
        """
        batches = max(1, self.block_samples // (batch_size * processes))
        if self.estimator not in KEEPS_GRADIENTS or sequence_bytes is None:
            return batches
        budget = BLOCK_SHARE * self.memory_budget_gib * GIBIBYTE
        fitting = int(budget / (batch_size * sequence_bytes))
        if self.stop_similarity is not None and fitting < batches:
            raise MisconfigurationException(
                f"FisherCollector.memory_budget_gib {self.memory_budget_gib} is too little for the "
                f"{self.block_samples} sequences between two checks of stop_similarity (a sequence "
                f"takes {sequence_bytes / 2**20:.1f} MiB): raise it, or lower block_samples"
            )
        return max(1, min(batches, fitting))
