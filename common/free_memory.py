"""How much memory this machine, or the container that the process runs in, has, and has left."""

import contextlib
import re
import sys
from pathlib import Path

MACHINE = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup")  # of this process, as containers mount it


def whole_memory() -> int:
    """Bytes of the machine or the container; as many as can be counted if nobody says."""
    found = [sys.maxsize]
    with contextlib.suppress(OSError):
        machine = re.search(r"^MemTotal:\s*(\d+) kB", MACHINE.read_text(), re.M)
        if machine:
            found.append(1024 * int(machine[1]))
    with contextlib.suppress(OSError, ValueError):
        found.append(int((CONTAINER / "memory.max").read_text()))  # "max" if there is no limit
    return min(found)


def free_memory() -> int:
    """Bytes that can be had without swapping; as many as can be counted if nobody says."""
    found = [sys.maxsize]
    with contextlib.suppress(OSError):
        machine = re.search(r"^MemAvailable:\s*(\d+) kB", MACHINE.read_text(), re.M)
        if machine:
            found.append(1024 * int(machine[1]))
    with contextlib.suppress(OSError, ValueError):
        most = int((CONTAINER / "memory.max").read_text())  # "max" if there is no limit
        used = int((CONTAINER / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)", (CONTAINER / "memory.stat").read_text(), re.M)
        found.append(most - used + (int(cached[1]) if cached else 0))
    return max(0, min(found))
