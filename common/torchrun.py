"""What torchrun's ranks can do for a short report when they fail.

torchrun ends all ranks as soon as one has failed. It then prints a line and a paragraph for each
rank that it had to end, and at last the text that the failed rank has left in its error file.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

# .../attempt_<restarts>/<local rank>/error.json
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
RESTARTS = "TORCHELASTIC_RESTART_COUNT"
SECONDS_FOR_FIRST_RANK = 60.0
SECONDS_FOR_OTHER_RANKS = 10.0
_PAUSE = 0.05
_FINAL = "final"


def has_started_this_process() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launcher_keeps_store() -> bool:
    """Whether the store where ranks meet is torchrun's, not rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def leave_line(line: str, seconds_later: int = 0, is_final: bool = False) -> bool:
    """Leave an error's line for the end of torchrun's report.

    Args:
        line: the error.
        seconds_later: the report ends with the earliest error; this one counts as so much later.
        is_final: another attempt would end in the same error.

    Returns:
        Whether torchrun prints its report to this process's stderr, so nobody else has to.
    """
    path = Path(os.environ.get(ERROR_FILE, ""))
    details = {"py_callstack": f"none\n{line}", "timestamp": str(int(time.time()) + seconds_later)}
    content = {"message": {"message": line, "extraInfo": details | {_FINAL: is_final}}}
    try:
        written = path.with_name(f"{path.name}.partial")
        written.write_text(json.dumps(content), encoding="utf-8")
        written.replace(path)
        return _torchrun_prints_here()
    except (OSError, ValueError):  # ValueError: there is no error file
        return False


def final_line_of_last_attempt() -> str:
    """The line that a rank of this machine has left if all ranks start again after a final error.

    Empty if they do not start again, or if another attempt may not have the error.
    """
    attempt = Path(os.environ.get(ERROR_FILE, "")).parent.parent
    kind, _, number = attempt.name.rpartition("_")
    if kind != "attempt" or number in ("", "0") or number != os.environ.get(RESTARTS):
        return ""
    files = attempt.with_name(f"{kind}_{int(number) - 1}").glob("*/error.json")
    lines = [line for file in sorted(files) if (line := _final_line(file))]
    return lines[0] if lines else ""


def _final_line(file: Path) -> str:
    """The line of a final error that the file holds; empty if it holds something else."""
    try:
        message = json.loads(file.read_text(encoding="utf-8"))["message"]
        return str(message["message"]) if message["extraInfo"][_FINAL] is True else ""
    except (OSError, ValueError, LookupError, TypeError):  # somebody else's, or half of one
        return ""


def _torchrun_prints_here() -> bool:
    launcher = Path("/proc", str(os.getppid()))
    words = launcher.joinpath("cmdline").read_bytes()
    is_torchrun = any(name in words for name in (b"torchrun", b"torch.distributed"))
    return is_torchrun and os.path.samestat(launcher.joinpath("fd", "2").stat(), os.fstat(2))


def first_rank_has_left_its_line() -> bool:
    """Wait for the line of the machine's first rank; False if none comes in time.

    If it comes, this rank must end with status 0, so that torchrun reports the first one alone.
    """
    own = Path(os.environ.get(ERROR_FILE, "/dev/null"))
    first = own.parent.parent / "0" / own.name
    if not _wait_for(first.is_file, SECONDS_FOR_FIRST_RANK):
        return False
    with contextlib.suppress(OSError):
        own.with_name("ending").write_text(str(os.getpid()))
    return True


def wait_for_other_ranks() -> None:
    """Wait on the first rank until the machine's other ranks have seen its line and ended."""
    own = Path(os.environ.get(ERROR_FILE, "/dev/null"))
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    others = [own.parent.parent / str(rank) / "ending" for rank in range(1, num_ranks)]
    if own.is_file():
        _wait_for(lambda: all(map(_has_ended, others)), SECONDS_FOR_OTHER_RANKS)


def _has_ended(ending: Path) -> bool:
    """Whether the process whose number the file holds is gone."""
    try:
        os.kill(int(ending.read_text()), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):  # it has not written the file yet
        return False
    return False


def _wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (is_true := condition()) and time.monotonic() < end:
        time.sleep(_PAUSE)
    return is_true
