"""Loops compiled by numba, with torch's OpenMP.

Import this before torch: it loads the system's libgomp, and torch then takes that one instead of
its own. Numba's threads and torch's are then the same pool. With two pools on the same cores each
spins while the other works, and small steps take half as long again.
"""

import contextlib
from collections.abc import Callable
from typing import Any

with contextlib.suppress(ImportError):  # numba's wheel needs the system's libgomp for it
    import numba.np.ufunc.omppool  # noqa: F401  (loads libgomp)
import numba


def compiler(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles a function on its first call and caches the machine code on disk.

    Where no folder for the cache can be written (a read-only installation without a home folder)
    each process compiles anew.

    Args:
        options: numba.njit's, beside nogil, which they all have: threads run them side by side.
    """

    def compile_later(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it can write
            return numba.njit(nogil=True, **options)(function)

    return compile_later


compiled = compiler()
