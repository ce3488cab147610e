"""What bad input gets: one clear line, exit code 2, and nothing written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from callbacks import FisherCollector
from tests.adapters import random_adapter
from tests.cli.commands import TINY, files, run
from tests.nano import nano_model, save_nano
from tests.small_merge import quiet_trainer, save_inputs, small_data, small_module

SMALL = [*TINY["data"], *TINY["trainer"], "--model.dtype=float32", "--model.max_new_tokens=3"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Inputs that are fine, made once and copied for each test."""
    folder = tmp_path_factory.mktemp("made")
    save_inputs(folder)
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A folder with good inputs that is the current one."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for name in ("utility", "second", "safety"):
        edit_config(tmp_path / name, base_model_name_or_path=str(tmp_path / "nano"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit_config(folder, **values):
    path = Path(folder) / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(folder, change):
    path = Path(folder) / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refused(here, capfd, *arguments):
    """Run a command that must fail; return its one line."""
    before = files(here)
    outcome = run(capfd, *arguments)
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert len(outcome.errors) == 1, outcome.err
    assert files(here) == before
    # jsonargparse explains a value of the wrong type in the lines below.
    return outcome.err[outcome.err.index(outcome.errors[0]) :]


def merge(here, capfd, *more, command="merge", safety="safety/adapter"):
    return refused(
        here, capfd, command, "--config=configs/merge_a6_a7.yaml", "--model.base=nano",
        "--model.utility=[utility/adapter]", f"--model.safety={safety}", "--output=out",
        *SMALL, *more,
    )  # fmt: skip


def test_the_same_command_with_good_input_works(here, capfd):
    """Without this, the tests below could pass for a wrong reason."""
    outcome = run(
        capfd, "merge", "--config=configs/merge_a6_a7.yaml", "--model.base=nano",
        "--model.utility=[utility/adapter]", "--model.safety=safety/adapter", "--output=out",
        *SMALL, "--alpha=0.5",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    written = set(files(here))
    assert {
        "out/adapter/adapter_model.safetensors",
        "out/report.html",
        "out/config.yaml",
    } <= written
    assert any(name.startswith("out/tensorboard/report/events") for name in written)


def test_adapters_of_different_bases(here, capfd):
    edit_config(here / "safety", base_model_name_or_path="someone/other-model")
    line = merge(here, capfd)
    assert "different bases" in line
    assert "someone/other-model" in line


def test_adapters_of_another_base_than_asked_for(here, capfd):
    for name in ("utility", "safety"):
        edit_config(here / name, base_model_name_or_path="someone/other-model")
    line = merge(here, capfd, "--model.base=smollm2-135m")
    assert "someone/other-model" in line
    assert "smollm2-135m" in line


def test_adapters_that_do_not_fit_the_base(here, capfd):
    shutil.rmtree(here / "nano")
    save_nano(here / "nano", hidden_size=16, intermediate_size=24)
    assert "trained on another model" in merge(here, capfd)


def test_a_base_with_fewer_layers(here, capfd):
    shutil.rmtree(here / "nano")
    save_nano(here / "nano", num_hidden_layers=1)
    line = merge(here, capfd)
    assert "model.layers.1" in line
    assert "utility/adapter" in line


def test_a_missing_module(here, capfd):
    def drop(tensors):
        for key in [key for key in tensors if "layers.1.mlp.up_proj" in key]:
            del tensors[key]

    edit_weights(here / "safety", drop)
    line = merge(here, capfd)
    assert "model.layers.1.mlp.up_proj" in line
    assert "safety" in line


def test_a_missing_factor(here, capfd):
    edit_weights(here / "safety", lambda t: t.pop(sorted(t)[0]))
    assert "has no lora_A factor" in merge(here, capfd)


def test_nan_in_a_weight(here, capfd):
    def spoil(tensors):
        tensors[sorted(tensors)[3]][0, 0] = float("nan")

    edit_weights(here / "safety", spoil)
    line = merge(here, capfd)
    assert "NaN" in line
    assert "lora_B of module" in line


def test_truncated_safetensors(here, capfd):
    path = here / "safety" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in merge(here, capfd)


def test_dora(here, capfd):
    edit_config(here / "safety", use_dora=True)
    assert "DoRA" in merge(here, capfd)


def test_a_missing_adapter_folder(here, capfd):
    assert "no/such: no such adapter folder" in merge(here, capfd, safety="no/such")


@pytest.mark.parametrize("command", ["merge", "compare"])
def test_an_output_that_exists(here, capfd, command):
    (here / "out").mkdir()
    (here / "out" / "report.md").write_text("keep")
    assert "out/report.md already exists" in merge(here, capfd, command=command)


@pytest.mark.parametrize("command", ["merge", "compare"])
def test_an_output_that_is_a_file(here, capfd, command):
    (here / "out").write_text("keep")
    assert "out already exists" in merge(here, capfd, command=command)


@pytest.mark.parametrize("base", ["nobody", "no/such/folder", "nobody/nothing"])
def test_an_unknown_base(here, capfd, base):
    for name in ("utility", "safety"):
        edit_config(here / name, base_model_name_or_path=None)
    assert base in merge(here, capfd, f"--model.base={base}")


def test_alpha_zero(here, capfd):
    assert "alpha must be a finite number other than 0" in merge(here, capfd, "--alpha=0")


def test_a_method_argument_out_of_range(here, capfd):
    line = merge(here, capfd, "--method=sst_lightning.SST", "--method.mu=-1")
    assert "mu must be 0 or more" in line


def test_the_fisher_files_of_another_merge(here, capfd):
    module = small_module(save_inputs(here / "elsewhere"), both=True)
    collector = FisherCollector(output=str(here / "fisher"))
    data = small_data(str(here / "nano"))
    quiet_trainer(callbacks=[collector]).validate(module, datamodule=data, verbose=False)
    capfd.readouterr()
    line = merge(here, capfd, "--fisher=fisher")
    assert "fisher/utility.safetensors" in line
    assert "another merge" in line


def test_a_folder_without_fisher_files(here, capfd):
    assert "no such Fisher file" in merge(here, capfd, "--fisher=nowhere")


def test_a_truncated_fisher_file(here, capfd):
    (here / "fisher").mkdir()
    for name in ("utility", "safety"):
        (here / "fisher" / f"{name}.safetensors").write_bytes(b"abc")
    assert "damaged or truncated" in merge(here, capfd, "--fisher=fisher")


def write_rows(path, count, **values):
    rows = [
        {k: v.format(i) if isinstance(v, str) else v for k, v in values.items()}
        for i in range(count)
    ]
    path.write_text(json.dumps(rows))


LOCAL_SAFETY = ["--data.safety.source=local", "--data.safety.path=a7.json"]


def test_wrong_columns(here, capfd):
    write_rows(here / "a7.json", 20, question="q {}", answer="a")
    line = merge(here, capfd, *LOCAL_SAFETY)
    assert "a7.json" in line
    assert "'prompt'" in line
    assert "'question'" in line


def test_an_empty_response(here, capfd):
    write_rows(here / "a7.json", 20, prompt="q {}", response="")
    line = merge(here, capfd, *LOCAL_SAFETY)
    assert "a7.json" in line
    assert "row 1" in line
    assert "response" in line


def test_an_empty_calibration_set(here, capfd):
    assert "calibration" in merge(here, capfd, "--data.calibration_samples=0")


def test_a_file_with_too_few_rows_for_a_calibration_set(here, capfd):
    write_rows(here / "a7.json", 1, prompt="q {}", response="no {}")
    line = merge(here, capfd, *LOCAL_SAFETY)
    assert "a7.json" in line
    assert "split" in line


def test_a_missing_data_file(here, capfd):
    assert "a7.json" in merge(here, capfd, *LOCAL_SAFETY)


# The other subcommands.


def test_validate_refuses_existing_fisher_files_and_unknown_bases(here, capfd):
    arguments = [
        "validate", "--config=configs/fisher_a6_a7.yaml", "--model.utility=[utility/adapter]",
        "--model.safety=safety/adapter", *TINY["trainer"],
    ]  # fmt: skip
    existing = here / "runs" / "fisher_a6_a7" / "utility.safetensors"
    existing.parent.mkdir(parents=True)
    existing.write_text("mine")
    assert "already exists" in refused(here, capfd, *arguments, "--model.base=nano")
    existing.unlink()
    assert "no/such/base" in refused(here, capfd, *arguments, "--model.base=no/such/base")


def test_test_refuses_bad_adapters_bases_and_outputs(here, capfd):
    arguments = ["test", "--config=configs/test.yaml", *TINY["trainer"], "--model.output=out"]
    good = [*arguments, "--model.base=nano", "--model.adapter=safety/adapter"]
    assert "no such adapter" in refused(here, capfd, *good, "--model.adapter=nowhere")
    assert "no/such/base" in refused(here, capfd, *good, "--model.base=no/such/base")
    edit_config(here / "safety", base_model_name_or_path="someone/other-model")
    line = refused(here, capfd, *good, "--model.base=smollm2-135m")
    assert "someone/other-model" in line
    random_adapter(nano_model(hidden_size=16), base_model=None).save(here / "other")
    line = refused(here, capfd, *good, "--model.adapter=other")
    assert "trained on another model" in line
    (here / "out").mkdir()
    (here / "out" / "results.json").write_text("[]")
    assert "results.json already exists" in refused(here, capfd, *good)


def test_fit_refuses_unknown_bases_bad_data_and_existing_adapters(here, capfd):
    arguments = ["fit", "--config=configs/a6_alpaca.yaml", *TINY["trainer"]]
    assert "no/such/base" in refused(here, capfd, *arguments, "--model.base=no/such/base")
    write_rows(here / "a6.json", 20, question="q", answer="a")
    line = refused(
        here, capfd, *arguments, "--model.base=nano", "--data.source=local", "--data.path=a6.json"
    )
    assert "a6.json" in line
    adapter = here / "runs" / "a6_alpaca" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    assert "already exists" in refused(here, capfd, *arguments, "--model.base=nano")


def test_nan_in_training_names_the_step(here, capfd, monkeypatch):
    """The message says what to try; no adapter is left behind."""
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda logits, *a, **k: logits.sum(1) * float("nan")
    )
    outcome = run(
        capfd, "fit", "--config=configs/a6_alpaca.yaml", "--model.base=nano",
        "--data.max_samples=8", *TINY["trainer"], "--trainer.num_sanity_val_steps=0",
    )  # fmt: skip
    assert outcome.code == 2
    assert "step 0" in outcome.err
    assert "Traceback" not in outcome.err
    assert not (here / "runs" / "a6_alpaca" / "adapter").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["study", "--config=nowhere.yaml"], "nowhere.yaml"),
        (["report", "--results=[nowhere.json]", "--output=out"], "nowhere.json"),
        (["report", "--results=[bad.json]", "--output=out"], "bad.json"),
        (["frobnicate"], "frobnicate"),
        (["demo", "--profile=huge"], "huge"),
        (["merge", "--config=configs/merge_a6_a7.yaml", "--no_such_option=1"], "no_such_option"),
    ],
)
def test_bad_command_lines(here, capfd, arguments, words):
    (here / "bad.json").write_text('[{"model": "x"}]')
    assert words in refused(here, capfd, *arguments)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stages": {"..": {"command": "fit", "config": "a6_alpaca.yaml"}}}, "stage name '..'"),
        ({"stages": {"figures": {"command": "fit", "config": "a6_alpaca.yaml"}}}, "figures"),
        ({"stages": {"a": {"command": "fly", "config": "a6_alpaca.yaml"}}}, "stage 'a' needs"),
        ({"stages": {"a": ["fit"]}}, "stage 'a' needs"),
        ({"stages": []}, "'stages' is not a mapping"),
        (
            {"stages": {"a": {"command": "fit", "config": "a6_alpaca.yaml", "argument": {}}}},
            "unknown key 'argument'",
        ),
        ({"stage": {}}, "unknown key 'stage'"),
        ({"stages": {"a": {"command": "fit", "config": "nowhere.yaml"}}}, "nowhere.yaml"),
    ],
)
def test_bad_studies(here, capfd, change, words):
    recipe = {"title": "t", "output": "out", "seed": 0, "stages": {}, **change}
    (here / "study.yaml").write_text(json.dumps(recipe))
    assert words in refused(here, capfd, "study", "--config=study.yaml")


def test_a_study_that_is_not_yaml(here, capfd):
    (here / "study.yaml").write_text("a: [")
    assert "cannot be read as YAML" in refused(here, capfd, "study", "--config=study.yaml")
