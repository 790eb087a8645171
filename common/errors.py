"""Errors that a user can mend: one line on stderr, exit status 2.

A UserError is a mistake that every rank finds; a RankError is one that a single rank may find.
"""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from common import torchrun

EXIT_SUCCESS = 0
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141  # 128 and the number of SIGPIPE
EXIT_TERMINATED = 143  # 128 and the number of SIGTERM
SECONDS_BEHIND_CAUSE = 60
_BEGIN = "error: "

Program = Callable[..., int]


class UserError(Exception):
    """A mistake that the user can mend: one line that says what, got, expected, what to do.

    All ranks find the same mistake, so only the first rank of each machine prints it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RankError(UserError):
    """A UserError that this rank may be the only one to find, so this rank prints it."""

    is_reported = False  # by report_now


class PassingError(RankError):
    """A RankError that a second attempt may not have, so torchrun's --max-restarts makes one."""


class RankGoneError(PassingError):
    """An error that another rank has caused, whose own error is the one to read."""


class TerminatedError(BaseException):
    """SIGTERM has come; `except Exception` lets it pass, as it does a KeyboardInterrupt."""

    def __init__(self) -> None:
        super().__init__("ended by SIGTERM")


def reports_errors(program: Program) -> Program:
    """Make a program's `main(argv)` return an exit status whatever happens.

    A UserError, a file that the system refuses and a lack of memory become one line and status 2;
    an interrupt becomes status 130, SIGTERM 143 without a line. If the reader of the output has
    gone, as `| head -1` does, the program says nothing and returns 141. A shell shows the same
    status for other programs in a pipe, and it is not 0 because the work is not done.

    With --max-restarts, torchrun starts all ranks again after any error. If the attempt before has
    ended in a UserError, such as a wrong flag, a damaged file or a loss that is nan, this one does
    nothing but report it again. Other errors may pass, and are tried again: a PassingError, a lack
    of memory, which another process may have taken, and a file that the system refuses, as the disk
    may have been full or away.
    """

    @functools.wraps(program)
    def main(argv: Sequence[str] | None = None) -> int:
        try:
            try:
                return _run(program, argv)
            finally:
                _flush(sys.stdout)
        except OSError as error:
            _drop_unwritable_output()
            if isinstance(error, BrokenPipeError) and error.filename is None:
                return EXIT_READER_GONE
            name = error.filename or "the output or a file"
            return _report(f"{name}: {error.strerror or error}")

    return main


def _run(program: Program, argv: Sequence[str] | None) -> int:
    if line := torchrun.final_line_of_last_attempt():
        return report_once(line.removeprefix(_BEGIN))
    try:
        return program(argv)
    except PassingError as error:
        return report_now(error)
    except RankError as error:
        return _report(str(error), is_final=True)
    except UserError as error:
        return report_once(str(error))
    except MemoryError as error:
        return _report(f"out of memory ({error}): smaller batches or tables help")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except TerminatedError:
        return EXIT_TERMINATED


def _flush(stream: TextIO | None) -> None:
    if stream is not None:  # None: the program was started without it
        stream.flush()


def _drop_unwritable_output() -> None:
    """Point the standard streams that cannot be written at /dev/null.

    Python writes what is left in them when it ends, and would complain.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            _flush(stream)
        except OSError:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), stream.fileno())


def report_once(message: str) -> int:
    """Print an error that all ranks of a launch find, on one of them; returns the exit status."""
    if not _is_first_of_machine():
        return _let_first_rank_report(message)
    status = _report(message, is_final=True)
    if torchrun.has_started_this_process():
        torchrun.wait_for_other_ranks()
    return status


def _is_first_of_machine() -> bool:
    """Whether this rank is its machine's first one.

    The launcher's variables are read as text, because they may be the mistake that is reported.
    """
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def _let_first_rank_report(message: str) -> int:
    """End after the first rank has reported, which torchrun takes for the failure of all.

    It ends all ranks as soon as one has failed, so a rank that is ahead of the first one would
    keep the error from being printed. A first rank that says nothing has not found the mistake.
    Under other launchers there is nothing to wait for.
    """
    if not torchrun.has_started_this_process():
        return EXIT_USER_ERROR
    with contextlib.suppress(KeyboardInterrupt):
        if torchrun.first_rank_has_left_its_line():
            return EXIT_SUCCESS
    return _report(message, is_final=True)


def report_now(error: PassingError) -> int:
    """Report an error where it is found, as a signal may replace it on its way up.

    The program does not report it again. Returns the exit status.
    """
    if not error.is_reported:
        error.is_reported = True
        later = SECONDS_BEHIND_CAUSE if isinstance(error, RankGoneError) else 0
        _report(str(error), later)
    return EXIT_USER_ERROR


def _report(message: str, seconds_later: int = 0, is_final: bool = False) -> int:
    line = f"{_BEGIN}{' '.join(message.split())}"
    if not torchrun.leave_line(line, seconds_later, is_final):
        # with its end in one piece: other ranks write theirs to the same terminal
        print(f"{line}\n", end="", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
