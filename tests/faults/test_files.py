"""``export`` and ``merge-files`` that are killed or run out of disk; the oracle is a calm run."""

import re
import resource
import signal

import pytest

from sst_lightning.algebra import factor_store
from sst_lightning.modules import export
from tests.cli.commands import files
from tests.faults.processes import run_child
from tests.small_merge import save_inputs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return folder, save_inputs(folder)


def export_command(made):
    return ["export", f"--base={made.base}", f"--adapter={made.utility}", "--output=out"]


def merge_command(made):
    return ["merge-files", "--utility", made.utility, f"--safety={made.safety}", "--output=out"]


def trap_export(fault):
    """Strike when the fifth weight of the output is due: it is partly written then."""
    merge_weight = export.merge_weight
    export.merge_weight = fifth(merge_weight, fault)


def trap_merge(fault):
    """Strike when the fifth module of the output is read: the merge is done, it is being written."""
    store = factor_store.FactorStore
    store.__getitem__ = fifth(store.__getitem__, fault)


def fifth(function, fault):
    calls = []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            fault()
        return function(*arguments)

    return counted


def raise_signal(number):
    return lambda: signal.raise_signal(number)


def fill_disk():
    """No file of this process can grow as large as the output's weights; its log can."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))


FAULTS = {
    "sigkill": (raise_signal(signal.SIGKILL), 137),
    "sigterm": (raise_signal(signal.SIGTERM), 143),
    "ctrl-c": (raise_signal(signal.SIGINT), 130),
    "full disk": (fill_disk, 2),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("command", "trap"),
    [(export_command, trap_export), (merge_command, trap_merge)],
    ids=["export", "merge-files"],
)
def test_nothing_or_the_old_output_is_left(inputs, command, trap, fault):
    top, made = inputs
    strike, code = FAULTS[fault]
    name = f"{command.__name__} {fault}"
    words = command(made)
    calm = run_child(top / f"{name} calm", words)
    assert calm.code == 0, calm.output
    expected = files(top / f"{name} calm" / "out")
    folder = top / name
    broken = run_child(folder, words, before=lambda: trap(strike))
    assert broken.code == code, broken.output
    assert not (folder / "out").exists()
    again = run_child(folder, words)
    assert again.code == 0, again.output
    assert files(folder / "out") == expected
    # Another adapter is to take the place of this one.
    other = [word.replace(made.utility, made.second) for word in words] + ["--overwrite"]
    broken = run_child(folder, other, before=lambda: trap(strike))
    assert broken.code == code, broken.output
    assert files(folder / "out") == expected
    left = {path.name for path in folder.iterdir()} - {"out", "output.txt"}
    if fault == "sigkill":
        assert all(item.startswith(".out.") for item in left)
    else:
        assert left == set()
    if fault == "full disk":
        # The output that was asked for is named, or a file in it, and no temporary one.
        assert re.search(r"error: out(/\S+)?: does not fit on its disk", broken.output)
        assert ".tmp" not in broken.output
        assert "Traceback" not in broken.output
    last = run_child(folder, other)
    assert last.code == 0, last.output
    assert files(folder / "out") != expected
