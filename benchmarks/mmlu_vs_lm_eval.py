"""MMLU here and in lm-evaluation-harness: the same answers? how long?

python benchmarks/mmlu_vs_lm_eval.py --data ../shared/data/mmlu.zip [--questions 520] [--threads 2]

Both sides load the same model in the same dtype, get the same prompts (checked) and run with the
same number of threads. Questions are the first ones of every subject with a test file. They are
scored in blocks of subjects, the two sides in turn and each first in every other block, so that
what else the machine does meets both; times are summed over blocks. Before that both score one
question of each subject, lm-eval once with each batch size, and the fastest is used. lm-eval keeps
its own defaults: sorted by length, one forward pass for the four letters of a question. Its time
and ours are those of tokenization and forward passes. The last line is one JSON object.
"""

import argparse
import csv
import io
import json
import logging
import os
import time
import zipfile
from itertools import chain, zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory

# Before the libraries are imported: they read these then.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

import torch
from lm_eval_mmlu import LmEval, Scores

from sst_lightning.modules.backbone import resolve
from sst_lightning.modules.causal_lm import CausalLMModule
from sst_lightning.modules.suite_runner import SuiteRunner
from sst_lightning.suites.datamodule import SuiteData
from sst_lightning.suites.mmlu import MMLU

Rows = dict[str, list[list[str]]]
"""Rows of CSV files by subject."""


class Ours:
    """The suite MMLU as ``sst-merge test`` runs it, nothing kept on disk.

    Args:
        folder: of a transformers model.
        dtype: of its weights.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        self.module = CausalLMModule(str(folder), dtype=dtype, attention="sdpa")  # as lm-eval
        self.module.configure_model()

    def score(self, tree: Path, shots: int, token_budget: int | None) -> Scores:
        """Score all test questions of a tree; see :meth:`LmEval.score`."""
        suite = MMLU(source="local", path=str(tree), shots=shots)
        prompts = {item.id: item.prompt for item in suite.items()}
        limit = self.module.language_model.config.max_position_embeddings
        data = SuiteData({"mmlu": suite}, token_budget=token_budget, max_length=limit)
        data.tokenizer = self.module.tokenizer
        data.setup("test")
        runner = SuiteRunner(self.module, store=None)
        start, cpu_start = time.perf_counter(), time.process_time()
        outputs = [
            output
            for batch in data.loader(data.evaluation_tasks[0], self.module.device)
            for output in runner.run(suite, batch)
        ]
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
        values = {output.id: output.log_likelihoods for output in outputs}
        return Scores(prompts, values, seconds, cpu_seconds)


def read_questions(data: Path, split: str) -> Rows:
    """Read all files of a split from a folder or a zip file of the Hendrycks tree."""
    root = zipfile.Path(data) if data.is_file() else data
    folder = next((p for p in (root / split, root / "data" / split) if p.is_dir()), None)
    if folder is None:
        raise SystemExit(
            f"{data}: no folder {split} in it. Give the Hendrycks tree, or a zip of it"
        )
    ending = f"_{split}.csv"
    questions = {}
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(ending):
            text = io.StringIO(file.read_bytes().decode(), newline="")
            questions[file.name.removesuffix(ending)] = [row for row in csv.reader(text) if row]
    return questions


def first_questions(test: Rows, number: int) -> Rows:
    """Return this many questions in all: the first of each subject, the second of each, ..."""
    columns = zip_longest(*([(subject, row) for row in rows] for subject, rows in test.items()))
    pairs = [pair for pair in chain.from_iterable(columns) if pair is not None][:number]
    chosen: Rows = {}
    for subject, row in pairs:
        chosen.setdefault(subject, []).append(row)
    return chosen


def write_tree(folder: Path, dev: Rows, test: Rows) -> Path:
    """Write a Hendrycks tree with these test questions, and the dev questions of their subjects."""
    for split, rows in (("dev", {subject: dev[subject] for subject in test}), ("test", test)):
        (folder / split).mkdir(parents=True)
        for subject, own in rows.items():
            path = folder / split / f"{subject}_{split}.csv"
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(own)
    return folder


class Comparison:
    """Both sides on the same questions.

    Args:
        options: of the command line.
        scratch: folder for the trees.
    """

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        self.options = options
        folder = resolve(options.model)
        self.ours = Ours(folder, options.dtype)
        self.lm_eval = LmEval(folder, options.dtype)
        dev, test = (read_questions(options.data, split) for split in ("dev", "test"))
        chosen = first_questions(test, options.questions)
        if missing := sorted(set(chosen) - set(dev)):
            raise SystemExit(f"{options.data}: no dev questions of {', '.join(missing)}")
        self.right = {
            f"{subject}/test/{number}": "ABCD".index(row[-1])
            for subject, rows in chosen.items()
            for number, row in enumerate(rows, start=1)
        }
        subjects = sorted(chosen)
        self.blocks = [
            write_tree(scratch / f"block{n}", dev, {name: chosen[name] for name in own})
            for n in range(options.blocks)
            if (own := subjects[n :: options.blocks])
        ]
        self.few = write_tree(scratch / "few", dev, first_questions(test, len(subjects)))

    def fastest_batch_size(self, shots: int) -> int:
        """Run both sides on a few questions; return the batch size that is best for lm-eval."""
        self.ours.score(self.few, shots, self.options.token_budget)
        cpu_seconds = {}
        for size in self.options.batch_sizes:
            scores = self.lm_eval.score(self.few, shots, size)
            cpu_seconds[size] = scores.cpu_seconds
            print(
                f"{shots} shots, lm-eval, batch size {size}: {scores.seconds:.1f} s, of the CPU "
                f"{scores.cpu_seconds:.1f} s",
                flush=True,
            )
        # On the clock of the process: other programs disturb it less.
        return min(cpu_seconds, key=lambda size: cpu_seconds[size])

    def scores(self, shots: int, batch_size: int) -> tuple[Scores, Scores]:
        """Return our scores and lm-eval's on all questions."""
        ours, theirs = [], []
        for number, tree in enumerate(self.blocks):
            sides = [
                lambda tree=tree: ours.append(
                    self.ours.score(tree, shots, self.options.token_budget)
                ),
                lambda tree=tree: theirs.append(self.lm_eval.score(tree, shots, batch_size)),
            ]
            for run in sides if number % 2 == 0 else sides[::-1]:
                run()
            print(
                f"{shots} shots, block {number + 1} of {len(self.blocks)}: ours "
                f"{ours[-1].seconds:.1f} s, lm-eval {theirs[-1].seconds:.1f} s",
                flush=True,
            )
        return Scores.joined(ours), Scores.joined(theirs)

    def figures(self, ours: Scores, theirs: Scores) -> tuple[dict[str, float], set[str]]:
        """Compare; return the figures by name, and the ids with the same answer."""
        different = [name for name in self.right if ours.prompts[name] != theirs.prompts[name]]
        if different:
            raise SystemExit(
                f"{len(different)} prompts differ, the first is that of {different[0]}"
            )
        pairs = {
            name: (ours.log_likelihoods[name], theirs.log_likelihoods[name]) for name in self.right
        }
        same = {name for name, (a, b) in pairs.items() if _answer(a) == _answer(b)}
        for name in sorted(set(pairs) - same):
            print(f"different answers: {name}, ours {pairs[name][0]}, lm-eval {pairs[name][1]}")
        ranked = [sorted(values) for values in theirs.log_likelihoods.values()]
        figures = {
            "agree": len(same),
            "largest_difference": max(
                abs(x - y) for a, b in pairs.values() for x, y in zip(a, b, strict=True)
            ),
            # Differences below this cannot change an answer.
            "smallest_margin": min(values[-1] - values[-2] for values in ranked),
            "accuracy_ours": self._accuracy(ours),
            "accuracy_lm_eval": self._accuracy(theirs),
            "seconds_ours": ours.seconds,
            "seconds_lm_eval": theirs.seconds,
            "speedup": theirs.seconds / ours.seconds,
            "cpu_speedup": theirs.cpu_seconds / ours.cpu_seconds,
        }
        return figures, same

    def _accuracy(self, scores: Scores) -> float:
        right = [_answer(scores.log_likelihoods[name]) == key for name, key in self.right.items()]
        return sum(right) / len(right)


def _answer(values: tuple[float, ...]) -> int:
    return max(range(len(values)), key=lambda place: values[place])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/mmlu.zip"))
    parser.add_argument("--questions", type=int, default=520)
    parser.add_argument("--model", default="smollm2-135m", help="alias or folder")
    parser.add_argument("--dtype", default="float32", help="in bfloat16 letters tie")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 5])
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="lm-eval's"
    )
    parser.add_argument("--token_budget", type=int, help="of our batches; ours when not given")
    parser.add_argument("--blocks", type=int, default=4)
    options = parser.parse_args()
    if not options.data.exists():
        raise SystemExit(f"{options.data} is not there: give --data, the Hendrycks tree or a zip")
    torch.set_num_threads(options.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with TemporaryDirectory() as scratch:
        comparison = Comparison(options, Path(scratch))
        results: dict[int, dict[str, float]] = {}
        agreed = set(comparison.right)
        for shots in options.shots:
            batch_size = comparison.fastest_batch_size(shots)
            figures, same = comparison.figures(*comparison.scores(shots, batch_size))
            results[shots] = {**figures, "batch_size_lm_eval": batch_size}
            agreed &= same
    print("| | " + " | ".join(f"{shots} shots" for shots in results) + " |")
    print("|---|" + "---|" * len(results))
    for name in next(iter(results.values())):
        cells = [f"{figures[name]:.4g}" for figures in results.values()]
        print(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    summary = {
        "items": len(comparison.right),
        "agree": len(agreed),
        "dtype": options.dtype,
        "threads": options.threads,
        **{
            f"{name}_{shots}shot": value
            for shots, figures in results.items()
            for name, value in figures.items()
        },
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
