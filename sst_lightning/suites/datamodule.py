"""The suites of an evaluation as test dataloaders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.lazy_tokenizer import LazyTokenizer
from sst_lightning.data.rows import Kind, Row
from sst_lightning.metrics.judges import Judge
from sst_lightning.suites.base import Suite
from sst_lightning.suites.batching import (
    SuiteBatch,
    batch_loader,
    make_batches,
    share_of_process,
)
from sst_lightning.suites.encoding import encode_item

GPU_TOKENS = 16384
CPU_TOKENS = {"choice": 1024, "likelihood": 1024, "generation": 8192}
"""Token budgets where none is given.

A CPU reads small batches faster, which fit its caches (24 MMLU questions with SmolLM2-135M in fp32:
5.9 CPU seconds with 1,024 tokens, 8.7 with 4,096); generating, it reads the weights once for every
token of a batch, so that large batches are faster.
"""


@dataclass(frozen=True)
class SuiteTask:
    """One dataloader of the test pass.

    Attributes:
        task: the suite's name in tables and files.
        suite: what is asked and how it is scored.
        max_length: most tokens of prompt and answer together.
    """

    task: str
    suite: Suite
    max_length: int

    @property
    def name(self) -> str:
        """Unique among all tasks."""
        return f"{self.task}/{self.suite.measure}"

    @property
    def kind(self) -> Kind:
        """What the suite says about a model."""
        return self.suite.kind

    def fingerprint(self) -> str:
        """Hash of items and settings."""
        return f"{self.suite.fingerprint()} {self.max_length}"


class SuiteData(LazyTokenizer, LightningDataModule):
    """Evaluation suites for ``sst-merge test``.

    Args:
        suites: suites by name, in the order of the tables.
        tokenizer: alias, hub id or folder; the command line sets it to the model's base.
        token_budget: most tokens of a batch, padding and answers included; when not given, what suits
            the device (:data:`CPU_TOKENS`, :data:`GPU_TOKENS`).
        max_batch: most items of a batch.
        max_length: most tokens of prompt and answer together, as far as the model can read them.
        folder: where relative paths of the suites start; the working directory when not given.
        judges: judges of the answers of safety suites, beside the rules, which always judge.
        allow_code_execution: run suites that execute programs a model wrote (HumanEval); without it
            they are left out, with a warning.

    Raises:
        DataError: there is no suite, or a name cannot be used or is taken.
    """

    def __init__(
        self,
        suites: dict[str, Suite],
        tokenizer: str = "smollm2-135m",
        token_budget: int | None = None,
        max_batch: int = 64,
        max_length: int = 4096,
        folder: str | None = None,
        judges: list[Judge] | None = None,
        allow_code_execution: bool = False,
    ) -> None:
        super().__init__()
        if not suites:
            raise DataError("data.suites is empty: give at least one suite")
        for name in suites:
            if not name or any(character in name for character in "/\\ ."):
                raise DataError(
                    f"suite name {name!r}: names files and metrics, so it holds no slash, dot or space"
                )
        self.utility: dict[str, Any] = {}
        self.suites = {
            name: suite
            for name, suite in suites.items()
            if allow_code_execution or suite.allow_code_execution or not suite.runs_code
        }
        self.left_out = sorted(set(suites) - set(self.suites))
        for suite in self.suites.values():
            suite.allow_code_execution = suite.runs_code
            if folder is not None:
                suite.find_in(Path(folder))
        self.token_budget = token_budget
        self.max_batch = max_batch
        self.max_length = max_length
        self.judges = list(judges or [])
        names = [judge.name for judge in self.judges]
        if len(set(names)) < len(names):
            raise DataError(
                f"data.judges: two judges of one name ({', '.join(names)}), whose scores would be "
                "one. Leave one out, or evaluate twice"
            )
        self.tokenizer_name = tokenizer
        self.evaluation_tasks: Sequence[SuiteTask] = []
        self._loaders: dict[str, DataLoader[SuiteBatch]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Read all suites and find all judges, once.

        Args:
            stage: only ``test`` has data.

        Raises:
            DataError: a suite cannot be used.
            JudgeError: a judge is missing.
        """
        if self.evaluation_tasks:
            return
        for name in self.left_out:
            rank_zero_warn(
                f"suite {name} is left out: it runs programs that the model wrote. "
                "--allow-code-execution runs them, isolated (docs/sandbox.md)"
            )
        for name, suite in self.suites.items():
            rank_zero_info(f"suite {name} ({type(suite).__name__}): {len(suite.items())} items")
        for judge in self.judges:
            judge.check()
        self.evaluation_tasks = [
            SuiteTask(name, suite, self.max_length) for name, suite in self.suites.items()
        ]

    def test_dataloader(self) -> list[DataLoader[SuiteBatch]]:
        """One dataloader per suite."""
        assert self.trainer is not None
        device = self.trainer.strategy.root_device
        module: Any = self.trainer.lightning_module
        most = getattr(module.language_model.config, "max_position_embeddings", None)
        return [self.loader(task, device, most) for task in self.evaluation_tasks]

    def loader(
        self, task: SuiteTask, device: torch.device, most: int | None = None
    ) -> DataLoader[SuiteBatch]:
        """Return the batches of one suite, tokenised once.

        Args:
            task: the suite.
            device: of the model.
            most: tokens that the model can read, where that is known.
        """
        if task.task not in self._loaders:
            suite = task.suite
            limit = min(self.max_length, most or self.max_length)
            items = [encode_item(item, suite, self.tokenizer, limit) for item in suite.items()]
            truncated = sum(item.truncated for item in items)
            if truncated:
                rank_zero_warn(
                    f"suite {task.task}: {truncated} of {len(items)} prompts are longer than "
                    f"{limit} tokens with their answer and lose their beginning"
                )
            answer = suite.max_new_tokens if suite.measure == "generation" else 0
            own = share_of_process(items, task.task)
            usual = CPU_TOKENS[suite.measure] if device.type == "cpu" else GPU_TOKENS
            batches = make_batches(
                own, self.token_budget or usual, self.max_batch, answer, suite.samples_per_item
            )
            self._loaders[task.task] = batch_loader(batches)
        return self._loaders[task.task]

    def test_rows(self) -> dict[str, list[Row]]:
        """Return no rows: suites have items."""
        return {}

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Batches of suites hold no tensors."""
        return batch
