"""The threads that the environment asks for, checked before the libraries that read it are loaded.

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
        if not all(_is_number_of_threads(number) for number in numbers):
            return f"{name}={text!r} in the environment: {EXPECTED}"
    return ""


def num_omp_threads(default: int) -> int:
    """Threads of a process by OMP_NUM_THREADS, which problem_of_threads has checked."""
    return int(os.environ.get("OMP_NUM_THREADS", str(default)).split(",")[0])


def _is_number_of_threads(text: str) -> bool:
    text = text.strip()
    return text.isascii() and text.isdigit() and len(text) < 9 and 1 <= int(text) <= MOST_THREADS
