"""Measurements one after the other: one that fails, lasts too long or hangs costs no other one.

A call that waits for a card which does not answer cannot be ended from within its process: Python
runs a signal's handler only when the call returns, an exception cannot be raised in another thread
before that either, and `exit` would wait for the card once more. So there are three limits:

1. The measuring process (`serve`) has a timer, whose handler raises an error in the main thread. It
   ends whatever runs Python: loops, the loader, a compiler that is waited for.
2. `faulthandler` has a thread of C that needs neither Python nor the card. It prints where Python
   stands, which is the call that hangs, and ends the process by `_exit`; the system then takes the
   card's memory back and ends its kernels.
3. The process that has started it (`supervise`) uses no card. It kills what still lives.

After 2 or 3, and where the card refuses all work after an error, `supervise` starts another process
for the measurements that are left.
"""

import contextlib
import faulthandler
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXIT_NO_DEVICE = 3  # of a measuring process whose card refuses work
GRACE = 5.0  # seconds between one limit and the next
SECONDS_TO_START = 60.0  # imports, the card's first answer
SECONDS_TO_RECOVER = 10.0  # freeing memory after a measurement that failed
MOST_LETTERS = 300  # of why a measurement failed

Record = dict[str, Any]


class OutOfTimeError(Exception):
    """A measurement has lasted too long."""


@dataclass(frozen=True)
class Measurement:
    """What is measured, for at most so many seconds; `work` returns what it found, as JSON."""

    name: str
    seconds: float
    work: Callable[[], Record]


# ---------------------------------------------------------------- the measuring process


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise an OutOfTimeError after so many seconds; end the process if that does not help.

    Main thread only.
    """

    def ring(*_: object) -> None:
        raise OutOfTimeError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    # the process's own stream: a test may have put another one in its place
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def measure(measurement: Measurement) -> Record:
    """Its record: what it found, or why it failed; the seconds that it took."""
    begin = time.perf_counter()
    record: Record = {"name": measurement.name}
    try:
        with at_most(measurement.seconds):
            found = measurement.work()
        record |= found
    except (Exception, SystemExit) as error:  # what is measured may leave by itself
        record["failed"] = why(error)
    return record | {"seconds": round(time.perf_counter() - begin, 1)}


def why(error: BaseException) -> str:
    """An error in one line, with the end of a long one, where programs say what is wrong."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= MOST_LETTERS else f"... {text[-MOST_LETTERS:]}"
    return f"{type(error).__name__}: {shown}".rstrip(": ")


def serve(measurements: Iterable[Measurement], recover: Callable[[], object] = lambda: None) -> int:
    """Measure all in this process, with a line of JSON before and after each.

    Args:
        measurements: in their order.
        recover: called after one that failed. It frees what that one held and asks the card for
            something; if it raises, the others are left to another process.

    Returns:
        The exit status: 0, or EXIT_NO_DEVICE.
    """
    out = sys.stdout  # measurements may redirect it

    def tell(record: Record) -> None:
        print(json.dumps(record), file=out, flush=True)

    for one in measurements:
        tell({"begins": one.name, "limit": one.seconds})
        record = measure(one)
        tell(record)
        if "failed" in record and not _recovers(recover):
            return EXIT_NO_DEVICE
    return 0


def _recovers(recover: Callable[[], object]) -> bool:
    gc.collect()  # the failed measurement's frames hold its tensors
    try:
        with at_most(SECONDS_TO_RECOVER):
            recover()
    except Exception as error:
        print(f"the device gives no more answers: {why(error)}", file=sys.stderr, flush=True)
        return False
    return True


# ---------------------------------------------------------------- the process that supervises


@dataclass(frozen=True)
class Measuring:
    """How a measuring process is started.

    Attributes:
        command: the command that measures what has the names that it is given.
        folder: where it runs.
        environment: changes to this process's.
    """

    command: Callable[[Sequence[str]], list[str]]
    folder: Path
    environment: dict[str, str]


def supervise(measuring: Measuring, names: Sequence[str]) -> Iterator[Record]:
    """The records of all measurements, each when it is done, whatever becomes of the processes."""
    left = list(names)
    while left:
        is_fruitful = False
        for record in _records_of_a_process(measuring, left):
            if record["name"] in left:
                left.remove(record["name"])
                is_fruitful = True
                yield record
        if not is_fruitful:  # it has not even begun one
            yield from ({"name": name, "failed": "no process could begin it"} for name in left)
            return


def _records_of_a_process(measuring: Measuring, names: Sequence[str]) -> Iterator[Record]:
    """The records of a measuring process; one that says so for the measurement that ends it."""
    pipe = subprocess.PIPE
    variables = os.environ | measuring.environment
    command = measuring.command(names)
    process = subprocess.Popen(
        command, cwd=measuring.folder, env=variables, stdout=pipe, text=True, errors="replace"
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    at_work, patience, began = "", SECONDS_TO_START, time.perf_counter()
    try:
        while (line := lines.get(timeout=patience)) is not None:
            record = _parsed(line)
            if record is None:
                print(line, end="", flush=True)
            elif "begins" in record:
                at_work, began = record["begins"], time.perf_counter()
                patience = record["limit"] + 2 * GRACE
            else:
                at_work, patience = "", SECONDS_TO_START
                yield record
        ended = f"the process ended with status {_status(process)}"
    except queue.Empty:
        ended = "the process did not end by itself and was killed"
    finally:
        process.kill()  # does nothing if it has ended
        _status(process)
    if at_work:
        seconds = round(time.perf_counter() - began, 1)
        yield {"name": at_work, "failed": f"{ended} after {seconds} s", "seconds": seconds}


def _read(stream: Any, lines: "queue.Queue[str | None]") -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _parsed(line: str) -> Record | None:
    """The record that a line is; None: it is something else that was printed."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"begins", "name"} & set(record) else None


def _status(process: "subprocess.Popen[str]") -> str:
    """The exit status; one that the system cannot end at once is left behind."""
    try:
        return str(process.wait(GRACE))
    except subprocess.TimeoutExpired:
        return "unknown (it does not end)"
