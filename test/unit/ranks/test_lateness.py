"""Whom the ranks wait for follows from what they have begun; sentences name these ranks."""

import time

import pytest
import torch

from ranks.attendance import Attendance, Sign
from ranks.collectives import Pending
from ranks.lateness import Hearing, Late
from ranks.process import Process

# begun, is_inside, seconds
INSIDE, ONE_AHEAD, OUTSIDE = (8, True, 60.0), (9, True, 60.0), (7, False, 61.4)
PASSED = (8, False, 60.0)


def late_of(facts, stopped=(), runs_ahead=False):
    """Who is late if the ranks' attendances are `facts`, and some have given no sign for long."""
    hearing = Hearing()
    hearing.hear([Sign(0, *fact) for fact in facts])
    time.sleep(0.02)
    hearing.hear([Sign(int(rank not in stopped), *fact) for rank, fact in enumerate(facts)])
    return hearing.late(0.01, runs_ahead)


def test_those_that_have_begun_the_fewest_are_late():
    late = late_of([INSIDE, OUTSIDE, INSIDE, OUTSIDE])
    assert (late.ranks, late.waiting, late.answer, late.seconds) == ([1, 3], [0, 2], True, 61.4)


def test_a_rank_that_has_sent_its_part_waits_in_the_next_collective():
    late = late_of([INSIDE, ONE_AHEAD, OUTSIDE])
    assert (late.ranks, late.waiting) == ([2], [0, 1])


@pytest.mark.parametrize("facts", [[OUTSIDE] * 3, [INSIDE] * 3, [INSIDE, PASSED, PASSED]])
def test_nobody_is_late_where_all_work_or_all_have_begun(facts):
    assert late_of(facts).ranks in ((), [])


def test_a_rank_that_gives_no_signs_is_the_late_one_whatever_its_last_sign_was():
    for last in (OUTSIDE, INSIDE):
        late = late_of([INSIDE, last, OUTSIDE], stopped=[1])
        assert (late.ranks, late.waiting, late.answer) == ([1], [0], False)
    assert late_of([OUTSIDE, OUTSIDE, OUTSIDE], stopped=[1]).ranks == (), "nobody waits"


def test_where_the_host_runs_ahead_a_rank_outside_of_a_collective_waits_too():
    facts = [PASSED, OUTSIDE, PASSED]
    assert late_of(facts).ranks in ((), [])
    late = late_of(facts, runs_ahead=True)
    assert (late.ranks, late.waiting) == ([1], [0, 2])
    assert late_of([OUTSIDE] * 3, runs_ahead=True).ranks in ((), [])


def test_sentences():
    one, several = Late([2], [0, 1], seconds=61.4), Late([1, 3], [0, 2], answer=False)
    assert one.slow_sentence(60.2) == (
        "rank 2 is slow: for 60 s the others have waited for it at a collective that it has not"
        " begun (it left its last one 61 s ago)"
    )
    assert several.slow_sentence(60) == (
        "ranks 1, 3 are slow: for 60 s the others have waited for them at a collective, and they do"
        " not answer"
    )
    assert one.no_longer_sentence(75) == "rank 2 is no longer waited for, after 75 s"
    assert one.hang_sentence(5).startswith("rank 2 hangs: for 5 s (--dist-timeout) the others have")
    assert Late((), ()).hang_sentence(5) == (
        "a collective has not ended in 5 s (--dist-timeout): it is not known which rank hangs"
    )


def test_a_sign_tells_of_the_attendance_and_travels_as_text():
    attendance = Attendance()
    with attendance:
        inside = Sign.parse(str(Sign.of(attendance, 4)))
    assert (inside.number, inside.begun, inside.is_inside) == (4, 1, True)
    assert 0 <= inside.seconds < 60
    outside = Sign.parse(str(Sign.of(attendance)))
    assert (outside.begun, outside.is_inside) == (1, False)


@pytest.mark.parametrize("enter", [lambda one: one, Attendance.waiting], ids=["begin", "wait"])
def test_a_rank_stays_inside_a_collective_that_has_failed(enter):
    attendance = Attendance()
    with pytest.raises(RuntimeError), enter(attendance):
        raise RuntimeError("the connection is closed")
    assert attendance.is_inside


def test_a_rank_is_inside_collectives_that_go_on_only_while_it_waits_for_them():
    """Where a rank does other work in between, or hangs, the others may wait for that rank."""
    process = Process(0, 2, 0, torch.device("cpu"), "gloo")
    attendance, begun = process.attendance, []

    class Handle:
        def wait(self):
            assert attendance.is_inside and attendance.changed >= now, "the wait has begun now"

    def begin():
        assert attendance.is_inside, "it may have to wait for a connection"
        begun.append(attendance.begun)
        return Handle()

    pending = [Pending(process, begin, ()) for _ in range(2)]
    for one in pending:
        assert not attendance.is_inside
        now = time.monotonic()
        one.wait()
    assert not attendance.is_inside
    assert begun == [1, 2] and attendance.begun == 2, "waiting begins none"
