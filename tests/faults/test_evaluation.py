"""``merge`` with rows and suites that is killed: the next run has the results of one that was not."""

import json
import signal

import pytest
import yaml

from sst_lightning.algebra import files
from tests.cli.commands import TINY
from tests.cli.test_evaluation import write_suites
from tests.faults.processes import run_child
from tests.small_merge import save_inputs

pytestmark = pytest.mark.slow
SUITES = "--config=../suites.yaml"


@pytest.fixture(scope="module")
def merge(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    made = save_inputs(folder)
    data = {**write_suites(folder), "max_batch": 1}
    (folder / "suites.yaml").write_text(yaml.safe_dump({"suites": data}))

    def run(name, *more, **options):
        return run_child(
            folder / name,
            [
                "merge", "--config=configs/merge_own.yaml",
                f"--model.base={made.base}", f"--model.utility=[{made.utility}]",
                f"--model.safety={made.safety}", "--method=task_arithmetic", "--output=out",
                *TINY["data"], *TINY["trainer"], *more,
            ],
            **options,
        )  # fmt: skip

    return folder, run


def fault(number, batch):
    callback = {
        "class_path": "tests.faults.provoke.SignalAt",
        "init_args": {"number": int(number), "batch": batch, "place": "test"},
    }
    return f"--trainer.callbacks={json.dumps([callback])}"


def metrics(folder):
    """What was measured, and every item's answer."""
    records = json.loads((folder / "out" / "results.json").read_text())
    examples = {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted((folder / "out" / "models").rglob("*.jsonl"))
    }
    return [record["metrics"] for record in records], examples


def stored(folder):
    """The keys of stored outputs, in the order they were computed."""
    paths = sorted(folder.rglob("process-*.jsonl"), key=lambda path: path.stat().st_mtime)
    return [json.loads(line)["key"] for path in paths for line in path.read_text().splitlines()]


def test_an_evaluation_goes_on(merge):
    folder, run = merge
    whole = run("whole", SUITES)
    assert whole.code == 0, whole.output
    expected = metrics(folder / "whole")
    stopped = run("stopped", SUITES, fault(signal.SIGTERM, 9))
    assert stopped.code == 143, stopped.output
    assert "stopped by SIGTERM; to go on, run the same command with --overwrite" in stopped.output
    assert "Traceback" not in stopped.output
    scores = sorted((folder / "stopped" / "out" / "evaluations").glob("*.json"))
    before = [path.stat().st_mtime_ns for path in scores]
    first = stored(folder / "stopped")
    assert scores
    assert first
    assert not (folder / "stopped" / "out" / "results.json").exists()
    killed = run("stopped", SUITES, "--overwrite", fault(signal.SIGKILL, 12))
    assert killed.code == 137, killed.output
    second = stored(folder / "stopped")
    assert set(second) > set(first)
    # A kill in the middle of a write.
    (log,) = list((folder / "stopped").rglob("process-0.jsonl"))[:1]
    log.write_bytes(log.read_bytes() + b'{"key": "a", "va')
    last = run("stopped", SUITES, "--overwrite")
    assert last.code == 0, last.output
    assert metrics(folder / "stopped") == expected
    assert [path.stat().st_mtime_ns for path in scores] == before


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_while_an_adapter_is_replaced(merge, moment):
    """The adapter is the old one or the new one."""
    folder, run = merge
    name = f"replaced {moment}"
    words = ["--evaluate=false", "--overwrite"]
    assert run(name, *words, "--alpha=1").code == 0
    adapter = folder / name / "out" / "adapter"
    old = (adapter / "adapter_model.safetensors").read_bytes()

    def trap():
        exchange = files._exchange

        def kill(first, second):
            if moment == "after":
                exchange(first, second)
            signal.raise_signal(signal.SIGKILL)

        files._exchange = kill

    killed = run(name, *words, "--alpha=2", before=trap)
    assert killed.code == 137, killed.output
    new = (adapter / "adapter_model.safetensors").read_bytes()
    assert (new == old) is (moment == "before")
    assert json.loads((adapter / "adapter_config.json").read_text())
    again = run(name, *words, "--alpha=2")
    assert again.code == 0, again.output
    assert (adapter / "adapter_model.safetensors").read_bytes() != old
