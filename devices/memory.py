"""A lack of memory, of the host or of a card, as one line that says what would need less of it."""

import contextlib
import re
from collections.abc import Iterator

import torch

from common.errors import PassingError

# The CPU and the libraries below torch have no error type for it: their words tell it.
_WORDS = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",  # the system's own words, as when a file cannot be mapped
    "ALLOC_FAILED",
    "Storage size calculation overflowed",
)
_MOST_BYTES = 1 << 63  # torch counts bytes in 64 bits
_AMOUNT = re.compile(r"allocate ([\d.]+ [A-Za-z]+)")


@contextlib.contextmanager
def out_of_memory_told(
    device: torch.device,
    what: str = "",
    less: str = "a smaller --mini-batch-size or --test-mini-batch-size, smaller MLPs or tables, or"
    " more ranks",
    num_bytes: int = 0,
) -> Iterator[None]:
    """Turn a lack of memory in the block into one line.

    Args:
        device: where the block's tensors are.
        what: what the memory is for; empty: it is not known.
        less: what would need less memory, in the plural.
        num_bytes: at least so many are needed; more than torch can count are not asked for.

    Raises:
        PassingError: there was no memory; on other ranks, and later, there may be.
    """
    try:
        if num_bytes >= _MOST_BYTES:
            raise MemoryError
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        amount = _AMOUNT.search(str(error))
        asked = f" (asked for {amount[1]})" if amount else ""
        begin = f"no memory for {what}" if what else "out of memory"
        raise PassingError(f"{begin} on {device}{asked}: {less} help") from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _WORDS)
