"""Programs that run beside a test, for tests of what signals do to them."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

HANG = """
def hang():
    "Wait in C for a lock that this thread has: no signal ends that, and other threads go on."
    lock = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)
"""

# without torch, so that it starts at once
PROGRAM = """
import contextlib, ctypes, os, signal, sys, threading, time
from common import termination
from common.errors import reports_errors


def say(*words):
    # in one write: a signal between the words and their newline would put others there
    print(" ".join(map(str, words)) + "\\n", end="", flush=True)


{hang}

@reports_errors
def main(argv=None):
    with termination.ends_on_signals(lambda error: say("told", repr(str(error)))):
{block}
    return 0


{settings}
status = main()
say("status", status)
termination.skip_clean_up_if_ended(status)
sys.exit(status)
"""


@dataclass
class Run:
    """A program that runs; files hold its output, so that it never waits for a reader."""

    process: subprocess.Popen
    folder: Path

    def said(self, stream="out"):
        return (self.folder / stream).read_text()

    def wait_for(self, word):
        """Wait for a line that begins with the word."""
        while not re.search(f"^{word}", self.said(), re.M):
            assert self.process.poll() is None, self.said() + self.said("err")
            time.sleep(0.01)

    def end(self, *signals):
        """Send the signals; returns (status, output, stderr) when it has ended."""
        for number in signals:
            self.process.send_signal(number)
        return self.process.wait(timeout=100), self.said(), self.said("err")


@contextlib.contextmanager
def started(*command, cwd=ROOT, **environment):
    """A program in a session of its own, all of which is killed at the end of the `with`."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as files:
        out, err = (files.enter_context(open(Path(name, end), "w")) for end in ("out", "err"))
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd, env=settings, stdout=out, stderr=err, start_new_session=True,
        )  # fmt: skip
        with process:
            try:
                yield Run(process, Path(name))
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def running(block, before="", **settings):
    """PROGRAM with the block, which has said `ready`.

    `before` is a line that it runs first; `settings` are constants of common/termination.py.
    """
    lines = [f"termination.{name} = {value}" for name, value in settings.items()]
    block = "\n".join(" " * 8 + line for line in block.strip().splitlines())
    text = PROGRAM.format(block=block, hang=HANG, settings="\n".join([*lines, before]))
    with started(sys.executable, "-c", text) as run:
        run.wait_for("ready")
        yield run
