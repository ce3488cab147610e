"""The merge step: Fishers from validation passes, filter, iterate, save, verify."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.fisher import FisherCollector
from sst_lightning.algebra.core import Cores
from sst_lightning.algebra.diagnostics import kept_energy_by_module, spectrum
from sst_lightning.algebra.errors import FisherError
from sst_lightning.algebra.fisher_file import FisherStatistics, mix
from sst_lightning.algebra.methods import AdditiveMethod, CoreMethod, MergeMethod, MergeProblem
from sst_lightning.algebra.streaming import FISHER_NAMES
from sst_lightning.data.safety_utility import SafetyUtilityData
from sst_lightning.modules.merge import MergeModule
from sst_lightning.modules.processes import gather, on_rank_zero


def check_methods(
    model: MergeModule, grids: Sequence[tuple[MergeMethod, Sequence[float | None]]]
) -> None:
    """Let every method refuse the adapters or an α before the base model is loaded.

    Args:
        model: the adapters.
        grids: methods with their α.

    Raises:
        SSTMergeError: a method cannot merge these adapters with an α.
    """
    problem = MergeProblem(model.space, model.adapters, tuple(model.utility_weights))
    for method, alphas in grids:
        method.check(problem, [alpha for alpha in alphas if alpha is not None])


class Merger:
    """Turns methods into merges of one set of adapters, taking each Fisher once.

    Args:
        trainer: runs the validation passes.
        model: holds the adapters in core space.
        datamodule: gives the calibration rows.
        fisher: folder with Fisher files of an earlier ``validate``; collected when not given.
        work: folder for Fishers that are collected, which a merge that is started again after a
            kill finds there; :meth:`remove_work` deletes it. ``None`` keeps them in memory.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: MergeModule,
        datamodule: SafetyUtilityData,
        fisher: str | Path | None = None,
        work: Path | None = None,
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.datamodule = datamodule
        self.folder = None if fisher is None else Path(fisher)
        self.work = work
        self._passes = 0
        self._at_adapters: dict[str, dict[str, FisherStatistics]] = {}
        if self.folder is not None:
            self._load(self.folder)

    def problem(self, method: MergeMethod) -> MergeProblem:
        """Return the merge problem for ``method``, collecting the Fishers it needs."""
        problem = MergeProblem(
            self.model.space, self.model.adapters, tuple(self.model.utility_weights)
        )
        if not method.requires_fisher:
            return problem
        fishers = self.fishers(method.estimator)
        return replace(
            problem,
            fisher_utility=mix(method.utility_mixture(fishers, {})),
            fisher_safety=fishers["safety"].modules,
        )

    def prepare(self, method: MergeMethod) -> tuple[Any, MergeProblem]:
        """Compute what does not depend on α, re-taking F_u at the merge ``iterations`` times.

        The Fishers of an iteration are taken at the merge with ``method.iteration_alpha``, so the
        result does not depend on the final α.

        Returns:
            What the method prepared and the problem of the last iteration.
        """
        problem = self.problem(method)
        prepared = self._prepare(method, problem)
        for iteration in range(method.iterations):
            assert isinstance(method, CoreMethod)
            rank_zero_info(
                f"{method.name}: utility Fisher at merge {iteration + 1} of {method.iterations}"
            )
            self.model.merge_core = on_rank_zero(
                partial(_merge_cores, method, problem, prepared), self.trainer
            )
            names = [name for name in self.datamodule.fisher_rows() if name != "safety"]
            at_merge = self._collect(method.estimator, dict.fromkeys(names, "merge"))
            mixture = method.utility_mixture(self.fishers(method.estimator), at_merge)
            problem = replace(problem, fisher_utility=mix(mixture))
            prepared = self._prepare(method, problem)
        return prepared, problem

    def _prepare(self, method: MergeMethod, problem: MergeProblem) -> Any:
        # Once: an eigendecomposition on every process would take the time of all of them on a
        # shared CPU, and may give each another result on a GPU.
        return on_rank_zero(lambda: method.prepare(problem), self.trainer)

    def fishers(self, estimator: str) -> dict[str, FisherStatistics]:
        """Return F_u and F_s at their default points, collected on first use."""
        if estimator not in self._at_adapters:
            if self.folder is not None:
                have = ", ".join(sorted(self._at_adapters))
                raise FisherError(
                    f"{self.folder}: holds Fishers of estimator '{have}', but the method uses "
                    f"'{estimator}'. Collect them again with FisherCollector.estimator: {estimator}"
                )
            points = {"utility": "utility", "harmless": "utility", "safety": "safety"}
            rows = self.datamodule.fisher_rows()
            self._at_adapters[estimator] = self._collect(
                estimator, {name: point for name, point in points.items() if name in rows}
            )
        return self._at_adapters[estimator]

    def diagnostics(
        self, method: MergeMethod, prepared: Any, problem: MergeProblem
    ) -> dict[str, Any]:
        """Return what the report draws of a filter: kept safety energy and the GEVP spectrum."""
        if not isinstance(method, AdditiveMethod):
            return {}
        return on_rank_zero(lambda: _diagnostics(prepared, problem), self.trainer)

    def _collect(self, estimator: str, points: dict[str, str]) -> dict[str, FisherStatistics]:
        output = None if self.work is None else self.work / str(self._passes)
        self._passes += 1
        if output is not None:
            collected = self._collected(output, points, estimator)
            # Where one process has to collect them, all do.
            complete = all(gather(collected is not None, self.trainer))
            if collected is not None and complete:
                rank_zero_info(f"{output}: Fishers of an interrupted merge are used again")
                return collected
        collector = FisherCollector(
            points,
            estimator,  # type: ignore[arg-type]
            None if output is None else str(output),
            # What an interrupted merge has left there is either this or of no use.
            overwrite=True,
        )
        self.trainer.callbacks.append(collector)  # type: ignore[attr-defined]
        self.datamodule.select_validation(list(points))
        try:
            self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        finally:
            self.trainer.callbacks.remove(collector)  # type: ignore[attr-defined]
            self.datamodule.select_validation(None)
        return collector.statistics

    def _collected(
        self, folder: Path, points: dict[str, str], estimator: str
    ) -> dict[str, FisherStatistics] | None:
        """Open what an interrupted merge has collected in a pass, if it has all of it."""
        result: dict[str, FisherStatistics] = {}
        rows = self.datamodule.fisher_rows()
        for name, point in points.items():
            path = folder / f"{name}.safetensors"
            if not path.exists():
                return None
            opened = FisherStatistics.open(path)
            expected = {
                **self.model.fisher_metadata(point),
                "data_fingerprint": self.datamodule.validation_fingerprint(name),
                "estimator": estimator,
                "count": len(rows[name]),
            }
            if any(getattr(opened.metadata, key) != value for key, value in expected.items()):
                return None
            result[name] = opened.streamed_to_space(self.model.space)
        return result

    def remove_work(self) -> None:
        """Delete the Fishers that were collected, when the merge is complete."""
        self.trainer.strategy.barrier()
        if self.work is not None and self.trainer.local_rank == 0:
            shutil.rmtree(self.work, ignore_errors=True)

    def _load(self, folder: Path) -> None:
        loaded: dict[str, FisherStatistics] = {}
        for name in FISHER_NAMES:
            path = folder / f"{name}.safetensors"
            if name == "harmless" and not path.exists():
                continue
            loaded[name] = FisherStatistics.open(path)
        estimators = {value.metadata.estimator for value in loaded.values()}
        if len(estimators) != 1:
            raise FisherError(
                f"{folder}: its Fishers were taken with different estimators {estimators}"
            )
        self._at_adapters[estimators.pop()] = loaded

    def check_fishers(self) -> None:
        """Refuse Fisher files of another merge (base, adapters, points or calibration rows differ).

        Raises:
            FisherError: names the file, the field that differs and the remedy.
        """
        rows = self.datamodule.fisher_rows()
        for statistics in self._at_adapters.values():
            if set(statistics) != set(rows):
                differing = sorted(set(statistics) ^ set(rows))[0]
                raise FisherError(
                    f"{self.folder}: the calibration set '{differing}' is only among the Fisher "
                    "files or only in the data of this merge. Collect the Fishers again, or set "
                    "data.harmless_calibration to what they were collected with"
                )
            for name, value in statistics.items():
                point = "safety" if name == "safety" else "utility"
                identity = self.model.fisher_metadata(point)
                value.check_matches(
                    identity["base_fingerprint"],
                    identity["adapter_fingerprints"],
                    point=self.model.point_label(point),
                    data_fingerprint=self.datamodule.validation_fingerprint(name),
                    count=len(rows[name]),
                )
                # The file has the axes of the space it was collected in. Every module is looked at
                # now, so that one that does not fit is known before long work.
                statistics[name] = value.streamed_to_space(self.model.space)
                for module in statistics[name].modules:
                    statistics[name].modules[module]


def _merge_cores(method: CoreMethod, problem: MergeProblem, prepared: Any) -> Cores:
    """Return the merge with ``iteration_alpha``, at which the next Fisher is taken."""
    return {
        name: method.merge_core(problem.module(name, method.iteration_alpha), prepared)
        for name in problem.space.bases
    }


def _diagnostics(prepared: Cores, problem: MergeProblem) -> dict[str, Any]:
    energy = kept_energy_by_module(problem.safety, prepared, problem.fisher_safety)
    result: dict[str, Any] = {"kept_energy": energy}
    if problem.fisher_utility is not None and problem.fisher_safety is not None:
        values = spectrum(problem.fisher_safety, problem.fisher_utility)
        if values is not None:
            result["spectrum"] = values
    return result
