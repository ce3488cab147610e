"""One command of the program in a process whose memory and CPU time are measured.

    python benchmarks/measured_run.py merge --config configs/merge_a6_a7.yaml

The last line it prints is a JSON object, in bytes and seconds:

- ``peak``: VmHWM of /proc/self/status, the most memory the process ever had resident. Unlike
  ``getrusage`` it starts at zero with the program.
- ``anonymous``: the most memory beside pages of files, sampled a hundred times a second. How much of a
  mapped file is resident is the kernel's choice, this is not.
- ``libraries``: resident pages of files that hold no tensors, when the command has ended.
- ``cpu_seconds``: of all threads.
"""

import ctypes
import itertools
import json
import mmap
import re
import resource
import sys
import threading
import time
from pathlib import Path

LOCK_ON_FAULT = 1
"""Flag of mlock2: a page that was touched stays resident."""
INTERVAL = 0.01
PROC = Path("/proc/self")


def resident() -> tuple[int, int]:
    """Return the bytes of resident pages, and those of them that are pages of files."""
    fields = (PROC / "statm").read_text(encoding="ascii").split()
    return int(fields[1]) * mmap.PAGESIZE, int(fields[2]) * mmap.PAGESIZE


def libraries() -> int:
    """Return the bytes of resident pages of files other than safetensors, without copied ones."""
    total, counted = 0, False
    for line in (PROC / "smaps").read_text(encoding="utf-8").splitlines():
        key, _, rest = line.partition(" ")
        if not key.endswith(":"):  # the head of a mapping: addresses, and last its file
            path = rest.partition("/")[2]
            counted = bool(path) and not path.endswith(".safetensors")
        elif key in ("Rss:", "Anonymous:") and counted:
            total += 1024 * int(rest.split()[0]) * (1 if key == "Rss:" else -1)
    return total


def mapped_files() -> set[str]:
    """Return the addresses at which files are mapped."""
    lines = (PROC / "maps").read_text(encoding="utf-8").splitlines()
    parts = (line.split(maxsplit=5) for line in lines)
    return {where for where, *_, path in (p for p in parts if len(p) == 6) if path[0] == "/"}


class Sampler(threading.Thread):
    """Notes the memory of this process that is not of files, and keeps pages of files resident.

    Where a kernel takes back pages of mapped files that have not been used for a while, a peak would
    not be what a run has used. Other memory must not be locked: the C library could not give it back.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.locked: set[str] = set()
        self.refused = False

    def run(self) -> None:
        """Sample until the process ends."""
        for sample in itertools.count():
            pages, files = resident()
            self.peak = max(self.peak, pages - files)
            if sample % 10 == 0:
                self.lock_files()
            time.sleep(INTERVAL)

    def lock_files(self) -> None:
        """Lock the mappings of files that are new."""
        lock = ctypes.CDLL(None).mlock2
        found = mapped_files()
        for where in found - self.locked:
            start, end = (int(address, 16) for address in where.split("-"))
            if lock(ctypes.c_void_p(start), ctypes.c_size_t(end - start), LOCK_ON_FAULT):
                # Unless the mapping has gone meanwhile.
                self.refused |= where in mapped_files()
        self.locked = found


def main() -> None:
    """Run the command and exit with its code."""
    from sst_lightning.cli.main import main as program

    sampler = Sampler()
    sampler.start()
    code = program(sys.argv[1:])
    found = re.search(r"VmHWM:\s+(\d+)", (PROC / "status").read_text(encoding="ascii"))
    assert found is not None
    used = resource.getrusage(resource.RUSAGE_SELF)
    if sampler.refused:
        print("pages cannot be locked: the kernel may have taken some back", file=sys.stderr)
    figures = {
        "peak": 1024 * int(found[1]),
        "anonymous": sampler.peak,
        "libraries": libraries(),
        "cpu_seconds": used.ru_utime + used.ru_stime,
    }
    print()
    print(json.dumps(figures))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
