"""Shows a growing log on a terminal, line by line, above a bar of the epoch that is trained.

    python -m reporting.follow_log train_0.log --from-line=1 --pid=17

The log holds lines only. One process writes to the terminal, so a line never hits the bar. Between
two log lines the bar moves at the pace that the last one tells, and never beyond the next one.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from common.errors import UserError, reports_errors
from common.flags import ArgumentParser, number_in

SECONDS_BETWEEN_LOOKS = 0.2
_TRAINED = re.compile(r"Finished training it (\d+)/(\d+) of epoch (\d+), ([\d.]+) ms/it")
_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


@dataclass(frozen=True)
class Plan:
    """What the flags of a run tell about its pace and its length.

    Attributes:
        rows: of a step, over all ranks; 0: nobody knows.
        epochs: of the run; 0: nobody knows how long it is.
    """

    rows: int = 0
    epochs: int = 0

    @classmethod
    def from_folder(cls, folder: Path) -> "Plan":
        """That of the flags.json in a run's folder; without one nothing is known."""
        try:
            content = json.loads((folder / "flags.json").read_text())
            flags = content["defaults"] | content["flags"]
            epochs = 0 if flags["--performance"] else int(flags["--nepochs"])
            return cls(int(flags["--mini-batch-size"]), epochs)
        except (OSError, ValueError, KeyError, TypeError):
            return cls()


@dataclass(frozen=True)
class Pace:
    """What the last log line tells.

    Attributes:
        it, of: batches of the epoch that were done, and all of them.
        epoch: its number, from 0.
        ms_per_it: milliseconds; 0: not measured.
        seen: when the line was read, in seconds.
        stride: steps from the line before to this one.
    """

    it: int
    of: int
    epoch: int
    ms_per_it: float
    seen: float
    stride: int

    @classmethod
    def from_line(cls, line: str, seen: float, before: "Pace | None") -> "Pace | None":
        """That of a log line; None for a line of another kind."""
        found = _TRAINED.match(line)
        if not found:
            return None
        it, of, epoch = (int(word) for word in found.groups()[:3])
        is_next = before is not None and before.epoch == epoch and before.it < it
        stride = it - before.it if is_next and before is not None else it
        return cls(it, of, epoch, float(found[4]), seen, stride)

    def step_at(self, now: float) -> int:
        """The step that is probably done by now; at most that of the next line."""
        if not self.ms_per_it:
            return self.it
        steps = int((now - self.seen) * 1000 / self.ms_per_it)
        return min(self.it + min(steps, self.stride), self.of)

    def text_at(self, now: float, plan: Plan) -> str:
        """Rows a second, and the time that is left, as far as they are known."""
        if not self.ms_per_it:
            return ""
        parts = []
        if plan.rows:
            parts.append(f"{plan.rows * 1000 / self.ms_per_it:,.0f} rows/s")
        if plan.epochs:
            steps = (plan.epochs - 1 - self.epoch) * self.of + self.of - self.step_at(now)
            left = tqdm.format_interval(steps * self.ms_per_it / 1000)
            parts.append(f"{left} of training left")
        return ", ".join(parts)


class Screen:
    """A terminal with lines, and the bar below them.

    Args:
        terminal: where they are written.
        folder: that of the run.
    """

    def __init__(self, terminal: TextIO, folder: Path) -> None:
        self._terminal, self._folder = terminal, folder
        self._pace: Pace | None = None
        self._plan = Plan()
        self._bar: tqdm[Any] | None = None

    def line(self, line: str) -> None:
        """Show a line of the log above the bar."""
        tqdm.write(line, file=self._terminal)
        pace = Pace.from_line(line, time.monotonic(), self._pace)
        if pace is None:
            return
        if self._pace is None or self._pace.epoch != pace.epoch:
            self.close()
            self._plan = Plan.from_folder(self._folder)
            self._bar = tqdm(
                total=pace.of,
                desc=f"epoch {pace.epoch}",
                bar_format=_FORMAT,
                file=self._terminal,
                leave=False,
                dynamic_ncols=True,
            )
        self._pace = pace
        self.move()

    def move(self) -> None:
        """Draw the bar as it is now."""
        if self._pace is None or self._bar is None:
            return
        now = time.monotonic()
        self._bar.n = self._pace.step_at(now)
        self._bar.set_postfix_str(self._pace.text_at(now, self._plan))

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()


def follow(log: TextIO, is_alive: Callable[[], bool], screen: Screen) -> None:
    """Show the rest of a log, and what is added to it until its writer has ended."""
    begun = ""
    while True:
        was_alive = is_alive()  # asked first: what it has written before its end is read
        text = log.read()
        *lines, begun = (begun + text).split("\n")
        for line in lines:
            screen.line(line)
        if text:
            continue
        if not was_alive:
            break
        screen.move()
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if begun:
        screen.line(begun)
    screen.close()


def is_running(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Follow a log until the process that writes it has ended; returns the exit status."""
    parser = ArgumentParser(
        prog="python -m reporting.follow_log", description="Shows a log above a bar."
    )
    parser.add_argument("log", type=Path, help="rank 0's log, in the run's folder")
    parser.add_argument(
        "--from-line", type=number_in(int, 1), default=1, help="the first line that is shown"
    )
    parser.add_argument(
        "--pid", type=number_in(int, 1), required=True, help="the process whose end is the log's"
    )
    options = parser.parse_args(argv)
    try:
        log = open(options.log, encoding="utf-8", errors="replace", newline="\n")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{options.log}: cannot read the log ({error.strerror})") from error
    with log:
        for _ in range(options.from_line - 1):
            log.readline()
        follow(log, lambda: is_running(options.pid), Screen(sys.stdout, options.log.parent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
