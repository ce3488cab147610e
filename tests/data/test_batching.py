from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.batching import EncodedDataset, LengthBucketBatchSampler, collate
from sst_lightning.data.rows import Row
from sst_lightning.data.tokenization import Encoded


def encoded(prompt: int, completion: int, name: str = "r") -> Encoded:
    ids = list(range(1, prompt + completion + 1))
    row = Row(name, "p", "c", "utility", "g")
    return Encoded(ids, [-100] * prompt + ids[prompt:], prompt, row)


def test_collate_pads_sequences_right_and_prompts_left():
    batch = collate([encoded(2, 1, "a"), encoded(3, 2, "b")], pad_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 9, 9], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100, -100], [-100, -100, -100, 4, 5]]
    assert batch["prompt_ids"].tolist() == [[9, 1, 2], [1, 2, 3]]
    assert batch["prompt_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert [row.id for row in batch["rows"]] == ["a", "b"]
    assert batch["input_ids"].dtype == torch.long


lengths = st.lists(st.integers(1, 200), min_size=1, max_size=120)


@settings(max_examples=100, deadline=None)
@given(
    lengths=lengths,
    batch_size=st.integers(1, 9),
    replicas=st.integers(1, 4),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_index_once_and_as_many_batches_on_every_rank(
    lengths, batch_size, replicas, shuffle, epoch
):
    if len(lengths) < replicas:
        with pytest.raises(DataError, match="processes"):
            LengthBucketBatchSampler(lengths, batch_size, num_replicas=replicas, rank=0)
        return
    seen, counts = [], set()
    for rank in range(replicas):
        sampler = LengthBucketBatchSampler(
            lengths, batch_size, shuffle, num_replicas=replicas, rank=rank, window=2
        )
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(0 < len(batch) <= batch_size + 1 for batch in batches)
        counts.add(len(batches))
        seen += [index for batch in batches for index in batch]
    assert sorted(seen) == list(range(len(lengths)))
    assert len(counts) == 1


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        sampler = LengthBucketBatchSampler([5] * 50, 4, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_unshuffled_order_is_longest_first():
    sampler = LengthBucketBatchSampler([3, 9, 5, 7], 2)
    assert list(sampler) == [[1, 3], [2, 0]]


def test_batches_hold_similar_lengths():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 400, (512,), generator=generator).tolist()
    spread = [
        max(lengths[i] for i in batch) - min(lengths[i] for i in batch)
        for batch in LengthBucketBatchSampler(lengths, 8, shuffle=True)
    ]
    # Random batches of 8 differ by about 300 tokens, those of a sorted window by a sixteenth.
    assert sum(spread) / len(spread) < 60


def test_batch_size_must_be_positive():
    with pytest.raises(DataError, match="batch_size"):
        LengthBucketBatchSampler([1, 2], 0)


class Recorder(LightningModule):
    """Records the ids of every training batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append([row.id for row in batch["rows"]])
        return self.weight * batch["input_ids"].float().mean()

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(loader, **options):
    module = Recorder()
    Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, loader)
    return module.seen


@pytest.fixture
def loader():
    items = [encoded(2, 1 + i % 5, str(i)) for i in range(20)]
    sampler = LengthBucketBatchSampler([len(item) for item in items], 4, shuffle=True)
    return DataLoader(
        EncodedDataset(items),
        batch_size=None,
        sampler=sampler,
        collate_fn=partial(collate, pad_id=0),
    )


def test_lightning_keeps_the_sampler_and_sets_its_epoch(loader):
    seen = fit(loader, max_epochs=2)
    first, second = seen[:5], seen[5:]
    for epoch in (first, second):
        assert sorted(int(i) for batch in epoch for i in batch) == list(range(20))
    assert first != second


def test_overfit_batches_works(loader):
    assert len(fit(loader, max_epochs=2, overfit_batches=3)) == 6
