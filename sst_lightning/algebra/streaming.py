"""Merging PEFT folders into one, module by module, without the base model.

Inputs are read from safetensors when their module is merged, and with a store on disk so is the
result when it is saved: memory is needed for one module, whatever the number of layers. Nothing is
measured here: a merge is made of Fishers that ``sst-merge validate`` has collected, or of none.
"""

from collections.abc import Sequence
from pathlib import Path

from sst_lightning.algebra.adapter import LoraAdapter, check_compatible
from sst_lightning.algebra.core import CoreSpace
from sst_lightning.algebra.errors import FisherError, SSTMergeError
from sst_lightning.algebra.fisher_file import FisherStatistics, mix
from sst_lightning.algebra.methods.base import Merged, MergeMethod, Progress, Store
from sst_lightning.algebra.methods.problem import MergeProblem
from sst_lightning.algebra.rank import EXACT, RankRule

FISHER_NAMES = ("utility", "harmless", "safety")


def merge_folders(
    utility: Sequence[str | Path],
    safety: str | Path,
    method: MergeMethod,
    alpha: float = 1.0,
    rule: RankRule = EXACT,
    utility_weights: Sequence[float] = (),
    fisher: str | Path | None = None,
    progress: Progress = iter,
    store: Store | None = None,
) -> Merged:
    """Merge adapter folders.

    Args:
        utility: folders of the utility adapters.
        safety: folder of the safety adapter.
        method: merge method, without iterations: those need the base model.
        alpha: weight of the safety adapter.
        rule: rank of the result.
        utility_weights: weight of each utility adapter; 1 each when empty.
        fisher: folder of Fisher files, for a method that uses them.
        progress: wraps the names of the modules, such as ``tqdm``.
        store: where merged modules are kept, such as a ``FactorStore``; in memory when not given.

    Returns:
        The merged adapter; ``merged.adapter.save(folder)`` writes it.

    Raises:
        SSTMergeError: adapters, weights, method and Fishers do not fit each other.
    """
    adapters = [LoraAdapter.open(path) for path in (*utility, safety)]
    if len(adapters) < 2:
        raise SSTMergeError("give at least one utility adapter folder")
    if utility_weights and len(utility_weights) != len(utility):
        raise SSTMergeError(
            f"{len(utility_weights)} utility weights for {len(utility)} utility adapters"
        )
    check_compatible(adapters)
    problem = MergeProblem(CoreSpace.streamed(adapters), adapters, tuple(utility_weights))
    if method.iterations:
        raise SSTMergeError(
            f"{method.label()} takes Fishers at a merge, which needs the base model: use "
            "sst-merge merge, or --method.iterations 0"
        )
    method.check(problem, [alpha] if method.uses_alpha else [])
    if not method.requires_fisher:
        if fisher is not None:
            raise SSTMergeError(f"{method.name} uses no Fishers: leave --fisher out")
        return method.merge(problem, alpha, rule, progress, store)
    if fisher is None:
        raise SSTMergeError(
            f"{method.name} uses Fishers: give --fisher, a folder of sst-merge validate"
        )
    statistics = load_fishers(Path(fisher), problem, method.estimator)
    problem = MergeProblem(
        problem.space,
        adapters,
        problem.utility_weights,
        mix(method.utility_mixture(statistics, {})),
        statistics["safety"].modules,
    )
    return method.merge(problem, alpha, rule, progress, store)


def load_fishers(
    folder: Path, problem: MergeProblem, estimator: str
) -> dict[str, FisherStatistics]:
    """Open the Fisher files of a merge, in the bases of its core space.

    Args:
        folder: holds ``utility.safetensors``, ``safety.safetensors`` and perhaps ``harmless``.
        problem: the adapters, whose hashes the files must name.
        estimator: the estimator the method wants.

    Raises:
        FisherError: a file is missing, of other adapters, points or another estimator; names it.
    """
    weights = [float(w) for w in problem.utility_weights] or [1.0] * (len(problem.adapters) - 1)
    points = {"utility": f"utility {weights}", "harmless": f"utility {weights}", "safety": "safety"}
    fingerprints = [adapter.fingerprint for adapter in problem.adapters]
    result: dict[str, FisherStatistics] = {}
    for name in FISHER_NAMES:
        path = folder / f"{name}.safetensors"
        if name == "harmless" and not path.exists():
            continue
        opened = FisherStatistics.open(path)
        found = opened.metadata
        if found.adapter_fingerprints != fingerprints or found.point != points[name]:
            raise FisherError(
                f"{path}: taken with other adapters or at another point ('{found.point}', this "
                f"merge needs '{points[name]}'). Collect it again with sst-merge validate"
            )
        if found.estimator != estimator:
            raise FisherError(
                f"{path}: estimator '{found.estimator}', but the method uses '{estimator}'. "
                f"Collect it again with FisherCollector.estimator: {estimator}"
            )
        result[name] = opened.streamed_to_space(problem.space)
    return result
