"""Whatever kills a run, and whenever: the checkpoint before is whole, and nothing else is lost."""

import os
import re
import sys

import pytest
import torch
from conftest import ROOT, shell

sys.path.insert(0, str(ROOT / "test"))

import kill_campaign

from checkpoints.folder import CheckpointFolder
from checkpoints.index import Index
from checkpoints.matrices import HeldRows, MatrixShape, Shard
from checkpoints.shard_file import read_tensors
from checkpoints.writer import write_rows

ROWS = 6


def save(folder, step):
    """Save three matrices full of the step's number, as a run does it."""
    rows = [
        HeldRows(Shard(f"emb_l.{k}.weight", 0, ROWS), {
            "weight": torch.full((ROWS, 3), float(step)), "sum": torch.full((ROWS, 3), -float(step))
        }, False)
        for k in range(3)
    ]  # fmt: skip
    shapes = {held.shard.key: MatrixShape(ROWS, {"weight": (3,), "sum": (3,)}) for held in rows}
    with folder.opened():
        partial = folder.begin(step)
        written = write_rows(partial, 0, rows)
        assert not written.trouble
        folder.publish(partial, Index({}, {}, shapes, written.files, {"step": step}))


def check_whole(found):
    """A checkpoint's files are all there, and of its step."""
    index = Index.read(found.path)
    assert index.state["step"] == found.step
    for file in index.files:
        for name, tensor in read_tensors(found.path / file.name, file.facts).items():
            sign = -1 if name.endswith("sum") else 1
            assert torch.equal(tensor, torch.full((ROWS, 3), sign * float(found.step)))


def test_a_kill_inside_each_call_of_a_save_leaves_whole_checkpoints(tmp_path):
    """One kill at each write, sync, rename and folder of the third save, which removes the first.

    Of the kills that come before the rename, the checkpoint before is the newest one.
    """
    newest = []
    for number in range(1, 100):
        folder = CheckpointFolder(tmp_path / str(number), keep=2)
        for step in (1, 2):
            save(folder, step)
        child = os.fork()
        if child == 0:
            try:
                kill_campaign.die_in_call(number)
                save(folder, 3)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = folder.checkpoints()
        for one in found:
            check_whole(one)
        newest.append(found[0].step)
        assert found[0].step in (2, 3) and len(found) in (2, 3)
        save(folder, 4)  # what was left is in nobody's way
        names = sorted(path.name for path in folder.path.iterdir())
        assert len(names) == 3 and names[-1] == "lock" and names[1].endswith("-step-4"), names
        check_whole(folder.checkpoints()[0])
        if status == 0:
            break
        assert status == -9
    assert number > 10 and newest == sorted(newest) and set(newest) == {2, 3}


@pytest.mark.slow
def test_a_campaign_of_random_kills_loses_nothing():
    """One rank, four ranks, random data; docs/checkpoints.md has the command of a long one."""
    done = shell(sys.executable, ROOT / "test" / "kill_campaign.py", 3, "--seed=3", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^3 of 3 runs ended as if nobody had killed them$", done.stdout, re.M)


TELLS = """
import sys
sys.path.insert(0, "test")
import kill_campaign

case = kill_campaign.CASES[2]
with kill_campaign.campaign(seed=1) as runs:
    runs.prepare(case)
    lines, model = case.lines, case.model
    for case.lines, case.model in ([lines[0]] + lines[2:], model), (lines, model[:-1]):
        runs.clear()
        run = runs.start(case, lambda rank: kill_campaign.die_in_call(30))
        assert run.wait() == [-9]
        print(runs.resume_and_compare(case, run)[0].partition(":")[0])
"""


@pytest.mark.slow
def test_a_campaign_tells_what_differs():
    """It is no campaign if it calls every run equal."""
    done = shell(sys.executable, "-c", TELLS, cwd=ROOT)
    said = done.stdout.splitlines()
    assert said == ["lines before the kill differ", "the model files differ"], done.stderr
