"""Exact metrics of any number of labelled scores in bounded memory.

A run of keys (engine/score_meter.py says what a key is) is sorted in memory; when there are more,
sorted runs go to a temporary file without a name, and are read side by side in the end, a range of
keys at a time.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from engine.score_meter import Ranking, keys_of
from reporting.metrics import NAN, Metrics

KEYS_PER_RUN = 1 << 22  # 16 MB
KEYS_PER_PART = 1 << 18  # counting takes about 100 bytes a key: 26 MB
_BIN_BITS = 15  # keys are below 2^31: 65,536 bins

Keys = npt.NDArray[np.int32]


class LabelledScores:
    """Scores and labels of any number of rows.

    Args:
        folder: where the temporary file is, if one is needed.
        keys_per_run: keys that are sorted at a time.
    """

    def __init__(self, folder: Path, keys_per_run: int = KEYS_PER_RUN) -> None:
        self._folder, self._keys_per_run = folder, keys_per_run
        self._waiting: list[Keys] = []
        self._num_waiting = 0
        self._file: IO[bytes] | None = None
        self._run_lengths: list[int] = []
        self._bins = np.zeros(1 << (31 - _BIN_BITS), np.int64)
        self._num_rows = self._positives = self._right = 0
        self._is_finite = True

    def add(self, scores: npt.NDArray[np.float32], labels: npt.NDArray[Any]) -> None:
        """Add rows.

        Args:
            scores: (n,) in [0, 1].
            labels: (n,) 0 or 1.

        Raises:
            OSError: the temporary file cannot be written.
        """
        self._is_finite &= bool(np.isfinite(scores).all())
        is_one = labels == 1
        self._num_rows += len(scores)
        self._positives += int(is_one.sum())
        self._right += int(((scores > 0.5) == is_one).sum())  # 0.5 is rounded to 0
        keys = keys_of(torch.from_numpy(scores), torch.from_numpy(is_one))
        self._waiting.append(keys.numpy())
        self._num_waiting += len(scores)
        if self._num_waiting >= self._keys_per_run:
            self._write_run(self._take_run())

    def _take_run(self) -> Keys:
        run = np.concatenate([np.zeros(0, np.int32), *self._waiting])
        self._waiting, self._num_waiting = [], 0
        run.sort()
        self._bins += np.bincount(run >> _BIN_BITS, minlength=len(self._bins))
        return run

    def _write_run(self, run: Keys) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        self._file.write(run.tobytes())
        self._run_lengths.append(len(run))

    def metrics(self) -> Metrics:
        """Metrics of all rows, those of `ScoreMeter`; called once. There must be rows.

        If a score is not finite, all of them are nan.
        """
        if not self._is_finite:
            return Metrics(NAN)
        runs = [self._take_run()]
        if self._file is not None:
            self._file.flush()
            whole = np.memmap(self._file, np.int32, mode="r")
            runs += np.split(whole, np.cumsum(self._run_lengths)[:-1])
        ranking = Ranking(self._num_rows, self._positives)
        for part in self._in_order(runs):
            ranking.add(torch.from_numpy(part))
        if self._file is not None:
            self._file.close()
        return ranking.metrics(self._right)

    def _in_order(self, runs: list[Keys]) -> Iterator[Keys]:
        """The keys of sorted runs in ascending order, in parts of at most about KEYS_PER_PART."""
        begins = [0] * len(runs)
        for end_bin in self._ends_of_parts():
            last = (end_bin << _BIN_BITS) - 1  # largest key of the bins before
            ends = [int(np.searchsorted(run, last, side="right")) for run in runs]
            slices = [run[b:e] for run, b, e in zip(runs, begins, ends, strict=True)]
            begins = ends
            yield from _merged(slices)

    def _ends_of_parts(self) -> list[int]:
        """Numbers of bins before which parts end: a part has one bin, or several small ones."""
        ends, size = [], 0
        for number in np.flatnonzero(self._bins).tolist():
            if size and size + self._bins[number] > KEYS_PER_PART:
                ends.append(number)
                size = 0
            size += int(self._bins[number])
        return [*ends, len(self._bins)]


def _merged(slices: list[Keys]) -> Iterator[Keys]:
    """The keys of sorted slices in ascending order; many of the few values of a bin are counted."""
    if sum(map(len, slices)) <= 2 * KEYS_PER_PART:
        keys = np.concatenate(slices)
        keys.sort()
        if len(keys):
            yield keys
        return
    values, counts = _counted(slices)
    ends = np.cumsum(counts)
    for begin in range(0, int(ends[-1]), KEYS_PER_PART):
        end = min(begin + KEYS_PER_PART, int(ends[-1]))
        first, last = np.searchsorted(ends, begin, "right"), np.searchsorted(ends, end, "left")
        of_part = counts[first : last + 1].copy()
        of_part[0] = ends[first] - begin
        of_part[-1] -= ends[last] - end
        yield np.repeat(values[first : last + 1], of_part)


def _counted(slices: list[Keys]) -> tuple[Keys, npt.NDArray[np.int64]]:
    """The distinct keys of sorted slices, and how often each one is there."""
    first = min(int(keys[0]) for keys in slices if len(keys))
    counts = np.zeros(0, np.int64)
    for keys in slices:
        for begin in range(0, len(keys), KEYS_PER_PART):
            block = np.bincount(keys[begin : begin + KEYS_PER_PART] - first, minlength=len(counts))
            block[: len(counts)] += counts
            counts = block
    found = np.flatnonzero(counts)
    return (found + first).astype(np.int32), counts[found]
