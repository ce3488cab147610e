"""One set's collection: blocks, interruption, processes; the Fisher is the same in all cases."""

import pytest
import torch
from torch import distributed, multiprocessing

from sst_lightning.algebra.accumulators import make_accumulator
from sst_lightning.algebra.eigenspace import EigenspaceMonitor
from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher_blocks import BlockStore
from sst_lightning.algebra.fisher_file import _tensors
from sst_lightning.modules.fisher_collection import FisherCollection

MODULES = {"first": (3, 4), "second": (2, 5)}
SEQUENCES, TOKENS = 11, 6
BATCHES = [[7, 2], [10, 0], [3, 9], [5, 1], [8, 4], [6]]
ESTIMATORS = ["exact", "kfac", "ekfac", "diagonal", "vila"]


def projections(name, indices):
    """P and R of some sequences, the same whoever asks."""
    p, q = MODULES[name]
    pairs = []
    for index in indices:
        source = torch.Generator().manual_seed(100 * index + p)
        width = torch.randn(TOKENS, p + q, generator=source)
        pairs.append((width[:, :q], width[:, q:]))
    return [torch.stack(part) for part in zip(*pairs, strict=True)]


def collection(
    estimator="exact", order=BATCHES, folder=None, block_batches=2, monitor=None, rank=0
):
    store = BlockStore(folder, {"estimator": estimator}, rank)
    return FisherCollection(list(MODULES), estimator, order, block_batches, store, monitor)


def run(target, batches=None, start=0):
    """Give the collection its batches, as the callback does; returns those computed."""
    computed = []
    for number in range(start, len(target.order) if batches is None else batches):
        if target.known(number) is not None:
            continue
        computed.append(number)
        indices = target.order[number]
        for name in reversed(MODULES):
            target.update(name, *projections(name, indices))
        target.finish_batch(number, torch.tensor(indices) / 2, torch.tensor(indices) + 1)
    return computed


def estimates(target):
    return {name: _tensors(fisher) for name, fisher in target.estimates()}


def assert_same(one, two, exactly=True):
    assert one.keys() == two.keys()
    for name in one:
        for key, tensor in one[name].items():
            tolerance = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(two[name][key], tensor, **tolerance)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_blocks_give_the_estimate_of_one_accumulator(estimator):
    target = collection(estimator)
    run(target)
    for name, fisher in target.estimates():
        accumulator = make_accumulator(estimator)
        for indices in BATCHES:
            accumulator.update(*projections(name, indices))
        expected = accumulator.finish().dense()
        torch.testing.assert_close(fisher.dense(), expected, rtol=1e-5, atol=1e-6)
        assert fisher.count == SEQUENCES


def test_samples_are_in_the_order_of_the_set():
    target = collection()
    run(target)
    samples = dict(target.estimates())["first"].samples
    for index in range(SEQUENCES):
        inputs, gradients = projections("first", [index])
        torch.testing.assert_close(samples[index], gradients[0].T @ inputs[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("interrupted", [1, 2, 5, 6])
def test_an_interrupted_collection_goes_on_and_gives_the_same(tmp_path, estimator, interrupted):
    whole = collection(estimator, folder=tmp_path / "whole")
    run(whole)
    run(collection(estimator, folder=tmp_path / "parts"), batches=interrupted)
    resumed = collection(estimator, folder=tmp_path / "parts")
    complete = 6 if interrupted == 6 else interrupted // 2 * 2
    assert resumed.resumed == complete
    nll, tokens = resumed.known(1) or (None, None)
    if complete:
        assert nll.tolist() == [5.0, 0.0]
        assert tokens.tolist() == [11, 1]
    assert run(resumed) == list(range(complete, 6))
    assert_same(estimates(whole), estimates(resumed))


def test_memory_and_disk_give_the_same(tmp_path):
    on_disk, in_memory = collection(folder=tmp_path), collection()
    for target in (on_disk, in_memory):
        run(target)
    assert on_disk.store.on_disk
    assert not in_memory.store.on_disk
    assert_same(estimates(on_disk), estimates(in_memory))


def test_a_convergence_that_was_interrupted_stops_at_the_same_sequence(tmp_path):
    order = [[2 * n, 2 * n + 1] for n in range(60)]

    def monitored(folder):
        return collection(
            order=order, folder=folder, block_batches=4, monitor=EigenspaceMonitor(0.7)
        )

    whole = monitored(tmp_path / "whole")
    computed = run(whole)
    assert whole.stopped
    assert 8 < len(computed) < 60
    assert len(computed) % 4 == 0
    nll, tokens = whole.known(len(computed))
    assert len(nll) == len(tokens) == 0
    run(monitored(tmp_path / "parts"), batches=len(computed) - 5)
    resumed = monitored(tmp_path / "parts")
    assert not resumed.stopped
    run(resumed)
    assert resumed.monitor.similarity == whole.monitor.similarity
    assert_same(estimates(whole), estimates(resumed))
    assert monitored(tmp_path / "parts").stopped


def test_a_bad_gradient_is_an_error_at_its_block_and_is_not_kept(tmp_path):
    target = collection(folder=tmp_path)
    for number in range(2):
        for name in MODULES:
            inputs, gradients = projections(name, target.order[number])
            target.update(name, inputs, gradients * torch.nan)
        if number == 0:
            target.finish_batch(0, torch.zeros(2), torch.ones(2))
    with pytest.raises(FisherError, match="NaN or infinite"):
        target.finish_batch(1, torch.zeros(2), torch.ones(2))
    assert len(collection(folder=tmp_path).store) == 0


def test_an_empty_set_is_refused():
    with pytest.raises(FisherError, match="calibration set is empty"):
        estimates(collection(order=[]))


def collect_in_process(rank, folder, estimator, threshold):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    order = [batch[rank::2] for batch in EVEN_BATCHES]
    monitor = None if threshold is None else EigenspaceMonitor(threshold)
    first = collection(estimator, order, folder / "blocks", 2, monitor, rank)
    # Rank 1 is killed before it writes its second block.
    run(first, batches=4 if rank == 0 else 3) if threshold is None else None
    target = collection(
        estimator,
        order,
        folder / "blocks",
        2,
        None if threshold is None else EigenspaceMonitor(threshold),
        rank,
    )
    assert target.resumed == (2 if threshold is None else 0)
    run(target)
    found = estimates(target)
    similarity = target.monitor and target.monitor.similarity
    torch.save({"found": found, "similarity": similarity}, folder / f"result-{rank}")
    distributed.destroy_process_group()


EVEN_BATCHES = [
    [7, 2, 10, 0], [3, 9, 5, 1], [8, 4, 6, 11], [14, 12, 13, 15],
    *([4 * n, 4 * n + 1, 4 * n + 2, 4 * n + 3] for n in range(4, 30)),
]  # fmt: skip


@pytest.mark.parametrize(("estimator", "threshold"), [("exact", 0.7), ("ekfac", None)])
def test_two_processes_give_what_one_gives(tmp_path, estimator, threshold):
    """Also after a kill between the blocks of two processes, and stopping at the same batch."""
    arguments = (tmp_path, estimator, threshold)
    multiprocessing.start_processes(collect_in_process, arguments, 2, start_method="fork")
    monitor = None if threshold is None else EigenspaceMonitor(threshold)
    single = collection(estimator, EVEN_BATCHES, block_batches=2, monitor=monitor)
    run(single)
    expected = estimates(single)
    for rank in range(2):
        result = torch.load(tmp_path / f"result-{rank}", weights_only=True)
        assert_same(expected, result["found"], exactly=estimator == "exact")
        if threshold is not None:
            assert single.stopped
            assert result["similarity"] == pytest.approx(single.monitor.similarity, abs=1e-12)
