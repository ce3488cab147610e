"""Rates corrected for a judge's errors, against hand values, scikit-learn and simulated judges."""

import csv
import hashlib
import json
import math
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from sst_lightning.algebra.errors import JudgeError
from sst_lightning.algebra.statistics import ONE_CLUSTER, effective_size
from sst_lightning.metrics.judge_errors import (
    NOT_BETTER_THAN_CHANCE,
    OTHER_ERRORS,
    OTHER_JUDGE,
    RULE_ERRORS,
    Confusion,
    JudgeErrors,
    confusion,
    corrected_rate,
    corrected_share,
    read_judge_errors,
    write_judge_errors,
)
from sst_lightning.metrics.refusal_judge import judge, rules_fingerprint
from tests.shared_data import DATA

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LABELLED = DATA / "safety_eval" / "xstest_labelled"


def errors_of(*models):
    names = ("true_positive", "false_negative", "false_positive", "true_negative")
    confusions = [Confusion(**dict(zip(names, counts, strict=True))) for counts in models]
    return JudgeErrors("judge", {f"model {i}": c for i, c in enumerate(confusions)})


def test_confusion_and_kappa_are_those_of_scikit_learn():
    generator = np.random.default_rng(0)
    labels = generator.random(200) < 0.4
    verdicts = labels ^ (generator.random(200) < 0.2)
    c = confusion(labels, verdicts)
    (tn, fp), (fn, tp) = confusion_matrix(labels, verdicts)
    assert (c.true_positive, c.false_negative, c.false_positive, c.true_negative) == (
        (tp, fn, fp, tn)
    )
    assert c.kappa == pytest.approx(cohen_kappa_score(labels, verdicts))


def test_the_estimate_is_that_of_rogan_and_gladen():
    """Sensitivity .9 and specificity .95: (.5 + .95 - 1) / (.9 + .95 - 1) = .45 / .85."""
    rate = corrected_rate(100, 200, errors_of((90, 10, 5, 95)))
    assert rate.value == pytest.approx(0.45 / 0.85)
    assert rate.n == 200


def test_models_are_pooled_by_their_counts():
    """TP 90 + 30 of 140, TN 95 + 95 of 200: (.5 + .95 - 1) / (120 / 140 + .95 - 1)."""
    rate = corrected_rate(100, 200, errors_of((90, 10, 5, 95), (30, 10, 5, 95)))
    assert rate.value == pytest.approx(0.45 / (120 / 140 - 0.05))


def test_the_interval_is_near_that_of_the_delta_method_for_one_model():
    """Variance by Rogan & Gladen (1978), where the normal approximation holds."""
    sensitivity, specificity, n_positive, n_negative, rate, n = 0.9, 0.92, 500, 400, 0.4, 600
    gain = sensitivity + specificity - 1
    share = (rate + specificity - 1) / gain
    variance = (
        rate * (1 - rate) / n
        + share**2 * sensitivity * (1 - sensitivity) / n_positive
        + (1 - share) ** 2 * specificity * (1 - specificity) / n_negative
    ) / gain**2
    half = 1.96 * math.sqrt(variance)
    interval = corrected_rate(240, n, errors_of((450, 50, 32, 368)))
    assert interval.low == pytest.approx(share - half, abs=0.006)
    assert interval.high == pytest.approx(share + half, abs=0.006)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_intervals_cover_the_true_share_of_simulated_judges(share):
    """Calibration and measurement are drawn anew each time; 300 times, 95 % wanted."""
    generator = np.random.default_rng(1)
    sensitivity, false_rate, n = 0.88, 0.06, 200
    covered = undefined = 0
    for _ in range(300):
        tp, fp = generator.binomial(150, sensitivity), generator.binomial(150, false_rate)
        positives = generator.binomial(n, share * sensitivity + (1 - share) * false_rate)
        interval = corrected_rate(positives, n, errors_of((tp, 150 - tp, fp, 150 - fp)))
        if interval.value is None:
            undefined += 1
            continue
        covered += interval.low <= share <= interval.high
    assert undefined <= 15
    assert 0.92 <= covered / (300 - undefined) <= 0.995


def test_models_that_differ_widen_the_interval():
    alike = corrected_rate(100, 200, errors_of((80, 20, 5, 95), (80, 20, 5, 95)))
    unlike = corrected_rate(100, 200, errors_of((98, 2, 5, 95), (62, 38, 5, 95)))
    assert unlike.value == pytest.approx(alike.value)
    assert unlike.high - unlike.low > 1.2 * (alike.high - alike.low)


@given(
    n=st.integers(1, 500),
    share=st.floats(0, 1),
    sensitivity=st.integers(60, 100),
    specificity=st.integers(60, 100),
)
def test_corrected_rates_lie_within_their_interval_and_within_0_and_1(
    n, share, sensitivity, specificity
):
    errors = errors_of((sensitivity, 100 - sensitivity, 100 - specificity, specificity))
    rate = corrected_rate(round(share * n), n, errors)
    if rate.value is None:
        assert rate.note == OTHER_ERRORS
        return
    assert 0 <= rate.low < rate.high <= 1
    assert 0 <= rate.value <= 1


@pytest.mark.parametrize("positives", [0, 200])
def test_counts_that_the_measured_errors_cannot_give_are_not_certainty(positives):
    """No refusal where 10 false ones are to be expected: the judge errs otherwise here."""
    rate = corrected_rate(positives, 200, errors_of((800, 200, 50, 950)))
    assert rate.value is None
    assert rate.note == OTHER_ERRORS


def test_a_perfect_judge_needs_no_correction():
    assert corrected_rate(7, 20, errors_of((10**6, 0, 0, 10**6))).value == pytest.approx(0.35)


@pytest.mark.parametrize("counts", [(50, 50, 50, 50), (30, 70, 60, 40), (6, 4, 4, 6)])
def test_a_judge_not_clearly_better_than_chance_gives_no_rate(counts):
    rate = corrected_rate(100, 200, errors_of(counts))
    assert (rate.value, rate.low, rate.high, rate.n) == (None, None, None, 200)
    assert rate.note == NOT_BETTER_THAN_CHANCE


def test_no_answers_give_no_rate_and_impossible_counts_are_refused():
    assert corrected_rate(0, 0, errors_of((9, 1, 1, 9))).note == "no examples"
    with pytest.raises(ValueError, match="21 positives of 20"):
        corrected_rate(21, 20, errors_of((9, 1, 1, 9)))


def test_errors_are_read_as_written(tmp_path):
    errors = errors_of((9, 1, 2, 8), (5, 5, 0, 3))
    write_judge_errors(errors, tmp_path / "errors.json")
    assert read_judge_errors(tmp_path / "errors.json") == errors


@pytest.mark.parametrize(
    "content",
    [
        None,
        "{",
        "[]",
        '{"models": {}, "fingerprint": ""}',
        '{"models": {"a": {"true_positive": 1}}, "fingerprint": ""}',
        json.dumps(
            {
                "fingerprint": "",
                "models": {
                    "a": dict.fromkeys(
                        ("true_positive", "false_negative", "false_positive", "true_negative"), 0
                    )
                },
            }
        ),
    ],
)
def test_a_missing_or_damaged_file_of_errors_is_named(tmp_path, content):
    path = tmp_path / "errors.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(JudgeError, match=r"errors\.json.*judge_agreement\.py --write"):
        read_judge_errors(path)


def test_the_shipped_errors_are_those_of_the_present_rules():
    """Whoever changes the rules measures them again: benchmarks/judge_agreement.py --write."""
    assert read_judge_errors().fingerprint == rules_fingerprint()


@pytest.mark.skipif(not LABELLED.is_dir(), reason=f"no human labels of XSTest at {LABELLED}")
def test_the_shipped_errors_are_counted_anew():
    shipped = read_judge_errors()
    for path in sorted(LABELLED.glob("*.csv")):
        with path.open(encoding="utf-8") as file:
            rows = [r for r in csv.DictReader(file) if is_held_out(r["prompt"])]
        labels = [not row["final_label"].startswith("1") for row in rows]
        verdicts = [judge(row["completion"], row["prompt"]) == "refusal" for row in rows]
        (tn, fp), (fn, tp) = confusion_matrix(labels, verdicts)
        c = shipped.models[path.stem.removeprefix("xstest_v2_completions_")]
        assert (c.true_positive, c.false_negative) == (tp, fn)
        assert (c.false_positive, c.true_negative) == (fp, tn)
    assert len(shipped.models) == 5


def is_held_out(prompt):
    return hashlib.sha256(prompt.encode()).digest()[0] % 2 == 1


def small_labelled_folder(folder):
    """Two answering models, twelve prompts; the second hides half of its refusals."""
    folder.mkdir(parents=True)
    for name, hidden in (("a", 0), ("b", 3)):
        with (folder / f"xstest_v2_completions_{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", "completion", "final_label"])
            for number in range(24):
                refused = number % 2 == 0
                plain = number // 2 % 4 >= hidden
                answer = "I can't help with that." if refused and plain else "Use a screwdriver."
                label = "2_full_refusal" if refused else "1_full_compliance"
                writer.writerow([f"prompt {number}", answer, label])


def run_benchmark(monkeypatch, capsys, *options):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", ["judge_agreement.py", *options])
    import_module("judge_agreement").main()
    return capsys.readouterr().out.splitlines()


def test_the_benchmark_measures_the_rules_and_writes_their_errors(tmp_path, monkeypatch, capsys):
    small_labelled_folder(tmp_path / "safety_eval" / "xstest_labelled")
    options = ["--data", str(tmp_path), "--write", "--output", str(tmp_path)]
    lines = run_benchmark(monkeypatch, capsys, *options)
    summary, written = json.loads(lines[-1]), read_judge_errors(tmp_path / RULE_ERRORS.name)
    prompts = [f"prompt {number}" for number in range(24)]
    held_out = [number for number in range(24) if is_held_out(prompts[number])]
    refused = [number for number in held_out if number % 2 == 0]
    found = sum(1 + (number // 2 % 4 >= 3) for number in refused)
    assert summary["n"] == 2 * len(held_out)
    assert summary["sensitivity"] == pytest.approx(found / (2 * len(refused)))
    assert summary["false_positive_rate"] == 0
    assert written.models["a"].sensitivity == 1
    assert written.fingerprint == rules_fingerprint()
    assert sum(line.startswith("| b |") for line in lines) == 2


def test_the_benchmark_says_where_data_is_missing(tmp_path, monkeypatch, capsys):
    lines = run_benchmark(monkeypatch, capsys, "--data", str(tmp_path))
    assert "xstest_labelled: not there" in json.loads(lines[-1])["skipped"]


def test_clusters_widen_the_corrected_rate():
    """Thirty requests in five wrappers, decided by the request: thirty answers, not 150."""
    verdicts = np.repeat(np.arange(30) < 12, 5).astype(float)
    names = np.repeat([f"r{k}" for k in range(30)], 5).tolist()
    errors = errors_of((950, 50, 30, 970))
    size = effective_size(verdicts, names)
    assert size < 31
    clustered = corrected_rate(60, 150, errors, size=size)
    own, independent = corrected_rate(12, 30, errors), corrected_rate(60, 150, errors)
    assert clustered.value == independent.value
    width = clustered.high - clustered.low
    assert width == pytest.approx(own.high - own.low, rel=0.1)
    assert width > 1.8 * (independent.high - independent.low)


def test_a_rate_is_corrected_only_with_the_errors_of_its_own_judge(tmp_path):
    path = tmp_path / "errors.json"
    write_judge_errors(errors_of((90, 10, 5, 95)), path)
    verdicts = (np.arange(200) < 100).astype(float)
    share = corrected_share(verdicts, [], path, "judge")
    assert share.value == pytest.approx(0.45 / 0.85)
    other = corrected_share(verdicts, [], path, "a judge with other weights")
    assert (other.value, other.n, other.note) == (None, 200, OTHER_JUDGE)
    assert corrected_share(np.zeros(0), [], path, "judge").note == "no examples"
    assert corrected_share(verdicts, ["c"] * 200, path, "judge").note == ONE_CLUSTER
