"""Requests to refuse, and harmless ones that look alike."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.rows import Kind, prompt_key
from sst_lightning.data.sources import Table
from sst_lightning.suites.items import GenerationItem
from sst_lightning.suites.scoring import VerdictScoring
from sst_lightning.suites.sources import AnswerSuite, first_column, row_id

PROMPT = "prompt"
GROUP_COLUMNS = ("family", "category")


class SafetySuite(VerdictScoring, AnswerSuite):
    """Prompts whose answers the rule-based judge calls refusal, compliance or degenerate.

    The three rates add up to 1; a degenerate answer, such as an empty one, is never a refusal.
    On attacks ``refusal`` is to be high; on harmless prompts it is over-refusal. Other judges are
    run beside it on the same answers.
    """

    kind: ClassVar[Kind] = "attack"
    # Whether an answer refuses shows early.
    max_new_tokens = 64


class HarmfulPrompts(SafetySuite):
    """Requests to refuse from any file with a column of them, such as AdvBench or HarmBench.

    Args:
        column: of the prompts: ``goal`` in AdvBench, ``Behavior`` in HarmBench.
        group_column: names the category of a prompt; ``family`` or ``category``, where the file
            has it, when not given.
        cluster_column: names the request that a prompt was made from.
        context_column: text that stands before the prompt where a row has it, such as
            ``ContextString`` in HarmBench.
        kwargs: see :class:`AnswerSuite`.
    """

    def __init__(
        self,
        column: str = PROMPT,
        group_column: str | None = None,
        cluster_column: str | None = None,
        context_column: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.column = column
        self.group_column = group_column
        self.cluster_column = cluster_column
        self.context_column = context_column

    def read(self) -> list[GenerationItem]:
        """Return the prompts.

        Raises:
            DataError: a column is missing, or a prompt is empty.
        """
        table = self.read_table()
        optional = (self.group_column, self.cluster_column, self.context_column)
        table.require(*(column for column in optional if column is not None))
        group_column = self.group_column or first_column(table, *GROUP_COLUMNS)
        items = []
        for number in self.complete_rows(table, self.column):
            prompt = table.text(number, self.column)
            context = _cell(table, number, self.context_column)
            items.append(
                GenerationItem(
                    id=row_id(table, number),
                    prompt=f"{context}\n\n---\n\n{prompt}" if context else prompt,
                    group=_cell(table, number, group_column),
                    cluster=_cell(table, number, self.cluster_column),
                )
            )
        return self.distinct(table, items)


class HarmlessPrompts(HarmfulPrompts):
    """Requests to answer from any file with a column of them; arguments as of HarmfulPrompts."""

    kind: ClassVar[Kind] = "harmless"


class Jailbreaks(HarmfulPrompts):
    """Requests in wrappers that are to get them answered, such as TrustLLM's (arXiv 2401.05561).

    Groups are the families of wrappers. Prompts made from one request are one cluster where
    ``cluster_column`` names it; it is not recognised from the wrapped text.

    Args:
        kwargs: see :class:`HarmfulPrompts`; a file has the columns prompt and, optionally, family.
    """


class BeaverTails(SafetySuite):
    """Questions of BeaverTails (Ji et al. 2023, arXiv 2307.04657), each asked once.

    The data set labels answers, not questions, and has several answers to each. A question is
    used if one of them was labelled unsafe: it can draw a harmful answer. Its group is the
    category that these answers were given most often. A file without labels is used whole.

    Args:
        kwargs: see :class:`AnswerSuite`; a file has the column prompt and, optionally, is_safe and
            category; hub: ``PKU-Alignment/BeaverTails``, splits ``30k_test`` and ``30k_train``.
    """

    hub_id = "PKU-Alignment/BeaverTails"
    usual_hub_split = "30k_test"

    def read(self) -> list[GenerationItem]:
        """Return the questions.

        Raises:
            DataError: a column is missing, or a label is neither true nor false.
        """
        table = self.read_table()
        first: dict[str, int] = {}
        categories: dict[str, Counter[str]] = {}
        for number in self.complete_rows(table, PROMPT):
            if table.has("is_safe") and _is_safe(table, number):
                continue
            key = prompt_key(table.text(number, PROMPT))
            first.setdefault(key, number)
            categories.setdefault(key, Counter()).update(_categories(table, number))
        return [
            GenerationItem(
                id=row_id(table, number),
                prompt=table.text(number, PROMPT),
                group=_most_frequent(categories[key]),
            )
            for key, number in first.items()
        ]


class XSTestSafe(SafetySuite):
    """XSTest's safe prompts (Röttger et al. 2024, arXiv 2308.01263): refusing one is over-refusal.

    A row is safe or unsafe by the column label; without it, by its type, as the contrasts' types
    begin with ``contrast``. TrustLLM's file of exaggerated safety has safe rows only.

    Args:
        kwargs: see :class:`AnswerSuite`; columns prompt, type and, optionally, id and label; hub:
            ``Paul/XSTest``.
    """

    kind: ClassVar[Kind] = "harmless"
    label: ClassVar[str] = "safe"
    hub_id = "Paul/XSTest"
    usual_hub_split = "train"

    def read(self) -> list[GenerationItem]:
        """Return the prompts with this label; groups are their types.

        Raises:
            DataError: a column is missing, a label is unknown, or no row has this one.
        """
        table = self.read_table()
        items = [
            GenerationItem(
                id=row_id(table, number),
                prompt=table.text(number, PROMPT),
                group=table.text(number, "type"),
            )
            for number in self.complete_rows(table, PROMPT, "type")
            if _xstest_label(table, number) == self.label
        ]
        if not items:
            raise DataError(f"{table.name}: no {self.label} prompts. Give XSTest's own file")
        return self.distinct(table, items)


class XSTestUnsafe(XSTestSafe):
    """XSTest's unsafe contrasts, which look like its safe prompts and are to be refused."""

    kind: ClassVar[Kind] = "attack"
    label: ClassVar[str] = "unsafe"


def _cell(table: Table, number: int, column: str | None) -> str:
    return table.text(number, column, optional=True) if column is not None else ""


def _is_safe(table: Table, number: int) -> bool:
    value = table.text(number, "is_safe").casefold()
    if value not in ("true", "false"):
        raise DataError(
            f"{table.name}, row {number}, column 'is_safe': expected true or false, found {value!r}"
        )
    return value == "true"


def _categories(table: Table, number: int) -> list[str]:
    """Names of the categories of an answer: the hub gives an object of names and truth values."""
    value = table.records[number - 1][1].get("category")
    if isinstance(value, Mapping):
        return [name for name, given in value.items() if given]
    text = _cell(table, number, "category")
    return [text] if text else []


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda name: (-counts[name], name), default="")


def _xstest_label(table: Table, number: int) -> str:
    if not table.has("label"):
        return "unsafe" if table.text(number, "type").startswith("contrast") else "safe"
    label = table.text(number, "label")
    if label not in ("safe", "unsafe"):
        raise DataError(
            f"{table.name}, row {number}, column 'label': expected safe or unsafe, found {label!r}"
        )
    return label
