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
    from numba.core.caching import FunctionCache


class _Cache(FunctionCache):
    """Numba's cache of a function on disk, without which the function is compiled as well.

    Numba tries a folder once, with a temporary file. Afterwards its files may be another user's,
    the disk may be full, or a crash may have damaged what a file holds, which then raises errors of
    any type.
    """

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function, or None if it is not in the cache or cannot be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception:
            with contextlib.suppress(OSError):
                self.flush()  # a damaged index would keep the function from being saved
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Save a compiled function if that is possible."""
        with contextlib.suppress(Exception):
            super().save_overload(sig, data)


def compiler(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A decorator that compiles a function on its first call and caches the machine code on disk.

    If numba finds no folder that it can write (a read-only installation without a home folder), or
    cannot use the files there, each process compiles anew.

    Args:
        options: passed to numba.njit. nogil is always set, so threads run compiled functions side
            by side.
    """

    def compile_later(function: Callable[..., Any]) -> Any:
        dispatcher: Any = numba.njit(nogil=True, **options)(function)
        with contextlib.suppress(RuntimeError, OSError):  # numba found no folder for the cache
            dispatcher._cache = _Cache(function)  # what cache=True does, with numba's own class
        return dispatcher

    return compile_later


compiled = compiler()
