"""OpenMP's threads sleep while they wait if there are fewer cores than threads, and spin if not."""

import os
import sys

import pytest
from conftest import ROOT, shell

from common import environment

PROGRAM = "import os, common.compiled; print(os.environ.get('OMP_WAIT_POLICY') or None)"


@pytest.fixture
def machine(monkeypatch):
    """A machine of 8 cores, whatever the tests' launcher has set."""
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # else what a test sets would stay
        monkeypatch.delenv(name)
    cores = {0: set(range(8)), os.getppid(): set(range(8))}
    monkeypatch.setattr(os, "sched_getaffinity", cores.__getitem__, raising=False)
    return cores


@pytest.mark.parametrize(
    "ranks, threads, policy",
    [
        (None, None, None),
        ("1", "8", None),
        ("1", "9", "passive"),
        ("2", "4", None),
        ("2", "5", "passive"),
        ("4", "4,2", "passive"),
        ("2", None, "passive"),
        ("16", "1", "passive"),
        ("nonsense", "8", None),
    ],
)
def test_threads_sleep_where_ranks_times_threads_exceed_the_cores(
    ranks, threads, policy, machine, monkeypatch
):
    for name, value in (("LOCAL_WORLD_SIZE", ranks), ("OMP_NUM_THREADS", threads)):
        if value:
            monkeypatch.setenv(name, value)
    environment.choose_wait_policy()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


@pytest.mark.parametrize("name, value", [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "9")])
def test_what_the_user_has_set_stays(name, value, machine, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "99")
    monkeypatch.setenv(name, value)
    environment.choose_wait_policy()
    assert os.environ.get("OMP_WAIT_POLICY") == (value if name == "OMP_WAIT_POLICY" else None)


def test_a_rank_that_is_bound_to_its_own_cores_does_not_share_them(machine, monkeypatch):
    """Its launcher may use all of them; but its own threads must fit into its cores."""
    machine[0] = {0, 1, 2, 3}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    environment.choose_wait_policy()
    assert "OMP_WAIT_POLICY" not in os.environ
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    environment.choose_wait_policy()
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize("threads, policy", [("1", "None"), ("4000", "passive")])
def test_it_is_chosen_before_libgomp_is_loaded(threads, policy):
    settings = {"OMP_NUM_THREADS": threads, "LOCAL_WORLD_SIZE": "1", "OMP_WAIT_POLICY": ""}
    done = shell(sys.executable, "-c", PROGRAM, env=settings, cwd=ROOT)
    assert done.stdout == policy + "\n", done.stderr
