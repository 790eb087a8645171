"""A log says which rank is slow; errors say which one hangs or has ended."""

import os
import pickle
import re
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL_MODEL, shell
from signalled import HANG, started

from common.versions import release
from ranks.process import Process


def run_program(program, folder, timeout=60, **values):
    """Run it as a process of its own, with these values in their places."""
    file = folder / "program.py"
    file.write_text(program.format(paths=[str(ROOT), str(ROOT / "test" / "unit")], **values))
    return shell(sys.executable, file, cwd=folder, timeout=timeout)


SLOW = """
import os, signal, sys, time
sys.path[:0] = {paths}
import dlrm_s_pytorch as dlrm
import torch
from common.errors import PassingError, RankGoneError
from forked_ranks import run_ranks
from ranks import watch
from ranks.collectives import any_rank, texts_of_all
from ranks.process import joined, this_process

watch.SECONDS_BETWEEN_SIGNS, watch.SECONDS_OF_A_SLOW_RANK = 0.2, 2.0


def work():
    process = this_process("cpu")
    try:
        with joined(process, timeout=5):
            pids = texts_of_all(process, str(os.getpid()))
            if process.rank == 1:
                time.sleep(3.5)
            any_rank(process, [True])
            if process.rank == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            any_rank(process, [True])
    except PassingError as error:
        line = f"rank {{process.rank}} ends: {{type(error).__name__}}: {{error}}\\n"
        print(line, end="", flush=True)  # in one write, as others write too
    if process.is_first:
        os.kill(int(pids[2]), signal.SIGCONT)


run_ranks(3, work)
"""


def test_a_slow_rank_is_named_in_the_log_and_one_that_hangs_in_the_error(tmp_path):
    done = run_program(SLOW, tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    waited = "the others have waited for it at a collective"
    lines = [re.sub(r"\d s", "N s", line) for line in done.stdout.splitlines()]
    assert lines[:3] == [
        f"rank 1 is slow: for N s {waited} that it has not begun (it left its last one N s ago)",
        "rank 1 is no longer waited for, after N s",
        f"rank 2 is slow: for N s {waited}, and it does not answer",
    ]
    ends = dict(line.split(" ends: ") for line in lines[3:])
    hangs = f"rank 2 hangs: for N s (--dist-timeout) {waited}, and it does not answer"
    assert f"PassingError: {hangs}" in (ends["rank 0"], ends["rank 1"])
    for name in ("rank 0", "rank 1", "rank 2"):  # it may see that one of the others has ended
        gone = r"RankGoneError: rank \d has ended \(process \d+\): its own log says why"
        assert ends[name] == f"PassingError: {hangs}" or re.fullmatch(gone, ends[name])
    assert f"error: {hangs}" in re.sub(r"\d s", "N s", done.stderr)
    assert "Traceback" not in done.stderr


BETWEEN = """
import sys, time
sys.path[:0] = {paths}
import dlrm_s_pytorch as dlrm
import torch
from common.errors import PassingError
from forked_ranks import run_ranks
from ranks import watch
from ranks.collectives import any_rank, begin_all_to_all
from ranks.process import joined, this_process

watch.SECONDS_BETWEEN_SIGNS, watch.SECONDS_OF_A_SLOW_RANK = 0.2, 1.0


def work():
    process = this_process("cpu")
    try:
        with joined(process, timeout=3):
            numbers = torch.zeros(3)
            exchanges = [
                begin_all_to_all(process, torch.empty(3), numbers, [1] * 3, [1] * 3)
                for _ in range(2)
            ]
            if process.rank == 1:
                time.sleep(4)
            for one in exchanges:
                one.wait()
            any_rank(process, [True])
    except PassingError as error:
        print(f"rank {{process.rank}} ends: {{error}}\\n", end="", flush=True)


run_ranks(3, work)
"""


def test_a_rank_that_hangs_between_beginning_and_waiting_is_named(tmp_path):
    """Its numbers have come, so the others wait for it at the next collective."""
    done = run_program(BETWEEN, tmp_path)
    assert done.returncode == 0, done.stderr
    why = "the others have waited for it at a collective that it has not begun"
    left = "(it left its last one N s ago)"
    slow, *ends = (re.sub(r"\d s", "N s", line) for line in done.stdout.splitlines())
    assert slow == f"rank 1 is slow: for N s {why} {left}"
    hangs = f"rank 1 hangs: for N s (--dist-timeout) {why} {left}"
    ends = dict(line.split(" ends: ") for line in ends)
    assert hangs in (ends["rank 0"], ends["rank 2"])
    for name in ("rank 0", "rank 2"):  # it may see that the other one has ended
        gone = r"rank \d has ended \(process \d+\): its own log says why"
        assert ends[name] == hangs or re.fullmatch(gone, ends[name])


STUCK = """
import ctypes, os, signal, sys, time
sys.path[:0] = {paths}
import dlrm_s_pytorch as dlrm
from common import termination
from common.errors import reports_errors
from forked_ranks import run_ranks
from ranks import watch
from ranks.collectives import text_from_first
from ranks.process import joined, this_process

watch.SECONDS_WITHOUT_A_RANK = termination.SECONDS_TO_UNWIND = 0.5


{hang}

@reports_errors
def main(argv=None):
    process = this_process("cpu")
    with termination.ends_on_signals(lambda error: print("ended by", repr(error), flush=True)):
        with joined(process):
            first = int(text_from_first(process, str(os.getpid())))
            if process.rank == 1:
                if {warns}:
                    os.kill(first, signal.SIGTERM)
                    time.sleep(0.3)
                print("rank 1 is", os.getpid(), flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            with process.attendance:
                hang()


run_ranks(2, main)
"""


@pytest.mark.parametrize("warns", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_rank_whose_backend_notices_nothing_ends_without_a_launcher(warns, tmp_path):
    """If SIGTERM has come before, the end of the other rank is no news: it got the signal too."""
    done = run_program(STUCK, tmp_path, hang=HANG, warns=warns)
    assert done.returncode == 1, done.stderr
    pid = re.search(r"^rank 1 is (\d+)$", done.stdout, re.M)[1]
    line = f"error: rank 1 has ended (process {pid}): its own log says why\n"
    assert done.stderr == ("" if warns else line)
    assert "ended by TerminatedError" in done.stdout


MACHINES = """
import os, signal, sys
from dataclasses import replace
sys.path[:0] = {paths}
import dlrm_s_pytorch as dlrm
from common.errors import RankGoneError
from forked_ranks import run_ranks
from ranks import watch
from ranks.board import Member
from ranks.collectives import any_rank
from ranks.process import joined, this_process

watch.SECONDS_BETWEEN_SIGNS, watch.SECONDS_TO_FIND_WHO_HAS_GONE = 0.2, 1.0
here = Member.of_this_process


def elsewhere(cls):
    machine = {machines!r}[int(os.environ["RANK"])]
    return replace(here(), machine=machine, host=f"node-{{machine}}")


Member.of_this_process = classmethod(elsewhere)


def work():
    process = this_process("cpu")
    try:
        with joined(process):
            any_rank(process, [True])
            if process.rank == {dies}:
                os.kill(os.getpid(), signal.SIGKILL)
            any_rank(process, [True])
    except RankGoneError:
        pass


run_ranks(3, work)
"""


@pytest.mark.parametrize(
    "machines, dies, told",
    [
        ("aaa", 0, {"rank 0 has ended (process N)"}),  # it keeps the store
        ("abb", 2, {"rank 2 has ended (process N)", "rank 2 has ended (process N on node-b)"}),
        pytest.param(
            "aab",
            2,
            {"rank 2 gives no sign of life (process N on node-b)"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_of_this_or_another_machine_is_named(machines, dies, told, tmp_path):
    """A rank beside it tells who has ended; if there is none, it is the one that gives no signs."""
    done = run_program(MACHINES, tmp_path, machines=machines, dies=dies)
    said = re.sub(r"process \d+", "process N", done.stderr).splitlines()
    assert set(said) == {f"error: {what}: its own log says why" for what in told}, done.stderr


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
LONG = [*SMALL_MODEL, "--data-size=64000000", "--print-freq=5", "--tensor-board-filename="]


def children_of(*pids):
    found = shell("ps", "-o", "pid=", "--ppid", ",".join(map(str, pids)))
    return sorted(int(word) for word in found.stdout.split())


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="looks for processes in /proc")
def test_a_rank_that_is_killed_is_named_and_all_processes_end(tmp_path):
    """Its loader keeps its connections open for a while, so the others are inside of gloo then."""
    with started(
        *TORCHRUN, "--nproc_per_node=3", ROOT / "dlrm_s_pytorch.py", *LONG, "--num-workers=1",
        cwd=tmp_path,
    ) as launcher:  # fmt: skip
        launcher.wait_for("Finished")
        ranks = children_of(launcher.process.pid)
        assert len(ranks) == 3
        processes = ranks + children_of(*ranks)
        assert len(processes) >= 6
        os.kill(ranks[1], signal.SIGKILL)
        status, out, err = launcher.end()
        assert status and "Traceback (most" not in out
        told = rf"^  error: rank 1 has ended \(process {ranks[1]}\): its own log says why$"
        if release(torch.__version__) < (2, 11):  # its report is of the rank that died alone
            told = rf"rank +: 1 \(local_rank: 1\)\n +exitcode +: -9 \(pid: {ranks[1]}\)"
        assert re.search(told, err, re.M), err
        deadline = time.monotonic() + 20
        while any(os.path.exists(f"/proc/{pid}") for pid in processes):
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_process_is_the_same_whatever_it_has_counted_and_goes_to_loaders():
    one, other = (Process(1, 3, 1, torch.device("cpu"), "gloo") for _ in range(2))
    with one.attendance:
        assert one == other and hash(one) == hash(other) and repr(one) == repr(other)
    sent = pickle.loads(pickle.dumps(one))
    assert sent == one and sent.attendance.begun == 1
