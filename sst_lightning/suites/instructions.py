"""Everyday instructions: how close an answer is to the reference, and how likely the reference is."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from sst_lightning.data.alpaca import instruction_prompt
from sst_lightning.data.sources import Table
from sst_lightning.metrics.per_example import PerExampleMetric
from sst_lightning.metrics.text import RougeL
from sst_lightning.suites.items import GenerationItem, LikelihoodItem, Output
from sst_lightning.suites.scoring import LikelihoodScoring
from sst_lightning.suites.sources import AnswerSuite, TableSuite, answers_of, ids_of, row_id

HUB_ID = "tatsu-lab/alpaca"


class AlpacaInstructions(AnswerSuite):
    """Answers to instructions (Stanford Alpaca, Taori et al. 2023), by ROUGE-L.

    Args:
        skip_empty: leave out rows without output, and say how many: the usual file has some.
        kwargs: see :class:`AnswerSuite`; a file has the columns instruction, output and,
            optionally, input; hub: ``tatsu-lab/alpaca``.
    """

    primary: ClassVar[str] = "rouge_l"
    hub_id = HUB_ID
    usual_hub_split = "train"

    def __init__(self, skip_empty: bool = True, **kwargs: Any) -> None:
        super().__init__(skip_empty=skip_empty, **kwargs)

    def read(self) -> list[GenerationItem]:
        """Return the instructions.

        Raises:
            DataError: a column is missing.
        """
        table = self.read_table()
        items = [
            GenerationItem(id=item_id, prompt=prompt, references=(output,))
            for item_id, prompt, output in _rows(self, table)
        ]
        return self.distinct(table, items)

    def metrics(self) -> dict[str, PerExampleMetric]:
        """Return ROUGE-L."""
        return {"rouge_l": RougeL()}

    def update(
        self, metrics: Mapping[str, Any], items: Sequence[GenerationItem], outputs: Sequence[Output]
    ) -> None:
        """Score outputs."""
        references = [item.references[0] for item in items]
        metrics["rouge_l"].update(ids_of(items), answers_of(outputs), references)


class AlpacaLikelihood(LikelihoodScoring, TableSuite):
    """NLL of the reference answers to instructions (Stanford Alpaca), in the chat.

    Args:
        skip_empty: leave out rows without output, and say how many: the usual file has some.
        kwargs: see :class:`TableSuite`; columns as of :class:`AlpacaInstructions`.
    """

    hub_id = HUB_ID
    usual_hub_split = "train"

    def __init__(self, skip_empty: bool = True, **kwargs: Any) -> None:
        super().__init__(skip_empty=skip_empty, **kwargs)

    def read(self) -> list[LikelihoodItem]:
        """Return the instructions.

        Raises:
            DataError: a column is missing.
        """
        table = self.read_table()
        items = [
            LikelihoodItem(id=item_id, prompt=prompt, completion=output)
            for item_id, prompt, output in _rows(self, table)
        ]
        return self.distinct(table, items)


def _rows(suite: TableSuite, table: Table) -> Iterator[tuple[str, str, str]]:
    """Give id, prompt and output of each complete row."""
    for number in suite.complete_rows(table, "instruction", "output"):
        prompt = instruction_prompt(
            table.text(number, "instruction"), table.text(number, "input", optional=True)
        )
        yield row_id(table, number), prompt, table.text(number, "output")
