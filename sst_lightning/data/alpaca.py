"""A6: following everyday instructions."""

from sst_lightning.data.base import TextDataModule
from sst_lightning.data.embedded import a6
from sst_lightning.data.rows import Row, prompt_key
from sst_lightning.data.sources import Table


class Alpaca(TextDataModule):
    """Instructions with answers (Stanford Alpaca, Taori et al. 2023; hub: tatsu-lab/alpaca).

    The embedded set has everyday instructions whose answers can be checked. A file has the columns
    instruction, output and, optionally, input. Rows are split one by one; a prompt that occurs
    twice counts once.
    """

    name = "a6"
    hub_id = "tatsu-lab/alpaca"

    def embedded_rows(self) -> dict[str, list[Row]]:
        """Return the embedded rows by split."""
        return a6.rows()

    def table_rows(self, table: Table) -> list[Row]:
        """Return the rows of a table.

        Raises:
            DataError: A column is missing or a cell is empty.
        """
        table.require("instruction", "output")
        rows = []
        for number, _ in table:
            if not self.keep(table, number, ("instruction", "output")):
                continue
            given = table.text(number, "input", optional=True)
            instruction = table.text(number, "instruction")
            prompt = f"{instruction}\n\n{given}" if given else instruction
            response = table.text(number, "output")
            rows.append(
                Row(
                    id=f"{self.name}:{number}",
                    prompt=prompt,
                    response=response,
                    kind="utility",
                    group=prompt_key(prompt),
                    references=(response,),
                )
            )
        return rows
