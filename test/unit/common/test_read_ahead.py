"""Items are made ahead, in order, and errors come in their place."""

import threading

import pytest

from common.read_ahead import read_ahead


def test_items_come_in_order_and_the_next_ones_are_made_meanwhile():
    made, third = [], threading.Event()

    def items():
        for number in range(10):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    found = read_ahead(items(), depth=2)
    assert next(found) == 0
    assert third.wait(10)
    assert len(made) <= 4
    assert list(found) == list(range(1, 10))


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        yield 2
        raise ValueError("third")

    found = read_ahead(items())
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ValueError, match="third"):
        next(found)
    assert list(read_ahead(iter([]))) == []
