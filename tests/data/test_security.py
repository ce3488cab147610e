import csv
import json

import pytest

from sst_lightning.algebra.errors import DataError
from sst_lightning.data import Security
from sst_lightning.data.rows import prompt_key
from sst_lightning.data.splits import SPLITS
from tests.nano import nano_tokenizer

FAMILIES = ["fixed", "json", "leet", "multitask", "story"]


def attacks(families=FAMILIES):
    return [
        {"prompt": f"{family} {i}: do it, please", "response": "No.", "family": family}
        for family in families
        for i in range(20)
    ]


def write_csv(path, records):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(records[0]))
        writer.writeheader()
        writer.writerows(records)
    return str(path)


def write_jsonl(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def path(tmp_path):
    return write_csv(tmp_path / "attacks.csv", attacks())


def ready(**options):
    module = Security(**options)
    module.tokenizer = nano_tokenizer()
    module.setup()
    return module


def families(module, split):
    return {row.group for row in module.rows[split]}


def ids(module, split):
    return {row.id for row in module.rows[split]}


def test_whole_families_are_held_out(path):
    module = ready(source="local", path=path)
    assert families(module, "test") == {"multitask", "story"}
    assert families(module, "train") | families(module, "calibration") == {"fixed", "json", "leet"}
    assert [len(module.rows[split]) for split in SPLITS] == [45, 15, 40]
    assert not ids(module, "train") & ids(module, "calibration")
    assert module.rows["harmless_test"] == []


def test_named_families_are_held_out(path):
    module = ready(source="local", path=path, held_out_groups=["json"])
    assert families(module, "test") == {"json"}


@pytest.mark.parametrize(
    ("names", "words"), [(["nope"], "unknown nope"), (FAMILIES, "no family left")]
)
def test_bad_held_out_families(path, names, words):
    with pytest.raises(DataError, match=words) as error:
        ready(source="local", path=path, held_out_groups=names)
    assert "fixed, json, leet" in str(error.value)


def test_a_prompt_of_the_test_families_does_not_train(tmp_path):
    records = [
        *attacks(),
        {"prompt": "STORY 3: do it, please", "response": "No.", "family": "json"},
    ]
    module = ready(source="local", path=write_csv(tmp_path / "a.csv", records))
    keys = {prompt_key(row.prompt) for row in module.rows["test"]}
    for split in ("train", "calibration"):
        assert not keys & {prompt_key(row.prompt) for row in module.rows[split]}


def test_file_without_families_is_split_by_rows(tmp_path):
    records = [{"instruction": f"Do {i}", "output": f"No {i}."} for i in range(100)]
    module = ready(source="local", path=write_jsonl(tmp_path / "a.jsonl", records))
    assert [len(module.rows[split]) for split in SPLITS] == [70, 15, 15]
    with pytest.raises(DataError, match="two or more families"):
        ready(
            source="local", path=write_jsonl(tmp_path / "b.jsonl", records), held_out_groups=["x"]
        )


def harmless(start, stop, **more):
    return [
        {"prompt": f"How do I kill process {i}?", "response": f"kill {i}", **more}
        for i in range(start, stop)
    ]


def test_harmless_rows_are_split_in_thirds(path, tmp_path):
    file = write_jsonl(tmp_path / "harmless.jsonl", harmless(0, 90))
    module = ready(source="local", path=path, harmless_path=file)
    parts = [ids(module, f"harmless_{split}") for split in SPLITS]
    assert [len(part) for part in parts] == [30, 30, 30]
    assert len(set().union(*parts)) == 90
    assert {row.kind for row in module.rows["harmless_test"]} == {"harmless"}
    assert {row.kind for row in module.rows["train"]} == {"attack"}


def test_harmless_test_file_wins_over_rows_it_shares_with_the_other(path, tmp_path):
    first = write_jsonl(tmp_path / "first.jsonl", harmless(0, 60))
    second = write_csv(tmp_path / "second.csv", [{"prompt": "how do I kill  process 7?"}])
    module = ready(source="local", path=path, harmless_path=first, harmless_test_path=second)
    assert [row.response for row in module.rows["harmless_test"]] == [""]
    kept = module.rows["harmless_train"] + module.rows["harmless_calibration"]
    assert len(kept) == 59
    assert all("process 7?" not in row.prompt for row in kept)


def test_only_rows_with_the_label_are_harmless(path, tmp_path):
    records = harmless(0, 30, label="safe") + harmless(30, 60, label="unsafe")
    file = write_jsonl(tmp_path / "h.jsonl", records)
    module = ready(source="local", path=path, harmless_path=file, harmless_label="label=safe")
    rows = [row for split in SPLITS for row in module.rows[f"harmless_{split}"]]
    assert {row.response for row in rows} == {f"kill {i}" for i in range(30)}
    with pytest.raises(DataError, match="no harmless rows left with 'label=other'"):
        ready(source="local", path=path, harmless_path=file, harmless_label="label=other")


def test_rows_without_response_only_test(path, tmp_path):
    file = write_jsonl(tmp_path / "h.jsonl", [{"prompt": f"How {i}?"} for i in range(30)])
    module = ready(source="local", path=path, harmless_path=file)
    assert module.rows["harmless_train"] == module.rows["harmless_calibration"] == []
    assert len(module.rows["harmless_test"]) == 10
    batch = next(iter(module.make_loader(module.rows["harmless_test"])))
    assert (batch["labels"] == -100).all()
    with pytest.raises(DataError, match="no row with a response"):
        ready(source="local", path=path, harmless_path=file, harmless_ratio=1.0)


def test_embedded_look_alikes_beside_a_file_of_attacks(path):
    module = ready(source="local", path=path, harmless_path="embedded")
    assert module.rows["harmless_test"] == ready().rows["harmless_test"]


@pytest.mark.parametrize(("ratio", "count"), [(0.0, 0), (0.5, 20), (1.0, 40), (3.0, 120)])
def test_harmless_ratio(ratio, count):
    module = ready(max_samples=40, harmless_ratio=ratio)
    kinds = [row.kind for row in module.rows["train"]]
    assert kinds.count("attack") == 40
    assert kinds.count("harmless") == count
    assert {row.id for row in module.rows["train"] if row.kind == "harmless"} <= ids(
        module, "harmless_train"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"harmless_ratio": -1.0}, "0 or more"),
        ({"harmless_path": "x.csv"}, "source: local"),
        ({"harmless_label": "safe"}, "label=safe"),
        ({"source": "local", "path": "x", "harmless_ratio": 1.0}, "harmless_path"),
        ({"source": "local", "path": "x", "harmless_test_path": "y"}, "harmless_path"),
        ({"source": "local", "path": "x", "mode": "full", "harmless_label": "s"}, "label=safe"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(DataError, match=words):
        Security(**options)


def test_hub_needs_a_data_set():
    with pytest.raises(DataError, match="data set id"):
        Security(source="hub").setup()


def test_hub_schema(monkeypatch):
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(attacks())
    )
    module = ready(source="hub", path="somebody/attacks")
    assert families(module, "test") == {"multitask", "story"}


def test_embedded_styles_can_be_held_out_by_name():
    module = ready(held_out_groups=["story"])
    assert {row.group.split("/")[0] for row in module.rows["test"]} == {"story"}
    wrapped = {row.group.split("/")[0] for row in module.rows["harmless_test"]} - {"look-alike"}
    assert wrapped == {"story"}
    for split in ("train", "calibration", "harmless_train", "harmless_calibration"):
        assert "story" not in {row.group.split("/")[0] for row in module.rows[split]}
    with pytest.raises(DataError, match="unknown nope"):
        ready(held_out_groups=["nope"])
