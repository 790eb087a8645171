"""Threads in the environment, checked and completed before the libraries that read it are loaded.

A Python that is too old has to get through this module, so it uses nothing new.
"""

import os

MOST_THREADS = 4096  # libgomp ends a process that asks for more than the system allows
EXPECTED = f"expected a whole number of 1 to {MOST_THREADS}, or no such variable"


def problem_of_threads() -> str:
    """What is wrong with OMP_NUM_THREADS or NUMBA_NUM_THREADS; empty if nothing is.

    libgomp and numba would take an empty value for a wrong one, so it is removed.
    """
    for name, lists in (("OMP_NUM_THREADS", True), ("NUMBA_NUM_THREADS", False)):
        text = os.environ.get(name, "")
        if not text.strip():
            os.environ.pop(name, None)
            continue
        numbers = text.split(",") if lists else [text]  # a list: one number a level of nesting
        if not all(is_whole_number(number.strip(), MOST_THREADS, 8) for number in numbers):
            return f"{name}={text!r} in the environment: {EXPECTED}"
    return ""


def is_whole_number(text: str, highest: int, digits: int) -> bool:
    """Whether a text is a whole number from 1 to `highest`, in at most that many digits."""
    is_number = text.isascii() and text.isdigit() and len(text) <= digits
    return is_number and 1 <= int(text) <= highest


def num_omp_threads(default: int) -> int:
    """Threads of a process by OMP_NUM_THREADS, which problem_of_threads has checked."""
    return int(os.environ.get("OMP_NUM_THREADS", str(default)).split(",")[0])


def choose_wait_policy() -> None:
    """Have OpenMP's threads sleep while they wait, if all ranks' threads exceed the cores.

    A thread that spins keeps its core from the thread that it waits for, which makes a small step
    three times as long; on cores of its own it begins sooner than one that sleeps. libgomp reads
    OMP_WAIT_POLICY when it is loaded, and what the user has set stays.
    """
    is_set = os.environ.get("OMP_WAIT_POLICY") or os.environ.get("GOMP_SPINCOUNT")
    if is_set or problem_of_threads():
        return
    own = _num_cores(0)
    # a launcher that binds each rank to its own cores may use them all itself
    of_machine = max(own, _num_cores(os.getppid()))
    ranks = os.environ.get("LOCAL_WORLD_SIZE", "1")
    threads = num_omp_threads(own)
    if threads > own or threads * int(ranks if ranks.isdecimal() else 1) > of_machine:
        os.environ["OMP_WAIT_POLICY"] = "passive"


def _num_cores(process: int) -> int:
    """Cores that a process may use; 0 is this one."""
    try:
        return len(os.sched_getaffinity(process))
    except (AttributeError, OSError):  # not on Linux, or the process has ended
        return os.cpu_count() or 1
