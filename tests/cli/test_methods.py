"""Methods from the command line: the list, the documentation, one word to switch."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml

import sst_lightning
from sst_lightning.algebra.adapter import LoraAdapter, LoraFactors
from sst_lightning.algebra.errors import SSTMergeError
from sst_lightning.cli import method_table
from sst_lightning.cli.method_names import _load, complete_method_names
from sst_lightning.cli.study import load_study
from sst_lightning.modules.methods import ALL_METHODS, find_method
from sst_lightning.report.records import read_records
from tests.algebra.builders import random_lora
from tests.cli.commands import TINY, files, run
from tests.small_merge import save_inputs

ROOT = Path(sst_lightning.__file__).parents[1]
NEEDS_MODELS = ("safe_lora", "safe_merge")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("made"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def inputs(made):
    return ["--utility", made.utility, made.second, "--safety", made.safety, "--output", "out"]


def delta(folder):
    return {name: item.delta() for name, item in LoraAdapter.load(folder).factors.items()}


def test_the_documentation_is_that_of_the_registry():
    """Make it again with: sst-merge methods --markdown > docs/methods.md"""
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == method_table.markdown()


def test_every_method_is_documented(here, capfd):
    outcome = run(capfd, "methods")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert [line.split()[0] for line in lines] == list(ALL_METHODS)
    text = method_table.markdown()
    for name, method in ALL_METHODS.items():
        assert method.family in method_table.FAMILIES
        assert f"### {name}\n\n`{method.formula}`\n\nSource: {method.source}.\n" in text
        _, arguments = method_table.description(method)
        # A parameter that the docstring forgets has no row, and no help on the command line.
        assert list(arguments) == list(method_defaults(method))
        assert all(arguments.values())


def method_defaults(method):
    import inspect

    return {
        name: item
        for name, item in inspect.signature(method).parameters.items()
        if item.kind is item.POSITIONAL_OR_KEYWORD
    }


def test_one_method_is_explained(here, capfd):
    outcome = run(capfd, "methods", "ties")
    assert "ties (TIES)" in outcome.out
    assert "--method.density: share of each task vector's entries" in outcome.out
    outcome = run(capfd, "methods", "tees")
    assert outcome.code == 2
    assert "method 'tees' is not known" in outcome.err


def test_names_and_classes_are_the_same_method():
    for name, method in ALL_METHODS.items():
        assert find_method(name) is find_method(method.__name__) is method


@pytest.mark.parametrize("name", ["ties", "TIES"])
def test_merge_switches_by_one_word(here, capfd, made, name):
    outcome = run(
        capfd, "merge", "--config=configs/merge_a6_a7.yaml", f"--model.base={made.base}",
        f"--model.utility=[{made.utility}]", f"--model.safety={made.safety}", "--output=out",
        *TINY["trainer"], *TINY["data"], "--method", name, "--method.density=0.5", "--rank=full",
        "--evaluate=false",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    recipe = json.loads((here / "out/adapter/merge.json").read_text())
    assert recipe["method"] == "ties"
    assert recipe["parameters"]["density"] == 0.5
    assert recipe["discarded_energy"] == 0


@pytest.mark.parametrize(
    "name", [n for n, m in ALL_METHODS.items() if n not in NEEDS_MODELS and not m.requires_fisher]
)
def test_files_are_merged_by_every_method_that_needs_no_fisher(here, capfd, made, name):
    arguments = {"peft": ["--method.combination=cat"]}.get(name, [])
    outcome = run(capfd, "merge-files", *inputs(made), "--method", name, *arguments, "--alpha=0.5")
    assert outcome.code == 0, outcome.err
    recipe = json.loads((here / "out/merge.json").read_text())
    assert recipe["method"] == name
    assert recipe["parameters"]["alpha"] == 0.5
    assert recipe["adapter_sha256"] == LoraAdapter.load(here / "out").fingerprint
    assert "was not measured" in (here / "out/README.md").read_text().replace("\n", " ")


def test_merged_files_are_the_weighted_sum(here, capfd, made):
    outcome = run(
        capfd, "merge-files", *inputs(made), "--alpha=0.5", "--utility_weights=[2.0, -1.0]"
    )
    assert outcome.code == 0, outcome.err
    parts = [(2.0, made.utility), (-1.0, made.second), (0.5, made.safety)]
    found = delta("out")
    for name, value in found.items():
        expected = sum(weight * delta(folder)[name] for weight, folder in parts)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_fishers_of_validate_serve_merge_files(here, capfd, made):
    base = [f"--model.base={made.base}", *TINY["trainer"], *TINY["data"]]
    adapters = [f"--model.utility=[{made.utility}]", f"--model.safety={made.safety}"]
    for command in (
        ["validate", "--config=configs/fisher_a6_a7.yaml", *base, *adapters],
        ["merge", "--config=configs/merge_a6_a7.yaml", *base, *adapters, "--method=sst",
         "--method.iterations=0", "--fisher=runs/fisher_a6_a7", "--evaluate=false",
         "--output=measured"],
        ["merge-files", "--utility", made.utility, "--safety", made.safety, "--output=files",
         "--method=sst", "--method.iterations=0", "--fisher=runs/fisher_a6_a7"],
    ):  # fmt: skip
        outcome = run(capfd, *command)
        assert outcome.code == 0, outcome.err
    assert delta("files").keys() == delta("measured/adapter").keys()
    for name, value in delta("measured/adapter").items():
        torch.testing.assert_close(delta("files")[name], value, rtol=1e-4, atol=1e-6)


YAML = """
model: {{class_path: sst_lightning.MergeModule, init_args: {{base: {base}, utility: [{utility}],
  safety: {safety}, max_new_tokens: 2}}}}
{methods}
"""


def from_yaml(here, capfd, made, command, methods, *more):
    """Run ``command`` with methods that a YAML file names."""
    text = YAML.format(base=made.base, utility=made.utility, safety=made.safety, methods=methods)
    (here / "own.yaml").write_text(text)
    return run(
        capfd, command, "--config=configs/merge_a6_a7.yaml", "--config=own.yaml", "--output=out",
        *TINY["trainer"], *TINY["data"], *more,
    )  # fmt: skip


@pytest.mark.parametrize(
    "methods",
    [
        "method: ties",
        "method: {class_path: ties, init_args: {density: 0.5}}",
        "method: {class_path: TIES}",
        "method: {class_path: sst_lightning.algebra.methods.TIES}",
    ],
)
def test_a_yaml_file_names_a_method(here, capfd, made, methods):
    outcome = from_yaml(here, capfd, made, "merge", methods, "--evaluate=false")
    assert outcome.code == 0, outcome.err
    recipe = json.loads((here / "out/adapter/merge.json").read_text())
    assert recipe["method"] == "ties"
    assert recipe["parameters"]["density"] == (0.5 if "0.5" in methods else 0.2)


def test_lists_of_methods_hold_names(here, capfd, made):
    outcome = from_yaml(
        here, capfd, made, "compare",
        "methods: [task_arithmetic, {class_path: tsv_merge, init_args: {share: 0.5}}]\nalphas: [1.0]",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    expected = {"task_arithmetic-alpha-1", "tsv_merge_share_0.5-alpha-1"}
    assert {path.name for path in (here / "out/adapters").iterdir()} == expected
    outcome = from_yaml(
        here, capfd, made, "compare", "alphas: [1.0]",
        "--methods=[task_arithmetic, {class_path: tsv_merge, init_args: {share: 0.5}}]",
        "--overwrite",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert {path.name for path in (here / "out/adapters").iterdir()} == expected


@pytest.mark.parametrize("form", [["--method={}"], ["--method", "{}"]])
def test_a_named_method_with_parameters_on_the_command_line(here, capfd, made, form):
    """What a study's stage becomes."""
    entry = json.dumps({"class_path": "ties", "init_args": {"density": 0.5}})
    words = [word.replace("{}", entry) for word in form]
    outcome = run(capfd, "merge-files", *inputs(made), *words)
    assert outcome.code == 0, outcome.err
    recipe = json.loads((here / "out/merge.json").read_text())
    assert (recipe["method"], recipe["parameters"]["density"]) == ("ties", 0.5)


def test_only_methods_are_completed():
    ties = {"class_path": "sst_lightning.algebra.methods.sparse.TIES"}
    own = {"class_path": "MyMerge"}
    assert _load("method: ties") == {"method": ties}
    assert _load("compare: {methods: [ties, {class_path: MyMerge}]}") == {
        "compare": {"methods": [ties, own]}
    }
    for text in (
        "{class_path: a.B, init_args: {method: mean}}",
        "{class_path: a.B, method: mean}",
        "data: {init_args: {utility: {method: {class_path: Alpaca}}}}",
        "method: {class_path: Alpaca}",
        "model: {method: mean}",
        "method: null",
        "method: a.b.C",
    ):
        assert _load(text) == yaml.safe_load(text)
    with pytest.raises(SSTMergeError, match="method 'tees' is not known"):
        _load("method: tees")
    assert complete_method_names(["--methods+=ties", "--other=ties", "--method", "x.yaml"]) == [
        "--methods+=sst_lightning.algebra.methods.sparse.TIES", "--other=ties", "--method", "x.yaml",
    ]  # fmt: skip


def test_a_yaml_file_with_an_unknown_method_is_one_line(here, capfd, made):
    outcome = from_yaml(here, capfd, made, "merge", "method: tees")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "method 'tees' is not known" in outcome.err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method=sst"], "needs the base model"),
        (["--method=sst", "--method.iterations=0"], "give --fisher"),
        (["--method=tees"], "method 'tees' is not known"),
        (["--method=ties", "--method.density=2"], "density must be in (0, 1], got 2"),
        (["--rank=0"], "must be at least 1"),
        (["--method=peft"], "needs adapters of one rank"),
        (["--utility_weights=[1.0]"], "1 utility weights for 2"),
        (["--utility-weights=[1.0]"], "1 utility weights for 2"),
        (["--fisher=x"], "uses no Fishers"),
    ],
)
def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(here, capfd, made, more, message):
    outcome = run(capfd, "merge-files", *inputs(made), *more)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert message in outcome.err
    assert list(here.iterdir()) == []


def test_a_failed_merge_of_files_leaves_no_folders(here, capfd, made):
    outcome = run(capfd, "merge-files", *inputs(made)[:-1], "deep/er/out", "--safety=nosuch")
    assert outcome.code == 2
    assert "nosuch" in outcome.err
    assert list(here.iterdir()) == []


def test_files_are_merged_into_a_new_folder_and_nothing_else_is_left(here, capfd, made):
    outcome = run(capfd, "merge-files", *inputs(made)[:-1], "deep/er/out")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in here.iterdir()] == ["deep"]
    assert [path.name for path in (here / "deep/er").iterdir()] == ["out"]


class Counted(LoraFactors):
    """Counts the modules that are in memory."""

    alive: ClassVar[int] = 0
    most: ClassVar[int] = 0

    def __init__(self, *values):
        super().__init__(*values)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


@pytest.mark.parametrize(
    "name",
    [n for n, m in ALL_METHODS.items() if n not in NEEDS_MODELS and not m.requires_fisher],
)
def test_merging_files_holds_few_modules_at_a_time(here, capfd, monkeypatch, name):
    """Inputs, result, hashes and all: as many of eight layers as of two."""
    found = {}
    monkeypatch.setattr("sst_lightning.algebra.adapter.LoraFactors", Counted)
    monkeypatch.setattr("sst_lightning.algebra.factor_store.LoraFactors", Counted)
    for layers in (2, 8):
        names = [f"layers.{layer}.q_proj" for layer in range(layers)]
        for seed, folder in enumerate(("utility", "safety")):
            random_lora(seed, names=names).save(here / f"{folder}{layers}")
        Counted.alive = Counted.most = 0
        outcome = run(
            capfd, "merge-files", "--utility", f"utility{layers}", "--safety", f"safety{layers}",
            "--output", f"out{layers}", "--method", name, "--rank=full",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
        found[layers] = Counted.most
    assert 0 < found[8] == found[2]


def test_an_adapter_that_is_there_stays(here, capfd, made):
    assert run(capfd, "merge-files", *inputs(made)).code == 0
    before = files(here)
    outcome = run(capfd, "merge-files", *inputs(made), "--alpha=2")
    assert outcome.code == 2
    assert "already exists" in outcome.err
    assert files(here) == before
    assert run(capfd, "merge-files", *inputs(made), "--alpha=2", "--overwrite").code == 0
    assert files(here) != before


def test_the_recipe_of_all_methods_compares_them(here, capfd, made):
    """configs/demo/methods.yaml, on the nano base: every method that needs no second base model."""
    _, _, stages = load_study("demo/methods.yaml", "unused", None)
    methods = stages[-1].arguments["methods"]
    names = {item if isinstance(item, str) else item["class_path"] for item in methods}
    # Concatenation is task arithmetic in other factors.
    assert names == {*ALL_METHODS, "concatenation"} - {*NEEDS_MODELS, "concatenation"}
    # The inputs here have different ranks.
    methods[methods.index("peft")] = {"class_path": "peft", "init_args": {"combination": "cat"}}
    outcome = run(
        capfd, "compare", "--config=configs/merge_a5_a6_a7.yaml", f"--model.base={made.base}",
        f"--model.utility=[{made.utility}, {made.second}]", f"--model.safety={made.safety}",
        "--output=out", *TINY["trainer"], *TINY["data"], f"--methods={json.dumps(methods)}",
        "--alphas=[1.0]", "--model.max_new_tokens=2",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    records = read_records(here / "out" / "results.json")
    merged = {r["method"] for r in records if "alpha" in r["parameters"]}
    assert len(merged) == len(methods)
    fronts = [r for r in records if r["method"] == "comparison"]
    assert {r["parameters"]["method"] for r in fronts} == merged
    for name in ("front_area", "over_refusal_front_area"):
        assert all(name in r["metrics"] for r in fronts)
    report = (here / "out" / "report.md").read_text()
    assert "| method | front area | difference in area | over-refusal front area |" in report


def test_overwriting_replaces_adapters_and_nothing_else(here, capfd, made):
    (here / "out" / "sub").mkdir(parents=True)
    (here / "out" / "precious.txt").write_text("mine")
    outcome = run(capfd, "merge-files", *inputs(made), "--overwrite")
    assert outcome.code == 2
    assert "is not an adapter folder alone" in outcome.err
    assert files(here) == {"out/precious.txt": b"mine"}
    outcome = run(
        capfd, "merge-files", "--utility", made.utility, "--safety", made.safety,
        "--output", made.utility, "--overwrite",
    )  # fmt: skip
    assert outcome.code == 2
    assert "is one of the adapters to merge" in outcome.err


def test_documentation_shows_no_markup_of_the_source():
    text = method_table.markdown()
    assert "inspect" not in text
    assert ":class:" not in text
    assert "``" not in text
