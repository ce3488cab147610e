"""The memory of a process that a larger one has started."""

import subprocess
import sys

import pytest

from sst_lightning.planner.program import STATUS

CHILD = "from sst_lightning.planner.program import program_bytes; print(program_bytes())"
PARENT = f"""
import subprocess, sys
large = b"x" * (300 << 20)
sys.stdout.write(subprocess.run([sys.executable, "-c", {CHILD!r}], capture_output=True).stdout.decode())
"""


@pytest.mark.skipif(not STATUS.is_file(), reason="Linux keeps the peak of a process there")
def test_the_memory_of_the_starting_process_is_not_counted():
    output = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, check=True).stdout
    assert 1 << 20 < int(output) < 200 << 20
