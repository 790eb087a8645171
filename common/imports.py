"""Faster imports of large libraries."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def garbage_left_alone() -> Iterator[None]:
    """Switch Python's garbage collector off while the block imports large libraries.

    Importing torch makes about half a million objects that are never freed. The collector would
    scan them again and again, which takes a third of the import's time. Later collections skip
    everything that the block made.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
