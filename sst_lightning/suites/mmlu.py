"""MMLU: multiple choice questions on 57 subjects."""

import csv
import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info

from sst_lightning.algebra.errors import DataError
from sst_lightning.data.sources import decode, read_hub
from sst_lightning.suites.base import Suite
from sst_lightning.suites.items import ChoiceItem
from sst_lightning.suites.scoring import ChoiceScoring
from sst_lightning.suites.sources import Source, check_source

LETTERS = "ABCD"
SUBJECTS = 57
"""Subjects of the whole benchmark."""
MOST_SHOTS = 5
"""Questions of each subject's dev file."""

HUB_SPLITS = {"dev": "dev", "val": "validation", "test": "test"}
"""Names on the hub of the splits of the Hendrycks tree."""


@dataclass(frozen=True)
class Question:
    """One question with its four choices; ``answer`` is the index of the right one."""

    question: str
    choices: tuple[str, ...]
    answer: int

    def text(self) -> str:
        """Return the question as the model reads it, up to where the letter is to stand."""
        lines = [
            f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True)
        ]
        return "\n".join([self.question.strip(), *lines, "Answer:"])


class MMLU(ChoiceScoring, Suite):
    """MMLU (Hendrycks et al. 2021, arXiv 2009.03300), by the log-likelihood of the letters.

    Prompts are those of lm-evaluation-harness 0.4.13: a line that names the subject, the first
    ``shots`` questions of its dev file with their answers, and the question. They are read as they
    stand, without chat template. A file may hold fewer subjects; how many is said.

    Args:
        source: ``local`` or ``hub``.
        path: of source ``local``: the folder with ``dev``, ``val`` and ``test`` (or with ``data``
            above them), or a zip file of it; files are ``<subject>_<split>.csv`` without header.
            Of source ``hub``: a data set like ``cais/mmlu``, which is the default.
        shots: solved questions before each question, 0 to 5.
        subjects: such as ``abstract_algebra``; all that are there when not given.
        split: ``test`` or ``val``.
        samples: most questions; all when not given.
        seed: of the choice of questions.
    """

    chat = False
    hub_id = "cais/mmlu"

    def __init__(
        self,
        source: Source = "hub",
        path: str | None = None,
        shots: int = 0,
        subjects: list[str] | None = None,
        split: Literal["test", "val"] = "test",
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(samples=samples, seed=seed)
        check_source(type(self).__name__, source, path)
        if not 0 <= shots <= MOST_SHOTS:
            raise DataError(f"MMLU: shots must be 0 to {MOST_SHOTS}, got {shots}")
        self.source = source
        self.path = path
        self.shots = shots
        self.subjects = subjects
        self.split = split

    def read(self) -> list[ChoiceItem]:
        """Return the questions of all wanted subjects.

        Raises:
            DataError: a subject, split or dev question is missing, or a file is damaged.
        """
        splits = (self.split, "dev") if self.shots else (self.split,)
        if self.source == "local":
            name = str(self.path)
            read = {split: _read_tree(Path(name), split) for split in splits}
        else:
            name = self.path or self.hub_id
            read = {split: _read_hub(name, split) for split in splits}
        questions = read[self.split]
        missing = sorted(set(self.subjects or ()) - set(questions))
        if missing:
            raise DataError(
                f"{name}: no subject {', '.join(map(repr, missing))} in split {self.split!r}; "
                f"it has {', '.join(sorted(questions))}"
            )
        subjects = sorted(self.subjects or questions)
        items = []
        for subject in subjects:
            introduction = self._introduction(name, subject, read.get("dev", {}).get(subject, []))
            items += [
                ChoiceItem(
                    id=f"{subject}/{self.split}/{number}",
                    prompt=introduction + question.text(),
                    group=subject,
                    choices=tuple(f" {letter}" for letter in LETTERS),
                    answer=question.answer,
                )
                for number, question in enumerate(questions[subject], start=1)
            ]
        rank_zero_info(
            f"MMLU ({name}, {self.split}): {len(subjects)} of {SUBJECTS} subjects, "
            f"{len(items)} questions"
        )
        return items

    def _introduction(self, name: str, subject: str, solved: Sequence[Question]) -> str:
        if len(solved) < self.shots:
            raise DataError(
                f"{name}: {len(solved)} dev questions of {subject}, {self.shots} shots asked for. "
                "Add the dev files or ask for fewer shots"
            )
        topic = subject.replace("_", " ")
        parts = [f"The following are multiple choice questions (with answers) about {topic}."]
        parts += [f"{one.text()} {LETTERS[one.answer]}" for one in solved[: self.shots]]
        return "\n\n".join(parts) + "\n\n"


def _read_tree(path: Path, split: str) -> dict[str, list[Question]]:
    if path.is_dir():
        files = _folder_files(path, split)
    elif path.is_file():
        files = _zip_files(path, split)
    else:
        raise DataError(f"{path}: no such file. Give MMLU's folder or a zip file of it")
    if not files:
        raise DataError(
            f"{path}: no files {split}/<subject>_{split}.csv. Give the folder that holds dev, val "
            "and test"
        )
    ending = f"_{split}.csv"
    return {
        name.rpartition("/")[2].removesuffix(ending): _parse(name, text)
        for name, text in sorted(files.items())
    }


def _folder_files(path: Path, split: str) -> dict[str, str]:
    for folder in (path / split, path / "data" / split):
        if folder.is_dir():
            files = sorted(folder.glob(f"*_{split}.csv"))
            return {file.as_posix(): decode(file.read_bytes(), str(file)) for file in files}
    return {}


def _zip_files(path: Path, split: str) -> dict[str, str]:
    files = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                member = PurePosixPath(name)
                if member.parent.name == split and member.name.endswith(f"_{split}.csv"):
                    files[f"{path}/{name}"] = decode(archive.read(name), f"{path}/{name}")
    # A cut-off archive has no directory at its end; a damaged one fails when a member is read.
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a complete zip file ({error}). Download it again") from error
    return files


def _parse(name: str, text: str) -> list[Question]:
    questions = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: not CSV ({error})") from error
    for number, row in enumerate(rows, start=1):
        if len(row) != len(LETTERS) + 2:
            raise DataError(
                f"{name}, row {number}: {len(row)} cells; expected a question, four choices and a "
                "letter. Quote cells that contain commas; a row cut short is a truncated download"
            )
        letter = row[-1].strip()
        if len(letter) != 1 or letter not in LETTERS:
            raise DataError(
                f"{name}, row {number}: answer {row[-1]!r} is none of A, B, C, D. Correct the row"
            )
        questions.append(Question(row[0], tuple(row[1:-1]), LETTERS.index(letter)))
    return questions


def _read_hub(dataset: str, split: str) -> dict[str, list[Question]]:
    table = read_hub(dataset, HUB_SPLITS[split], "all")
    table.require("subject", "question", "choices", "answer")
    questions: dict[str, list[Question]] = {}
    for number, row in table:
        choices, answer = row["choices"], row["answer"]
        if len(choices) != len(LETTERS) or answer not in range(len(LETTERS)):
            raise DataError(
                f"{table.name}, row {number}: {len(choices)} choices and answer {answer!r}; "
                "expected four choices and an answer of 0 to 3"
            )
        question = Question(row["question"], tuple(choices), answer)
        questions.setdefault(row["subject"], []).append(question)
    return questions
