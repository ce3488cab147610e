from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sst_lightning.algebra.adapter import LoraAdapter, LoraFactors
from sst_lightning.algebra.errors import FisherError, SSTMergeError
from sst_lightning.algebra.fisher import DiagonalFisher, ExactFisher
from sst_lightning.algebra.methods import METHODS, SST, TaskArithmetic
from sst_lightning.algebra.methods.layers import LAYER_PRESETS, layer_patterns, layer_weight
from tests.algebra.builders import (
    dense_soft,
    generator,
    problem_of,
    random_diagonal,
    random_exact,
    random_kronecker,
    random_lora,
)

MAKERS = {
    "exact": lambda shape, seed: random_exact(6, *shape, seed),
    "kfac": lambda shape, seed: random_kronecker(*shape, seed),
    "diagonal": lambda shape, seed: random_diagonal(*shape, seed),
}


def problem(estimator="exact"):
    return problem_of(random_lora(1), random_lora(2, rank=3), MAKERS[estimator])


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)


def test_registry_names_are_the_methods_names():
    assert METHODS["task_arithmetic"] is TaskArithmetic
    assert METHODS["sst"] is SST
    assert TaskArithmetic().label() == "task_arithmetic"
    assert TaskArithmetic.requires_fisher is False


def test_task_arithmetic_is_the_weighted_sum_of_deltas():
    utility, safety = random_lora(1), random_lora(2, rank=3, scaling=0.3)
    given = replace(problem_of(utility, safety, MAKERS["exact"]), fisher_utility=None)
    for name, factors in TaskArithmetic().merge(given, 0.7).adapter.factors.items():
        expected = utility.factors[name].delta() + 0.7 * safety.factors[name].delta()
        torch.testing.assert_close(factors.delta(), expected, rtol=0, atol=1e-4)


def test_merge_is_utility_plus_alpha_times_filter():
    given, method = problem(), SST(mu=3.0, rho=0.2)
    merged = given.space.encode(method.merge(given, 1.5).adapter)
    for name, basis in given.space.bases.items():
        assert tuple(merged[name].shape) == basis.shape
        filtered = dense_soft(
            given.safety[name],
            given.fisher_safety[name].dense(),
            given.fisher_utility[name].dense(),
            3.0,
            0.2,
        )
        torch.testing.assert_close(
            merged[name], given.utility[name] + 1.5 * filtered, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("estimator", MAKERS)
@pytest.mark.parametrize("filter_", ["soft", "hard"])
def test_filter_is_a_pure_function_of_the_problem(estimator, filter_):
    given = problem(estimator)
    before = {name: core.clone() for name, core in given.safety.items()}
    method = SST(filter=filter_, estimator=estimator)
    first, again = method.filter_safety(given), method.filter_safety(given)
    assert_same(first, again, rtol=0, atol=0)
    assert_same(given.safety, before, rtol=0, atol=0)
    assert any(not torch.equal(first[name], before[name]) for name in before)


@pytest.mark.parametrize("estimator", ["exact", "diagonal"])
@pytest.mark.parametrize("options", [{}, {"filter": "hard", "k": 3}])
def test_result_does_not_depend_on_the_factorisation(estimator, options):
    """The same ΔW in other factors gives the same merged ΔW: even the diagonal Fisher's."""
    sides = random_lora(1), random_lora(2, rank=3)
    weights = {name: torch.randn(50, 9, 7, generator=generator(5)) for name in sides[0].factors}

    def refactored(adapter):
        factors = {}
        for i, (name, item) in enumerate(adapter.factors.items()):
            r = torch.randn(item.rank, item.rank, generator=generator(i)).double()
            r += 3 * torch.eye(item.rank)
            a = torch.linalg.solve(r, item.A.double())
            factors[name] = LoraFactors(a, 2 * item.B.double() @ r, item.scaling / 2)
        return LoraAdapter(factors)

    merged = []
    for utility, safety in (sides, tuple(map(refactored, sides))):
        given = problem_of(utility, safety, MAKERS["exact"])
        fishers = []
        for part in (slice(0, 20), slice(20, 50)):
            fishers.append({})
            for name, basis in given.space.bases.items():
                # Gradients with respect to the full weight, projected as the hooks do.
                cores = basis.q_out.T @ weights[name][part] @ basis.q_in
                fishers[-1][name] = (
                    ExactFisher(cores)
                    if estimator == "exact"
                    else DiagonalFisher(cores.double().square().mean(0), len(cores))
                )
        given = replace(given, fisher_utility=fishers[0], fisher_safety=fishers[1])
        adapter = SST(estimator=estimator, **options).merge(given, 1.0).adapter
        merged.append({name: factors.delta() for name, factors in adapter.factors.items()})
    assert_same(merged[0], merged[1], rtol=0, atol=1e-3)


def test_residual_ratio_and_layer_weights():
    given = problem()
    plain = SST().filter_safety(given)
    assert_same(SST(residual_ratio=1.0).filter_safety(given), given.safety)
    half = SST(residual_ratio=0.5).filter_safety(given)
    weighted = SST(layer_weights={r"q_proj$": 0.25, "layers": 2.0}).filter_safety(given)
    for name, core in given.safety.items():
        torch.testing.assert_close(half[name], (core + plain[name]) / 2)
        factor = 0.25 if name.endswith("q_proj") else 2.0
        torch.testing.assert_close(weighted[name], factor * plain[name])


@pytest.mark.parametrize("filter_", ["soft", "hard"])
@pytest.mark.parametrize("projector", ["euclidean", "fisher"])
def test_global_scope_of_one_module_is_module_scope(filter_, projector):
    one = ("layers.0.q_proj",)
    given = problem_of(random_lora(1, names=one), random_lora(2, names=one), MAKERS["exact"])
    options = {"filter": filter_, "projector": projector, "k": 3}
    found = SST(scope="global", **options).filter_safety(given)
    assert_same(found, SST(**options).filter_safety(given), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("scope", ["module", "global"])
@pytest.mark.parametrize("filter_", ["soft", "hard"])
def test_module_without_safety_delta_needs_no_fisher(scope, filter_):
    names = ("layers.0.q_proj", "layers.1.down_proj")
    given = problem_of(random_lora(1), random_lora(2, names=names[:1]), MAKERS["exact"])
    silent = given.fisher_safety[names[1]]
    fishers = {**given.fisher_safety, names[1]: ExactFisher(silent.samples * 0)}
    result = SST(filter=filter_, scope=scope).filter_safety(replace(given, fisher_safety=fishers))
    assert not result[names[1]].any()
    assert result[names[0]].any()


def test_nothing_to_filter_gives_zero():
    silent = LoraAdapter(
        {n: replace(f, B=torch.zeros_like(f.B)) for n, f in random_lora(2).factors.items()}
    )
    empty = problem_of(random_lora(1), silent, MAKERS["exact"])
    for scope in ("module", "global"):
        assert_same(SST(scope=scope).filter_safety(empty), empty.safety)


def test_missing_zero_and_foreign_fishers_name_the_module():
    given = problem()
    name = "layers.0.q_proj"
    with pytest.raises(FisherError, match="needs the Fishers"):
        SST().filter_safety(replace(given, fisher_utility=None))
    fewer = {key: value for key, value in given.fisher_safety.items() if key != name}
    with pytest.raises(FisherError, match=f"no Fisher for module '{name}'"):
        SST().filter_safety(replace(given, fisher_safety=fewer))
    zero = ExactFisher(given.fisher_utility[name].samples * 0)
    for filter_ in ("soft", "hard"):
        with pytest.raises(FisherError, match=f"module '{name}': .*no gradient"):
            SST(filter=filter_).filter_safety(
                replace(given, fisher_utility={**given.fisher_utility, name: zero})
            )
    foreign = {**given.fisher_utility, name: random_exact(6, 2, 2)}
    with pytest.raises(FisherError, match=f"module '{name}': .*one core space"):
        SST().filter_safety(replace(given, fisher_utility=foreign))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("filter", "medium"),
        ("mu", -1.0),
        ("mu", float("nan")),
        ("mu", float("inf")),
        ("rho", 0.0),
        ("k", 0),
        ("k", 1.5),
        ("k", True),
        ("projector", "oblique"),
        ("damping", 0.0),
        ("iterations", -1),
        ("iteration_alpha", 0.0),
        ("harmless_share", 1.0),
        ("merge_share", 1.1),
        ("residual_ratio", -0.1),
        ("scope", "layer"),
        ("solver", "woodbury"),
        ("solver", "kronecker"),
        ("estimator", "full"),
    ],
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(SSTMergeError, match=rf"SST: {name} must be .*got {value!r}"):
        SST(**{name: value})


def test_contradicting_arguments_are_refused():
    with pytest.raises(SSTMergeError, match="scope 'global' needs estimator 'exact'"):
        SST(scope="global", estimator="kfac")
    with pytest.raises(SSTMergeError, match="solver must be auto, dense"):
        SST(estimator="diagonal", solver="dual")
    with pytest.raises(SSTMergeError, match="is not a preset: use safety_first"):
        SST(layer_weights="aggressive")
    with pytest.raises(SSTMergeError, match="not a regular expression"):
        SST(layer_weights={"(": 1.0})
    with pytest.raises(SSTMergeError, match="weight of 'mlp' is -1"):
        SST(layer_weights={"mlp": -1.0})


def test_parameters_are_those_in_use():
    soft, hard = SST().parameters(), SST(filter="hard", layer_weights={"mlp": 0.5}).parameters()
    assert soft["mu"] == 10.0
    assert soft["rho"] == 0.1
    assert "k" not in soft
    assert hard["k"] == 0.25
    assert hard["layer_weights"] == {"mlp": 0.5}
    assert "mu" not in hard
    assert SST(estimator="kfac", filter="hard", residual_ratio=0.1).label() == (
        "sst_hard_kfac_residual_ratio_0.1"
    )
    assert SST().label() == "sst_soft"
    assert SST(mu=30, iterations=0).label() == "sst_soft_iterations_0_mu_30"
    assert SST(filter="hard", k=4).label() == "sst_hard_k_4"
    assert SST(filter="hard", projector="fisher").label() == "sst_hard_projector_fisher"
    presets = [SST(layer_weights=name).label() for name in ("minimal", "balanced")]
    assert presets == ["sst_soft_layer_weights_minimal", "sst_soft_layer_weights_balanced"]
    patterns = [SST(layer_weights={"mlp": weight}).label() for weight in (0.5, 0.7)]
    assert len(set(patterns)) == 2
    # μ has no part in the hard filter.
    assert SST(filter="hard", mu=3).label() == "sst_hard"


@pytest.mark.parametrize("preset", LAYER_PRESETS)
def test_presets_weigh_head_attention_and_feed_forward(preset):
    patterns = layer_patterns(preset)
    head, attention, mlp = (
        layer_weight(name, patterns)
        for name in ("lm_head", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj")
    )
    assert 0 <= mlp <= attention <= head <= 1
    assert layer_weight("something.else", patterns) == 1.0


def test_mixture_weights():
    """¼ at the adapters, ¼ at the merge, ½ harmless at the newest point."""
    points = {
        name: SimpleNamespace(name=name)
        for name in ("utility", "harmless", "utility1", "harmless1")
    }
    at_adapters = {"utility": points["utility"], "harmless": points["harmless"]}
    at_merge = {"utility": points["utility1"], "harmless": points["harmless1"]}

    def weights(first, second, **options):
        mixture = SST(**options).utility_mixture(first, second)
        return {part.name: weight for weight, part in mixture}

    assert weights(at_adapters, {}) == {"utility": 0.5, "harmless": 0.5}
    assert weights(at_adapters, at_merge) == {"utility": 0.25, "utility1": 0.25, "harmless1": 0.5}
    only = {"utility": points["utility"]}
    assert weights(only, {}) == {"utility": 1.0}
    assert weights(only, {"utility": points["utility1"]}, merge_share=1.0) == {"utility1": 1.0}
    assert weights(at_adapters, at_merge, harmless_share=0.0, merge_share=0.0) == {"utility": 1.0}


def test_labels_tell_a_number_of_directions_from_a_share():
    labels = [SST(filter="hard", k=k).label() for k in (1, 1.0, 0.25)]
    assert labels == ["sst_hard_k_1", "sst_hard_k_share_1", "sst_hard"]
    assert SST(mu=0.1234567).label() == "sst_soft_mu_0.1234567"
