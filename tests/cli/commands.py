"""Running ``main([...])`` in a folder of its own, and seeing what it wrote."""

from dataclasses import dataclass
from pathlib import Path

from sst_lightning.cli.main import main

# Keys every test overrides: short rows, few of them, one process, nothing but the run itself.
TINY = {
    "data": [
        "--data.calibration_samples=4",
        "--data.test_samples=3",
        "--data.generation_samples=2",
        "--data.attack_samples=2",
        "--data.harmless_samples=2",
    ],
    "trainer": [
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ],
}


@dataclass(frozen=True)
class Outcome:
    """Exit code of one command and the streams it wrote to."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines that say what was wrong."""
        return [line for line in self.err.splitlines() if "error:" in line]


def run(capfd, *arguments) -> Outcome:
    """Run the program in this process, as the console script would."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    captured = capfd.readouterr()
    return Outcome(code, captured.out, captured.err)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
