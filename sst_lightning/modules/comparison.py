"""Merges of one set of adapters, evaluated side by side and written as records and report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.algebra.files import move_folder, remove_outputs
from sst_lightning.algebra.methods import AdditiveMethod, MergeMethod, MergeProblem
from sst_lightning.algebra.rank import EXACT, RankRule
from sst_lightning.data.rows import fingerprint_rows
from sst_lightning.data.safety_utility import EvaluationTask, SafetyUtilityData
from sst_lightning.metrics.scores import ModelScores
from sst_lightning.modules.compared import (
    ComparedModel,
    Merge,
    check_names,
    input_models,
    merge_model,
    merge_name,
)
from sst_lightning.modules.evaluator import Evaluator
from sst_lightning.modules.merge import MergeModule
from sst_lightning.modules.merging import Merger
from sst_lightning.modules.processes import on_rank_zero
from sst_lightning.modules.verification import VerificationError, input_logits, verify_saved
from sst_lightning.report.provenance import provenance
from sst_lightning.report.recipe import merge_recipe, write_recipe
from sst_lightning.report.records import write_records
from sst_lightning.report.report import log_figures, write_report
from sst_lightning.report.suite_summary import suite_facts
from sst_lightning.report.summary import Candidate, build_records
from sst_lightning.suites.datamodule import SuiteData, SuiteTask

RESULTS = (
    "results.json",
    "adapter",
    "adapters",
    "config.yaml",
    "report.md",
    "report.html",
    "figures",
    "models",
    "tensorboard/report",
)
"""What a merge or comparison writes to its output, beside evaluations and the Trainer's logs."""

FISHER_WORK = "fishers.unfinished"
"""Fishers collected so far; a merge that is started again after a kill goes on from them."""


class Comparison:
    """Makes merges, checks each saved adapter, evaluates all of them and writes one report.

    Everything that can be checked without the base model (adapters, data, Fisher files, outputs)
    is checked when the object is made.

    Args:
        trainer: runs validation and test passes.
        model: the adapters.
        datamodule: calibration and test rows.
        output: folder of the results.
        fisher: folder of Fisher files; collected when not given.
        cache: folder of evaluations; ``<output>/evaluations`` when not given.
        setting: name of this set of adapters; the names of the utility data sets when not given.
        suites: evaluation suites that every model runs beside the test rows.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: MergeModule,
        datamodule: SafetyUtilityData,
        output: Path,
        fisher: str | None = None,
        cache: str | None = None,
        setting: str | None = None,
        suites: SuiteData | None = None,
    ) -> None:
        self.trainer = trainer
        self.suites = suites
        self.model = model
        self.datamodule = datamodule
        self.output = output
        self.setting = setting or "+".join([*(name.upper() for name in datamodule.utility), "A7"])
        check_names(datamodule.utility)
        datamodule.setup()
        if suites is not None:
            suites.tokenizer_name = model.base
            suites.setup("test")
        self.merger = Merger(trainer, model, datamodule, fisher, output / FISHER_WORK)
        # Outside a Trainer's entry point; the base goes where the Trainer will run it.
        model.trainer = trainer
        # An earlier comparison may have left the base that it measured on.
        model.change_base(model.own_storage)
        model.configure_model()
        self.merger.check_fishers()
        self.evaluator = Evaluator(
            trainer,
            model,
            datamodule,
            Path(cache) if cache else output / "evaluations",
            suites,
            output / "models",
        )
        self.merges: list[Merge] = []
        self.budget: dict[str, Any] | None = None
        self._input_logits: dict[str, Tensor] | None = None
        self._prepared: dict[str, tuple[Any, MergeProblem, dict[str, Any]]] = {}

    def add(
        self, method: MergeMethod, alpha: float | None, folder: Path, rule: RankRule = EXACT
    ) -> Merge:
        """Merge, save a PEFT adapter to ``folder`` and verify it through PEFT.

        Args:
            method: merge method; what does not depend on α is computed once.
            alpha: weight of the safety adapter; ``None`` for a method that does not use it.
            folder: where the adapter goes.
            rule: rank of the merged adapter.

        Raises:
            VerificationError: the saved adapter is not the merge, or nothing was merged; ``folder``
                is gone then.
        """
        prepared, problem = self.prepare(method)
        weight = 1.0 if alpha is None else alpha
        # Once, so that all processes evaluate the adapter that is saved.
        merged = on_rank_zero(
            lambda: method.merge_prepared(problem, prepared, weight, rule), self.trainer
        )
        adapter = merged.adapter
        recipe = merge_recipe(
            method, alpha, rule, merged, self.model.adapters, self.model.utility_weights
        )
        recipe["calibration"] = {
            name: {"rows": len(rows), "sha256": fingerprint_rows(rows)}
            for name, rows in self.datamodule.fisher_rows().items()
            if method.requires_fisher
        }
        if self.budget is not None:
            recipe["budget"] = self.budget
        recipe = on_rank_zero(lambda: self._save(adapter, folder, recipe), self.trainer)
        rank_zero_info(f"{merge_name(method, alpha)}: saved and verified {folder}")
        if merged.discarded > 0:
            rank_zero_info(
                f"rank {adapter.rank} holds all but {100 * merged.discarded:.2g} % of ‖ΔW‖²"
            )
        merge = Merge(method, alpha, adapter, folder, recipe, self._prepare(method)[2])
        self.merges.append(merge)
        return merge

    def _save(self, adapter: LoraAdapter, folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
        """Write the adapter, verify it, and return the recipe with what the verification found."""
        # Nothing takes the place of an adapter that is there before it has been verified.
        unverified = self.output / f".{folder.name}.unverified"
        adapter.save(unverified, overwrite=True)
        try:
            recipe = {**recipe, "verification": self._verify(unverified, adapter)}
        except VerificationError:
            shutil.rmtree(unverified)
            raise
        write_recipe(recipe, unverified)
        if not self.merges:
            # What an earlier run left in ``output`` is not about the merges made now. An adapter in the
            # new one's place stays until the new one takes it.
            remove_outputs(self.output, [n for n in RESULTS if self.output / n != folder])
        folder.parent.mkdir(parents=True, exist_ok=True)
        move_folder(unverified, folder)
        return recipe

    def prepare(self, method: MergeMethod) -> tuple[Any, MergeProblem]:
        """Return what the method prepared, once, and the problem of its merges."""
        prepared, problem, _ = self._prepare(method)
        return prepared, problem

    def _prepare(self, method: MergeMethod) -> tuple[Any, MergeProblem, dict[str, Any]]:
        key = json.dumps([method.name, method.parameters()], sort_keys=True)
        if key not in self._prepared:
            prepared, problem = self.merger.prepare(method)
            diagnostics = self.merger.diagnostics(method, prepared, problem)
            if isinstance(method, AdditiveMethod):
                # Fishers taken at this method's merge, of a gigabyte at rank 16, are not kept for it.
                problem = replace(problem, fisher_utility=None, fisher_safety=None)
            self._prepared[key] = prepared, problem, diagnostics
        return self._prepared[key]

    def finish(self) -> list[dict[str, Any]]:
        """Evaluate base, inputs and merges; write results.json, report and TensorBoard figures.

        On each storage of ``model.served_on``: the figures are those of the first, the others have
        paired differences to it. Suites run on the first alone.
        """
        inputs = input_models(self.model, list(self.datamodule.utility))
        models = [*inputs, *(merge_model(merge, self.setting) for merge in self.merges)]
        merged_on = {
            "storage": self.model.storage,
            "base_sha256": self.model.base_fingerprint(),
        }
        served, *_ = self.model.served_on
        scores: dict[str, list[ModelScores]] = {}
        bases: dict[str, dict[str, Any]] = {}
        self._input_logits = None
        # That which is loaded goes first: a base is loaded once at most.
        for storage in sorted(self.model.served_on, key=lambda name: name != self.model.storage):
            self.model.change_base(storage)
            scores[storage] = self._evaluate(models, with_suites=storage == served)
            bases[storage] = self._base()
        settings = bases[served]["evaluation"]
        candidates = [
            Candidate(
                model=model.name,
                method=model.method,
                parameters=model.parameters,
                scores=scores[served][index],
                diagnostics=model.diagnostics,
                provenance=provenance(bases[served]["base_sha256"], settings, model.recipe)
                | {"merged_on": merged_on},
                on_other_bases={
                    storage: found[index] for storage, found in scores.items() if storage != served
                },
            )
            for index, model in enumerate(models)
        ]
        return on_rank_zero(lambda: self._report(candidates, len(inputs)), self.trainer)

    def _report(self, candidates: list[Candidate], inputs: int) -> list[dict[str, Any]]:
        """Write results.json, report and figures, and return the records.

        Args:
            candidates: all models, evaluated.
            inputs: number of those that are no merges.
        """
        records = build_records(
            candidates,
            setting=self.setting,
            utility_tasks=list(self.datamodule.utility),
            # What every merge starts from at α = 0.
            reference=candidates[inputs - 2].scores,
            safety=candidates[inputs - 1].scores,
            rows=self.datamodule.test_rows(),
            suites=(
                suite_facts(self.suites.evaluation_tasks, self.suites.judges) if self.suites else {}
            ),
        )
        write_records(records, self.output / "results.json")
        write_report(records, self.output, f"SST-Merge: {self.setting}")
        log_figures(records, self.output / "tensorboard" / "report")
        return records

    def _evaluate(self, models: list[ComparedModel], with_suites: bool) -> list[ModelScores]:
        result = []
        for number, model in enumerate(models, 1):
            rank_zero_info(
                f"evaluating model {number} of {len(models)} on the base in "
                f"{self.model.storage}: {model.name}"
            )
            result.append(self.evaluator.evaluate(model.adapter, model.folder, with_suites))
        return result

    def _base(self) -> dict[str, Any]:
        """What a record says of the base that is loaded."""
        tasks: list[EvaluationTask | SuiteTask] = [
            *self.datamodule.evaluation_tasks,
            *(self.suites.evaluation_tasks if self.suites else ()),
        ]
        return {
            "base_sha256": self.model.base_fingerprint(),
            "evaluation": self.model.evaluation_settings(tasks, self.trainer),
        }

    def _verify(self, folder: Path, adapter: LoraAdapter) -> dict[str, float]:
        batch = self.datamodule.sample_batch()
        if self._input_logits is None:
            # The inputs are the same for every merge.
            self._input_logits = input_logits(self.model, batch)
        return verify_saved(self.model, folder, adapter, batch, self._input_logits)
