"""A training that SIGTERM ends says so in MLPerf's log, once, and leaves no half of a file."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_mlperf_log import LOGGED, end_of, events_of

PROGRAM = ROOT / "dlrm_s_pytorch.py"
LONG = [*LOGGED, "--data-size=64000000", "--print-freq=5", "--tensor-board-filename="]
TERMINATED = ("aborted", "ended by SIGTERM")
# the program with something changed before its main
CHANGED = """
import os, sys, time
import dlrm_s_pytorch as dlrm
from common import termination
{change}
termination.skip_clean_up_if_ended(dlrm.main(sys.argv[1:]))
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@contextlib.contextmanager
def started(*command, cwd, **environment):
    """A program in a session of its own, all of which is ended with the `with`."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    process = subprocess.Popen(
        [str(word) for word in command], cwd=cwd, env=settings, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def read_until(process, word):
    """The lines of the output up to the one that begins with the word, which has to come."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(word):
            return "".join(lines)
    raise AssertionError(f"no {word!r}: {process.communicate()[1]}")


def finish(process, before):
    """Wait for the end; returns (status, the whole output, stderr)."""
    out, err = process.communicate(timeout=100)
    return process.returncode, before + out, err


@pytest.mark.parametrize("more", [[], ["--num-workers=2"]])
def test_sigterm_ends_the_log_with_a_reason(more, tmp_path):
    """It goes to the loaders too, as that of torchrun does."""
    with started(sys.executable, PROGRAM, *LONG, *more, cwd=tmp_path) as process:
        out = read_until(process, "Finished")
        os.killpg(process.pid, signal.SIGTERM)
        status, out, err = finish(process, out)
    assert (status, err) == (143, "") and end_of(out) == TERMINATED
    keys = [event["key"] for event in events_of(out)]
    assert keys[-3:] == ["epoch_stop", "block_stop", "run_stop"]


def test_a_model_file_that_is_being_written_is_removed(tmp_path):
    change = "os.fsync = lambda file: (print('saving', flush=True), time.sleep(60))"
    words = ["-c", CHANGED.format(change=change), *LONG]
    flags = ["--num-batches=20", "--test-freq=10", f"--save-model={tmp_path}/m.pth"]
    with started(sys.executable, *words, *flags, cwd=tmp_path) as process:
        out = read_until(process, "saving")
        assert os.listdir(tmp_path) == ["m.pth.partial"]
        process.terminate()
        status, out, err = finish(process, out)
    assert (status, err, os.listdir(tmp_path)) == (143, "", []) and end_of(out) == TERMINATED


def ranks_of(launcher):
    """Process numbers of torchrun's ranks: its children."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(launcher.pid)], capture_output=True, text=True
    )
    return [int(word) for word in found.stdout.split()]


def is_there(pid):
    return os.path.exists(f"/proc/{pid}")


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize("whom", ["torchrun", "rank 0", "rank 1"])
def test_sigterm_to_one_of_several_ranks_ends_all_and_the_log_once(whom, tmp_path):
    """Rank 0 may see that rank 1 has gone before torchrun sends it SIGTERM."""
    with started(*TORCHRUN, PROGRAM, *LONG, cwd=tmp_path) as launcher:
        out = read_until(launcher, "Finished")
        ranks = sorted(ranks_of(launcher))
        assert len(ranks) == 2
        os.kill(launcher.pid if whom == "torchrun" else ranks[int(whom[-1])], signal.SIGTERM)
        status, out, err = finish(launcher, out)
    gone = ("aborted", "another rank has ended: its own log says why")
    assert status and end_of(out) in (TERMINATED, gone)
    assert len(re.findall(r"^error: ", err, re.M)) <= 1
    deadline = time.monotonic() + 20
    while any(map(is_there, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_there, ranks))


def test_a_rank_that_waits_for_another_one_does_not_outlive_sigterm(tmp_path):
    """It is inside gloo, where Python calls no handler; the other rank is stopped."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = str(unused.getsockname()[1])
    settings = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = [sys.executable, "-c", CHANGED.format(change="termination.SECONDS_TO_UNWIND = 1")]
    with (
        started(*words, *LONG, cwd=tmp_path, RANK="0", **settings) as first,
        started(*words, *LONG, cwd=tmp_path, RANK="1", **settings) as second,
    ):
        out = read_until(first, "Finished")
        second.send_signal(signal.SIGSTOP)
        time.sleep(0.5)  # a step is done in milliseconds
        began = time.monotonic()
        first.terminate()
        status, out, err = finish(first, out)
    assert (status, err) == (143, "") and end_of(out) == TERMINATED
    assert 0.5 < time.monotonic() - began < 20
