"""Listeners tell everything to all, in order, and end and close all of them though one fails."""

import inspect

import pytest

from reporting.reporter import Listeners, Reporter

CALLS = [
    name
    for name, method in inspect.getmembers(Reporter, inspect.isfunction)
    if not name.startswith("_")
]


class Recorder(Reporter):
    """Notes what it is told in a list that several share."""

    def __init__(self, name, notes):
        for call in CALLS:
            setattr(self, call, lambda *told, call=call: notes.append((name, call, told)))


@pytest.mark.parametrize("call", CALLS)
def test_each_call_goes_to_all_in_order(call):
    notes = []
    listeners = Listeners(Recorder("a", notes), Recorder("b", notes))
    told = tuple(range(len(inspect.signature(getattr(Reporter, call)).parameters) - 1))
    getattr(listeners, call)(*told)
    assert notes == [("a", call, told), ("b", call, told)]


def test_all_are_ended_and_closed_though_one_fails():
    class Failing(Reporter):
        def end_run(self, error=None):
            raise OSError("full")

        close = end_run

    notes = []
    with pytest.raises(OSError, match="full"), Listeners(Failing(), Recorder("b", notes)):
        pass
    assert [call for _, call, _ in notes] == ["end_run", "close"]


def test_a_page_is_wanted_if_one_wants_it():
    class WithPage(Reporter):
        wants_page = True

    assert Listeners(Reporter(), WithPage()).wants_page
    assert not Listeners(Reporter()).wants_page and not Reporter().wants_page
