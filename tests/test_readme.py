"""Every command of the README: parsed as it stands, and the user's own adapters merged for real."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.cli.commands import TINY, run
from tests.small_merge import save_inputs

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
SHELL = [
    shlex.split(line.partition(" #")[0])
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
]
COMMANDS = [words[1:] for words in SHELL if words and words[0] == "sst-merge"]
AS_THEY_STAND = ("methods", "merge-files", "plan", "plan-eval")
# Those that evaluate run one after the other in a test of their own.
EVALUATION = [words for words in COMMANDS if words[0] == "paired" or "runs/eval" in " ".join(words)]
OWN = next(words for words in COMMANDS if "configs/merge_own.yaml" in words)
EXPORT = next(words for words in COMMANDS if words[0] == "export")
PYTHON = next(text for language, text in BLOCKS if language == "python")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with the two adapters where the README has them."""
    made = save_inputs(tmp_path / "made")
    for source, name in ((made.utility, "a6_alpaca"), (made.safety, "a7_security")):
        shutil.copytree(source, tmp_path / "runs" / name / "adapter")
    monkeypatch.chdir(tmp_path)
    return made


def test_the_readme_has_the_commands():
    assert {words[0] for words in COMMANDS} >= {"fit", "validate", "merge", "test", "compare"}
    # CI runs these two themselves.
    assert {" ".join(words[:2]) for words in SHELL if words} >= {"make demo", "make test"}


@pytest.mark.parametrize(
    "words", [w for w in COMMANDS if w[0] not in ("paired", "export")], ids=" ".join
)
def test_command_parses(here, capfd, words):
    """Those that need no base model run as they stand."""
    parse_only = [] if words[0] in AS_THEY_STAND else ["--print_config"]
    outcome = run(capfd, *words, *parse_only)
    assert outcome.code == 0, outcome.err


def test_own_adapters_from_the_shell(here, capfd):
    words = [str(here.base) if word == "smollm2-135m" else word for word in OWN]
    outcome = run(capfd, *words, *TINY["data"], *TINY["trainer"])
    assert outcome.code == 0, outcome.err
    assert (Path("runs/mine/adapter/adapter_model.safetensors")).is_file()
    assert Path("runs/mine/report.html").is_file()


def test_full_weights_from_the_shell(here, capfd):
    shutil.copytree(here.utility, "runs/merge_a6_a7_qlora/adapter")
    words = [str(here.base) if word == "llama-3.1-8b" else word for word in EXPORT]
    outcome = run(capfd, *words)
    assert outcome.code == 0, outcome.err
    assert Path("runs/full/model.safetensors").is_file()


def test_evaluation_and_comparison_of_two_models(here, capfd):
    shutil.copytree(here.utility, "runs/mine/adapter")
    assert [words[0] for words in EVALUATION] == ["test", "test", "paired"]
    for words in EVALUATION:
        small = [f"--base={here.base}", *TINY["trainer"]] if words[0] == "test" else []
        outcome = run(capfd, *words, *small)
        assert outcome.code == 0, outcome.err
    assert Path("runs/eval/examples/attacks.jsonl").is_file()
    assert "lookalikes" in Path("runs/paired/paired.md").read_text()


def test_own_adapters_from_python(here):
    code = PYTHON.replace('"smollm2-135m"', repr(str(here.base)))
    # Fewer rows than the README's, nothing else: the nano model has a token for each character.
    code = code.replace("safety=Security())", "safety=Security(), **SMALL)")
    small = {"tokenizer": str(here.base), "calibration_samples": 4, "test_samples": 3}
    small |= {"generation_samples": 2, "attack_samples": 2, "harmless_samples": 2}
    assert "**SMALL" in code
    exec(compile(code, "README.md", "exec"), {"SMALL": small})
    assert Path("runs/mine-python/adapter/adapter_model.safetensors").is_file()
