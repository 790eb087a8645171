"""Items that a thread makes while those before them are used."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterator[Item], depth: int = 2) -> Generator[Item, None, None]:
    """The items in their order; a thread of its own makes up to `depth` of them in advance.

    An error that making an item raises comes after the items before it.
    """
    end = object()
    maker = ThreadPoolExecutor(1)
    ahead: deque[Future[Item | object]] = deque()
    try:
        ahead.extend(maker.submit(next, items, end) for _ in range(depth))
        while (item := ahead.popleft().result()) is not end:
            ahead.append(maker.submit(next, items, end))
            yield item  # type: ignore[misc]  # it is not `end`
    finally:
        maker.shutdown(wait=False, cancel_futures=True)
