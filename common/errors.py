"""Errors that a user can mend: one line on stderr, exit status 2.

A UserError is a mistake that every rank finds; a RankError is one that a single rank may find.
"""

import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141  # 128 and the number of SIGPIPE
SECONDS_FOR_FIRST_RANK = 60.0

Program = Callable[..., int]


class UserError(Exception):
    """A mistake that the user can mend: one line that says what, got, expected, what to do.

    All ranks find the same mistake, so only the first rank of each machine prints it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RankError(UserError):
    """A UserError that this rank may be the only one to find, so this rank prints it."""


def reports_errors(program: Program) -> Program:
    """Make a program's `main(argv)` return an exit status whatever happens.

    A UserError, a file that the system refuses and a lack of memory become one line and status 2;
    an interrupt becomes status 130. If the reader of the output has gone, as `| head -1` does, the
    program says nothing and returns 141. A shell shows the same status for other programs in a
    pipe, and it is not 0 because the work is not done.
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
    try:
        return program(argv)
    except RankError as error:
        return _report(str(error))
    except UserError as error:
        return report_once(str(error))
    except MemoryError as error:
        return _report(f"out of memory ({error}): smaller batches or tables help")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED


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
    return _report(message) if _is_first_of_machine() else _let_first_rank_report(message)


def _is_first_of_machine() -> bool:
    """Whether this rank is its machine's first one.

    The launcher's variables are read as text, because they may be the mistake that is reported.
    """
    return os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"


def _let_first_rank_report(message: str) -> int:
    """Wait until torchrun ends this rank, which it does as soon as the first one has reported.

    It ends all ranks as soon as one has failed, so a rank that is ahead of the first one would
    keep the error from being printed. A first rank that says nothing has not found the mistake.
    Under other launchers there is nothing to wait for.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return EXIT_USER_ERROR
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(SECONDS_FOR_FIRST_RANK)
    return _report(message)


def _report(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
