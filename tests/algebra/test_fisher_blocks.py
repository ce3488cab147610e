"""Blocks of an unfinished Fisher: in memory, in a temporary folder, and found again."""

import gc

import pytest
import torch

from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher_blocks import GIBIBYTE, Block, BlockStore, join_states

IDENTITY = {"point": "utility", "adapter_fingerprints": ["a", "b"]}


def block(seed, modules=("first", "second")):
    source = torch.Generator().manual_seed(seed)
    states = {
        name: [
            torch.randn(3, 3, generator=source, dtype=torch.float64),
            torch.randn(2, 3, 4, generator=source),
        ]
        for name in modules
    }
    indices = torch.tensor([2 * seed, 2 * seed + 1])
    return Block(indices, torch.randn(2, generator=source), torch.tensor([3, 5]), states)


def assert_equal(found, expected):
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.nll, expected.nll)
    assert torch.equal(found.tokens, expected.tokens)
    assert list(found.states) == list(expected.states)
    for name, state in expected.states.items():
        for one, two in zip(found.states[name], state, strict=True):
            assert torch.equal(one, two)


def test_blocks_in_a_folder_are_found_again(tmp_path):
    store = BlockStore(tmp_path / "blocks", IDENTITY, process=1)
    for seed in range(3):
        store.append(block(seed))
    again = BlockStore(tmp_path / "blocks", IDENTITY, process=1)
    assert len(again) == 3
    for seed, found in enumerate(again):
        assert_equal(found, block(seed))
    assert len(BlockStore(tmp_path / "blocks", IDENTITY, process=0)) == 0
    again.keep(2)
    assert len(BlockStore(tmp_path / "blocks", IDENTITY, process=1)) == 2
    again.remove()
    assert not (tmp_path / "blocks").exists()


def test_blocks_stay_in_memory_up_to_the_budget_and_go_to_disk_beyond(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    size = block(0).bytes()
    assert size == 2 * (9 * 8 + 24 * 4)
    store = BlockStore(None, IDENTITY, memory_budget_gib=3.5 * size / GIBIBYTE)
    for seed in range(2):
        store.append(block(seed))
        assert not store.on_disk
    store.append(block(2))  # a fourth would not fit
    assert store.on_disk
    store.append(block(3))
    assert len(list(tmp_path.glob("sst-merge-fisher-*/*"))) == 4
    for seed, found in enumerate(store):
        assert_equal(found, block(seed))
    del store, found
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({**IDENTITY, "point": "safety"}, "another point .utility, now safety"),
        ({**IDENTITY, "adapter_fingerprints": ["a"]}, "another adapter_fingerprints"),
        ({**IDENTITY, "estimator": "exact"}, "another estimator .None, now exact"),
    ],
)
def test_blocks_of_another_collection_are_refused(tmp_path, other, named):
    BlockStore(tmp_path, IDENTITY).append(block(0))
    with pytest.raises(FisherError, match=rf"process-0-block-00000\.safetensors: .*{named}"):
        BlockStore(tmp_path, other)


def test_a_damaged_block_and_those_after_it_are_left_out_loudly(tmp_path):
    store = BlockStore(tmp_path, IDENTITY)
    for seed in range(3):
        store.append(block(seed))
    path = tmp_path / "process-0-block-00001.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match=r"block-00001.*collected again"):
        again = BlockStore(tmp_path, IDENTITY)
    assert len(again) == 1
    again.append(block(1))
    assert len(again) == 2
    assert_equal(again[1], block(1))


def test_a_block_that_cannot_be_written_says_what_to_do(tmp_path):
    (tmp_path / "blocks").write_text("not a folder")
    store = BlockStore(None, IDENTITY)
    store.folder = tmp_path / "blocks"
    with pytest.raises(FisherError, match=r"cannot be written .*the next run goes on from it"):
        store.append(block(0))


def test_joined_states_add_sums_and_append_rows():
    states = [block(seed).states["first"] for seed in range(2)]
    total, rows = join_states(1, states)
    assert torch.equal(total, states[0][0] + states[1][0])
    assert torch.equal(rows, torch.cat([states[0][1], states[1][1]]))
    assert len(join_states(1, [state[:1] for state in states])) == 1
