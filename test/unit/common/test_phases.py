"""Phases of a step are measured while somebody measures, and cost nothing else."""

import contextlib

import pytest

from common.phases import PHASES, each_in_phase, phase, phases_measured


class Marks:
    """Notes when phases begin and end."""

    def __init__(self):
        self.seen = []

    @contextlib.contextmanager
    def mark(self, name):
        self.seen.append(f"+{name}")
        yield
        self.seen.append(f"-{name}")


def test_phases_are_given_to_who_measures_them_and_to_nobody_else():
    marks = Marks()
    with phase("MLPs"):
        pass
    with phases_measured(marks.mark), phase("backward"), phase("update"):
        pass
    with phase("MLPs"):
        pass
    assert marks.seen == ["+backward", "+update", "-update", "-backward"]


def test_measuring_ends_with_an_exception():
    marks = Marks()
    with pytest.raises(ZeroDivisionError), phases_measured(marks.mark):
        raise ZeroDivisionError
    with phase("MLPs"):
        pass
    assert marks.seen == []


def test_the_making_of_each_item_is_a_phase_and_its_use_is_none():
    marks = Marks()

    def batches():
        for number in range(2):
            marks.seen.append(f"make {number}")
            yield number

    with phases_measured(marks.mark):
        for number in each_in_phase("load", batches()):
            marks.seen.append(f"use {number}")
    assert marks.seen == [
        "+load", "make 0", "-load", "use 0", "+load", "make 1", "-load", "use 1", "+load", "-load",
    ]  # fmt: skip


def test_measuring_may_begin_and_end_between_items():
    marks = Marks()
    items = each_in_phase("load", [1, 2, 3])
    found = [next(items)]
    with phases_measured(marks.mark):
        found.append(next(items))
    assert [*found, *items] == [1, 2, 3] and marks.seen == ["+load", "-load"]


def test_names_of_phases_are_distinct():
    assert len(set(PHASES)) == len(PHASES)
