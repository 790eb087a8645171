"""Errors that a user can mend: one line, exit status 2."""

import functools
import os
import sys
from collections.abc import Callable, Sequence

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

Program = Callable[..., int]


class UserError(Exception):
    """A mistake that the user can mend: one line that says what, got, expected, what to do.

    All ranks of a run find the same mistake, so only the first of each machine prints it; what a
    single rank finds is a RankError.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RankError(UserError):
    """A UserError that only this rank may have found: it prints it itself."""


def reports_errors(program: Program) -> Program:
    """Make a program's `main(argv)` give an exit status whatever happens.

    A UserError, a file that the system refuses and memory that it has not got become one line and
    status 2. A mistake that all ranks find is printed once a machine.
    """

    @functools.wraps(program)
    def main(argv: Sequence[str] | None = None) -> int:
        try:
            return program(argv)
        except UserError as error:
            rank_here = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0"))
            is_ours = isinstance(error, RankError) or rank_here == "0"
            return _report(str(error)) if is_ours else EXIT_USER_ERROR
        except OSError as error:
            return _report(f"{error.filename or 'a file'}: {error.strerror or error}")
        except MemoryError as error:
            return _report(f"out of memory ({error}): smaller batches or tables help")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr, flush=True)
            return EXIT_INTERRUPTED

    return main


def _report(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR
