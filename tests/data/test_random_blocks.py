import pytest

from sst_lightning.algebra.errors import DataError
from sst_lightning.data import Alpaca
from sst_lightning.data.random_blocks import RandomBlocks, RandomBlockSampler
from tests.nano import save_nano

LENGTHS = [(7 * n) % 53 + 1 for n in range(50)]


def taken(blocks, batch_size=2, processes=1, seed=0):
    """Global batches."""
    parts = [
        list(RandomBlockSampler(LENGTHS, batch_size, blocks, seed, processes, rank))
        for rank in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    return [[i for part in batches for i in part] for batches in zip(*parts, strict=True)]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("most", [None, 50, 49, 20, 7])
def test_every_row_once_and_blocks_do_not_depend_on_processes(processes, most):
    blocks = RandomBlocks(12, most)
    batches = taken(blocks, 2, processes)
    rows = [index for batch in batches for index in batch]
    assert len(rows) == len(set(rows)) == (most or 50)
    expected = [index for batch in taken(blocks, 2, 1) for index in batch]
    # A rest that is too small for all processes joins the last batch.
    for start in range(0, len(rows) - 24, 12):
        assert set(rows[start : start + 12]) == set(expected[start : start + 12])
    sampler = RandomBlockSampler(LENGTHS, 2, blocks, 0, processes, 0)
    assert len(sampler) == len(batches)


def test_a_sample_is_a_beginning_of_the_random_order_and_batches_are_of_similar_length():
    whole = taken(RandomBlocks(10))
    assert taken(RandomBlocks(10, 20)) == whole[:10]
    assert taken(RandomBlocks(10), seed=1) != whole
    for start in range(0, 25, 5):
        lengths = [LENGTHS[i] for batch in whole[start : start + 5] for i in batch]
        assert lengths == sorted(lengths, reverse=True)
    # No block holds the longest rows, which an order by length would put first.
    first = {i for batch in whole[:5] for i in batch}
    longest = sorted(range(50), key=lambda i: -LENGTHS[i])[:10]
    assert len(first & set(longest)) < 6


def test_fewer_rows_than_processes_are_refused():
    with pytest.raises(DataError, match="2 examples cannot be shared by 3 processes"):
        RandomBlockSampler(LENGTHS, 1, RandomBlocks(6, 2), 0, 3, 0)


def test_a_data_module_takes_its_validation_rows_in_random_blocks(tmp_path):
    data = Alpaca(str(save_nano(tmp_path)), calibration_samples=12, batch_size=2, max_length=160)
    data.setup()
    ids = [row.id for row in data.rows["calibration"]]
    data.random_blocks = {"calibration": RandomBlocks(4, 6)}
    found = [row.id for batch in data.val_dataloader() for row in batch["rows"]]
    order = RandomBlockSampler([1] * 12, 2, RandomBlocks(4, 6), data.seed).order
    assert set(found) == {ids[i] for i in order}
    data.random_blocks = {}
    assert len([row for batch in data.val_dataloader() for row in batch["rows"]]) == 12
