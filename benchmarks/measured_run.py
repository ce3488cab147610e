"""One command of the program in a process whose memory and CPU time are measured.

    python benchmarks/measured_run.py merge --config configs/merge_a6_a7.yaml

The last line it prints is a JSON object, in bytes and seconds:

- ``peak``: VmHWM of /proc/self/status, the most memory the process ever had resident. Unlike
  ``getrusage`` it starts at zero with the program.
- ``anonymous``: the most memory beside pages of files, sampled a hundred times a second. How much of a
  mapped file is resident is the kernel's choice, this is not.
- ``libraries``: resident pages of files when the program has been imported.
- ``cpu_seconds``: of all threads.
"""

import ctypes
import json
import mmap
import re
import resource
import sys
import threading
import time
from pathlib import Path

LOCK = 1 | 2 | 4
"""MCL_CURRENT, MCL_FUTURE, MCL_ONFAULT: what was touched once stays resident. Where a kernel takes back
pages of mapped files that have not been used for a while, a peak is not what a run has used."""
INTERVAL = 0.01
PROC = Path("/proc/self")


def resident() -> tuple[int, int]:
    """Return the bytes of resident pages, and those of them that are pages of files."""
    fields = (PROC / "statm").read_text(encoding="ascii").split()
    return int(fields[1]) * mmap.PAGESIZE, int(fields[2]) * mmap.PAGESIZE


class AnonymousPeak(threading.Thread):
    """Samples the memory of this process that is not of files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            pages, files = resident()
            self.peak = max(self.peak, pages - files)
            time.sleep(INTERVAL)


def main() -> None:
    """Run the command and exit with its code."""
    if ctypes.CDLL(None).mlockall(LOCK):
        print("pages cannot be locked: the kernel may take some back", file=sys.stderr)
    from sst_lightning.cli.main import main as program

    _, libraries = resident()
    sampler = AnonymousPeak()
    sampler.start()
    code = program(sys.argv[1:])
    found = re.search(r"VmHWM:\s+(\d+)", (PROC / "status").read_text(encoding="ascii"))
    assert found is not None
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "peak": 1024 * int(found[1]),
        "anonymous": sampler.peak,
        "libraries": libraries,
        "cpu_seconds": used.ru_utime + used.ru_stime,
    }
    print()
    print(json.dumps(figures))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
