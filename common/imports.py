"""Imports of large libraries."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def garbage_left_alone() -> Iterator[None]:
    """Import large libraries in the block, faster.

    They make some half a million objects that stay for good. Python's collector would look at them
    again and again: a third of the time that importing torch takes. Nor do later collections look
    at what the block has made.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
