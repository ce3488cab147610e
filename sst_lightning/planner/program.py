"""The process that a stage runs in: its own memory, and how its heap is set up."""

import os
import re
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
SMALL_THRESHOLD = 1 << 20
HOLES = 0.5
"""Share of a pass's blocks below 32 MiB that glibc's heap has in holes beside them: what peaks are
above those with MALLOC_MMAP_THRESHOLD_=131072 (SmolLM2, 4 x 256 tokens, bf16, glibc 2.36: .49 in two
fits, .56 with gradient checkpointing)."""


def program_bytes() -> int:
    """Return the most memory that this process has had.

    Called before anything is loaded, this is the memory of Python and its libraries. On Linux
    ``getrusage`` would say more: it begins with the memory of the process that started this one.
    """
    if STATUS.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))
        if found is not None:
            return 1024 * int(found[1])
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def heap_holes() -> float:
    """Return the memory in the heap's holes, as a share of the tensors that are in the heap.

    None where the environment has glibc map every larger block on its own.
    """
    threshold = os.environ.get(THRESHOLD, "")
    return 0.0 if threshold.isdigit() and int(threshold) <= SMALL_THRESHOLD else HOLES
