"""The Trainer with the two entry points Lightning does not have: ``merge`` and ``compare``."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import lazy_instance
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.algebra.files import refuse_overwrite
from sst_lightning.algebra.methods import SST, MergeMethod, TaskArithmetic
from sst_lightning.algebra.rank import RankRule
from sst_lightning.data.safety_utility import SafetyUtilityData
from sst_lightning.modules.budget import Budget, check_limit, variants
from sst_lightning.modules.checkpoint_files import AtomicCheckpointIO
from sst_lightning.modules.comparison import RESULTS, Comparison
from sst_lightning.modules.heap import ReleaseFreeMemory
from sst_lightning.modules.interruption import StopOnSignal
from sst_lightning.modules.merge import MergeModule
from sst_lightning.modules.merging import check_methods
from sst_lightning.modules.processes import start_processes
from sst_lightning.modules.strategies import check_strategy, named_strategy
from sst_lightning.modules.verification import NothingMerged
from sst_lightning.report.report import budget_outcome
from sst_lightning.suites.datamodule import SuiteData

DEFAULT_ALPHAS = [0.5, 1.0, 2.0, 3.5]


class SSTTrainer(Trainer):
    """Lightning's Trainer plus ``merge``, ``compare`` and a strategy ``fsdp`` that is FSDP2.

    It ends at SIGTERM and Ctrl-C where a run can be continued (:class:`StopOnSignal`), gives back the
    memory that a pass has freed (:class:`ReleaseFreeMemory`), and writes and reads checkpoints with
    :class:`AtomicCheckpointIO`.

    Args:
        strategy: Lightning's argument; ``fsdp`` means :class:`FullyShardedStrategy`.
        kwargs: all other arguments of Lightning's Trainer.
    """

    def __init__(self, *, strategy: str | Strategy = "auto", **kwargs: Any) -> None:
        super().__init__(strategy=named_strategy(strategy), **kwargs)
        # After the checkpoint callbacks: what a batch leaves to save is saved first.
        self.callbacks += [ReleaseFreeMemory(), StopOnSignal()]  # type: ignore[attr-defined]
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = AtomicCheckpointIO()

    def merge(
        self,
        model: MergeModule,
        datamodule: SafetyUtilityData,
        method: MergeMethod = lazy_instance(SST),  # type: ignore[assignment]  # noqa: B008
        alpha: float | None = None,
        output: str = "runs/merge",
        rank: int | Literal["full"] | None = None,
        energy: float | None = None,
        fisher: str | None = None,
        evaluate: bool = True,
        overwrite: bool = False,
        max_utility_drop: float | None = None,
        search: dict[str, list[Any]] | None = None,
        suites: SuiteData | None = None,
    ) -> list[dict[str, Any]]:
        """Merge the adapters with one method, save one PEFT adapter, verify and evaluate it.

        Args:
            model: the adapters.
            datamodule: calibration and test rows.
            method: merge method; a YAML file or the command line may name it (``sst-merge methods``
                lists all).
            alpha: weight of the safety adapter; 1 when not given.
            output: folder; the merged adapter goes to ``<output>/adapter``.
            rank: truncate the merged adapter to this rank; exact (at most the sum of ranks) when not
                given. A method on the entries of ΔW keeps the sum of ranks then, and all of its
                result with ``full``. The discarded energy is reported.
            energy: keep as few singular values of each module as hold this share of ‖ΔW‖².
            fisher: folder with Fisher files of ``sst-merge validate``; collected when not given.
            evaluate: measure base, inputs and merge on the test rows and write the report.
            overwrite: replace an ``output`` that exists.
            max_utility_drop: instead of ``alpha``: take the largest α whose utility loss (relative
                increase of the NLL per token on calibration rows) stays below this with 95 %
                confidence, such as 0.01.
            search: with ``max_utility_drop``: values of the method's parameters that are tried too,
                such as ``{mu: [3, 10, 30]}``; the variant that refuses calibration attacks most
                surely wins.
            suites: evaluation suites that every model runs beside the test rows; on the command line
                also a configuration of ``test``, such as ``configs/eval/minimal.yaml``.

        Returns:
            The records of ``results.json`` (empty without evaluation).
        """
        rule = RankRule(rank, energy)
        _check_alphas([] if alpha is None else [alpha])
        if suites is not None and not evaluate:
            raise SSTMergeError("suites has no effect with evaluate: false; leave one of them out")
        if max_utility_drop is None and search:
            raise SSTMergeError("search needs max_utility_drop: the budget it searches within")
        if max_utility_drop is not None:
            check_limit(max_utility_drop)
            if alpha is not None:
                raise SSTMergeError("give alpha or max_utility_drop, not both")
        if not method.uses_alpha and (alpha is not None or max_utility_drop is not None):
            raise SSTMergeError(
                f"{method.name} does not use the safety adapter: it has no alpha and no "
                "max_utility_drop"
            )
        candidates = variants(method, search)
        check_methods(model, [(item, [1.0 if alpha is None else alpha]) for item in candidates])
        _refuse_results(Path(output), overwrite)
        check_strategy(self.strategy, "merge")
        start_processes(self)
        comparison = Comparison(self, model, datamodule, Path(output), fisher=fisher, suites=suites)
        if max_utility_drop is not None:
            budget = Budget(self, model, datamodule, comparison.prepare, max_utility_drop, rule)
            method, alpha = budget.search(candidates)
            comparison.budget = budget.record()
        if alpha is None and method.uses_alpha:
            alpha = 1.0
        comparison.add(method, alpha, Path(output) / "adapter", rule)
        records = comparison.finish() if evaluate else []
        comparison.merger.remove_work()
        if records and max_utility_drop is not None:
            merged = next(r for r in records if "budget" in r.get("provenance", {}))
            rank_zero_info(budget_outcome(merged))
        return records

    def compare(
        self,
        model: MergeModule,
        datamodule: SafetyUtilityData,
        methods: list[MergeMethod] | None = None,
        alphas: list[float] | dict[str, list[float]] | None = None,
        output: str = "runs/compare",
        setting: str | None = None,
        rank: int | Literal["full"] | None = None,
        energy: float | None = None,
        fisher: str | None = None,
        cache: str | None = None,
        overwrite: bool = False,
        suites: SuiteData | None = None,
    ) -> list[dict[str, Any]]:
        """Merge with several methods over a grid of α, and report them side by side.

        Args:
            model: the adapters.
            datamodule: calibration and test rows.
            methods: merge methods, in a YAML file or on the command line by name or with
                ``init_args``; SST and task arithmetic when not given.
            alphas: weights of the safety adapter: one grid for all methods, or a grid for each
                method by its label (such as ``sst_soft``, ``task_arithmetic``); 0.5, 1, 2 and 3.5
                when not given.
            output: folder; each merge goes to ``<output>/adapters/<method>-alpha-<alpha>``.
            setting: name of this set of adapters in the report, such as ``A5+A7``.
            rank: truncate merged adapters to this rank (see ``merge``).
            energy: keep as few singular values of each module as hold this share of ‖ΔW‖².
            fisher: folder with Fisher files of ``sst-merge validate``; collected when not given.
            cache: folder of evaluations shared by runs (``<output>/evaluations`` when not given);
                identical weights on identical rows are not evaluated again.
            overwrite: replace an ``output`` that exists.
            suites: evaluation suites that every model runs beside the test rows; on the command line
                also a configuration of ``test``, such as ``configs/eval/minimal.yaml``.

        Returns:
            The records of ``results.json``.
        """
        grids = _grids([SST(), TaskArithmetic()] if methods is None else methods, alphas)
        rule = RankRule(rank, energy)
        for _, grid in grids:
            _check_alphas([alpha for alpha in grid if alpha is not None])
        check_methods(model, grids)
        _refuse_results(Path(output), overwrite)
        check_strategy(self.strategy, "compare")
        start_processes(self)
        comparison = Comparison(
            self,
            model,
            datamodule,
            Path(output),
            fisher=fisher,
            cache=cache,
            setting=setting,
            suites=suites,
        )
        for method, grid in grids:
            for alpha in grid:
                name = method.label() + ("" if alpha is None else f"-alpha-{alpha:g}")
                try:
                    comparison.add(method, alpha, Path(output) / "adapters" / name, rule)
                except NothingMerged as error:
                    # One method that changes nothing must not cost the others' results.
                    rank_zero_warn(f"left out of the comparison: {error}")
        records = comparison.finish()
        comparison.merger.remove_work()
        return records


def _grids(
    methods: list[MergeMethod], alphas: list[float] | dict[str, list[float]] | None
) -> list[tuple[MergeMethod, Sequence[float | None]]]:
    """Pair each method with its α grid; one without α is merged once.

    Raises:
        SSTMergeError: two methods share a label, or ``alphas`` does not name exactly the methods.
    """
    labels = [method.label() for method in methods]
    if len(set(labels)) < len(labels):
        raise SSTMergeError(
            f"compare: the same method with the same parameters twice: {', '.join(labels)}"
        )
    if not methods or (alphas is not None and not alphas):
        raise SSTMergeError("compare: methods and alphas must not be empty lists")
    for label, grid in alphas.items() if isinstance(alphas, dict) else ():
        if not grid:
            raise SSTMergeError(f"compare: alphas has no value for {label}")
    own = {method.label() for method in methods if method.uses_alpha}
    if isinstance(alphas, dict) and set(alphas) != own:
        raise SSTMergeError(
            f"compare: alphas names {', '.join(alphas)}, but the methods with an α are "
            f"{', '.join(sorted(own))}"
        )
    grids: list[tuple[MergeMethod, Sequence[float | None]]] = []
    for method in methods:
        if not method.uses_alpha:
            grids.append((method, [None]))
        elif isinstance(alphas, dict):
            grids.append((method, alphas[method.label()]))
        else:
            grids.append((method, alphas or DEFAULT_ALPHAS))
    return grids


def _refuse_results(output: Path, overwrite: bool) -> None:
    """Stop before any work when ``output`` holds results; logs alone are none.

    Raises:
        OutputExistsError: it does, or is a file, and ``overwrite`` is false.
    """
    if output.is_file():
        refuse_overwrite(output, overwrite=False, flag="another folder")
    for name in RESULTS:
        refuse_overwrite(output / name, overwrite)


def _check_alphas(alphas: Sequence[float]) -> None:
    """Refuse weights that no merge can have, before any work.

    Raises:
        SSTMergeError: an α is 0 or not finite, or appears twice.
    """
    for alpha in alphas:
        if not math.isfinite(alpha) or alpha == 0:
            raise SSTMergeError(f"alpha must be a finite number other than 0, got {alpha}")
    if len({f"{alpha:g}" for alpha in alphas}) < len(alphas):
        raise SSTMergeError(f"alphas holds a value twice: {', '.join(map(str, alphas))}")
