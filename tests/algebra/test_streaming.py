"""Merging folders module by module against the same merge with everything in memory."""

import pytest
import torch

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.errors import FisherError, SSTMergeError
from sst_lightning.algebra.factor_store import FactorStore
from sst_lightning.algebra.fisher_file import FisherMetadata, FisherStatistics, mix
from sst_lightning.algebra.methods import METHODS, SST, MergeProblem, TaskArithmetic
from sst_lightning.algebra.rank import EXACT, RankRule
from sst_lightning.algebra.streaming import merge_folders
from tests.algebra.builders import random_diagonal, random_exact, random_kronecker, random_lora

NAMES = ("layers.0.q_proj", "layers.0.o_proj", "layers.1.down_proj")
NEEDS_MODELS = ("safe_lora", "safe_merge")
MAKERS = {
    "exact": lambda shape, seed: random_exact(6, *shape, seed),
    "kfac": lambda shape, seed: random_kronecker(*shape, seed),
    "diagonal": lambda shape, seed: random_diagonal(*shape, seed),
}


@pytest.fixture
def folders(tmp_path):
    """Two utility adapters, one of which lacks a module, and a safety adapter."""
    adapters = [
        random_lora(1, rank=2, names=NAMES),
        random_lora(2, rank=1, names=NAMES[:2]),
        random_lora(3, rank=3, names=NAMES),
    ]
    paths = [tmp_path / name for name in ("one", "two", "safety")]
    for adapter, path in zip(adapters, paths, strict=True):
        adapter.save(path)
    return paths


def save_fishers(folders, folder, estimator="exact", weights=(1.0, 1.0), **changes):
    """Random Fishers in the core space of the adapters; returns them by calibration set."""
    adapters = [LoraAdapter.load(path) for path in folders]
    space = CoreSpace.from_adapters(adapters)
    result = {}
    for number, name in enumerate(("utility", "harmless", "safety")):
        modules = {
            module: MAKERS[estimator](basis.shape, 10 * number + i)
            for i, (module, basis) in enumerate(space.bases.items())
        }
        values = {
            "base_model": "nano", "base_fingerprint": "b", "data_name": name,
            "adapter_fingerprints": [adapter.fingerprint for adapter in adapters],
            "data_fingerprint": "d", "count": 6, "estimator": estimator,
            "point": "safety" if name == "safety" else f"utility {list(weights)}",
        }  # fmt: skip
        result[name] = FisherStatistics(modules, space, FisherMetadata(**{**values, **changes}))
        result[name].save(folder / f"{name}.safetensors")
    return result


def in_memory(folders, method, alpha, fishers=None, weights=(), rule=EXACT):
    adapters = [LoraAdapter.load(path) for path in folders]
    problem = MergeProblem(CoreSpace.from_adapters(adapters), adapters, weights)
    if fishers is not None:
        mixture = mix(method.utility_mixture(fishers, {}))
        problem = MergeProblem(problem.space, adapters, weights, mixture, fishers["safety"].modules)
    return method.merge_prepared(problem, method.prepare(problem), alpha, rule)


def assert_same_merge(found, expected):
    assert found.adapter.factors.keys() == expected.adapter.factors.keys()
    for name, factors in expected.adapter.factors.items():
        torch.testing.assert_close(
            found.adapter.factors[name].delta(), factors.delta(), rtol=1e-5, atol=1e-6
        )
    assert found.discarded == pytest.approx(expected.discarded, abs=1e-9)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NEEDS_MODELS])
def test_every_method_merges_folders_as_in_memory(name, folders, tmp_path):
    method = METHODS[name](**({"iterations": 0} if name == "sst" else {}))
    fishers = None
    if method.requires_fisher:
        fishers = save_fishers(folders, tmp_path / "fisher", method.estimator)
    fisher = tmp_path / "fisher" if method.requires_fisher else None
    found = merge_folders(folders[:2], folders[2], method, 0.7, fisher=fisher)
    assert_same_merge(found, in_memory(folders, method, 0.7, fishers))


@pytest.mark.parametrize(
    "method", [SST(iterations=0), SST(iterations=0, scope="global"), TaskArithmetic()]
)
def test_weights_ranks_and_progress(method, folders, tmp_path):
    fishers = save_fishers(folders, tmp_path, weights=(0.5, 2.0))
    seen = []

    def progress(names):
        for name in names:
            seen.append(name)
            yield name

    rule = RankRule(2)
    fisher = tmp_path if method.requires_fisher else None
    found = merge_folders(folders[:2], folders[2], method, 1.5, rule, (0.5, 2.0), fisher, progress)
    given = fishers if method.requires_fisher else None
    assert_same_merge(found, in_memory(folders, method, 1.5, given, (0.5, 2.0), rule))
    assert seen == sorted(NAMES)
    assert found.adapter.rank == 2
    assert found.adapter.base_model == "nano"


def test_a_fisher_of_another_machines_axes_gives_the_same_merge(folders, tmp_path):
    """Flipped and exchanged axes span the same space."""
    method = SST(iterations=0)
    fishers = save_fishers(folders, tmp_path)
    expected = merge_folders(folders[:2], folders[2], method, 1.0, fisher=tmp_path)
    for name, statistics in fishers.items():
        bases, modules = {}, {}
        for module, basis in statistics.space.bases.items():
            turn = [torch.eye(size).double().flip(0) * -1 for size in basis.shape]
            bases[module] = type(basis)(
                (basis.q_out.double() @ turn[0].T).float(),
                (basis.q_in.double() @ turn[1].T).float(),
            )
            modules[module] = statistics.modules[module].rotated(*turn)
        FisherStatistics(modules, CoreSpace(bases), statistics.metadata).save(
            tmp_path / f"{name}.safetensors"
        )
    assert_same_merge(
        merge_folders(folders[:2], folders[2], method, 1.0, fisher=tmp_path), expected
    )


def test_what_does_not_fit_is_refused(folders, tmp_path):
    utility, safety = folders[:2], folders[2]
    with pytest.raises(SSTMergeError, match="needs the base model"):
        merge_folders(utility, safety, SST(), fisher=tmp_path)
    with pytest.raises(SSTMergeError, match="give --fisher"):
        merge_folders(utility, safety, SST(iterations=0))
    with pytest.raises(SSTMergeError, match="at least one utility"):
        merge_folders([], safety, TaskArithmetic())
    with pytest.raises(SSTMergeError, match="1 utility weights for 2"):
        merge_folders(utility, safety, TaskArithmetic(), utility_weights=[1.0])
    with pytest.raises(FisherError, match=r"utility\.safetensors: no such Fisher file"):
        merge_folders(utility, safety, SST(iterations=0), fisher=tmp_path)
    save_fishers(folders, tmp_path)
    with pytest.raises(FisherError, match="at another point"):
        merge_folders(
            utility, safety, SST(iterations=0), utility_weights=(1.0, 0.5), fisher=tmp_path
        )
    with pytest.raises(FisherError, match="other adapters"):
        merge_folders(utility[::-1], safety, SST(iterations=0), fisher=tmp_path)
    with pytest.raises(FisherError, match="estimator 'exact', but the method uses 'kfac'"):
        merge_folders(utility, safety, METHODS["regmean"](), fisher=tmp_path)


@pytest.mark.parametrize("name", ["ties", "task_arithmetic", "sst"])
def test_a_store_on_disk_gives_the_same_merge(name, folders, tmp_path):
    method = METHODS[name](**({"iterations": 0} if name == "sst" else {}))
    arguments = {"rule": RankRule("full")}
    if name == "sst":
        save_fishers(folders, tmp_path / "fisher")
        arguments["fisher"] = tmp_path / "fisher"
    expected = merge_folders(folders[:-1], folders[-1], method, 0.7, **arguments)
    (tmp_path / "store").mkdir()
    store = FactorStore(tmp_path / "store")
    found = merge_folders(folders[:-1], folders[-1], method, 0.7, **arguments, store=store)
    assert found.adapter.factors is store
    assert len(list((tmp_path / "store").iterdir())) == len(NAMES)
    assert_same_merge(found, expected)
    for adapter, path in ((found.adapter, "found"), (expected.adapter, "expected")):
        adapter.save(tmp_path / path)
    weights = [(tmp_path / path / "adapter_model.safetensors") for path in ("found", "expected")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_store_is_a_mapping(tmp_path):
    store = FactorStore(tmp_path)
    first, second, third = (random_lora(seed, names=("m",)).factors["m"] for seed in (1, 2, 3))
    store["a"], store["b"] = first, second
    del store["a"]
    store["c"], store["b"] = first, third
    assert list(store) == ["b", "c"]
    assert len(list(tmp_path.iterdir())) == 2
    for name, expected in (("b", third), ("c", first)):
        assert store[name].scaling == expected.scaling
        assert torch.equal(store[name].A, expected.A)
        assert torch.equal(store[name].B, expected.B)
    with pytest.raises(KeyError):
        store["a"]
