"""The memory that a process has before it has loaded anything."""

import re
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


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
