"""--metrics-file: numbers for programs, a line of JSON for each log line; docs/reporting.md."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from reporting.log_lines import StepPosition
from reporting.memory_use import memory_use
from reporting.records import EvaluationRecord, TrainingRecord
from reporting.reporter import Reporter

_NOWHERE = StepPosition(0, 1, 0)


class MetricsFile(Reporter):
    """Appends a line for each log line, each evaluation and the end of the run.

    Each line is one write, so a run that is killed leaves whole lines. If the disk is full, the
    lines are lost, one warning is printed, and training goes on.

    Args:
        path: the file; it is made if it is not there.
        device: the device whose memory is told.
        say: prints the warning.
    """

    def __init__(self, path: Path, device: torch.device, say: Callable[[str], object]) -> None:
        self._path, self._device, self._say = path, device, say
        self._began = time.monotonic()
        self._has_warned = self._has_ended = False
        self._last: dict[str, Any] = _position(_NOWHERE) | {"loss": None}
        self._best: dict[str, float | None] = {"best_accuracy": None, "best_auc": None}
        self._is_torn = _ends_inside_a_line(path)

    def training(self, record: TrainingRecord) -> None:
        """Append the line."""
        self._last = _position(record.where) | {"loss": record.loss}
        speed = {"rows_per_second": record.rows_per_second, "ms_per_it": record.ms_per_it}
        self._append("train", self._last | {"lr": record.lr} | speed)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Append the line."""
        self._best = {"best_accuracy": record.best_accuracy, "best_auc": record.best_auc}
        self._last |= _position(record.where)
        speed = {"num_rows": record.num_rows, "rows_per_second": record.rows_per_second}
        metrics = asdict(record.metrics)
        self._append("evaluation", _position(record.where) | metrics | self._best | speed)

    def end_run(self, error: BaseException | None = None) -> None:
        """Append the last line if an error ends the run; else what comes may still fail."""
        if error is not None:
            self._end(error)

    def close(self) -> None:
        """Append the last line of a run that has ended well."""
        self._end(None)

    def _end(self, error: BaseException | None) -> None:
        if self._has_ended:
            return
        self._has_ended = True
        text = None if error is None else _in_one_line(error)
        self._append("end", self._last | self._best | {"error": text})

    def _append(self, kind: str, facts: dict[str, Any]) -> None:
        """Write a line; a line that the disk had no room for is closed by the next one."""
        now = {"time": time.time(), "elapsed": time.monotonic() - self._began}
        memory = {"memory": asdict(memory_use(self._device))}
        values = {"kind": kind} | facts | now | memory
        text = json.dumps({key: _finite(value) for key, value in values.items()}, allow_nan=False)
        line = f"{chr(10) * self._is_torn}{text}\n".encode()
        try:
            with open(self._path, "ab", buffering=0) as file:
                self._is_torn = file.write(line) != len(line)
            if self._is_torn:
                raise OSError(0, "no room for a whole line")
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                reason = error.strerror or error
                self._say(f"warning: --metrics-file={self._path} lacks lines ({reason})")


def read_lines(path: Path, num_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, one after the other; what is no such line is left out.

    Args:
        path: the file; if it cannot be read there are no lines.
        num_bytes: how much of its beginning to read; None: all.
    """
    with contextlib.suppress(OSError), open(path, "rb") as file:
        for line in file:
            if num_bytes is not None and file.tell() > num_bytes:
                return
            values = _parsed(line)
            if isinstance(values, dict) and {"kind", "step"} <= set(values):
                yield values


def _parsed(line: bytes) -> Any:
    """The value of a line of JSON; None if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _position(where: StepPosition) -> dict[str, Any]:
    return {"step": where.step, "epoch": where.epoch, "it": where.it}


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _ends_inside_a_line(path: Path) -> bool:
    """Whether the file's last line has no end: a power cut, or a disk that was full."""
    try:
        with open(path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:  # there is none, or it is empty
        return False
