"""Ranks that have written their share wait for those that have more, though a signal has come."""

import os
import sys

import pytest
from conftest import ROOT, SMALL_MODEL, shell

from checkpoints.folder import newest_in
from checkpoints.index import Index

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
import dlrm_s_pytorch as dlrm
from common import termination
from forked_ranks import run_ranks

termination.SECONDS_TO_UNWIND, termination.SECONDS_BETWEEN_SIGNS = 0.5, 1.0
slow_rank, *flags = sys.argv[1:]
fsync = os.fsync

def slow_fsync(file):
    "As if there were many files: after each of them the rank shows life."
    if os.readlink(f"/proc/self/fd/{file}").endswith((".safetensors", "index.json")):
        for _ in range(20):
            time.sleep(0.1)
            termination.show_life()
    fsync(file)

class Asked(dlrm.Trainer):
    def train_step(self, batch, it):
        if it == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().train_step(batch, it)

def work():
    if os.environ["RANK"] == slow_rank:
        os.fsync = slow_fsync
    dlrm.Trainer = Asked
    assert dlrm.main(flags) == 143
    # no rank has ended before: torchrun ends the others when one has
    (path,) = Path("all").glob("*/index.json")
    assert path.parent.suffix == ""

run_ranks(2, work)
"""


@pytest.mark.parametrize("slow_rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_waits_for_the_slowest_rank(slow_rank, tmp_path):
    """A file of it takes longer than a rank may be without a sign of life, here 1 s."""
    settings = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'test' / 'unit'}"}
    flags = [*SMALL_MODEL, "--tensor-board-filename=", "--checkpoint-dir=all"]
    done = shell(sys.executable, "-c", PROGRAM, slow_rank, *flags, cwd=tmp_path, env=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = newest_in(tmp_path / "all")
    assert {file.name[:8] for file in Index.read(found.path).files} == {"rank-000", "rank-001"}
