"""Validation rows in random order, so that the first ones stand for all of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sst_lightning.data.batching import LengthBucketBatchSampler


@dataclass(frozen=True)
class RandomBlocks:
    """How a part of a set is taken.

    Attributes:
        size: sequences of a block; whole batches of all processes.
        most: sequences to take; ``None`` is all.
    """

    size: int
    most: int | None = None


class RandomBlockSampler(LengthBucketBatchSampler):
    """A seeded random order of the rows, cut into blocks that are each sorted by length.

    What lies before the end of any block is a simple random sample of the rows, and batches still
    hold rows of similar length. The order is the same in every epoch and for any number of
    processes; the base class sorts all rows, longest first, of which no beginning is a sample.

    Args:
        lengths: number of tokens of each example.
        batch_size: examples per batch and process.
        blocks: size of the blocks and number of rows.
        seed: of the order.
        num_replicas: number of processes; ``None`` asks torch.distributed, else 1.
        rank: index of this process; ``None`` asks torch.distributed, else 0.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        blocks: RandomBlocks,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        order = list(range(len(lengths)))
        random.Random(f"sst-merge random blocks {seed}").shuffle(order)
        self.order = order[: blocks.most]
        self.block_size = blocks.size
        # The base class counts the batches and checks the number of processes by the rows taken.
        taken = [lengths[index] for index in self.order]
        super().__init__(taken, batch_size, False, seed, num_replicas, rank)

    def _global_batches(self) -> list[list[int]]:
        size = self.batch_size * self.num_replicas
        batches: list[list[int]] = []
        for start in range(0, len(self.order), self.block_size):
            places = range(start, min(start + self.block_size, len(self.order)))
            block = [self.order[i] for i in sorted(places, key=lambda i: -self.lengths[i])]
            batches += [block[i : i + size] for i in range(0, len(block), size)]
        if len(batches) > 1 and len(batches[-1]) < self.num_replicas:
            rest = batches.pop()
            batches[-1] = batches[-1] + rest
        return batches
