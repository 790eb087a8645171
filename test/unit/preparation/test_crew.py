"""The threads of a process: its share of the cores, as many as the memory allows."""

import os

import pytest

from preparation.crew import WORK_MEMORY, Crew, crew_of_this_launch


def test_a_launch_shares_the_cores_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(9))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert crew_of_this_launch(parallel=True) == Crew(threads=9)
    assert crew_of_this_launch(parallel=False) == Crew(threads=1)
    for name, value in (("RANK", 5), ("WORLD_SIZE", 8), ("LOCAL_WORLD_SIZE", 4)):
        monkeypatch.setenv(name, str(value))
    assert crew_of_this_launch(parallel=True) == Crew(2, 5, 8, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert crew_of_this_launch(parallel=True).threads == 1


@pytest.mark.parametrize("local, share, threads", [(1, 0, 7), (1, 3, 3), (2, 6, 3), (4, 1, 1)])
def test_threads_fit_the_memory_of_the_machine(local, share, threads):
    """Threads that take 1 / share of the memory each; one is there at least."""
    crew = Crew(7, 1, 4, local)
    found = crew.within_memory(WORK_MEMORY // share if share else 0)
    assert found == Crew(threads, 1, 4, local)
