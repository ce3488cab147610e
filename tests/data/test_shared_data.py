"""The loaders on real files, where the workplace has them (../shared/data or $SST_SHARED_DATA)."""

import pytest

from sst_lightning.algebra.errors import DataError
from sst_lightning.data import Alpaca, RepliQA, Security
from sst_lightning.data.rows import prompt_key
from sst_lightning.data.splits import SPLITS
from tests.shared_data import DATA

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}")


def test_xquad_is_split_by_article():
    module = RepliQA(source="local", path=str(DATA / "a5_xquad" / "xquad_en.jsonl"))
    module.setup()
    articles = [{row.group for row in module.rows[split]} for split in SPLITS]
    assert sum(map(len, articles)) == len(set().union(*articles)) > 30
    assert all(len(module.rows[split]) >= 100 for split in SPLITS)


def test_alpaca():
    path = str(DATA / "a6_alpaca" / "alpaca_8k.json")
    with pytest.raises(DataError, match="column 'output': empty"):
        Alpaca(source="local", path=path).setup()
    module = Alpaca(source="local", path=path, mode="minimal", skip_empty=True)
    module.setup()
    assert [len(module.rows[split]) for split in SPLITS] == [200, 96, 64]


def test_jailbreaks_with_xstest_as_harmless_test():
    evaluation = DATA / "safety_eval"
    module = Security(
        source="local",
        path=str(DATA / "a7_security" / "response_dataframe.csv"),
        harmless_path=str(evaluation / "exaggerated_safety.jsonl"),
        harmless_test_path=str(evaluation / "xstest_prompts.csv"),
        harmless_label="label=safe",
    )
    module.setup()
    families = [{row.group for row in module.rows[split]} for split in SPLITS]
    assert len(families[2]) == 4
    assert not families[2] & (families[0] | families[1])
    assert len(module.rows["harmless_test"]) == 166
    splits = module.harmless_splits()
    test = {prompt_key(row.prompt) for row in splits["harmless_test"]}
    for split in ("train", "calibration"):
        assert not test & {prompt_key(row.prompt) for row in splits[f"harmless_{split}"]}
