"""A run's log: what its first rank prints, kept in a file too."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from common.errors import RankError, TerminatedError, UserError


@contextlib.contextmanager
def copied_to_log(path: Path) -> Iterator[None]:
    """Write what the block prints to the end of a log too, and the error that ends it.

    Nothing is done if a launcher has sent stdout to a file of the same folder: that is the log.

    Raises:
        RankError: the log cannot be written.
    """
    if _goes_to_folder(path.parent):
        yield
        return
    try:
        log = open(path, "a", buffering=1, encoding="utf-8", errors="replace")  # noqa: SIM115
    except OSError as error:
        raise RankError(f"{path}: cannot write the log ({error.strerror or error})") from error
    shown = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    both: Any = _Both(shown, log)
    try:
        with contextlib.redirect_stdout(both):
            yield
    except BaseException as error:
        both.copy(_text_of(error))
        raise
    finally:
        with contextlib.suppress(OSError):  # of a full disk, which was told
            log.close()


def _goes_to_folder(folder: Path) -> bool:
    """Whether stdout is a file of the folder."""
    try:
        ours = os.fstat(sys.stdout.fileno())
        return any(os.path.samestat(ours, path.stat()) for path in folder.glob("*.log"))
    except (AttributeError, OSError, ValueError):  # no stdout, or one without a file
        return False


def _text_of(error: BaseException) -> str:
    if isinstance(error, UserError):
        return f"error: {error}\n"
    if isinstance(error, KeyboardInterrupt | TerminatedError):
        return f"{'ended by SIGTERM' if isinstance(error, TerminatedError) else 'interrupted'}\n"
    return "".join(traceback.format_exception(error))


class _Both:
    """Stands for stdout: what is written goes to the log first, then to stdout as before.

    Args:
        shown: stdout.
        log: the log; a run goes on without it if it cannot be written any more.
    """

    def __init__(self, shown: TextIO, log: TextIO) -> None:
        self._shown = shown
        self._log: TextIO | None = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shown, name)

    def write(self, text: str) -> int:
        """Write to both."""
        self.copy(text)
        return self._shown.write(text)

    def copy(self, text: str) -> None:
        """Write to the log alone; the first time that this fails is told, and the last."""
        try:
            if self._log is not None:
                self._log.write(text)
        except OSError as error:
            self._log = None
            self._shown.write(f"warning: the log ends here ({error.strerror or error})\n")
