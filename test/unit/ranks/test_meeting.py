"""Ranks meet after the same steps, however fast each of them is, and a flag of one reaches all."""

import json
import os
import sys

import pytest
import torch
from conftest import ROOT, shell

from ranks.meeting import Meetings
from ranks.process import Process


def test_a_rank_alone_meets_after_each_step():
    meetings = Meetings(Process(0, 1, 0, torch.device("cpu"), "gloo"))
    for k in range(5):
        assert meetings.is_due()
        flags = [k % 2 == 0, False, True]
        assert meetings.hold(flags) == flags


PROGRAM = """
import json, sys, time
from unittest import mock
import torch
from forked_ranks import run_ranks
from ranks import meeting, process as ranks

SECONDS = {"alike": (0.01,) * 4, "one is slow": (0.001, 0.02, 0.001, 0.0), "fast": (1e-7,) * 4}
SECONDS["other one"] = (0.02, 0.001, 0.0, 0.0)

class Clock:
    "Time that a rank's steps take, without waiting for it."
    now = 100.0
    def monotonic(self):
        return self.now

def steps_of(process, seconds, num_steps):
    "The steps after which this rank meets, and what it then gets to know."
    clock, met, told = Clock(), [], []
    with mock.patch.object(meeting, "time", clock):
        meetings = meeting.Meetings(process)
        for step in range(num_steps):
            clock.now += seconds[process.rank]
            if meetings.is_due():
                met.append(step)
                # each rank has a flag that it alone sets, now and then
                flags = [rank == process.rank and len(met) % 3 == rank % 3 for rank in range(4)]
                told.append(meetings.hold([*flags, False, True]))
    return met, told

def early(process):
    "Ranks that meet although it is not due: they have saved, say; and what is due after that."
    clock, met = Clock(), []
    with mock.patch.object(meeting, "time", clock):
        meetings = meeting.Meetings(process)
        for step in range(200):
            clock.now += 0.01 if process.rank else 0.001
            is_due = meetings.is_due()
            if is_due or step % 40 == 39:
                meetings.hold([False])
                met.append(step)
            if step == 100:
                clock.now += 50.0 if process.rank == 2 else 0.0  # an evaluation
    return met

def other_work(process):
    "Fast steps, then steps of an evaluation, which take 10 s each."
    clock, met = Clock(), []
    with mock.patch.object(meeting, "time", clock):
        meetings = meeting.Meetings(process)
        for step in range(60):
            clock.now += 1e-7 if step < 50 else 10.0
            if step == 50:
                meetings.begin_other_work()
            if meetings.is_due():
                meetings.hold([False])
                met.append(step)
    return met

def work():
    process = ranks.this_process("cpu")
    with ranks.joined(process):
        found = {name: steps_of(process, seconds, 3000) for name, seconds in SECONDS.items()}
        found["early"], found["other work"] = early(process), other_work(process)
    with open(f"{process.rank}.json", "w") as file:
        json.dump(found, file)

run_ranks(4, work)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of four ranks has found."""
    folder = tmp_path_factory.mktemp("ranks")
    settings = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'test' / 'unit'}"}
    done = shell(sys.executable, "-c", PROGRAM, cwd=folder, env=settings, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


CASES = ("alike", "one is slow", "other one", "fast")


@pytest.mark.parametrize("case", [*CASES, "early"])
def test_all_meet_after_the_same_steps(ranks, case):
    found = [of_rank[case] if case == "early" else of_rank[case][0] for of_rank in ranks]
    assert found[0] and all(steps == found[0] for steps in found)


@pytest.mark.parametrize("case", CASES)
def test_a_flag_of_any_rank_reaches_all(ranks, case):
    told = ranks[0][case][1]
    assert all(of_rank[case][1] == told for of_rank in ranks)
    for number, flags in enumerate(told, 1):
        assert flags == [*(number % 3 == rank % 3 for rank in range(4)), False, True]
    assert len(told) >= 3


def test_they_meet_as_often_as_the_slowest_makes_steps_in_a_quarter_of_a_second(ranks):
    """After the first step, which tells how long one takes."""
    found = {case: ranks[0][case][0] for case in CASES}
    assert found["one is slow"][:4] == [0, 12, 24, 36] == found["other one"][:4]
    assert found["alike"][:3] in ([0, 25, 50], [0, 24, 48])  # as 0.25 / 0.01 is rounded
    assert found["fast"][:3] == [0, 1024, 2048]


def test_a_long_step_brings_the_next_meeting_near(ranks):
    """An evaluation of 50 s after step 100: a signal is heard soon after it."""
    met = ranks[0]["early"]
    after = [step for step in met if step > 100]
    assert after[1] - after[0] == 1


def test_other_work_brings_the_next_meeting_near(ranks):
    """After fast steps, an evaluation of few slow batches hears a signal after each of them."""
    assert ranks[0]["other work"] == [0, *range(50, 60)]
