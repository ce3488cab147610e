"""Batches of similar length: little padding, every row exactly once, the same order every time."""

import random
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, distributed
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.rows import Row
from sst_lightning.data.tokenization import IGNORED, Encoded


class Batch(TypedDict):
    """One batch of B sequences.

    Attributes:
        input_ids: (B, T) prompt and completion, padded on the right.
        attention_mask: (B, T) 1 on tokens, 0 on padding.
        labels: (B, T) -100 on prompt and padding.
        prompt_ids: (B, P) prompt alone, padded on the left, for generation.
        prompt_mask: (B, P) 1 on tokens, 0 on padding.
        rows: The B rows.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    rows: list[Row]


def collate(items: Sequence[Encoded], pad_id: int) -> Batch:
    """Pad sequences to the longest of the batch.

    Args:
        items: B tokenised rows.
        pad_id: Token put where nothing is; masked out everywhere.
    """
    prompts = [item.input_ids[: item.prompt_length] for item in items]
    full = [item.input_ids for item in items]
    return Batch(
        input_ids=_pad(full, pad_id),
        attention_mask=_pad([[1] * len(ids) for ids in full], 0),
        labels=_pad([item.labels for item in items], IGNORED),
        prompt_ids=_pad(prompts, pad_id, left=True),
        prompt_mask=_pad([[1] * len(ids) for ids in prompts], 0, left=True),
        rows=[item.row for item in items],
    )


def _pad(sequences: list[list[int]], value: int, left: bool = False) -> Tensor:
    width = max(len(sequence) for sequence in sequences)
    padded = []
    for sequence in sequences:
        padding = [value] * (width - len(sequence))
        padded.append(padding + sequence if left else sequence + padding)
    return torch.tensor(padded, dtype=torch.long)


class EncodedDataset(Dataset[Any]):
    """Tokenised rows, fetched a batch at a time.

    The index is the list that `LengthBucketBatchSampler` yields; a single index, which Lightning's
    ``overfit_batches`` uses, gives a batch of one.
    """

    def __init__(self, items: Sequence[Encoded]) -> None:
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int | list[int]) -> list[Encoded]:
        indices = [index] if isinstance(index, int) else index
        return [self.items[i] for i in indices]


class LengthBucketBatchSampler(DistributedSampler[Any]):
    """Yields lists of indices of similar length.

    Shuffled, it permutes all indices, sorts windows of ``window`` batches by length, and permutes
    the batches; the permutation follows from seed and epoch alone. Unshuffled, it sorts by length,
    longest first, so that a batch that does not fit in memory fails at the beginning.

    With several processes each global batch is divided among them. No index is repeated to fill
    one (repeated examples bias a Fisher or a metric: 11 examples counted as 12 were 4.7 % off), and
    all processes get the same number of batches (unequal numbers hang in gradient reduction), unless
    ``even`` is off: an evaluation has nothing to wait for, and may have fewer rows than processes.

    Give it to a DataLoader as ``sampler`` with ``batch_size=None``: being a `DistributedSampler` it
    is left alone by Lightning, which would replace any other sampler, and gets ``set_epoch``.

    Args:
        lengths: Number of tokens of each example.
        batch_size: Examples per batch and process. The last batch may be smaller, or larger by one
            where a remainder is smaller than the number of processes.
        shuffle: Another order each epoch.
        seed: Of the order.
        num_replicas: Number of processes; None asks torch.distributed, else 1.
        rank: Index of this process; None asks torch.distributed, else 0.
        window: Batches that are sorted together.
        even: Give every process the same number of batches.

    Raises:
        DataError: There are fewer examples than processes with ``even``, or ``batch_size`` is below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
        window: int = 16,
        even: bool = True,
    ) -> None:
        parallel = distributed.is_available() and distributed.is_initialized()
        if num_replicas is None:
            num_replicas = distributed.get_world_size() if parallel else 1
        if rank is None:
            rank = distributed.get_rank() if parallel else 0
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        if even and len(lengths) < num_replicas:
            raise DataError(
                f"{len(lengths)} examples cannot be shared by {num_replicas} processes: "
                "use more rows or fewer devices"
            )
        super().__init__(_Sized(len(lengths)), num_replicas, rank, shuffle=shuffle, seed=seed)
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.window = window
        self.even = even

    def __len__(self) -> int:
        """Number of batches of this process in an epoch."""
        total, size = len(self.lengths), self.batch_size * self.num_replicas
        full, rest = divmod(total, size)
        if not self.even:
            return full + (rest > self.rank)
        # A remainder too small to give every process an example joins the last full batch.
        return full + (rest >= self.num_replicas or (rest > 0 and full == 0))

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._global_batches():
            own = batch[self.rank :: self.num_replicas]
            if own:
                yield own

    def _global_batches(self) -> list[list[int]]:
        size = self.batch_size * self.num_replicas
        order = list(range(len(self.lengths)))
        generator = random.Random(f"sst-merge batches {self.seed} {self.epoch}")
        if self.shuffle:
            generator.shuffle(order)
            span = size * self.window
        else:
            span = max(len(order), 1)
        batches: list[list[int]] = []
        for start in range(0, len(order), span):
            # Stable sort: equal lengths stay in their (shuffled) order.
            bucket = sorted(order[start : start + span], key=lambda i: -self.lengths[i])
            batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        if self.even and len(batches) > 1 and len(batches[-1]) < self.num_replicas:
            rest = batches.pop()
            batches[-1] = batches[-1] + rest
        if self.shuffle:
            generator.shuffle(batches)
        return batches


class _Sized(Dataset[Any]):
    """Stands for the data in `DistributedSampler`, which asks for nothing but its length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length
