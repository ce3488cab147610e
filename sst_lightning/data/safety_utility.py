"""The data of a merge: calibration rows for the Fishers, test rows for utility and safety."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.base import TextDataModule
from sst_lightning.data.batching import Batch, collate
from sst_lightning.data.random_blocks import RandomBlocks
from sst_lightning.data.rows import Kind, Row, fingerprint_rows
from sst_lightning.data.security import Security

EMPTY_CALIBRATION = (
    "the calibration set '{name}' is empty: a Fisher needs rows with a completion. Give more rows "
    "(data.calibration_samples), or check the data file's response column"
)

Measure = Literal["nll", "generation", "both"]

BUDGET = "budget"
"""Validation set on which budgeted merging measures utility; it is asked for by name only."""

ENOUGH_BUDGET_ROWS = 20
"""With fewer rows that no Fisher is taken on, the Fisher's are used too (and it is said)."""

RESERVED_NAMES = frozenset({"attack", "harmless"})
"""Names of the safety tasks, which no utility data set may have."""


@dataclass(frozen=True)
class EvaluationTask:
    """One dataloader of the test pass.

    Attributes:
        name: ``<task>/<measure>``, unique.
        task: what is measured: the name of a utility data set, ``attack`` or ``harmless``.
        kind: kind of the rows.
        measure: ``nll`` scores the given completions, ``generation`` greedy answers; ``both`` does
            both in one pass over the prompts.
        rows: the rows.
    """

    name: str
    task: str
    kind: Kind
    measure: Measure
    rows: tuple[Row, ...]

    def fingerprint(self) -> str:
        """Hash of the task's measure and rows."""
        return hashlib.sha256(f"{self.measure} {fingerprint_rows(self.rows)}".encode()).hexdigest()


class SafetyUtilityData(LightningDataModule):
    """Utility data sets and safety data, together.

    Validation dataloaders are the calibration sets ``utility`` (all utility data sets together),
    ``harmless`` (look-alikes with helpful answers) and ``safety`` (attacks with refusals): what
    Fishers are taken on. Test dataloaders are the :class:`EvaluationTask`s.

    Args:
        utility: utility data sets by name, such as ``{a6: Alpaca}``.
        safety: attacks and harmless look-alikes.
        tokenizer: alias, hub id or folder; the command line sets it to the model's base.
        calibration_samples: most rows of each calibration set.
        budget_samples: most utility rows that ``merge --max_utility_drop`` measures utility on:
            calibration rows no Fisher is taken on, as far as there are any.
        harmless_calibration: take a Fisher on harmless look-alikes where the data has them.
        test_samples: most rows of each utility test set that are scored by NLL.
        generation_samples: most rows of each utility test set that are answered.
        attack_samples: most attacks that are answered (and whose refusals are scored by NLL).
        harmless_samples: most harmless look-alikes that are answered.
        batch_size: sequences per batch in NLL and Fisher passes.
        generation_batch_size: prompts per batch in generation.

    Attributes:
        random_blocks: validation sets that are taken in random order, and how (set by
            ``FisherCollector``); the others are sorted by length.
    """

    def __init__(
        self,
        utility: dict[str, TextDataModule],
        safety: Security,
        tokenizer: str = "smollm2-135m",
        calibration_samples: int = 128,
        budget_samples: int = 64,
        harmless_calibration: bool = True,
        test_samples: int = 128,
        generation_samples: int = 64,
        attack_samples: int = 64,
        harmless_samples: int = 64,
        batch_size: int = 8,
        generation_batch_size: int = 32,
    ) -> None:
        super().__init__()
        if not utility:
            raise DataError("data.utility is empty: give at least one utility data set")
        taken = sorted(set(utility) & RESERVED_NAMES)
        if taken:
            raise DataError(
                f"data.utility: the name '{taken[0]}' is that of a safety task. Use another name"
            )
        self.utility = utility
        self.safety = safety
        for module in self.children:
            module.tokenizer_name = tokenizer
        self.calibration_samples = calibration_samples
        self.budget_samples = budget_samples
        self.harmless_calibration = harmless_calibration
        self.test_samples = test_samples
        self.generation_samples = generation_samples
        self.attack_samples = attack_samples
        self.harmless_samples = harmless_samples
        self.batch_size = batch_size
        self.generation_batch_size = generation_batch_size
        self._fisher_parts: dict[str, list[tuple[TextDataModule, list[Row]]]] = {}
        self._selected: list[str] | None = None
        self.random_blocks: dict[str, RandomBlocks] = {}
        self.evaluation_tasks: list[EvaluationTask] = []
        self.allow_zero_length_dataloader_with_multiple_devices = True

    @property
    def children(self) -> list[TextDataModule]:
        """All data sets."""
        return [*self.utility.values(), self.safety]

    @property
    def validation_names(self) -> list[str]:
        """Name of each validation dataloader."""
        return list(self.fisher_rows()) if self._selected is None else self._selected

    def setup(self, stage: str | None = None) -> None:
        """Read all data sets, once.

        Args:
            stage: every stage uses the same rows.

        Raises:
            DataError: a data set cannot be used, or a calibration set is empty.
        """
        if self._fisher_parts:
            return
        for module in self.children:
            module.setup(stage)
        self._fisher_parts = self._calibration()
        self.evaluation_tasks = self._tasks()

    def fisher_rows(self) -> dict[str, list[Row]]:
        """Return the rows of each calibration set."""
        self.setup()
        return {
            name: [row for _, rows in parts for row in rows]
            for name, parts in self._fisher_parts.items()
        }

    def data_set(self, task: str) -> TextDataModule:
        """Return the data set a task's rows are from."""
        return self.utility.get(task, self.safety)

    def test_rows(self) -> dict[str, list[Row]]:
        """Return the rows of each task."""
        rows: dict[str, list[Row]] = {}
        for task in self.evaluation_tasks:
            rows.setdefault(task.task, []).extend(task.rows)
        return rows

    def select_validation(self, names: Sequence[str] | None) -> None:
        """Validate only on the named calibration sets; ``None`` is all of them."""
        self._selected = None if names is None else list(names)

    def validation_fingerprint(self, name: str) -> str:
        """Hash of the rows of a calibration set."""
        return fingerprint_rows(self.fisher_rows()[name])

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One dataloader per name in :attr:`validation_names`."""
        parts = {**self._fisher_parts, BUDGET: self._budget()}
        return [
            self._loader(parts[name], self.batch_size, self.random_blocks.get(name))
            for name in self.validation_names
        ]

    def budget_description(self) -> dict[str, int]:
        """Return the number of budget rows, and how many of them a Fisher is taken on too."""
        fisher = {row.id for row in self.fisher_rows()["utility"]}
        rows = [row for _, rows in self._budget() for row in rows]
        return {"rows": len(rows), "shared_with_fisher": sum(row.id in fisher for row in rows)}

    def _budget(self) -> list[tuple[TextDataModule, list[Row]]]:
        """Budget rows of each utility data set: those no Fisher is taken on, if there are enough."""
        most = self.budget_samples // len(self.utility)
        parts = []
        for module, used in self._fisher_parts["utility"]:
            unused = module.rows["calibration"][len(used) :]
            enough = len(unused) * len(self.utility) >= ENOUGH_BUDGET_ROWS
            parts.append((module, (unused if enough else [*unused, *used])[:most]))
        return parts

    def sample_batch(self) -> Batch:
        """Return one calibration row of each kind: enough tokens to tell two models apart."""
        parts = [(module, rows[:1]) for ((module, rows), *_) in self._fisher_parts.values()]
        items = [item for module, rows in parts for item in module.encode(rows)]
        return collate(items, self.safety.pad_id)

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """One dataloader per evaluation task; a process may have no rows of a small one.

        Raises:
            DataError: some process has no rows at all.
        """
        most = max(len(task.rows) for task in self.evaluation_tasks)
        processes = 1 if self.trainer is None else self.trainer.world_size
        if most < processes:
            raise DataError(
                f"{most} test rows cannot be shared by {processes} processes: use more rows or fewer "
                "devices"
            )
        return [
            self._loader(
                [(self.data_set(task.task), task.rows)],
                self.batch_size if task.measure == "nll" else self.generation_batch_size,
                even=False,
            )
            for task in self.evaluation_tasks
        ]

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Move the tensors of a batch; its rows stay as they are."""
        return self.safety.transfer_batch_to_device(batch, device, dataloader_idx)

    def _loader(
        self,
        parts: Sequence[tuple[TextDataModule, Sequence[Row]]],
        batch_size: int,
        blocks: RandomBlocks | None = None,
        even: bool = True,
    ) -> DataLoader[Batch]:
        # Each data set truncates its own rows: documents may need more room than attacks.
        items = [item for module, rows in parts for item in module.encode(rows)]
        return self.safety.loader_of(items, batch_size=batch_size, blocks=blocks, even=even)

    def _calibration(self) -> dict[str, list[tuple[TextDataModule, list[Row]]]]:
        most, sets = self.calibration_samples, len(self.utility)
        # The first sets get one row more where the number does not divide.
        shares = [most // sets + (index < most % sets) for index in range(sets)]
        harmless = _complete(self.safety.rows["harmless_calibration"])[:most]
        rows: dict[str, list[tuple[TextDataModule, list[Row]]]] = {
            "utility": [
                (module, module.rows["calibration"][:share])
                for module, share in zip(self.utility.values(), shares, strict=True)
            ],
            "harmless": [(self.safety, harmless)],
            "safety": [(self.safety, self.safety.rows["calibration"][:most])],
        }
        # Look-alikes are an extra where the data has them; the other two sets are not optional.
        if not (self.harmless_calibration and harmless):
            del rows["harmless"]
        for name, parts in rows.items():
            if not all(values for _, values in parts):
                raise DataError(EMPTY_CALIBRATION.format(name=name))
        return rows

    def _tasks(self) -> list[EvaluationTask]:
        tasks: list[EvaluationTask] = []

        def add(task: str, kind: Kind, scored: Sequence[Row], answered: Sequence[Row]) -> None:
            with_nll, with_answer = ({row.id for row in rows} for rows in (scored, answered))
            parts: dict[Measure, list[Row]] = {
                "both": [row for row in answered if row.id in with_nll],
                "nll": [row for row in scored if row.id not in with_answer],
                "generation": [row for row in answered if row.id not in with_nll],
            }
            for measure, rows in parts.items():
                if rows:
                    name = f"{task}/{measure}"
                    tasks.append(EvaluationTask(name, task, kind, measure, tuple(rows)))

        for name, module in self.utility.items():
            test = module.rows["test"]
            add(name, "utility", test[: self.test_samples], test[: self.generation_samples])
        attacks = self.safety.rows["test"][: self.attack_samples]
        add("attack", "attack", _complete(attacks), attacks)
        add("harmless", "harmless", [], self.safety.rows["harmless_test"][: self.harmless_samples])
        return tasks


def _complete(rows: Sequence[Row]) -> list[Row]:
    """Rows with a response: what a Fisher or an NLL can be taken on."""
    return [row for row in rows if row.response]
