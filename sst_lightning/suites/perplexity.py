"""Held-out NLL of plain text."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.sources import read_text
from sst_lightning.suites.items import LikelihoodItem, Output
from sst_lightning.suites.scoring import LikelihoodScoring
from sst_lightning.suites.sources import TableSuite, row_id


class Perplexity(LikelihoodScoring, TableSuite):
    """NLL of texts per token, byte and word; perplexity is its exponential.

    Models with different tokenizers are compared per byte or per word. Texts are cut into windows
    that do not overlap, each read without context, so that every token is scored once. Windows
    are measured in characters, which do not depend on the tokenizer: items stay the same for all
    models, and a window that fits into the context of one is never cut. Windows of a text are one
    cluster.

    Args:
        column: of the texts.
        window: most characters of a window; it ends before white space where it holds any. The
            usual 2,000 are about 500 tokens of English.
        kwargs: see :class:`TableSuite`. A local ``.txt`` file is one text. Hub: any data set.
    """

    chat = False
    units: ClassVar[Mapping[str, Callable[[LikelihoodItem, Output], int]]] = {
        **LikelihoodScoring.units,
        "nll_per_byte": lambda item, output: len(item.completion.encode()),
        "nll_per_word": lambda item, output: len(item.completion.split()),
    }

    def __init__(self, column: str = "text", window: int = 2000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if window < 1:
            raise DataError(f"Perplexity: window must be at least 1 character, got {window}")
        self.column = column
        self.window = window

    def read(self) -> list[LikelihoodItem]:
        """Return the windows of all texts.

        Raises:
            DataError: the file or the column is missing.
        """
        return [
            LikelihoodItem(id=f"{text_id}/{number}", prompt="", cluster=text_id, completion=window)
            for text_id, text in self._texts()
            for number, window in enumerate(windows(text, self.window), start=1)
        ]

    def _texts(self) -> list[tuple[str, str]]:
        if self.source == "local" and Path(str(self.path)).suffix.lower() == ".txt":
            return [("1", read_text(str(self.path)).strip())]
        table = self.read_table()
        numbers = self.complete_rows(table, self.column)
        return [(row_id(table, number), table.text(number, self.column)) for number in numbers]


def windows(text: str, size: int) -> Iterator[str]:
    """Cut a text into windows of at most ``size`` characters that together are the text.

    A window ends before the last white space that it could hold, which opens the next one, as
    tokenizers join a word to the space in front of it; a longer word is cut. Windows of white
    space alone are left out.
    """
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            # The first character is no place to end: the window would be empty.
            spaces = (i for i in range(end, start, -1) if text[i].isspace())
            end = next(spaces, end)
        window = text[start:end]
        if not window.isspace():
            yield window
        start = end
