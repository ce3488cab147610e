"""Models that were tested on the same items, compared with one of them item by item."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sst_lightning.algebra.errors import DataError
from sst_lightning.algebra.paired import PairedTest, compare_paired, holm
from sst_lightning.algebra.statistics import (
    Array,
    Interval,
)
from sst_lightning.metrics.examples import EXAMPLES, Example, read_examples
from sst_lightning.report.entries import SUMMED, value_interval
from sst_lightning.report.run_settings import RunSettings, check_same_settings, read_settings

Run = dict[str, dict[str, Example]]
"""Task to id to example."""


@dataclass(frozen=True)
class PairedScores:
    """Scores of two models on the same items.

    Attributes:
        task: the suite.
        metric: name of the score.
        scores: (n,).
        reference: of the other model, (n,).
        sizes: denominators of a metric that is a ratio of sums, such as the tokens of an NLL, (n,);
            none of a mean.
        clusters: (n,), "" being a cluster of its own.
    """

    task: str
    metric: str
    scores: Array
    reference: Array
    sizes: Array | None
    clusters: tuple[str, ...]


@dataclass(frozen=True)
class PairedComparison:
    """One model against the reference on one metric.

    Attributes:
        model: the model's output folder.
        task: the suite.
        metric: name of the score.
        value: of the model.
        reference: of the reference model.
        difference: value − reference, with its paired interval.
        higher: items on which the model scores higher.
        lower: items on which the reference does.
        test: which test, and its two-sided p-value.
        p_holm: p-value corrected over all tests made together; ``None`` of a metric that is shown
            beside the tested ones.
    """

    model: str
    task: str
    metric: str
    value: Interval
    reference: Interval
    difference: Interval
    higher: int
    lower: int
    test: PairedTest
    p_holm: float | None


def compare_runs(
    models: Sequence[str], reference: str, common: bool = False, metrics: Sequence[str] = ()
) -> list[PairedComparison]:
    """Compare models with a reference on every metric of every suite, in the order of these.

    The family of tests that are corrected together is that of the primary metrics, as the runs'
    results.json name them; of all metrics of a suite that no results.json names one for. A metric
    whose differences are those of another one, or their opposite, is the same test and counts once.

    Args:
        models: output folders of ``sst-merge test``.
        reference: the same for the reference.
        common: compare on what both have where suites, items or metrics differ.
        metrics: the metrics that are tested, in place of the primary ones.

    Raises:
        DataError: a folder is named twice or has no examples, a score is not finite, no suite has a
            metric that is to be tested, or the runs differ in their settings or items.
    """
    folders = [Path(folder).resolve() for folder in (*models, reference)]
    for place, folder in enumerate(folders):
        if folder in folders[:place]:
            raise DataError(f"{folder}: named twice among --models and --reference")
    found = {folder: read_settings(Path(folder)) for folder in (*models, reference)}
    settings = [run for run in found.values() if run is not None]
    for own in settings[:-1]:
        check_same_settings(own, settings[-1])
    runs = {folder: read_run(Path(folder), own) for folder, own in found.items()}
    pairs = [
        (model, pair)
        for model in models
        for pair in pair_runs(runs[model], runs[reference], model, reference, common)
    ]
    pairs.sort(key=lambda item: (item[1].task, item[1].metric))
    results = [
        compare_paired(pair.scores, pair.reference, pair.sizes, pair.clusters) for _, pair in pairs
    ]
    tested = _family(pairs, settings, metrics)
    adjusted = dict(zip(tested, holm([results[k][1].p for k in tested]), strict=True))
    return [
        PairedComparison(
            model,
            pair.task,
            pair.metric,
            value_interval(pair.scores, pair.sizes, pair.clusters),
            value_interval(pair.reference, pair.sizes, pair.clusters),
            difference,
            int((pair.scores > pair.reference).sum()),
            int((pair.scores < pair.reference).sum()),
            test,
            adjusted.get(place),
        )
        for place, ((model, pair), (difference, test)) in enumerate(
            zip(pairs, results, strict=True)
        )
    ]


def _family(
    pairs: Sequence[tuple[str, PairedScores]],
    settings: Sequence[RunSettings],
    metrics: Sequence[str],
) -> list[int]:
    """Places of the pairs that are tested, each difference once."""
    for metric in metrics:
        if metric not in {pair.metric for _, pair in pairs}:
            raise DataError(
                f"--metrics {metric}: no suite has it; there are "
                f"{', '.join(dict.fromkeys(pair.metric for _, pair in pairs))}"
            )
    primary = {suite: own["primary"] for run in settings for suite, own in run.suites.items()}
    family, seen = [], set()
    for place, (model, pair) in enumerate(pairs):
        if pair.metric not in (metrics or (primary.get(pair.task, pair.metric),)):
            continue
        difference = pair.scores - pair.reference
        first = difference[difference != 0][:1]
        # Models that agree everywhere differ in no metric, which makes the metrics no copies.
        if len(first):
            # Adding 0 makes −0 the same as 0.
            key = (model, pair.task, (difference * np.sign(first) + 0.0).tobytes())
            if key in seen:
                continue
            seen.add(key)
        family.append(place)
    return family


def read_run(folder: Path, settings: RunSettings | None) -> Run:
    """Read the examples of every suite of a run.

    Args:
        folder: output of ``sst-merge test``.
        settings: what :func:`read_settings` gives of it. Of suites that its results.json does not
            have, files may be left from an earlier run; they are not read.

    Raises:
        DataError: there are none, one is missing, or a file of them is damaged.
    """
    if settings is not None:
        paths = [folder / EXAMPLES / f"{suite}.jsonl" for suite in settings.suites]
    else:
        paths = sorted((folder / EXAMPLES).glob("*.jsonl"))
    if not paths:
        raise DataError(
            f"{folder / EXAMPLES}: no <suite>.jsonl in it. Name the output folder of sst-merge test"
        )
    return {path.stem: {example.id: example for example in read_examples(path)} for path in paths}


def pair_runs(
    run: Run, reference: Run, name: str, reference_name: str, common: bool
) -> list[PairedScores]:
    """Return the scores that two runs have on the same items, for every suite and metric.

    Args:
        run: examples of the model.
        reference: examples of the reference.
        name: folder of the model, for errors.
        reference_name: folder of the reference, for errors.
        common: leave out what only one of them has.

    Raises:
        DataError: the runs differ in suites, items or metrics and ``common`` is false; an item has
            another prompt, cluster or size; nothing is left to compare.
    """
    pairs = []
    folders = [Path(folder) / EXAMPLES for folder in (name, reference_name)]
    for task in _shared(run, reference, "suite", folders, common):
        files = [folder / f"{task}.jsonl" for folder in folders]
        own, other = run[task], reference[task]
        ids = _shared(own, other, "item", files, common)
        for item in ids:
            if (own[item].prompt, own[item].cluster) != (other[item].prompt, other[item].cluster):
                raise DataError(
                    f"{files[0]}: item {item!r} has another prompt or cluster than in {files[1]}. "
                    "Evaluate both models with the same data and settings"
                )
        sides = ([own[item] for item in ids], [other[item] for item in ids])
        for metric in dict.fromkeys(m for side in sides for e in side for m in e.scores):
            if metric not in SUMMED.values():
                pair = _pair(task, metric, sides, files, common)
                if len(pair.scores):
                    pairs.append(pair)
    if not pairs:
        raise DataError(f"{folders[0]} and {folders[1]} have no scores of the same items")
    return pairs


def _pair(
    task: str,
    metric: str,
    sides: tuple[Sequence[Example], Sequence[Example]],
    files: Sequence[Path],
    common: bool,
) -> PairedScores:
    own, other = ({e.id: e for e in side if metric in e.scores} for side in sides)
    ids = _shared(own, other, f"a score '{metric}' of item", files, common)
    size = SUMMED.get(metric)
    for file, side in zip(files, (own, other), strict=True):
        for item in ids:
            for name in (metric, size) if size else (metric,):
                if not math.isfinite(side[item].scores.get(name, math.nan)):
                    raise DataError(
                        f"{file}: '{name}' of item {item!r} is missing or not finite. Run sst-merge "
                        "test again"
                    )
    unlike = [item for item in ids if size and own[item].scores[size] != other[item].scores[size]]
    if unlike and not common:
        raise DataError(
            f"{files[0]}: item {unlike[0]!r} has another '{size}' than in {files[1]}: '{metric}' of "
            "models with different tokenizers cannot be compared. Pass --common to leave it out"
        )
    if unlike:
        ids = []
    return PairedScores(
        task,
        metric,
        np.array([own[item].scores[metric] for item in ids], dtype=np.float64),
        np.array([other[item].scores[metric] for item in ids], dtype=np.float64),
        np.array([own[item].scores[size] for item in ids], dtype=np.float64) if size else None,
        tuple(own[item].cluster for item in ids),
    )


def _shared(
    own: Collection[str],
    other: Collection[str],
    what: str,
    paths: Sequence[Path],
    common: bool,
) -> list[str]:
    """Names that both have, in the order of the first; all of them unless ``common``."""
    different = sorted(set(own) ^ set(other))
    if different and not common:
        lacking, having = paths if different[0] in other else reversed(paths)
        raise DataError(
            f"{lacking}: lacks {what} {different[0]!r} of {having} ({len(different)} differ). "
            "Evaluate both models on the same items, or pass --common to compare what both have"
        )
    return [name for name in own if name in other]
