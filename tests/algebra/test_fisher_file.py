import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sst_lightning.algebra.core import CoreBasis, CoreSpace
from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher import ExactFisher
from sst_lightning.algebra.fisher_file import (
    FisherMetadata,
    FisherStatistics,
    mix,
    write_samples,
)
from sst_lightning.algebra.tensor_file import TensorFile
from tests.algebra.builders import (
    random_core,
    random_diagonal,
    random_exact,
    random_kronecker,
    random_lora,
)
from tests.algebra.calibration import random_ekfac

MAKERS = {
    "exact": lambda shape, seed: random_exact(5, *shape, seed),
    "kfac": lambda shape, seed: random_kronecker(*shape, seed),
    "ekfac": lambda shape, seed: random_ekfac(*shape, seed),
    "diagonal": lambda shape, seed: random_diagonal(*shape, seed),
    "vila": lambda shape, seed: random_diagonal(*shape, seed),
}


def statistics(estimator="exact", seed=0):
    adapters = [random_lora(1), random_lora(2)]
    space = CoreSpace.from_adapters(adapters)
    modules = {
        name: MAKERS[estimator](basis.shape, seed + i)
        for i, (name, basis) in enumerate(space.bases.items())
    }
    metadata = FisherMetadata(
        base_model="nano",
        base_fingerprint="base",
        adapter_fingerprints=[adapter.fingerprint for adapter in adapters],
        data_name="utility",
        data_fingerprint="rows",
        count=next(iter(modules.values())).count,
        estimator=estimator,
        point="utility [1.0]",
    )
    return FisherStatistics(modules, space, metadata)


@pytest.mark.parametrize("estimator", MAKERS)
def test_round_trip(tmp_path, estimator):
    original = statistics(estimator)
    original.save(tmp_path / "utility.safetensors")
    again = FisherStatistics.load(tmp_path / "utility.safetensors")
    assert again.metadata == original.metadata
    assert again.path == tmp_path / "utility.safetensors"
    assert again.modules.keys() == original.modules.keys()
    for name, fisher in original.modules.items():
        assert type(again.modules[name]) is type(fisher)
        assert again.modules[name].count == fisher.count
        torch.testing.assert_close(again.modules[name].dense(), fisher.dense(), rtol=0, atol=0)
        assert torch.equal(again.space.bases[name].q_in, original.space.bases[name].q_in)
    assert [path.name for path in tmp_path.iterdir()] == ["utility.safetensors"]


def test_weights_and_scale_survive(tmp_path):
    original = statistics()
    name, fisher = next(iter(original.modules.items()))
    weighted = ExactFisher(fisher.samples, torch.arange(1.0, 6.0), 0.3)
    replace(original, modules={**original.modules, name: weighted}).save(tmp_path / "f.safetensors")
    again = FisherStatistics.load(tmp_path / "f.safetensors").modules[name]
    torch.testing.assert_close(again.dense(), weighted.dense(), rtol=1e-14, atol=0)


def test_unknown_estimator_is_refused(tmp_path):
    path = tmp_path / "utility.safetensors"
    original = statistics("diagonal")
    other = replace(original.metadata, estimator="shampoo")
    replace(original, metadata=other).save(path)
    with pytest.raises(FisherError, match=r"incomplete Fisher file .unknown estimator 'shampoo'"):
        FisherStatistics.load(path)


def test_estimators_of_one_class_do_not_mix():
    parts = [(1.0, statistics("diagonal")), (1.0, statistics("vila"))]
    with pytest.raises(FisherError, match="one estimator"):
        mix(parts)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "utility.safetensors"
    with pytest.raises(FisherError, match=r"utility\.safetensors: no such Fisher file"):
        FisherStatistics.load(path)
    statistics().save(path)
    content = path.read_bytes()
    for size in (len(content) // 2, 20, 0):
        path.write_bytes(content[:size])
        with pytest.raises(FisherError, match=r"utility\.safetensors: damaged or truncated"):
            FisherStatistics.load(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(FisherError, match=r"utility\.safetensors: not a Fisher file"):
        FisherStatistics.load(path)
    header = {"format": "sst-merge fisher 1", "metadata": "{}"}
    save_file({"x": torch.ones(2)}, path, metadata=header)
    with pytest.raises(FisherError, match=r"utility\.safetensors: incomplete Fisher file"):
        FisherStatistics.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_fingerprint", "another"),
        ("adapter_fingerprints", ["a", "b"]),
        ("point", "utility [0.5]"),
        ("data_fingerprint", "other rows"),
        ("count", 2),
    ],
)
def test_fisher_of_another_merge_is_refused(tmp_path, field, value):
    path = tmp_path / "utility.safetensors"
    statistics().save(path)
    loaded = FisherStatistics.load(path)
    expected = {
        "base_fingerprint": "base",
        "adapter_fingerprints": loaded.metadata.adapter_fingerprints,
        "point": "utility [1.0]",
        "data_fingerprint": "rows",
        "count": loaded.metadata.count,
    }
    loaded.check_matches(**expected)
    with pytest.raises(FisherError, match=rf"utility\.safetensors: {field} is .*Collect it again"):
        loaded.check_matches(**{**expected, field: value})


def test_mixture_of_statistics_is_module_by_module():
    parts = [statistics(seed=0), statistics(seed=50)]
    mixed = mix([(0.25, parts[0]), (0.75, parts[1])])
    for name, fisher in mixed.items():
        expected = 0.25 * parts[0].modules[name].dense() + 0.75 * parts[1].modules[name].dense()
        torch.testing.assert_close(fisher.dense(), expected)
    fewer = dict(list(parts[1].modules.items())[:1])
    with pytest.raises(FisherError, match="same modules"):
        mix([(1.0, parts[0]), (1.0, replace(parts[1], modules=fewer))])
    with pytest.raises(FisherError, match="at least one part"):
        mix([])


def turned(space, seed=3, signs_only=False):
    """The same spans with other orthonormal bases."""
    bases = {}
    for name, basis in space.bases.items():
        rotations = [random_core(n, n, seed) for n in basis.shape]
        rotations = [torch.linalg.qr(rotation)[0].float() for rotation in rotations]
        if signs_only:
            rotations = [torch.diag(rotation[0].sign()) for rotation in rotations]
        bases[name] = CoreBasis(basis.q_out @ rotations[0], basis.q_in @ rotations[1])
    return CoreSpace(bases)


@pytest.mark.parametrize("estimator", MAKERS)
def test_fisher_follows_the_adapters_into_other_bases(estimator):
    """The cost of the same ΔW is the same, whichever bases the core space was given."""
    original = statistics(estimator)
    adapter = random_lora(1)
    cores = original.space.encode(adapter)
    for signs_only in (True, False):
        space = turned(original.space, signs_only=signs_only)
        if estimator in ("diagonal", "vila") and not signs_only:
            with pytest.raises(FisherError, match="other axes"):
                original.to_space(space)
            continue
        moved = original.to_space(space)
        for name, core in space.encode(adapter).items():
            expected = original.modules[name].rayleigh(cores[name])
            assert moved.modules[name].rayleigh(core) == pytest.approx(expected, rel=1e-4)
            mixed = mix([(1.0, original), (1.0, moved)])[name].rayleigh(cores[name])
            assert mixed == pytest.approx(expected, rel=1e-4)
    assert original.to_space(original.space).modules == original.modules


def test_fisher_of_another_core_space_is_refused():
    original = replace(statistics(), path=Path("utility.safetensors"))
    others = (
        ([random_lora(3), random_lora(4)], r"core space of module 'layers\.0\.q_proj' is not that"),
        ([random_lora(1), random_lora(2, rank=4)], "is not that of this merge"),
        ([random_lora(1, names=("layers.0.q_proj",))], r"'layers\.1\.down_proj' is only in"),
    )
    for adapters, message in others:
        with pytest.raises(FisherError, match=rf"utility\.safetensors: .*{message}"):
            original.to_space(CoreSpace.from_adapters(adapters))


def test_samples_are_written_one_module_after_the_other(tmp_path):
    original = statistics()
    taken = [1, 4, 5, 7, 9]
    metadata = replace(original.metadata, available=12, stopped="max_samples", sequences=taken)
    seen = []

    def estimates():
        for name, fisher in original.modules.items():
            seen.append(name)
            yield name, fisher

    write_samples(tmp_path / "f.safetensors", original.space, metadata, estimates())
    again = FisherStatistics.open(tmp_path / "f.safetensors")
    assert seen == list(original.modules)
    assert again.metadata == metadata
    for name, fisher in original.modules.items():
        assert torch.equal(again.modules[name].samples, fisher.samples)
        assert again.modules[name].numbers().tolist() == taken
        assert torch.equal(again.space.bases[name].q_out, original.space.bases[name].q_out)
        torch.testing.assert_close(again.modules[name].dense(), fisher.dense(), rtol=0, atol=0)


def test_a_file_from_before_samples_could_be_fewer_is_read(tmp_path):
    path, original = tmp_path / "utility.safetensors", statistics()
    original.save(path)
    file = TensorFile(path)
    old = {
        key: value
        for key, value in json.loads(file.metadata["metadata"]).items()
        if key not in ("point_fingerprint", "available", "stopped", "similarity", "sequences")
    }
    tensors = {name: file.read(name) for name in file.shapes}
    save_file(tensors, path, metadata={**file.metadata, "metadata": json.dumps(old)})
    again = FisherStatistics.load(path)
    assert again.metadata == original.metadata
    again.check_matches("base", again.metadata.adapter_fingerprints, "utility [1.0]", "rows", 5)
