"""Utility and safety data, together."""

import pytest

from sst_lightning.algebra.errors import DataError
from sst_lightning.data import Alpaca, RepliQA, Row, SafetyUtilityData, Security
from tests.nano import save_nano


@pytest.mark.parametrize("name", ["attack", "harmless"])
def test_a_utility_set_cannot_have_the_name_of_a_safety_task(name):
    """Its scores would be taken for those of the safety task."""
    with pytest.raises(DataError, match=f"'{name}' is that of a safety task"):
        SafetyUtilityData(utility={name: Alpaca()}, safety=Security())


def test_without_utility_data_there_is_nothing_to_protect():
    with pytest.raises(DataError, match=r"data\.utility is empty"):
        SafetyUtilityData(utility={}, safety=Security())


@pytest.mark.parametrize(("scored", "answered"), [(6, 4), (4, 6), (5, 5)])
def test_each_prompt_is_read_once(tmp_path, scored, answered):
    """Rows that are scored and answered are in one dataloader, the others in one of their own."""
    data = SafetyUtilityData(
        utility={"a6": Alpaca()},
        safety=Security(),
        tokenizer=str(save_nano(tmp_path / "nano")),
        test_samples=scored,
        generation_samples=answered,
        attack_samples=3,
        harmless_samples=2,
    )
    data.setup()
    tasks = {task.name: [row.id for row in task.rows] for task in data.evaluation_tasks}
    sizes = {"a6/both": min(scored, answered), "attack/both": 3, "harmless/generation": 2}
    if scored != answered:
        sizes["a6/nll" if scored > answered else "a6/generation"] = abs(scored - answered)
    assert {name: len(ids) for name, ids in tasks.items()} == sizes
    test = [row.id for row in data.utility["a6"].rows["test"][: max(scored, answered)]]
    assert sorted(i for name in tasks if name.startswith("a6") for i in tasks[name]) == sorted(test)
    assert [row.id for row in data.test_rows()["a6"]] == [
        *tasks["a6/both"], *tasks.get("a6/nll", []), *tasks.get("a6/generation", [])
    ]  # fmt: skip


def test_each_data_set_truncates_its_own_rows(tmp_path):
    """A document may need more room than an attack."""
    long = "word " * 400
    data = SafetyUtilityData(
        utility={"a5": RepliQA(max_length=300)},
        safety=Security(max_length=90),
        tokenizer=str(save_nano(tmp_path / "nano")),
    )
    data.setup()
    data.utility["a5"].rows["calibration"][0] = Row("x", long, "yes", "utility", "g")
    data.safety.rows["calibration"][0] = Row("y", long, "no", "attack", "g")
    data._fisher_parts = data._calibration()
    lengths = dict(
        zip(
            data.validation_names,
            (max(b["input_ids"].shape[1] for b in loader) for loader in data.val_dataloader()),
            strict=True,
        )
    )
    assert lengths["safety"] == 90
    assert lengths["utility"] == 300


def test_calibration_samples_is_a_bound_on_all_sets_together(tmp_path):
    data = SafetyUtilityData(
        utility={"a5": RepliQA(), "a6": Alpaca()},
        safety=Security(),
        tokenizer=str(save_nano(tmp_path / "nano")),
        calibration_samples=5,
    )
    assert [len(rows) for rows in data.fisher_rows().values()] == [5, 5, 5]
