"""A file of a run is there whole or not at all, whatever ends the run while it is written."""

import os
import signal

import pytest
from signalled import end, running

WRITING = """
from pathlib import Path
from engine.whole_files import write_whole
def wait(_):
    with {hold}:
        say("ready")
        {wait}
os.fsync = wait
write_whole([(Path({path!r}), lambda file: file.write(b"new"))])
"""
WAITING = {
    "in Python": ("contextlib.nullcontext()", "time.sleep(60)"),
    "in C": ("termination.held_back()", "hang()"),
}


@pytest.mark.parametrize("where", WAITING)
def test_a_signal_leaves_the_file_that_was_there_and_no_partial_one(where, tmp_path):
    """Also if the disk hangs, so that the main thread does not come back to remove it."""
    path = tmp_path / "m.pth"
    path.write_text("old")
    hold, wait = WAITING[where]
    block = WRITING.format(hold=hold, wait=wait, path=str(path))
    with running(block, SECONDS_TO_UNWIND=0.2) as process:
        assert sorted(os.listdir(tmp_path)) == ["m.pth", "m.pth.partial"]
        assert end(process, signal.SIGTERM)[0] == 143
    assert os.listdir(tmp_path) == ["m.pth"] and path.read_text() == "old"
