"""Suites through the Trainer's test loop on the nano Llama."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sst_lightning.algebra.errors import DataError, JudgeError, SSTMergeError
from sst_lightning.metrics import judge as rule
from sst_lightning.metrics.examples import read_examples
from sst_lightning.metrics.judges import Judge
from sst_lightning.modules.adapter_evaluation import AdapterEvaluation
from sst_lightning.modules.suite_runner import SuiteRunner, answer_text
from sst_lightning.modules.trainer import SSTTrainer
from sst_lightning.report.suite_summary import SuiteFacts, suite_metrics, suite_report
from sst_lightning.suites import SuiteData
from tests.nano import save_nano
from tests.suites.small import Answers, Choices, Texts, prompts, questions, texts


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    return str(save_nano(tmp_path_factory.mktemp("models") / "nano"))


def trainer(**options):
    return SSTTrainer(
        **options,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def suites():
    few_shot = "Sum 1 and 1? 2. " * 6
    return {
        "sums": Choices(questions(few_shot=few_shot)),
        "requests": Answers(prompts()),
        "texts": Texts(texts()),
    }


def evaluate(nano, output=None, judges=None, cache=None, precision="32-true", **options):
    module = AdapterEvaluation(nano, output=output and str(output), cache=cache, dtype="float32")
    data = SuiteData(suites(), tokenizer=nano, judges=judges, **options)
    trainer(precision=precision).test(module, datamodule=data, verbose=False)
    return module


def examples_of(module):
    scores = module.scores([task.name for task in module.trainer.datamodule.evaluation_tasks])
    return {
        task: {e.id: (e.texts, e.log_likelihoods, e.scores) for e in own}
        for task, own in scores.examples.items()
    }


def close(a, b):
    assert set(a) == set(b)
    for task, own in a.items():
        assert set(own) == set(b[task])
        for item_id, (answers, values, scores) in own.items():
            assert answers == b[task][item_id][0]
            assert values == pytest.approx(b[task][item_id][1], abs=1e-4)
            assert scores == pytest.approx(b[task][item_id][2], abs=1e-4)


def test_batches_do_not_matter(nano):
    """One item a batch, and as many as fit: the same answers, likelihoods and scores."""
    alone = examples_of(evaluate(nano, max_batch=1))
    close(alone, examples_of(evaluate(nano)))
    assert len(alone["sums"]) == 9


def test_two_runs_are_identical(nano):
    assert examples_of(evaluate(nano)) == examples_of(evaluate(nano))


def test_results_and_examples_are_written(nano, tmp_path):
    module = evaluate(nano, tmp_path)
    (record,) = json.loads((tmp_path / "results.json").read_text())
    found = examples_of(module)
    for task, name in (("sums", "accuracy"), ("requests", "refusal")):
        scores = [own[2][name] for own in found[task].values()]
        entry = record["metrics"][f"{task}/{name}"]
        assert entry["value"] == pytest.approx(sum(scores) / len(scores))
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert entry["n"] == len(scores)
    tokens = sum(own[2]["nll_count"] for own in found["texts"].values())
    nll = -sum(own[1][0] for own in found["texts"].values())
    assert record["metrics"]["texts/nll"]["value"] == pytest.approx(nll / tokens)
    # Nine questions in two groups are handfuls; with three more they are reported.
    assert "sums/accuracy_macro" not in record["metrics"]
    kept = read_examples(tmp_path / "examples" / "sums.jsonl")
    assert [e.id for e in kept] == [f"q{n}" for n in range(9)]
    assert kept[2].prompt.startswith("Sum 1 and 1? 2.")
    assert record["provenance"]["evaluation"]["suites"]["requests"]["max_new_tokens"] == 8
    assert (tmp_path / "figures" / "suites.png").read_bytes().startswith(b"\x89PNG")
    assert "| sums | accuracy |" in (tmp_path / "report.md").read_text()


def test_groups_are_reported_where_they_are_no_handfuls(nano):
    module = AdapterEvaluation(nano, dtype="float32")
    task = {"sums": Choices(questions(12))}
    trainer().test(module, datamodule=SuiteData(task, tokenizer=nano), verbose=False)
    examples = module.scores(["sums/choice"]).examples
    metrics = suite_metrics(examples, {"sums": SuiteFacts("utility", "accuracy")})
    groups = {
        name: [e.scores["accuracy"] for e in examples["sums"] if e.group == name]
        for name in ("g0", "g1")
    }
    for name, scores in groups.items():
        assert metrics[f"sums/accuracy/{name}"].value == pytest.approx(sum(scores) / 6)
    macro = sum(sum(scores) / 6 for scores in groups.values()) / 2
    assert metrics["sums/accuracy_macro"].value == pytest.approx(macro)


def test_groups_with_slashes_are_in_the_report():
    entry = {"value": 0.5, "low": 0.2, "high": 0.8, "n": 9}
    metrics = {"attacks/refusal": entry, "attacks/refusal/style/topic|x": entry}
    text = suite_report([{"model": "base", "metrics": metrics}], "Title")
    assert "| attacks | refusal | style/topic&#124;x | 0.500 [0.200, 0.800] | 9 |" in text


def computed(monkeypatch):
    """Items that the model is asked, from now on."""
    asked = []
    original = SuiteRunner._compute

    def counting(self, suite, items, prefix):
        asked.extend(item.item.id for item in items)
        return original(self, suite, items, prefix)

    monkeypatch.setattr(SuiteRunner, "_compute", counting)
    return asked


def test_a_repeated_evaluation_asks_nothing(nano, tmp_path, monkeypatch):
    first = examples_of(evaluate(nano, cache=str(tmp_path)))
    asked = computed(monkeypatch)
    assert examples_of(evaluate(nano, cache=str(tmp_path))) == first
    assert asked == []


def test_suites_that_share_items_share_their_outputs(nano, tmp_path, monkeypatch):
    """The second suite finds them in the store of the same run."""
    asked = computed(monkeypatch)
    module = AdapterEvaluation(nano, cache=str(tmp_path), dtype="float32")
    twins = {"one": Answers(prompts()), "two": Answers(prompts())}
    trainer().test(module, datamodule=SuiteData(twins, tokenizer=nano), verbose=False)
    found = examples_of(module)
    assert found["one"] == found["two"]
    assert len(asked) == 7


def test_an_interrupted_evaluation_goes_on_where_it_was(nano, tmp_path, monkeypatch):
    whole = examples_of(evaluate(nano, max_batch=2))
    original, calls = SuiteRunner._compute, []

    def dying(self, suite, items, prefix):
        if len(calls) == 6:
            raise KeyError("killed")
        calls.extend(items[:1])
        return original(self, suite, items, prefix)

    monkeypatch.setattr(SuiteRunner, "_compute", dying)
    with pytest.raises(KeyError, match="killed"):
        evaluate(nano, cache=str(tmp_path), max_batch=2)
    monkeypatch.undo()
    asked = computed(monkeypatch)
    assert examples_of(evaluate(nano, cache=str(tmp_path), max_batch=2)) == whole
    assert len(asked) == 9 + 7 + 5 - 11  # six batches of two, of which one has a single item


def test_other_settings_ask_again(nano, tmp_path, monkeypatch):
    evaluate(nano, cache=str(tmp_path))
    asked = computed(monkeypatch)
    monkeypatch.setattr(Answers, "max_new_tokens", 5)
    evaluate(nano, cache=str(tmp_path))
    assert sorted(asked) == [f"p{n}" for n in range(7)]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_precisions_are_evaluated_apart(nano, tmp_path, monkeypatch, precision):
    """What was computed in one is not served in another."""
    evaluate(nano, cache=str(tmp_path))
    asked = computed(monkeypatch)
    evaluate(nano, cache=str(tmp_path), precision=precision)
    assert len(asked) == 9 + 7 + 5


def test_another_evaluation_leaves_nothing_of_the_one_it_replaces(nano, tmp_path):
    evaluate(nano, tmp_path)
    module = AdapterEvaluation(nano, output=str(tmp_path), overwrite=True, dtype="float32")
    data = SuiteData({"texts": Texts(texts())}, tokenizer=nano)
    trainer().test(module, datamodule=data, verbose=False)
    assert [path.name for path in (tmp_path / "examples").iterdir()] == ["texts.jsonl"]
    assert "sums" not in (tmp_path / "report.md").read_text()


def test_prompts_are_cut_to_what_the_model_reads(tmp_path):
    """The nano model of this test has 64 positions."""
    short = str(save_nano(tmp_path / "short", max_position_embeddings=64))
    module = AdapterEvaluation(short, dtype="float32")
    data = SuiteData({"sums": Choices(questions(few_shot="x" * 60))}, tokenizer=short)
    widths = []
    module.configure_model()
    module.language_model.get_decoder().register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(
            # Padding takes no position.
            int(kwargs.get("attention_mask", torch.ones_like(kwargs["input_ids"])).sum(1).max())
        ),
        with_kwargs=True,
    )
    with pytest.warns(UserWarning, match="9 of 9 prompts are longer than 64 tokens"):
        trainer().test(module, datamodule=data, verbose=False)
    assert max(widths) <= 64


def test_broken_weights_are_said(nano):
    module = AdapterEvaluation(nano, dtype="float32")
    module.configure_model()
    module.language_model.get_output_embeddings().weight.data[5] = float("nan")
    data = SuiteData({"sums": Choices(questions())}, tokenizer=nano)
    with pytest.raises(SSTMergeError, match=r"item 'q.': the model gives log-likelihoods"):
        trainer().test(module, datamodule=data, verbose=False)


def test_answers_keep_the_space_they_begin_with():
    """As Llama 2 and Mistral decode: the first space of a text is dropped."""
    words = ["<unk>", "\u2581", "\u2581\u2581\u2581", "\u2581return", "\u2581x", "<0x0A>", ":"]
    tokenizer = Tokenizer(models.BPE(vocab={w: n for n, w in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    answer = [2, 3, 4, 5, 2, 3, 4]
    assert fast.decode(answer) == "   return x\n    return x"
    assert answer_text(answer, [3, 6, 5], fast) == "    return x\n    return x"


class Shouting(Judge):
    """Says how long an answer is; NaN of answers in `broken`."""

    name = "shouting"

    def __init__(self, value=None):
        self.value = value
        self.judged = 0

    def check(self):
        pass

    def fingerprint(self):
        return f"1 {self.value}"

    def judge(self, prompts, answers, device):
        self.judged += len(answers)
        if self.value is not None:
            raise JudgeError("answer 0: the score is nan")
        return [{"length": float(len(answer))} for answer in answers]


def test_judges_score_safety_suites_once(nano, tmp_path):
    judge = Shouting()
    module = evaluate(nano, judges=[judge], cache=str(tmp_path))
    found = examples_of(module)
    for answers, _, scores in found["requests"].values():
        assert scores["shouting_length"] == len(answers[0])
        assert scores["refusal"] == float(rule(answers[0]) == "refusal")
    assert "shouting_length" not in next(iter(found["sums"].values()))[2]
    assert judge.judged == 7
    again = Shouting()
    assert examples_of(evaluate(nano, judges=[again], cache=str(tmp_path))) == found
    assert again.judged == 0


def test_a_judge_without_a_score_stops_the_evaluation(nano, tmp_path):
    with pytest.raises(JudgeError, match="answer 0"):
        evaluate(nano, tmp_path, judges=[Shouting(float("nan"))])
    assert not (tmp_path / "results.json").exists()
    # The answers are kept.
    assert list((tmp_path / "outputs").rglob("*.jsonl"))


def test_two_judges_of_one_name_are_an_error(nano):
    with pytest.raises(DataError, match="two judges of one name"):
        SuiteData(suites(), tokenizer=nano, judges=[Shouting(), Shouting()])


def test_verdicts_are_kept_chunk_by_chunk(nano, tmp_path, monkeypatch):
    """A judge that dies in the second chunk has the first one on disk."""
    monkeypatch.setattr(Shouting, "chunk", 3)
    original = Shouting.judge

    def dying(self, prompts, answers, device):
        if self.judged >= 3:
            raise KeyError("killed")
        return original(self, prompts, answers, device)

    monkeypatch.setattr(Shouting, "judge", dying)
    with pytest.raises(KeyError, match="killed"):
        evaluate(nano, judges=[Shouting()], cache=str(tmp_path))
    monkeypatch.setattr(Shouting, "judge", original)
    again = Shouting()
    evaluate(nano, judges=[again], cache=str(tmp_path))
    assert again.judged == 7 - 3


def test_a_missing_judge_stops_before_the_model_is_asked(nano, monkeypatch):
    class Missing(Shouting):
        def check(self):
            raise JudgeError("judge 'missing': no such folder. Give a folder or a hub id")

    asked = computed(monkeypatch)
    with pytest.raises(JudgeError, match="no such folder"):
        evaluate(nano, judges=[Missing()])
    assert asked == []


def test_sampled_answers_do_not_depend_on_the_batch(nano, monkeypatch):
    monkeypatch.setattr(Answers, "temperature", 0.9)
    monkeypatch.setattr(Answers, "samples_per_item", 3)
    together = examples_of(evaluate(nano))["requests"]
    alone = examples_of(evaluate(nano, max_batch=1))["requests"]
    assert {key: own[0] for key, own in together.items()} == {
        key: own[0] for key, own in alone.items()
    }
    assert all(len(own[0]) == 3 for own in together.values())
    assert len({text for own in together.values() for text in own[0]}) > 7


def test_stop_strings_end_an_answer_and_are_no_part_of_it(nano, monkeypatch):
    free = examples_of(evaluate(nano))["requests"]
    stop = next(own[0][0] for own in free.values() if len(own[0][0]) > 4)[2:4]
    monkeypatch.setattr(Answers, "stop", (stop,))
    module = evaluate(nano)
    stopped = {e.id: e for e in module.scores(["requests/generation"]).examples["requests"]}
    for item_id, (answers, _, _) in free.items():
        text, found, _ = answers[0].partition(stop)
        assert stopped[item_id].texts == (text,)
        if found:
            assert stopped[item_id].finish == ("stop",)


@pytest.mark.slow
def test_two_processes_score_as_one_does(nano, tmp_path):
    """Real processes (gloo); 9, 7 and 5 items, which two cannot share evenly.

    Of the documents' six rows few are scored by exact match: one process may have none.
    """
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import sys\n"
        "from tests.modules.test_suite_evaluation import AdapterEvaluation, Shouting, SuiteData\n"
        "from tests.modules.test_suite_evaluation import SSTTrainer, suites\n"
        "from sst_lightning.data import RepliQA\n"
        "from sst_lightning.suites import HeldOut\n"
        "nano, output, devices = sys.argv[1], sys.argv[2], int(sys.argv[3])\n"
        "module = AdapterEvaluation(nano, output=output, dtype='float32')\n"
        "rows = {'documents': HeldOut(RepliQA(), max_new_tokens=4, samples=6)}\n"
        "data = SuiteData(suites() | rows, tokenizer=nano, judges=[Shouting()])\n"
        "SSTTrainer(accelerator='cpu', devices=devices, logger=False,\n"
        "    strategy='ddp' if devices > 1 else 'auto', enable_progress_bar=False,\n"
        "    enable_checkpointing=False).test(module, datamodule=data, verbose=False)\n"
    )
    for devices in (1, 2):
        subprocess.run(
            [sys.executable, str(script), nano, str(tmp_path / str(devices)), str(devices)],
            check=True,
            timeout=300,
            env={**__import__("os").environ, "PYTHONPATH": ":".join(sys.path)},
        )
    one, two = (
        json.loads((tmp_path / str(n) / "results.json").read_text())[0]["metrics"] for n in (1, 2)
    )
    assert set(one) == set(two)
    for name, entry in one.items():
        assert two[name]["n"] == entry["n"], name
        assert two[name]["value"] == pytest.approx(entry["value"], abs=1e-5), name
    for task in ("sums", "requests", "texts"):
        first, second = (
            read_examples(tmp_path / str(n) / "examples" / f"{task}.jsonl") for n in (1, 2)
        )
        assert [e.id for e in first] == [e.id for e in second]
        assert [e.texts for e in first] == [e.texts for e in second]
    assert len(list((tmp_path / "2" / "outputs").rglob("process-*.jsonl"))) == 2
