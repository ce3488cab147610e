"""A7: refusing what should be refused, and harmless look-alikes that should be answered."""

from typing import Any

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.base import TextDataModule
from sst_lightning.data.embedded import a7
from sst_lightning.data.rows import Row, without_prompts_of
from sst_lightning.data.sources import Table, read_file
from sst_lightning.data.splits import SPLITS, split_by_group

HELD_OUT_SHARE = 0.4
"""Share of a file's attack families, the last in alphabetical order, held out by default."""

EMBEDDED = "embedded"
PROMPT_COLUMNS = ("prompt", "instruction")
RESPONSE_COLUMNS = ("response", "output")


class Security(TextDataModule):
    """Requests to refuse, with refusals, and harmless look-alikes, with helpful answers.

    The test split holds out whole attack families. In the embedded set a family is a wrapper style,
    and topics are held out as well. A file has the columns prompt and response (or instruction and
    output); without a family column, or with one family only, its rows are held out one by one.

    Harmless rows come from the embedded set with source "embedded", else from ``harmless_path``.
    They are split in three equal parts for training, calibration and test (two halves for training
    and calibration where ``harmless_test_path`` gives the test rows). Rows without a response are
    kept in the test split only, where over-refusal needs no reference; a prompt of the test split
    is removed from the other two.

    Args:
        harmless_ratio: Harmless rows per attack row in the training data; rows repeat where there
            are too few. 0 is the original's recipe, which teaches a blunt adapter.
        held_out_groups: Attack families (embedded: wrapper styles) of the test split; None means
            the last 40 % in alphabetical order (embedded: its own choice).
        group_column: Column of a file that names the attack family, or the source of a harmless row.
        harmless_path: File with harmless prompts, or "embedded" for the embedded look-alikes.
        harmless_test_path: Another file for the harmless test rows.
        harmless_label: "column=value": use only these rows of a harmless file that has the column,
            for instance "label=safe".
    """

    name = "a7"

    def __init__(
        self,
        harmless_ratio: float = 0.0,
        held_out_groups: list[str] | None = None,
        group_column: str = "family",
        harmless_path: str | None = None,
        harmless_test_path: str | None = None,
        harmless_label: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if harmless_ratio < 0:
            raise DataError(f"harmless_ratio must be 0 or more, got {harmless_ratio}")
        if self.source == EMBEDDED and (harmless_path or harmless_test_path):
            raise DataError("harmless_path and harmless_test_path need source: local or hub")
        if harmless_test_path and not harmless_path:
            raise DataError("harmless_test_path needs harmless_path as well")
        if harmless_label is not None and "=" not in harmless_label:
            raise DataError(f"harmless_label {harmless_label!r} must look like 'label=safe'")
        if harmless_ratio > 0 and self.source != EMBEDDED and harmless_path is None:
            raise DataError(
                f"harmless_ratio {harmless_ratio} needs harmless rows: give harmless_path"
            )
        self.harmless_ratio = harmless_ratio
        self.held_out_groups = held_out_groups
        self.group_column = group_column
        self.harmless_path = harmless_path
        self.harmless_test_path = harmless_test_path
        self.harmless_label = harmless_label

    def embedded_rows(self) -> dict[str, list[Row]]:
        """Return the embedded attack rows by split.

        Raises:
            DataError: ``held_out_groups`` names an unknown style.
        """
        return a7.attack_rows(self.held_out_groups)

    def load_rows(self) -> dict[str, list[Row]]:
        """Read, split and sample attack and harmless rows, and mix the training data.

        Raises:
            DataError: The data cannot be used, or a split is empty.
        """
        rows = super().load_rows()
        harmless = self.sample_splits(self.harmless_splits(), prefix="harmless_")
        wanted = round(self.harmless_ratio * len(rows["train"]))
        available = harmless["harmless_train"]
        if wanted and not available:
            raise DataError(
                f"{self.harmless_path}: no row with a response is left for training, and "
                f"harmless_ratio is {self.harmless_ratio}. Add a response column or set it to 0"
            )
        rows["train"] = rows["train"] + [available[i % len(available)] for i in range(wanted)]
        return rows | harmless

    def split_table(self, table: Table) -> dict[str, list[Row]]:
        """Split attack rows: whole families for the test, rows for calibration.

        Raises:
            DataError: ``held_out_groups`` names an unknown family, or all of them.
        """
        rows = self.table_rows(table)
        families = sorted({row.group for row in rows})
        if len(families) < 2:
            if self.held_out_groups:
                raise DataError(
                    f"{table.name}: held_out_groups needs two or more families in column "
                    f"{self.group_column!r}; found {len(families)}"
                )
            splits = split_by_group(rows, self.calibration_share, self.test_share, _row_id)
            return {split: splits[split] for split in SPLITS}
        held_out = self.held_out_groups
        if held_out is None:
            held_out = families[-max(1, round(HELD_OUT_SHARE * len(families))) :]
        unknown = sorted(set(held_out) - set(families))
        if unknown or len(set(held_out)) == len(families):
            problem = f"unknown {', '.join(unknown)}" if unknown else "no family left to train on"
            raise DataError(
                f"{table.name}: held_out_groups: {problem}. Families: {', '.join(families)}"
            )
        test = [row for row in rows if row.group in held_out]
        rest = without_prompts_of([row for row in rows if row.group not in held_out], test)
        share = min(self.calibration_share * len(rows) / max(len(rest), 1), 0.5)
        splits = split_by_group(rest, share, 0.0, _row_id)
        splits["test"] = split_by_group(test, 0.0, 1.0, _row_id)["test"]
        return {split: splits[split] for split in SPLITS}

    def table_rows(self, table: Table) -> list[Row]:
        """Return the attack rows of a table.

        Raises:
            DataError: A column is missing or a cell is empty.
        """
        prompt = _column(table, PROMPT_COLUMNS)
        response = _column(table, RESPONSE_COLUMNS)
        rows = []
        for number, _ in table:
            if not self.keep(table, number, (prompt, response)):
                continue
            rows.append(
                Row(
                    id=f"{self.name}:{number}",
                    prompt=table.text(number, prompt),
                    response=table.text(number, response),
                    kind="attack",
                    group=self._group(table, number),
                )
            )
        return rows

    def harmless_splits(self) -> dict[str, list[Row]]:
        """Return all harmless rows by split, names prefixed with ``harmless_``.

        Raises:
            DataError: A harmless file cannot be used.
        """
        if self.source == EMBEDDED:
            return a7.harmless_rows(self.held_out_groups)
        if self.harmless_path == EMBEDDED and self.harmless_test_path is None:
            return a7.harmless_rows()
        if self.harmless_path is None:
            return {f"harmless_{split}": [] for split in SPLITS}
        if self.harmless_path == EMBEDDED:
            rows = [row for part in a7.harmless_rows().values() for row in part]
        else:
            rows = self._harmless_table(self.harmless_path, "harmless")
        if self.harmless_test_path is None:
            splits = split_by_group(rows, 1 / 3, 1 / 3, _row_id)
            test = splits["test"]
        else:
            test = self._harmless_table(self.harmless_test_path, "harmless_test")
            rows = without_prompts_of(rows, test)
            splits = split_by_group(rows, 1 / 2, 0.0, _row_id)
        return {
            "harmless_train": [row for row in splits["train"] if row.response],
            "harmless_calibration": [row for row in splits["calibration"] if row.response],
            "harmless_test": test,
        }

    def _harmless_table(self, path: str, label: str) -> list[Row]:
        table = read_file(path)
        prompt = _column(table, PROMPT_COLUMNS)
        response = next((c for c in RESPONSE_COLUMNS if table.has(c)), None)
        column, _, wanted = (self.harmless_label or "=").partition("=")
        rows = []
        for number, _ in table:
            if table.has(column) and table.text(number, column, optional=True) != wanted:
                continue
            if not self.keep(table, number, (prompt,)):
                continue
            rows.append(
                Row(
                    id=f"{self.name}:{label}:{number}",
                    prompt=table.text(number, prompt),
                    response=table.text(number, response, optional=True) if response else "",
                    kind="harmless",
                    group=self._group(table, number) or label,
                )
            )
        if not rows:
            raise DataError(f"{path}: no harmless rows left with {self.harmless_label!r}")
        return rows

    def _group(self, table: Table, number: int) -> str:
        if not table.has(self.group_column):
            return ""
        return table.text(number, self.group_column, optional=self.skip_empty)


def _row_id(row: Row) -> str:
    return row.id


def _column(table: Table, names: tuple[str, ...]) -> str:
    for name in names:
        if table.has(name):
            return name
    raise DataError(
        f"{table.name}: no column {' or '.join(map(repr, names))}; "
        f"it has {', '.join(map(repr, table.columns))}. Rename or add the column"
    )
