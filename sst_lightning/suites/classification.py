"""Texts with one of a few labels: sentiment and news topics."""

from typing import ClassVar

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.sources import Table
from sst_lightning.suites.items import ChoiceItem
from sst_lightning.suites.scoring import ChoiceScoring
from sst_lightning.suites.sources import TableSuite, first_column, row_id

TEXT_COLUMNS = ("sentence", "text", "input")
LABEL_COLUMNS = ("label", "output")


class LabelSuite(ChoiceScoring, TableSuite):
    """Classification by the log-likelihood of a word for each label.

    A table has the columns of the hub (sentence or text, and label, the number of a label) or
    those of instruction data (input, and output, the name of a label; the instruction is not
    used, so that both give the same prompt). Prompts are read as they stand, without chat template.

    Attributes:
        labels: names in the data, in the order of their numbers.
        words: what the model would say for each; what is scored.
        question: what is asked after the text.
    """

    chat = False
    labels: ClassVar[tuple[str, ...]]
    words: ClassVar[tuple[str, ...]]
    question: ClassVar[str]

    def read(self) -> list[ChoiceItem]:
        """Return the texts.

        Raises:
            DataError: a column is missing, or a label is unknown.
        """
        table = self.read_table()
        text = first_column(table, *TEXT_COLUMNS)
        label = first_column(table, *LABEL_COLUMNS)
        if text is None or label is None:
            raise DataError(
                f"{table.name}: no column {', '.join(TEXT_COLUMNS)} with {' or '.join(LABEL_COLUMNS)}; "
                f"it has {', '.join(table.columns)}. Rename the columns"
            )
        items = []
        for number in self.complete_rows(table, text, label):
            answer = self._answer(table, number, label)
            items.append(
                ChoiceItem(
                    id=row_id(table, number),
                    prompt=f"{table.text(number, text)}\nQuestion: {self.question}\nAnswer:",
                    group=self.labels[answer],
                    choices=tuple(f" {word}" for word in self.words),
                    answer=answer,
                )
            )
        return self.distinct(table, items)

    def _answer(self, table: Table, number: int, column: str) -> int:
        value = table.text(number, column)
        names = [name.casefold() for name in self.labels]
        if value.casefold() in names:
            return names.index(value.casefold())
        if value in map(str, range(len(names))):
            return int(value)
        raise DataError(
            f"{table.name}, row {number}, column {column!r}: unknown label {value!r}; expected one "
            f"of {', '.join(self.labels)} or 0 to {len(names) - 1}. Splits without labels (-1) "
            "cannot be scored"
        )


class SST2(LabelSuite):
    """Sentiment of film reviews (Socher et al. 2013), asked as lm-evaluation-harness asks it.

    Args:
        kwargs: see :class:`TableSuite`; hub: ``stanfordnlp/sst2``, whose test split has no labels.
    """

    labels = words = ("negative", "positive")
    question = "Is this sentence positive or negative?"
    hub_id = "stanfordnlp/sst2"
    usual_hub_split = "validation"


class AGNews(LabelSuite):
    """Topics of news articles (Zhang et al. 2015, arXiv 1509.01626).

    The question does not list the labels: SmolLM2-135M-Instruct then repeats the first of them for
    almost every article. ``Sci/Tech``, which no text says, is asked for as ``Technology``.

    Args:
        kwargs: see :class:`TableSuite`; hub: ``fancyzhx/ag_news``.
    """

    labels = ("World", "Sports", "Business", "Sci/Tech")
    words = ("World", "Sports", "Business", "Technology")
    question = "What is the topic of this article?"
    hub_id = "fancyzhx/ag_news"
