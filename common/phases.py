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
CLOSED_PHASES = ("evaluation",)  # phases inside these are not counted, their time is its own

# makes a range of that name, for the time of a block
Mark = Callable[[str], contextlib.AbstractContextManager[Any]]
Item = TypeVar("Item")

_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
_END = object()


class _Measuring:
    """Who measures phases at the moment."""

    mark: Mark | None = None


_measuring = _Measuring()


def phase(name: str) -> contextlib.AbstractContextManager[Any]:
    """A block that is a phase of a step, on any thread; phases may be nested.

    Args:
        name: one of PHASES.
    """
    return _NOTHING if _measuring.mark is None else _measuring.mark(name)


def each_in_phase(name: str, items: Iterable[Item]) -> Iterator[Item]:
    """The items; making each of them is a phase."""
    with phase(name):  # with the first item: a loader starts its workers here
        iterator = iter(items)
        item: Any = next(iterator, _END)
    while item is not _END:
        yield item
        with phase(name):
            item = next(iterator, _END)


@contextlib.contextmanager
def phases_measured(mark: Mark) -> Iterator[None]:
    """Give phases of the block to `mark`."""
    _measuring.mark = mark
    try:
        yield
    finally:
        _measuring.mark = None
