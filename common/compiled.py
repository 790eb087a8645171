"""Loops compiled by numba, on the same threads as torch's operators.

Import this before torch: it loads the system's libgomp, and torch then uses that one in place of
its own. Numba and torch then share one pool of threads. Two pools on the same cores would each
spin while the other works, and small steps would take half as long again.
"""

import contextlib
from collections.abc import Callable
from typing import Any

from common.environment import choose_wait_policy
from common.imports import garbage_left_alone

choose_wait_policy()  # before libgomp is loaded
with garbage_left_alone():
    with contextlib.suppress(ImportError):  # this module of numba needs a libgomp on the system
        import numba.np.ufunc.omppool  # noqa: F401  (loads libgomp)
    import numba


def compiler(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles a function on its first call and caches the machine code on disk.

    If numba finds no folder that it can write (a read-only installation without a home folder),
    each process compiles anew.

    Args:
        options: passed to numba.njit. nogil is always set, so threads run compiled functions side
            by side.
    """

    def compile_later(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder for the cache
            return numba.njit(nogil=True, **options)(function)

    return compile_later


compiled = compiler()
