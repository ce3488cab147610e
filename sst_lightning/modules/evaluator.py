"""Runs the test pass on any adapter, once per distinct weights and rows."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path

from lightning.pytorch import Trainer

from sst_lightning.algebra.adapter import LoraAdapter
from sst_lightning.data import tokenization
from sst_lightning.data.safety_utility import EvaluationTask, SafetyUtilityData
from sst_lightning.metrics.examples import EXAMPLES, Example, write_examples
from sst_lightning.metrics.scores import ModelScores, scoring_fingerprint
from sst_lightning.modules import causal_lm, core_hooks, evaluation, generation, head_nll
from sst_lightning.modules.merge import MergeModule
from sst_lightning.modules.processes import on_rank_zero
from sst_lightning.suites.datamodule import SuiteData


class Evaluator:
    """Evaluates adapters with ``trainer.test`` and keeps the per-example scores in a cache folder.

    The key is a hash of base model, weights, precision, answer length, rows and the code of the
    metrics: a repeated or interrupted run evaluates only what is missing. Tasks are cached
    separately, so that a model measured in one setting is not measured again on the same rows in
    the next. Of suites the outputs are cached, item by item (:class:`OutputStore`).

    Args:
        trainer: runs the test pass.
        model: holds the adapters.
        datamodule: gives the evaluation tasks.
        cache: folder of scores and outputs.
        suites: suites that are run beside the tasks.
        models: folder that gets the suites' examples, in a folder for each model.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: MergeModule,
        datamodule: SafetyUtilityData,
        cache: Path,
        suites: SuiteData | None = None,
        models: Path | None = None,
    ) -> None:
        self.trainer = trainer
        self.model = model
        self.datamodule = datamodule
        self.cache = cache
        self.suites = suites
        self.models = models

    def evaluate(
        self, adapter: LoraAdapter | None, name: str, with_suites: bool = True
    ) -> ModelScores:
        """Return the scores of one model.

        Args:
            adapter: on the base model; ``None`` is the bare base.
            name: of the folder with the suites' examples.
            with_suites: run the suites too, where there are any.
        """
        weights = "base" if adapter is None else adapter.fingerprint
        all_tasks = self.datamodule.evaluation_tasks
        files = {task.name: self.cache / f"{self._key(task, weights)}.json" for task in all_tasks}
        # Decided once: another node need not see the files.
        names = on_rank_zero(
            lambda: [name for name, file in files.items() if not file.exists()], self.trainer
        )
        missing = [task for task in all_tasks if task.name in names]
        if missing:
            self.model.use_adapter(adapter)
            self.datamodule.evaluation_tasks = missing
            try:
                self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
            finally:
                self.datamodule.evaluation_tasks = all_tasks
            for task in missing:
                scores = self.model.scores([task.name])
                on_rank_zero(partial(scores.save, files[task.name]), self.trainer)
        result = on_rank_zero(
            lambda: merge_scores([ModelScores.load(file) for file in files.values()]), self.trainer
        )
        if self.suites is not None and with_suites:
            self._run_suites(self.suites, adapter, weights, name, result)
        return result

    def _run_suites(
        self,
        suites: SuiteData,
        adapter: LoraAdapter | None,
        weights: str,
        name: str,
        result: ModelScores,
    ) -> None:
        self.model.use_adapter(adapter)
        self.model.output_store = self.model.open_store(
            self.cache / "outputs",
            self.model.base_fingerprint(),
            weights,
            self.trainer,
        )
        self.trainer.test(self.model, datamodule=suites, verbose=False)
        tasks = [task.name for task in suites.evaluation_tasks]
        result.examples.update(self.model.scores(tasks).examples)
        if self.models is not None:
            folder = self.models / name / EXAMPLES
            on_rank_zero(lambda: _write_examples(folder, result.examples), self.trainer)

    def _key(self, task: EvaluationTask, weights: str) -> str:
        parts = [
            *self.model.model_key(self.model.base_fingerprint(), weights, self.trainer),
            str(self.model.max_new_tokens),
            task.fingerprint(),
            task.name,
            # What else changes a score: truncation, a pass cut short, the scoring itself.
            str(self.datamodule.data_set(task.task).max_length),
            str(self.trainer.limit_test_batches),
            scoring_fingerprint(),
            _running_fingerprint(),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


@lru_cache(maxsize=1)
def _running_fingerprint() -> str:
    """Hash of the code that turns rows into NLLs and answers."""
    digest = hashlib.sha256()
    for module in (causal_lm, core_hooks, evaluation, generation, head_nll, tokenization):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()


def _write_examples(folder: Path, examples: Mapping[str, Sequence[Example]]) -> None:
    for task, values in examples.items():
        write_examples(folder / f"{task}.jsonl", values)


def merge_scores(parts: list[ModelScores]) -> ModelScores:
    """Join the scores of several tasks and measures."""
    result = ModelScores({}, {})
    for part in parts:
        for task, metrics in part.values.items():
            for metric, scores in metrics.items():
                result.values.setdefault(task, {}).setdefault(metric, {}).update(scores)
        for task, answers in part.answers.items():
            result.answers.setdefault(task, {}).update(answers)
    return result
