"""The rows that a training data set holds back, as suites: no model was trained on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.base import TextDataModule
from sst_lightning.data.rows import Kind, Row
from sst_lightning.metrics.per_example import PerExampleMetric
from sst_lightning.metrics.text import ContainsMatch, ExactMatch, RougeL
from sst_lightning.suites.base import Suite
from sst_lightning.suites.items import GenerationItem, LikelihoodItem, Output
from sst_lightning.suites.scoring import LikelihoodScoring, VerdictScoring
from sst_lightning.suites.sources import answers_of, ids_of


class HeldOut(VerdictScoring, Suite):
    """Answers to the rows that a data set holds back for the test.

    Utility rows are scored by ROUGE-L against the response and, where a short reference decides
    that an answer is right, by exact and contains match; attacks and harmless prompts by the rules'
    verdict.

    Args:
        data: the data set, as in a training configuration: embedded, local or from the hub.
        split: ``test`` or, of safety data, ``harmless_test``.
        max_new_tokens: most tokens of an answer.
        samples: most rows; all when not given.
        seed: of the choice of rows.
    """

    paths: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        data: TextDataModule,
        split: str = "test",
        max_new_tokens: int = 64,
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(samples=samples, seed=seed)
        self.data = data
        self.split = split
        self.max_new_tokens = max_new_tokens
        self._kind: Kind | None = None

    @property
    def kind(self) -> Kind:  # type: ignore[override]
        """Kind of the rows."""
        self.items()
        assert self._kind is not None
        return self._kind

    @property
    def primary(self) -> str:  # type: ignore[override]
        """``rouge_l`` of utility rows, ``refusal`` of the others."""
        return "rouge_l" if self.kind == "utility" else "refusal"

    def find_in(self, folder: Path) -> None:
        """Let the relative paths of a local data set start in ``folder``."""
        for name in ("path", "harmless_path", "harmless_test_path"):
            path = getattr(self.data, name, None)
            if self.data.source == "local" and path is not None:
                setattr(self.data, name, str(folder / path))

    def rows(self) -> list[Row]:
        """Return the rows of the split.

        Raises:
            DataError: the data set has no such split, or its rows are of several kinds.
        """
        self.data.setup("test")
        if self.split not in self.data.rows:
            raise DataError(
                f"{type(self.data).__name__} has no split {self.split!r}; "
                f"it has {', '.join(self.data.rows)}"
            )
        rows = self.data.rows[self.split]
        kinds = {row.kind for row in rows}
        if len(kinds) > 1:
            raise DataError(f"split {self.split!r}: rows of several kinds: {', '.join(kinds)}")
        self._kind = kinds.pop() if kinds else "utility"
        return rows

    def read(self) -> list[Any]:
        """Return the rows of the split.

        Raises:
            DataError: the data set has no such split, or its rows are of several kinds.
        """
        return [
            GenerationItem(
                id=row.id,
                prompt=row.prompt,
                **_place(row),
                references=row.references if row.checkable else (),
                details={"response": row.response},
            )
            for row in self.rows()
        ]

    def metrics(self) -> dict[str, PerExampleMetric]:
        """Return ROUGE-L and matches, or the rates of the verdicts."""
        if self.kind != "utility":
            return super().metrics()
        return {"rouge_l": RougeL(), "exact_match": ExactMatch(), "contains": ContainsMatch()}

    def update(
        self, metrics: Mapping[str, Any], items: Sequence[GenerationItem], outputs: Sequence[Output]
    ) -> None:
        """Score answers."""
        if self.kind != "utility":
            super().update(metrics, items, outputs)
            return
        ids, answers = ids_of(items), answers_of(outputs)
        metrics["rouge_l"].update(ids, answers, [item.details["response"] for item in items])
        checkable = [place for place, item in enumerate(items) if item.references]
        for name in ("exact_match", "contains"):
            metrics[name].update(
                [ids[place] for place in checkable],
                [answers[place] for place in checkable],
                [items[place].references for place in checkable],
            )


class HeldOutLikelihood(LikelihoodScoring, HeldOut):
    """NLL of the responses of held-out rows.

    Args:
        data: the data set, as in a training configuration: embedded, local or from the hub.
        split: ``test`` or, of safety data, ``harmless_test``.
        samples: most rows; all when not given.
        seed: of the choice of rows.
    """

    def __init__(
        self,
        data: TextDataModule,
        split: str = "test",
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(data, split, samples=samples, seed=seed)

    def read(self) -> list[Any]:
        """Return the rows that have a response.

        Raises:
            DataError: the data set has no such split, or its rows are of several kinds.
        """
        return [
            LikelihoodItem(id=row.id, prompt=row.prompt, **_place(row), completion=row.response)
            for row in self.rows()
            if row.response
        ]


def _place(row: Row) -> dict[str, str]:
    """Group and cluster of a row; a document or template, of which there are many, is no group."""
    return {"group": "" if row.kind == "utility" else row.group, "cluster": row.cluster}
