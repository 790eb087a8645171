"""A small program without torch, for tests of what signals do to a run."""

import contextlib
import subprocess
import sys
import time

from conftest import ROOT

PROGRAM = """
import contextlib, ctypes, os, signal, sys, threading, time
from common import termination
from common.errors import reports_errors


def say(*words):
    print(*words, flush=True)


def hang():
    "Wait in C for a lock that this thread has: no signal ends that, and other threads go on."
    lock = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    libc.pthread_mutex_lock(lock)


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


@contextlib.contextmanager
def running(block, before="", **settings):
    """A process that runs the block and has said `ready`; it is ended with the `with`.

    `before` is a line that it runs first; `settings` are constants of common/termination.py.
    """
    lines = [f"termination.{name} = {value}" for name, value in settings.items()]
    block = "\n".join(" " * 8 + line for line in block.strip().splitlines())
    text = PROGRAM.format(block=block, settings="\n".join([*lines, before]))
    process = subprocess.Popen(
        [sys.executable, "-c", text], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def end(process, *signals):
    """Send the signals; returns (status, lines, stderr, seconds until it has ended)."""
    began = time.monotonic()
    for number in signals:
        process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out.splitlines(), err, time.monotonic() - began
