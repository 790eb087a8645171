"""Named phases of a training step, which a profiler can measure.

`with phase("exchange"):` costs next to nothing unless somebody measures phases.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

# in the order of the profile's table
PHASES = (
    "load", "copy", "embedding", "MLPs", "interaction", "backward", "update", "graph", "exchange",
    "evaluation",
)  # fmt: skip
CLOSED_PHASES = ("evaluation",)  # phases inside one of these are not counted themselves

# returns a context that records the time of its block under that name
Mark = Callable[[str], contextlib.AbstractContextManager[Any]]
Item = TypeVar("Item")

_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
_END = object()


class _Measuring:
    """Holds the function that measures phases; None while nobody measures."""

    mark: Mark | None = None


_measuring = _Measuring()


def phase(name: str) -> contextlib.AbstractContextManager[Any]:
    """A context whose block is a phase of a step, on any thread; phases may be nested.

    Args:
        name: one of PHASES.
    """
    return _NOTHING if _measuring.mark is None else _measuring.mark(name)


def each_in_phase(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items; the time to make each one counts as the phase `name`."""
    with phase(name):  # includes `iter`: a loader starts its workers there
        iterator = iter(items)
        item: Any = next(iterator, _END)
    while item is not _END:
        yield item
        with phase(name):
            item = next(iterator, _END)


@contextlib.contextmanager
def phases_measured(mark: Mark) -> Iterator[None]:
    """Have `mark` measure the phases that run during the block."""
    _measuring.mark = mark
    try:
        yield
    finally:
        _measuring.mark = None
