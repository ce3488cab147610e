"""The suites of a test pass: outputs, metrics, judges, and examples over all processes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sst_lightning.metrics.examples import Example
from sst_lightning.metrics.judges import Judge
from sst_lightning.metrics.nll import CompletionNLL
from sst_lightning.metrics.per_example import ExampleScore, PerExampleMetric, row_key
from sst_lightning.modules.causal_lm import CausalLMModule
from sst_lightning.modules.output_store import OutputStore
from sst_lightning.modules.processes import gather_by_id
from sst_lightning.modules.suite_runner import SuiteRunner
from sst_lightning.suites.batching import SuiteBatch
from sst_lightning.suites.datamodule import SuiteTask
from sst_lightning.suites.items import Item, Output

JUDGED_KINDS = ("attack", "harmless")


class SuiteEvaluation:
    """Scores the suites of one model.

    Args:
        module: holds the model; gives the device.
        tasks: the suites.
        judges: score the answers of safety suites, beside the suites' own metrics.
        store: outputs and verdicts that are there already; ``None`` keeps nothing.
    """

    def __init__(
        self,
        module: CausalLMModule,
        tasks: Sequence[SuiteTask],
        judges: Sequence[Judge] = (),
        store: OutputStore | None = None,
    ) -> None:
        self.module = module
        self.tasks = list(tasks)
        self.judges = list(judges)
        self.store = store
        self.runner = SuiteRunner(module, store)
        self.metrics: dict[str, nn.ModuleDict] = {
            task.task: nn.ModuleDict(dict(task.suite.metrics())).to(module.device) for task in tasks
        }
        self.outputs: dict[str, dict[str, Output]] = {task.task: {} for task in tasks}

    def step(self, task: SuiteTask, batch: SuiteBatch) -> None:
        """Score one batch of one suite."""
        outputs = self.runner.run(task.suite, batch)
        items = [item.item for item in batch.items]
        task.suite.update(dict(self.metrics[task.task].items()), items, outputs)
        self.outputs[task.task].update({output.id: output for output in outputs})

    def judge(self) -> None:
        """Let the judges score this process's answers of safety suites.

        Raises:
            JudgeError: a judge gave what is not a score.
        """
        for judge in self.judges:
            for task in self.tasks:
                if task.kind not in JUDGED_KINDS or task.suite.measure != "generation":
                    continue
                items = [item for item in task.suite.items() if item.id in self.outputs[task.task]]
                verdicts = self._verdicts(judge, task, items)
                metrics = self.metrics[task.task]
                for name in verdicts[0]:
                    metric = ExampleScore().to(self.module.device)
                    metric.update([item.id for item in items], [v[name] for v in verdicts])
                    metrics[f"{judge.name}_{name}"] = metric

    def examples(self, task: SuiteTask) -> list[Example]:
        """Return all examples of a suite, over all processes."""
        outputs = gather_by_id(self.outputs[task.task], self.module.trainer)
        scores: dict[str, dict[str, float]] = {item_id: {} for item_id in outputs}
        ids = {row_key(item_id): item_id for item_id in outputs}
        for name, metric in self.metrics[task.task].items():
            assert isinstance(metric, PerExampleMetric)
            found = {name: metric.scores()}
            if isinstance(metric, CompletionNLL):
                found[f"{name}_count"] = metric.token_counts()
            for kind, values in found.items():
                for key, value in values.items():
                    scores[ids[key]][kind] = value
        return [
            Example(
                id=item.id,
                group=item.group,
                cluster=item.cluster,
                prompt=item.prompt,
                texts=outputs[item.id].texts,
                finish=outputs[item.id].finish,
                log_likelihoods=outputs[item.id].log_likelihoods,
                scores=scores[item.id],
            )
            for item in task.suite.items()
            if item.id in outputs
        ]

    def means(self) -> dict[str, torch.Tensor]:
        """Return the mean of each metric as ``<task>/<metric>``, over all processes."""
        return {
            f"{task}/{name}": metric.compute()  # type: ignore[operator]
            for task, metrics in self.metrics.items()
            for name, metric in metrics.items()
        }

    def _verdicts(
        self, judge: Judge, task: SuiteTask, items: Sequence[Item]
    ) -> list[Mapping[str, float]]:
        pairs = [(item.prompt, self.outputs[task.task][item.id].texts[0]) for item in items]
        keys = [_verdict_key(judge, prompt, answer) for prompt, answer in pairs]
        known: dict[str, Mapping[str, float]] = {}
        if self.store is not None:
            known = {key: value for key in keys if (value := self.store.get(key)) is not None}
        missing = [place for place, key in enumerate(keys) if key not in known]
        for start in range(0, len(missing), judge.chunk):
            places = missing[start : start + judge.chunk]
            new = judge.judge(
                [pairs[place][0] for place in places],
                [pairs[place][1] for place in places],
                self.module.device,
            )
            fresh = {keys[place]: verdict for place, verdict in zip(places, new, strict=True)}
            if self.store is not None:
                self.store.add(fresh)
            known |= fresh
        return [known[key] for key in keys]


def _verdict_key(judge: Judge, prompt: str, answer: str) -> str:
    content: list[Any] = [judge.name, judge.fingerprint(), prompt, answer]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
