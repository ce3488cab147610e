import pytest

from sst_lightning.data.rows import Row, fingerprint_rows, without_prompts_of
from sst_lightning.data.splits import SPLITS, sample, split_by_group


def rows(count: int, per_group: int = 1) -> list[Row]:
    return [
        Row(f"r{i}", f"prompt {i}", "answer", "utility", f"g{i // per_group}") for i in range(count)
    ]


def ids(items: list[Row]) -> set[str]:
    return {row.id for row in items}


def test_groups_and_rows_are_in_one_split_only():
    splits = split_by_group(rows(200, per_group=7), 0.15, 0.15)
    assert sum(len(splits[s]) for s in SPLITS) == 200
    groups = [{row.group for row in splits[s]} for s in SPLITS]
    for i, one in enumerate(groups):
        for other in groups[i + 1 :]:
            assert not one & other


def test_shares_are_met():
    splits = split_by_group(rows(200), 0.2, 0.1)
    assert [len(splits[s]) for s in SPLITS] == [140, 40, 20]


def test_the_split_of_a_row_does_not_depend_on_the_order_of_the_file():
    data = rows(60)
    forward, backward = split_by_group(data, 0.2, 0.2), split_by_group(data[::-1], 0.2, 0.2)
    for split in SPLITS:
        assert ids(forward[split]) == ids(backward[split])


def test_a_repeated_prompt_counts_once():
    data = [*rows(20), Row("again", "  PROMPT 3 ", "x", "utility", "other group")]
    splits = split_by_group(data, 0.2, 0.2)
    assert "again" not in set().union(*(ids(splits[s]) for s in SPLITS))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_smaller_sample_begins_a_larger_one(seed):
    data = rows(50)
    assert sample(data, 10, seed) == sample(data, 30, seed)[:10]
    assert ids(sample(data, None, seed)) == ids(data)


def test_test_rows_do_not_depend_on_the_seed_and_training_rows_do():
    data = rows(50)
    assert sample(data, 10, 0) != sample(data, 10, 1)
    assert sample(data, 10, None) == sample(data[::-1], 10, None)


def test_fingerprint_changes_with_any_text_and_with_order():
    one, two = rows(2)
    base = fingerprint_rows([one, two])
    assert base == fingerprint_rows([one, two])
    assert base != fingerprint_rows([two, one])
    changed = Row(one.id, one.prompt, "answe", "utility", one.group)
    # The lost character must not be made up for by its neighbour.
    neighbour = Row("r" + two.id, two.prompt, two.response, "utility", two.group)
    assert base != fingerprint_rows([changed, neighbour])


def test_rows_without_prompts_of_others():
    data = rows(5)
    assert without_prompts_of(data, [Row("x", "Prompt  2", "", "harmless", "")]) == [
        row for row in data if row.id != "r2"
    ]
