"""Every shipped YAML parses against the signatures and runs on the nano Llama."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sst_lightning.cli.main import complete_switches
from sst_lightning.cli.shipped_configs import find_config, shipped_configs, shipped_folder
from sst_lightning.cli.study import load_study
from tests.cli.commands import TINY, files, run
from tests.small_merge import save_inputs

FIT = ("a5_repliqa.yaml", "a6_alpaca.yaml", "a7_security.yaml")
FISHER = ("fisher_a5_a7.yaml", "fisher_a6_a7.yaml")
MERGE = ("merge_a5_a7.yaml", "merge_a6_a7.yaml", "merge_a5_a6_a7.yaml", "merge_own.yaml")
QLORA = [
    *(("fit", f"{name}_qlora.yaml") for name in ("a5_repliqa", "a6_alpaca", "a7_security")),
    *(("validate", f"fisher_{name}_a7_qlora.yaml") for name in ("a5", "a6")),
    *(("merge", f"merge_{name}_a7_qlora.yaml") for name in ("a5", "a6")),
]
COMMANDS = [
    *(("fit", name) for name in FIT),
    *(("validate", name) for name in FISHER),
    *((command, name) for command in ("merge", "compare") for name in MERGE),
    ("test", "test.yaml"),
    ("test", "eval/minimal.yaml"),
    *QLORA,
]
# Their data is on the hub, or in a folder of the user's.
ELSEWHERE = [("test", "eval/full.yaml"), ("test", "eval/local.yaml")]
STUDIES = [name for name in shipped_configs() if name.startswith("demo/")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return save_inputs(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder: what runs there is the shipped YAML, found by its name."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arguments(command, name, made):
    """What makes a shipped config small: the nano base, random adapters, few short rows."""
    result = [command, f"--config=configs/{name}", f"--model.base={made.base}", *TINY["trainer"]]
    if command == "fit":
        if "qlora" in name:
            # The paged one needs a GPU.
            result.append("--model.optimizer=adamw")
        return [*result, "--data.max_length=120", "--data.max_samples=8"]
    if name.startswith("eval/"):
        return [*result, f"--adapter={made.safety}"]
    if command == "test":
        return [*result, *TINY["data"], f"--model.adapter={made.safety}"]
    utility = [made.utility, made.second] if "a5_a6" in name else [made.utility]
    return [
        *result, *TINY["data"], f"--model.utility={utility}", f"--model.safety={made.safety}",
    ]  # fmt: skip


def test_no_config_is_forgotten():
    known = {*(name for _, name in [*COMMANDS, *ELSEWHERE]), *STUDIES}
    assert known == set(shipped_configs())
    assert set(STUDIES) == {f"demo/{name}.yaml" for name in ("ci", "default", "full", "methods")}


@pytest.mark.parametrize(("command", "name"), [*COMMANDS, *ELSEWHERE])
def test_config_parses_as_it_is(here, capfd, command, name):
    """Nothing overridden but the adapters, which a fresh machine does not have."""
    outcome = run(capfd, command, f"--config=configs/{name}", "--print_config")
    assert outcome.code == 0, outcome.err
    printed = yaml.safe_load(outcome.out)
    original = yaml.safe_load(Path(find_config(name)).read_text())
    assert printed["model"]["class_path"].endswith(
        original["model"]["class_path"].rpartition(".")[2]
    )
    assert printed["model"]["init_args"]["base"] == original["model"]["init_args"]["base"]
    assert files(here) == {}


@pytest.mark.parametrize(("command", "name"), COMMANDS)
def test_config_runs(here, capfd, made, command, name):
    outcome = run(capfd, *arguments(command, name, made), "--trainer.fast_dev_run=true")
    assert outcome.code == 0, outcome.err
    written = set(files(here))
    if command in ("merge", "compare"):
        output = yaml.safe_load(Path(find_config(name)).read_text())["output"]
        assert {f"{output}/results.json", f"{output}/report.html"} <= written
        assert any(path.endswith("adapter_model.safetensors") for path in written)
    elif command == "validate":
        folder = "runs/" + name.removesuffix(".yaml")
        assert {f"{folder}/utility.safetensors", f"{folder}/safety.safetensors"} <= written
    else:
        # Lightning's ModelCheckpoint(save_last) writes even in fast_dev_run; the export does not.
        assert not [path for path in written if "checkpoints" not in path]


@pytest.mark.parametrize("name", STUDIES)
def test_every_stage_of_the_demo_recipes_parses(here, capfd, name):
    folder, _, stages = load_study(name, None, None)
    assert [stage.command for stage in stages] == ["fit"] * 3 + ["compare"] * 3
    for stage in stages:
        outcome = run(capfd, *stage.command_line(), "--print_config")
        assert outcome.code == 0, outcome.err
        config = yaml.safe_load(outcome.out)
        if stage.command == "compare":
            assert config["output"] == f"{folder}/{stage.name}"
        else:
            (path,) = [
                callback["init_args"]["path"]
                for callback in config["trainer"]["callbacks"]
                if callback["class_path"].endswith("AdapterExport")
            ]
            assert path == f"{folder}/{stage.name}/adapter"


def test_a_paged_optimizer_without_a_gpu_is_refused_before_anything_is_written(here, capfd, made):
    words = [w for w in arguments("fit", QLORA[0][1], made) if "optimizer" not in w]
    outcome = run(capfd, *words)
    assert outcome.code == 2
    assert "model.optimizer: adamw" in outcome.errors[0]
    assert files(here) == {}


def test_config_record_goes_beside_the_logs_and_never_into_the_current_folder(here, capfd, made):
    """Without a logger Lightning's own callback would replace ./config.yaml."""
    (here / "config.yaml").write_text("mine")
    outcome = run(capfd, *arguments("test", "test.yaml", made))
    assert outcome.code == 0, outcome.err
    assert files(here) == {"config.yaml": b"mine"}


def test_readme_commands_in_order(here, capfd, made):
    """Fit, validate, merge with the Fisher files, test, on the nano base, outputs where promised."""
    for name in ("a6_alpaca.yaml", "a7_security.yaml"):
        outcome = run(
            capfd, *arguments("fit", name, made), "--trainer.max_steps=2", "--model.r=2",
            "--data.calibration_samples=4",
        )  # fmt: skip
        assert outcome.code == 0, outcome.err
    base = [f"--model.base={made.base}", *TINY["trainer"], *TINY["data"]]
    for command in (
        ["validate", "--config=configs/fisher_a6_a7.yaml"],
        ["merge", "--config=configs/merge_a6_a7.yaml", "--fisher=runs/fisher_a6_a7",
         "--alpha=0.5", "--method=SST", "--method.mu=30", "--method.iterations=0"],
        ["merge", "--config=configs/merge_a6_a7.yaml", "--method=TaskArithmetic", "--overwrite"],
        ["test", "--config=configs/test.yaml", "--model.adapter=runs/merge_a6_a7/adapter",
         "--model.output=runs/tested"],
        ["merge", "--config=configs/merge_own.yaml", "--model.utility", "[runs/a6_alpaca/adapter]",
         "--model.safety", "runs/a7_security/adapter", "--alpha", "2.0", "--output", "runs/mine"],
    ):  # fmt: skip
        outcome = run(capfd, *command, *base)
        assert outcome.code == 0, outcome.err
    outcome = run(
        capfd, "report", "--results", "runs/merge_a6_a7/results.json", "runs/mine/results.json",
        "--output", "runs/again",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    written = set(files(here))
    expected = (
        "a6_alpaca/adapter/adapter_model.safetensors", "fisher_a6_a7/harmless.safetensors",
        "merge_a6_a7/report.html", "mine/adapter/README.md", "tested/results.json",
        "again/report.md", "a6_alpaca/checkpoints/last.ckpt",
    )  # fmt: skip
    assert {f"runs/{name}" for name in expected} <= written
    again = (here / "runs" / "again" / "report.md").read_text()
    assert "own" in again.lower()
    for name in ("fisher_a6_a7", "merge_a6_a7", "tested", "mine"):
        assert f"runs/{name}/config.yaml" in written
    # The recorded configuration, and nothing else, makes the same merge.
    outcome = run(
        capfd, "merge", "--config=runs/mine/config.yaml", "--output=runs/mine_again",
        "--evaluate=false",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    weights = "adapter/adapter_model.safetensors"
    assert files(here / "runs/mine")[weights] == files(here / "runs/mine_again")[weights]


def test_method_help_explains_the_parameters(here, capfd):
    outcome = run(capfd, "merge", "--method.help", "SST")
    assert outcome.code == 0
    assert "weight of utility in the soft filter" in outcome.out


def test_help_names_every_command(here, capfd):
    outcome = run(capfd, "--help")
    assert outcome.code == 0
    for command in ("fit", "validate", "test", "merge", "compare", "demo", "study", "report"):
        assert command in outcome.out


def test_configs_lists_and_copies(here, capfd):
    assert run(capfd, "configs").out.split() == shipped_configs()
    assert run(capfd, "configs", "--copy_to=mine").code == 0
    assert set(files(here / "mine")) == set(shipped_configs())
    outcome = run(capfd, "configs", "--copy_to=mine")
    assert outcome.code == 2
    assert "mine already exists" in outcome.err


def test_find_config_prefers_the_users_file(here):
    assert find_config("configs/test.yaml") == str(shipped_folder() / "test.yaml")
    (here / "configs").mkdir()
    shutil.copy(shipped_folder() / "test.yaml", here / "configs" / "test.yaml")
    assert find_config("configs/test.yaml") == "configs/test.yaml"


@pytest.mark.parametrize(
    ("given", "completed"),
    [
        (["--overwrite"], ["--overwrite=true"]),
        (["--overwrite", "--rank", "2"], ["--overwrite=true", "--rank", "2"]),
        (["--overwrite", "false"], ["--overwrite", "false"]),
        (["--overwrite=false", "--fresh"], ["--overwrite=false", "--fresh=true"]),
        (["--model.overwrite"], ["--model.overwrite=true"]),
        (["--output", "fresh"], ["--output", "fresh"]),
        ([], []),
        (["--data.path=rows.json", "--json"], ["--data.path=rows.json", "--json=true"]),
    ],
)
def test_switches_need_no_value(given, completed):
    assert complete_switches(given) == completed


@pytest.mark.slow
def test_the_module_is_the_same_program(here):
    """``python -m sst_lightning`` in a process of its own, outside the checkout."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, "-m", "sst_lightning", "merge", "--config", "nowhere.yaml"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "sst-merge: error: --config nowhere.yaml: no such file" in result.stderr
    assert "Traceback" not in result.stderr
