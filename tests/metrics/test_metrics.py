"""Metrics against rouge_score and hand counts, and merged over two processes."""

import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer

from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.metrics import (
    CompletionNLL,
    ContainsMatch,
    ExactMatch,
    ModelScores,
    RougeL,
    VerdictRate,
    row_key,
)

ANSWERS = ["The cat sat on the mat.", "dogs are running", "", "exactly this"]
RESPONSES = ["A cat is on the mat", "The dog ran away", "something", "exactly this"]


def merge_two_processes(make, first, second):
    """What torchmetrics does on two ranks: states gathered by their reduction, then computed."""
    ranks = [make(), make()]
    ranks[0].update(*first)
    ranks[1].update(*second)
    joined = make()
    for name in joined._defaults:
        states = [getattr(rank, name) for rank in ranks]
        setattr(joined, name, [tensor for state in states for tensor in state])
    joined._update_count = 2
    return joined


def test_rouge_l_equals_rouge_score():
    metric = RougeL()
    metric.update(["a", "b"], ANSWERS[:2], RESPONSES[:2])
    metric.update(["c", "d"], ANSWERS[2:], RESPONSES[2:])
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [
        scorer.score(response, answer)["rougeL"].fmeasure
        for answer, response in zip(ANSWERS, RESPONSES, strict=True)
    ]
    assert metric.compute().item() == pytest.approx(sum(expected) / 4)
    assert list(metric.scores().values()) == pytest.approx(expected)
    assert expected[1] > 0  # stemming: "dogs" matches "dog"
    assert expected[2:] == [0, 1]


@pytest.mark.parametrize(
    ("answer", "references", "exact", "contains"),
    [
        ("The Seine.", ["seine"], 1, 1),
        ("It is the river Seine, of course", ["Seine"], 0, 1),
        ("Seinery", ["Seine"], 0, 0),
        ("12", ["two", "12"], 1, 1),
        ("", ["x"], 0, 0),
        ("A red  apple!", ["red apple"], 1, 1),
    ],
)
def test_matches(answer, references, exact, contains):
    for metric, expected in ((ExactMatch(), exact), (ContainsMatch(), contains)):
        metric.update(["row"], [answer], [references])
        assert metric.compute().item() == expected


def test_completion_nll_is_per_token_over_the_set_not_per_sequence():
    metric = CompletionNLL()
    metric.update(["a", "b"], torch.tensor([2.0, 9.0]), torch.tensor([1, 3]))
    metric.update(["c"], torch.tensor([1.0]), torch.tensor([4]))
    assert metric.compute().item() == pytest.approx(12 / 8)
    assert metric.scores() == {row_key("a"): 2.0, row_key("b"): 9.0, row_key("c"): 1.0}
    assert metric.token_counts() == {row_key("a"): 1.0, row_key("b"): 3.0, row_key("c"): 4.0}


def test_two_processes_give_what_one_gives():
    one = CompletionNLL()
    first = (["a", "b"], torch.tensor([2.0, 9.0]), torch.tensor([1, 3]))
    second = (["c"], torch.tensor([1.0]), torch.tensor([4]))
    one.update(*first)
    one.update(*second)
    two = merge_two_processes(CompletionNLL, first, second)
    assert two.compute() == one.compute()
    assert two.scores() == one.scores()
    assert two.token_counts() == one.token_counts()


def test_verdict_rate_over_two_processes_of_different_sizes():
    metric = merge_two_processes(
        lambda: VerdictRate("refusal"),
        (["a", "b", "c"], ["I can't help with that.", "Sure, here it is.", ""]),
        (["d"], ["I won't help with this."]),
    )
    assert metric.compute().item() == 0.5


def test_an_example_scored_twice_is_an_error():
    metric = RougeL()
    metric.update(["a", "a"], ["x", "y"], ["x", "y"])
    with pytest.raises(ValueError, match="scored twice"):
        metric.scores()


def test_numbers_of_ids_and_scores_must_agree():
    with pytest.raises(ValueError, match="2 ids for 1 scores"):
        CompletionNLL().update(["a", "b"], torch.tensor([1.0]), torch.tensor([1]))


def test_scores_round_trip_and_arrays_are_in_one_order(tmp_path):
    scores = ModelScores({"a6": {"nll": {"b": 2.0, "a": 1.0}}, "a5": {"nll": {"z": 3.0}}}, {})
    scores.save(tmp_path / "scores.json")
    loaded = ModelScores.load(tmp_path / "scores.json")
    assert loaded == scores
    assert loaded.array(["a5", "a6"], "nll").tolist() == [3.0, 1.0, 2.0]
    assert loaded.array(["a5"], "rouge_l").shape == (0,)


@pytest.mark.parametrize("content", ["", "[]", '{"values": {}}', "not json"])
def test_a_damaged_score_file_is_named(tmp_path, content):
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(SSTMergeError, match=r"scores\.json: not an evaluation"):
        ModelScores.load(path)
