import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given as hypothesis_given
from hypothesis import strategies
from safetensors.torch import load_file

from sst_lightning.algebra.adapter import LoraAdapter, LoraFactors
from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.errors import AdapterError, BackboneError, SSTMergeError
from sst_lightning.algebra.methods.base import MergeProblem
from sst_lightning.algebra.methods.safe_lora import SafeLoRA, SafeMERGE, project
from sst_lightning.algebra.rank import RankRule
from tests.algebra.builders import generator, random_lora
from tests.algebra.test_weight_files import write_model

NAMES = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(5))
D_OUT, D_IN = 9, 7


def models(folder, names=NAMES, dtype=torch.float32, shards=1, zero=()):
    """Write two models whose V has a rank that differs by module, so that the cosines spread."""
    g = generator(7)
    unaligned = {name: torch.randn(D_OUT, D_IN, generator=g) for name in names}
    aligned = {}
    for i, name in enumerate(names):
        rank = 1 + i % 4
        change = torch.randn(D_OUT, rank, generator=g) @ torch.randn(rank, D_IN, generator=g)
        aligned[name] = unaligned[name] + (0.0 if name in zero else 0.05) * change
    paths, read = [], []
    for part, weights in (("aligned", aligned), ("unaligned", unaligned)):
        tensors = {f"{name}.weight": weight.to(dtype) for name, weight in weights.items()}
        paths.append(str(write_model(folder / part, tensors, shards)))
        read.append({name: tensors[f"{name}.weight"].double().numpy() for name in names})
    return paths, {name: read[0][name] - read[1][name] for name in names}


def adapters(names=NAMES):
    """Three adapters of unequal ranks and scalings; the last is the safety adapter."""
    return [
        random_lora(1, rank=2, scaling=1.5, names=names),
        random_lora(2, rank=3, scaling=0.4, names=names),
        random_lora(3, rank=1, scaling=2.0, names=names),
    ]


def problem_of(parts, weights=()):
    return MergeProblem(CoreSpace.from_adapters(parts), parts, weights)


def deltas(adapter):
    return {name: factors.delta().numpy() for name, factors in adapter.factors.items()}


def dense_utility(parts, weights):
    names = {name for part in parts for name in part.factors}
    sums = {name: np.zeros((D_OUT, D_IN)) for name in names}
    for weight, part in zip(weights, parts[:-1], strict=True):
        for name, delta in deltas(part).items():
            sums[name] += weight * delta
    return sums


def dense_projection(changes, delta):
    """C ΔW and the cosine with dense matrices (Hsu et al., section 3)."""
    matrix = changes @ changes.T / np.linalg.norm(changes)
    image = matrix @ delta
    scale = np.linalg.norm(image) * np.linalg.norm(delta)
    return image, float((image * delta).sum() / scale) if scale else float("nan")


def assert_deltas(merged, expected, atol=1e-4):
    found = deltas(merged.adapter)
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", [{"threshold": 0.35}, {"number": 2}, {"threshold": 1.0}, {}])
def test_safe_lora_is_the_papers_formula(tmp_path, shards, dtype, rule):
    (aligned, unaligned), changes = models(tmp_path, dtype=dtype, shards=shards)
    parts, weights = adapters(), (0.7, 1.3)
    utility = dense_utility(parts, weights)
    images = {name: dense_projection(changes[name], utility[name]) for name in NAMES}
    order = sorted(NAMES, key=lambda name: images[name][1])
    if "threshold" in rule:
        chosen = {name for name in NAMES if images[name][1] <= rule["threshold"]}
    else:
        chosen = set(order[: rule.get("number", 10)])
    assert chosen
    if rule in ({"threshold": 0.35}, {"number": 2}):
        assert len(chosen) < len(NAMES)
    expected = {name: images[name][0] if name in chosen else utility[name] for name in NAMES}
    merged = SafeLoRA(aligned, unaligned, **rule).merge(problem_of(parts, weights), 1.0)
    assert_deltas(merged, expected)
    assert all(factors.rank == 5 for factors in merged.adapter.factors.values())
    assert merged.discarded == 0


def test_safe_lora_truncates_to_the_best_approximation(tmp_path):
    (aligned, unaligned), changes = models(tmp_path)
    parts = adapters()
    merged = SafeLoRA(aligned, unaligned, threshold=1.0).merge(problem_of(parts), 1.0, RankRule(2))
    lost = total = 0.0
    expected = {}
    for name, delta in dense_utility(parts, (1, 1)).items():
        u, s, vt = np.linalg.svd(dense_projection(changes[name], delta)[0])
        expected[name] = u[:, :2] * s[:2] @ vt[:2]
        lost, total = lost + (s[2:] ** 2).sum(), total + (s**2).sum()
    assert_deltas(merged, expected)
    assert merged.discarded == pytest.approx(lost / total, rel=1e-4)


def test_safe_lora_uses_neither_alpha_nor_the_safety_adapter(tmp_path):
    (aligned, unaligned), _ = models(tmp_path)
    parts = adapters()
    method = SafeLoRA(aligned, unaligned, number=2)
    assert method.uses_alpha is False
    assert SafeMERGE.uses_alpha is True
    first = method.merge(problem_of(parts), 0.0)
    assert_deltas(method.merge(problem_of(parts), 3.0), deltas(first.adapter), atol=0)
    other = [*parts[:-1], random_lora(9, rank=2, names=NAMES)]
    assert_deltas(method.merge(problem_of(other), 1.0), deltas(first.adapter), atol=0)


def test_equal_cosines_are_replaced_together(tmp_path):
    """The n-th smallest cosine is a threshold, in the published code too."""
    (aligned, unaligned), changes = models(tmp_path)
    parts = adapters()
    twins = [
        LoraAdapter({**part.factors, NAMES[1]: part.factors[NAMES[0]]}, "nano") for part in parts
    ]
    for path in (aligned, unaligned):
        tensors = load_file(f"{path}/model.safetensors")
        tensors[f"{NAMES[1]}.weight"] = tensors[f"{NAMES[0]}.weight"].clone()
        write_model(tmp_path / path, tensors)
    utility = dense_utility(twins, (1, 1))
    cosines = {n: dense_projection(changes[n], utility[n])[1] for n in NAMES if n != NAMES[1]}
    place = sorted(cosines, key=cosines.get).index(NAMES[0]) + 1
    replaced = SafeLoRA(aligned, unaligned, number=place).prepare(problem_of(twins))
    assert len(replaced) == place + 1
    assert {NAMES[0], NAMES[1]} <= set(replaced)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.7])
@pytest.mark.parametrize(
    "options", [{"threshold": 0.35}, {"threshold": 0.35, "weights": (0.5, 0.9)}, {"threshold": 0.0}]
)
def test_safe_merge_is_the_papers_formula(tmp_path, alpha, options):
    (aligned, unaligned), changes = models(tmp_path, shards=2)
    parts, weights = adapters(), (0.7, 1.3)
    safety = deltas(parts[-1])
    first, second = options.get("weights", (0.8, 0.2))
    expected, merged_modules = {}, 0
    for name, delta in dense_utility(parts, weights).items():
        below = dense_projection(changes[name], delta)[1] < options["threshold"]
        merged_modules += below
        expected[name] = first * delta + alpha * second * safety[name] if below else delta
    assert 0 < merged_modules < len(NAMES) or options["threshold"] == 0
    method = SafeMERGE(aligned, unaligned, **options)
    assert_deltas(method.merge(problem_of(parts, weights), alpha), expected)


def test_published_constants_are_the_defaults(tmp_path):
    (aligned, unaligned), _ = models(tmp_path)
    assert (SafeLoRA(aligned, unaligned).number, SafeLoRA(aligned, unaligned).threshold) == (
        10,
        None,
    )
    assert SafeLoRA(aligned, unaligned, threshold=0.5).number is None
    method = SafeMERGE(aligned, unaligned)
    assert (method.threshold, method.weights) == (0.35, (0.8, 0.2))


def test_at_the_threshold_safe_lora_replaces_and_safe_merge_keeps(tmp_path):
    (aligned, unaligned), _ = models(tmp_path)
    given = problem_of(adapters())
    cosines = SafeMERGE(aligned, unaligned).prepare(given)
    name, cosine = sorted(cosines.items(), key=lambda item: item[1])[2]
    assert name in SafeLoRA(aligned, unaligned, threshold=cosine).prepare(given)
    merged = SafeMERGE(aligned, unaligned, threshold=cosine).merge(given, 1.0)
    expected = dense_utility(given.adapters, (1, 1))[name]
    np.testing.assert_allclose(deltas(merged.adapter)[name], expected, rtol=0, atol=1e-4)


@hypothesis_given(
    rank=strategies.integers(1, 8),
    change_rank=strategies.integers(1, 7),
    seed=strategies.integers(0, 2**20),
    scale=strategies.sampled_from([1e-4, 1.0, 1e3]),
)
def test_thin_projection_is_the_dense_one(rank, change_rank, seed, scale):
    g = generator(seed)
    change = torch.randn(D_OUT, change_rank, generator=g) @ torch.randn(
        change_rank, D_IN, generator=g
    )
    factors = LoraFactors(
        scale * torch.randn(rank, D_IN, generator=g), torch.randn(D_OUT, rank, generator=g), 1.0
    )
    image, cosine = dense_projection(change.double().numpy(), factors.delta().numpy())
    found = project(change, factors)
    assert 0 <= found.cosine <= 1
    assert found.cosine == pytest.approx(cosine, abs=1e-5)
    tolerance = 1e-5 * (1 + np.abs(image).max())
    np.testing.assert_allclose(found.factors.delta().numpy(), image, rtol=0, atol=tolerance)


METHODS = {
    "number": lambda paths: SafeLoRA(*paths, number=2),
    "threshold": lambda paths: SafeLoRA(*paths, threshold=0.35),
    "safe_merge": lambda paths: SafeMERGE(*paths, threshold=0.35),
}


@pytest.fixture(params=METHODS)
def method(request, tmp_path):
    return METHODS[request.param](models(tmp_path)[0])


def test_order_of_the_utility_adapters_does_not_matter(method):
    first, second, safety = adapters()
    expected = deltas(method.merge(problem_of([first, second, safety], (0.7, 1.3)), 1.2).adapter)
    other = method.merge(problem_of([second, first, safety], (1.3, 0.7)), 1.2)
    assert_deltas(other, expected)


def test_factorisation_does_not_matter(method):
    parts = adapters()
    expected = deltas(method.merge(problem_of(parts), 1.2).adapter)
    others = []
    for part in parts:
        factors = {}
        for i, (name, item) in enumerate(part.factors.items()):
            r = torch.randn(item.rank, item.rank, generator=generator(i)).double()
            r += 3 * torch.eye(item.rank)
            a = torch.linalg.solve(r, item.A.double())
            factors[name] = LoraFactors(a, 2 * item.B.double() @ r, item.scaling / 2)
        others.append(LoraAdapter(factors, "nano"))
    assert_deltas(method.merge(problem_of(others), 1.2), expected)


@pytest.mark.parametrize("scale", [-3.0, 1e-3])
def test_merge_scales_with_the_adapters(method, scale):
    """The cosine does not see a common factor of all ΔW."""
    parts = adapters()
    expected = deltas(method.merge(problem_of(parts), 1.2).adapter)
    scaled = [
        LoraAdapter({n: replace(f, scaling=scale * f.scaling) for n, f in part.factors.items()})
        for part in parts
    ]
    found = deltas(method.merge(problem_of(scaled), 1.2).adapter)
    for name, delta in expected.items():
        np.testing.assert_allclose(found[name] / scale, delta, rtol=0, atol=1e-4)


def silent(seed, names=NAMES):
    zero = random_lora(seed, names=names)
    return LoraAdapter({n: replace(f, B=torch.zeros_like(f.B)) for n, f in zero.factors.items()})


def test_zero_utility_adapter_is_neutral(method):
    first, second, safety = adapters()
    expected = deltas(method.merge(problem_of([first, second, safety]), 1.2).adapter)
    assert_deltas(method.merge(problem_of([first, second, silent(5), safety]), 1.2), expected)
    absent = LoraAdapter({})
    assert_deltas(method.merge(problem_of([first, second, absent, safety]), 1.2), expected)


def test_single_adapter_without_safety(tmp_path):
    """Nothing is chosen: the utility adapter. Modules that are chosen change even then."""
    paths, changes = models(tmp_path)
    utility = adapters()[0]
    given, expected = problem_of([utility, silent(3)]), deltas(utility)
    for method in (SafeLoRA(*paths, threshold=0.0), SafeMERGE(*paths, threshold=0.0)):
        assert_deltas(method.merge(given, 2.0), expected)
    projected = {n: dense_projection(changes[n], d)[0] for n, d in expected.items()}
    assert_deltas(SafeLoRA(*paths, threshold=1.0).merge(given, 2.0), projected)
    shrunk = {name: 0.8 * delta for name, delta in expected.items()}
    assert_deltas(SafeMERGE(*paths, threshold=1.0).merge(given, 2.0), shrunk)


def test_undefined_cosine(tmp_path):
    """V = 0 or ΔW_u = 0: Safe LoRA keeps and does not count the module, SafeMERGE merges it."""
    paths, changes = models(tmp_path, zero=NAMES[:1])
    first, second, safety = adapters()
    utilities = [
        LoraAdapter({name: f for name, f in part.factors.items() if name != NAMES[1]})
        for part in (first, second)
    ]
    given = problem_of([*utilities, safety])
    utility = dense_utility([first, second, safety], (1, 1))
    utility[NAMES[1]] = np.zeros((D_OUT, D_IN))
    images = {name: dense_projection(changes[name], utility[name]) for name in NAMES[2:]}
    lowest = min(images, key=lambda name: images[name][1])
    expected = {**utility, lowest: images[lowest][0]}
    assert_deltas(SafeLoRA(*paths, number=1).merge(given, 1.0), expected)
    everything = {**utility, **{name: images[name][0] for name in images}}
    for rule in ({"number": 5}, {"threshold": 1.0}):
        assert_deltas(SafeLoRA(*paths, **rule).merge(given, 1.0), everything)
    merged = deltas(SafeMERGE(*paths, threshold=0.0001).merge(given, 1.5).adapter)
    for name in NAMES[:2]:
        delta = 0.8 * utility[name] + 0.3 * safety.factors[name].delta().numpy()
        np.testing.assert_allclose(merged[name], delta, rtol=0, atol=1e-4)
    unmerged = SafeMERGE(*paths, threshold=0.0).merge(given, 1.5)
    assert_deltas(unmerged, utility)
    nothing = problem_of([silent(5), safety])
    assert_deltas(
        SafeLoRA(*paths).merge(nothing, 1.0), dict.fromkeys(NAMES, np.zeros((D_OUT, D_IN)))
    )


def test_same_models_are_refused(tmp_path):
    (aligned, _), _ = models(tmp_path)
    with pytest.raises(SSTMergeError, match="SafeLoRA: aligned and unaligned must be two models"):
        SafeLoRA(aligned, f"{aligned}/../aligned")
    other, _ = models(tmp_path / "copy", zero=NAMES)
    for method in (SafeLoRA(*other), SafeMERGE(*other)):
        with pytest.raises(BackboneError, match=r"Safe\w+: .* hold the same weights in every"):
            method.merge(problem_of(adapters()), 1.0)


def test_models_that_do_not_fit_are_refused_before_weights_are_read(tmp_path, monkeypatch):
    (aligned, unaligned), _ = models(tmp_path, names=NAMES[:-1])
    (full, _), _ = models(tmp_path / "full")
    monkeypatch.setattr("sst_lightning.algebra.weight_files.WeightFiles.weight", None)
    for paths in ((aligned, unaligned), (full, unaligned), (unaligned, full)):
        for method in (SafeLoRA(*paths), SafeMERGE(*paths)):
            with pytest.raises(BackboneError, match=rf"no weight '{NAMES[-1]}.weight'"):
                method.prepare(problem_of(adapters()))
    wide = {f"{name}.weight": torch.ones(D_OUT, D_IN + 1) for name in NAMES}
    other = str(write_model(tmp_path / "wide", wide))
    with pytest.raises(AdapterError, match=rf"SafeLoRA: .*{NAMES[0]}' is \(9, 8\) in .*wide"):
        SafeLoRA(full, other).prepare(problem_of(adapters()))


@pytest.mark.parametrize("method", [SafeLoRA, SafeMERGE])
def test_missing_folders_are_refused_at_once(tmp_path, method):
    (aligned, _), _ = models(tmp_path)
    with pytest.raises(BackboneError, match="nowhere: no such model folder"):
        method(aligned, str(tmp_path / "nowhere"))
    with pytest.raises(BackboneError, match="nowhere: no such model folder"):
        method(str(tmp_path / "nowhere"), aligned)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (SafeLoRA, {"threshold": 0.5, "number": 3}, "SafeLoRA: threshold .* and number .* exclude"),
        (
            SafeLoRA,
            {"threshold": 1.1},
            r"SafeLoRA: threshold must be a cosine in \[0, 1\], got 1.1",
        ),
        (SafeLoRA, {"threshold": float("nan")}, "SafeLoRA: threshold .*got nan"),
        (SafeLoRA, {"number": 0}, "SafeLoRA: number must be .*got 0"),
        (SafeLoRA, {"number": 2.5}, "SafeLoRA: number must be .*got 2.5"),
        (SafeLoRA, {"number": True}, "SafeLoRA: number must be .*got True"),
        (SafeMERGE, {"threshold": -0.1}, "SafeMERGE: threshold .*got -0.1"),
        (SafeMERGE, {"weights": (0.8,)}, r"SafeMERGE: weights must be two .*got \(0.8,\)"),
        (SafeMERGE, {"weights": (0.8, -0.2)}, "SafeMERGE: weights must be two finite"),
        (SafeMERGE, {"weights": (0.8, float("inf"))}, "SafeMERGE: weights must be two finite"),
    ],
)
def test_bad_arguments_are_named(method, options, message):
    # Before the folders are looked at.
    with pytest.raises(SSTMergeError, match=message):
        method("aligned", "unaligned", **options)


def test_labels_and_parameters(tmp_path):
    (aligned, unaligned), _ = models(tmp_path)
    (other, _), _ = models(tmp_path / "other")
    made = [
        SafeLoRA(aligned, unaligned),
        SafeLoRA(aligned, unaligned, number=5),
        SafeLoRA(aligned, unaligned, threshold=0.5),
        SafeLoRA(other, unaligned),
        SafeMERGE(aligned, unaligned),
        SafeMERGE(aligned, unaligned, weights=[0.7, 0.3]),
    ]
    labels = [method.label() for method in made]
    assert len(set(labels)) == len(labels)
    assert not any(character in label for label in labels for character in "/()[], ")
    assert "number" not in labels[0]  # 10 is what neither of the two means
    assert labels[1].endswith("_number_5")
    assert labels[2].endswith("_threshold_0.5")
    assert labels[5].endswith("_weights_0.7_0.3")
    assert made[2].parameters() == {
        "aligned": aligned,
        "unaligned": unaligned,
        "threshold": 0.5,
        "number": None,
    }
    assert json.loads(json.dumps(made[5].parameters()))["weights"] == [0.7, 0.3]
