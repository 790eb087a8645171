"""How much memory this machine, or the container that the process runs in, has, and has left."""

import contextlib
import re
import sys
from pathlib import Path

MACHINE = Path("/proc/meminfo")
CONTAINER = Path("/sys/fs/cgroup")  # of this process, as containers mount it


def whole_memory() -> int:
    """Bytes of the machine or the container; as many as can be counted if nobody says."""
    found = [_of_machine("MemTotal")]
    with contextlib.suppress(OSError, ValueError):
        found.append(_limit_of_container())
    return min(found)


def free_memory() -> int:
    """Bytes that can be had without swapping; as many as can be counted if nobody says."""
    found = [_of_machine("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):
        used = int((CONTAINER / "memory.current").read_text())
        cached = re.search(r"^inactive_file (\d+)", (CONTAINER / "memory.stat").read_text(), re.M)
        found.append(_limit_of_container() - used + (int(cached[1]) if cached else 0))
    return max(0, min(found))


def _of_machine(name: str) -> int:
    """The number of bytes that the machine tells by that name."""
    with contextlib.suppress(OSError):
        told = re.search(rf"^{name}:\s*(\d+) kB", MACHINE.read_text(), re.M)
        if told:
            return 1024 * int(told[1])
    return sys.maxsize


def _limit_of_container() -> int:
    """Bytes that the container may have.

    Raises:
        OSError, ValueError: there is no container, or no limit ("max").
    """
    return int((CONTAINER / "memory.max").read_text())
