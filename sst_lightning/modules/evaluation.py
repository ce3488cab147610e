"""LightningModule that measures utility and safety of a model in ``test``."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from lightning.pytorch import Trainer
from torch import nn

import sst_lightning
from sst_lightning.data.rows import Kind
from sst_lightning.data.safety_utility import EvaluationTask
from sst_lightning.metrics import (
    CompletionNLL,
    ContainsMatch,
    ExactMatch,
    ModelScores,
    PerExampleMetric,
    RougeL,
    VerdictRate,
    row_key,
)
from sst_lightning.modules.backbone import (
    Attention,
    Dtype,
    Quantization,
    tokenizer_fingerprint,
)
from sst_lightning.modules.causal_lm import CausalLMModule
from sst_lightning.modules.output_store import OutputStore
from sst_lightning.modules.processes import gather, gather_by_id
from sst_lightning.modules.suite_evaluation import SuiteEvaluation
from sst_lightning.modules.suite_runner import running_fingerprint
from sst_lightning.suites.batching import SuiteBatch
from sst_lightning.suites.datamodule import SuiteTask


class EvaluationModule(CausalLMModule):
    """A causal LM with the ``test`` pass of the project: one set of metrics per evaluation task.

    The datamodule gives ``evaluation_tasks`` (one per test dataloader): rows, and suites, which are
    left to :class:`SuiteEvaluation`. After ``trainer.test``, ``metrics[task.task]`` holds the
    torchmetrics of each task of rows with their per-example scores, ``generations[task.task]`` the
    answers by row id, and ``suites`` the suites.

    Args:
        base: alias, hub id or folder of the base model.
        dtype: dtype of the base weights.
        attention: attention implementation.
        quantization: ``nf4`` for 4-bit base weights.
        max_new_tokens: length of generated answers.
    """

    def __init__(
        self,
        base: str = "smollm2-135m",
        dtype: Dtype = "bfloat16",
        attention: Attention = "auto",
        quantization: Quantization | None = None,
        max_new_tokens: int = 24,
    ) -> None:
        super().__init__(base=base, dtype=dtype, attention=attention, quantization=quantization)
        self.max_new_tokens = max_new_tokens
        self.metrics: dict[str, nn.ModuleDict] = {}
        self.generations: dict[str, dict[str, str]] = defaultdict(dict)
        self.suites: SuiteEvaluation | None = None
        self._scored: dict[str, dict[str, PerExampleMetric]] = {}
        self.output_store: OutputStore | None = None

    def on_test_epoch_start(self) -> None:
        """Open fresh metrics for the tasks of the datamodule."""
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        tasks: list[EvaluationTask | SuiteTask] = datamodule.evaluation_tasks
        self.generations = defaultdict(dict)
        self.metrics = {
            task.task: _metrics_of(task.kind).to(self.device)
            for task in tasks
            if isinstance(task, EvaluationTask)
        }
        suites = [task for task in tasks if isinstance(task, SuiteTask)]
        judges = datamodule.judges if suites else []
        self.suites = SuiteEvaluation(self, suites, judges, self.output_store)

    def test_step(
        self, batch: Mapping[str, Any] | SuiteBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Score one batch of one task: completion NLL, greedy answers, both, or a suite's items."""
        task = self.trainer.datamodule.evaluation_tasks[dataloader_idx]  # type: ignore[attr-defined]
        if isinstance(batch, SuiteBatch):
            assert self.suites is not None
            self.suites.step(task, batch)
        else:
            self._score_rows(task, batch)

    def _score_rows(self, task: EvaluationTask, batch: Mapping[str, Any]) -> None:
        # A ModuleDict does not know the types of its modules.
        metrics: dict[str, Any] = dict(self.metrics[task.task].items())
        rows = batch["rows"]
        ids = [row.id for row in rows]
        if task.measure == "both":
            nll, tokens, answers = self.score_and_answer(batch, self.max_new_tokens)
        elif task.measure == "nll":
            nll, tokens = self.sequence_nll(batch)
        else:
            answers = self.generate_text(batch, self.max_new_tokens)
        if task.measure != "generation":
            metrics["nll"].update(ids, nll, tokens)
        if task.measure == "nll":
            return
        self.generations[task.task].update(zip(ids, answers, strict=True))
        if task.kind != "utility":
            for name in ("refusal", "degenerate"):
                metrics[name].update(ids, answers, [row.prompt for row in rows])
            return
        metrics["rouge_l"].update(ids, answers, [row.response for row in rows])
        checkable = [i for i, row in enumerate(rows) if row.checkable]
        for name in ("exact_match", "contains"):
            metrics[name].update(
                [ids[i] for i in checkable],
                [answers[i] for i in checkable],
                [rows[i].references for i in checkable],
            )

    def on_test_epoch_end(self) -> None:
        """Let the judges score the suites' answers; log each metric as ``<task>/<metric>``."""
        assert self.suites is not None
        self.suites.judge()
        for name, mean in self.suites.means().items():
            self.log(name, mean, rank_zero_only=True)
        self._scored = self._scored_metrics()
        for task, metrics in self._scored.items():
            for name, metric in metrics.items():
                # compute() has gathered all processes' examples already.
                self.log(f"{task}/{name}", metric.compute(), rank_zero_only=True)

    def _scored_metrics(self) -> dict[str, dict[str, PerExampleMetric]]:
        """Return the metrics that have an example in some process; all of them gather then."""
        own = [
            (task, name)
            for task, metrics in self.metrics.items()
            for name, metric in metrics.items()
            if metric.update_called
        ]
        scored = {pair for part in gather(own, self.trainer) for pair in part}
        result: dict[str, dict[str, PerExampleMetric]] = {}
        for task, metrics in self.metrics.items():
            for name, metric in metrics.items():
                assert isinstance(metric, PerExampleMetric)
                if (task, name) in scored:
                    result.setdefault(task, {})[name] = metric
                    if not metric.update_called:
                        metric.add_nothing()
        return result

    def scores(self, names: Sequence[str]) -> ModelScores:
        """Return the per-example scores of the last test pass, over all processes.

        Args:
            names: names of evaluation tasks.
        """
        result = ModelScores({}, {})
        for task in self.trainer.datamodule.evaluation_tasks:  # type: ignore[attr-defined]
            if task.name not in names:
                continue
            if isinstance(task, SuiteTask):
                assert self.suites is not None
                result.examples[task.task] = self.suites.examples(task)
                continue
            ids = {row_key(row.id): row.id for row in task.rows}
            values = result.values.setdefault(task.task, {})
            for name, metric in self._scored.get(task.task, {}).items():
                found = {name: metric.scores()}
                if isinstance(metric, CompletionNLL):
                    found["tokens"] = metric.token_counts()
                for kind, scores in found.items():
                    # Tasks of one name share their metrics: each gives the scores of its own rows.
                    own = {ids[key]: score for key, score in scores.items() if key in ids}
                    if own:
                        values.setdefault(kind, {}).update(own)
            if task.measure != "nll":
                answers = gather_by_id(dict(self.generations[task.task]), self.trainer)
                own_answers = {row.id: answers[row.id] for row in task.rows if row.id in answers}
                result.answers.setdefault(task.task, {}).update(own_answers)
        return result

    def model_key(self, base_fingerprint: str, weights: str, trainer: Trainer) -> list[str]:
        """Return what the output of a model depends on beside what it reads; part of cache keys.

        Args:
            base_fingerprint: hash of the base weights.
            weights: hash of the adapter, or ``base``.
            trainer: runs the evaluation: its precision and device decide on rounding.
        """
        return [
            sst_lightning.__version__,
            base_fingerprint,
            weights,
            self.dtype_name,
            str(self.quantization),
            str(self.attention),
            str(trainer.precision),
            trainer.strategy.root_device.type,
            torch.__version__,
            transformers.__version__,
            tokenizer_fingerprint(self.tokenizer),
        ]

    def open_store(
        self, cache: Path, base_fingerprint: str, weights: str, trainer: Trainer
    ) -> OutputStore:
        """Open the store of the outputs of one model; for the arguments see :meth:`model_key`.

        Args:
            cache: folder of all models' outputs.
            base_fingerprint: hash of the base weights.
            weights: hash of the adapter, or ``base``.
            trainer: runs the evaluation.
        """
        parts = [*self.model_key(base_fingerprint, weights, trainer), running_fingerprint()]
        key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
        return OutputStore(cache / key, trainer.global_rank)

    def evaluation_settings(
        self, tasks: Sequence[EvaluationTask | SuiteTask], trainer: Trainer
    ) -> dict[str, Any]:
        """Return what the scores of ``tasks`` depend on beside the weights, for the report."""
        return {
            "dtype": self.dtype_name,
            "quantization": self.quantization,
            "attention": self.attention,
            "precision": str(trainer.precision),
            "max_new_tokens": self.max_new_tokens,
            "rows": {
                task.name: {"rows": len(task.rows), "sha256": task.fingerprint()}
                for task in tasks
                if isinstance(task, EvaluationTask)
            },
            "suites": {
                task.task: {
                    "items": len(task.suite.items()),
                    "kind": task.kind,
                    "primary": task.suite.primary,
                    "sha256": task.fingerprint(),
                    "max_length": task.max_length,
                    **task.suite.settings(),
                }
                for task in tasks
                if isinstance(task, SuiteTask)
            },
        }


def _metrics_of(kind: Kind) -> nn.ModuleDict:
    if kind == "utility":
        return nn.ModuleDict(
            {
                "nll": CompletionNLL(),
                "rouge_l": RougeL(),
                "exact_match": ExactMatch(),
                "contains": ContainsMatch(),
            }
        )
    return nn.ModuleDict(
        {
            "nll": CompletionNLL(),
            "refusal": VerdictRate("refusal"),
            "degenerate": VerdictRate("degenerate"),
        }
    )
