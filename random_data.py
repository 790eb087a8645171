"""Random and synthetic data: bags of any length, drawn as the original draws them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from command_line import UserError
from dlrm_data_pytorch import Batch, Data, Features
from extend_distributed import Bags, Process, share_of_rows, split_rows

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BagBatch(Batch):
    """Block, int32: bits of dense (b, m) and label (b), lengths of bags (b, T), ids."""

    num_dense: int
    num_tables: int
    ids_per_rank: Ints

    def decode(self, triton: bool = False) -> Features:
        """Bags of any length, as they were drawn."""
        rows = self.num_rows
        ends = np.cumsum([rows * self.num_dense, rows, rows * self.num_tables])
        dense, label, lengths, ids = torch.tensor_split(self.block, [int(end) for end in ends])
        bags = Bags(ids, lengths.long().view(rows, self.num_tables), self.ids_per_rank)
        return Features(
            dense.view(torch.float32).view(rows, self.num_dense),
            bags,
            label.view(torch.float32).view(rows, 1),
        )


@dataclass(frozen=True)
class RandomSpec:
    """How random batches are drawn; names and meanings are the flags'."""

    num_rows: tuple[int, ...]
    num_dense: int
    batch_size: int
    data_size: int
    num_batches: int
    num_indices: int
    num_indices_fixed: bool
    distribution: str
    minimum: float
    maximum: float
    mu: float
    sigma: float
    round_targets: bool
    seed: int
    trace: str = ""
    trace_padding: bool = False


class StackDistances:
    """Draws ids by LRU stack distance (a trace's profile), as the original's synthetic data does.

    Args:
        path: three comma-separated lines: ids by first use, stack distances, their cumulative
            probabilities.
        padding: what `--data-trace-enable-padding` says.
    """

    def __init__(self, path: Path, padding: bool) -> None:
        try:
            lines = path.read_text().splitlines()
            self._ids = [int(word) for word in lines[0].split(",")]
            self._distances = [int(word) for word in lines[1].split(",")]
            self._probabilities = np.array([float(word) for word in lines[2].split(",")])
        except (OSError, ValueError, IndexError) as error:
            raise UserError(
                f"--data-trace-file: {path}: {error}; expected three comma-separated lines"
                " (ids, stack distances, cumulative probabilities), a file a table",
                everywhere=True,
            ) from error
        distances = self._distances
        fits = len(distances) == len(self._probabilities) and distances == sorted(distances)
        if not fits or distances[0] < 0 or distances[-1] > len(self._ids):
            raise UserError(
                f"--data-trace-file: {path}: expected ascending distances from 0 to"
                f" {len(self._ids)} (the number of ids) and as many probabilities",
                everywhere=True,
            )
        self._padding = padding

    def draw(self, size: int, random: np.random.RandomState) -> Ints:
        """`size` ids of one bag, repetitions included; each begins with the list as it was read."""
        recent = list(self._ids)
        num_new = 0
        drawn = np.empty(size, np.int64)
        for i in range(size):
            distance = self._draw_distance(num_new, float(random.rand(1)[0]))
            num_new += distance == 0
            drawn[i] = recent.pop(0 if distance == 0 else -distance)
            recent.append(int(drawn[i]))
        return drawn

    def _draw_distance(self, num_new: int, number: float) -> int:
        if num_new < self._distances[-1]:
            reachable = int(np.searchsorted(self._distances, num_new, side="right")) - 1
            number *= self._probabilities[max(reachable, 0)]
        elif self._padding:
            number = (1 - self._probabilities[0]) * number + self._probabilities[0]
        at = int(np.searchsorted(self._probabilities, number, side="left"))
        return self._distances[min(at, len(self._distances) - 1)]


class RandomData:
    """Random or synthetic batches, drawn in turn from a generator that starts anew at batch 0.

    Every rank draws the whole batch and keeps its rows. Asked for a batch out of turn, it draws
    those before.
    """

    def __init__(self, spec: RandomSpec, process: Process) -> None:
        self._spec, self._process = spec, process
        self._random, self._next = np.random.RandomState(spec.seed), 0
        self.batches_at_a_time, self.readers = 1, 1
        self._traces: list[StackDistances] = []
        if spec.trace:
            path = Path(spec.trace)
            names = [
                path.with_name(path.name.replace("j", str(table)))
                for table in range(len(spec.num_rows))
            ]
            self._traces = [StackDistances(name, spec.trace_padding) for name in names]
        self.rows_read = 0

    def __len__(self) -> int:
        return self._spec.num_batches or -(-self._spec.data_size // self._spec.batch_size)

    def __getitem__(self, number: int) -> Batch:
        if number < self._next:
            self._next = 0
        while self._next < number:
            self._draw(self._next)
        return self._share(*self._draw(number))

    def read(self, numbers: Sequence[int], pin_memory: bool = False) -> list[Batch]:
        """Batches `numbers`."""
        return [self[number] for number in numbers]

    def _draw(self, number: int) -> tuple[Floats, Ints, Ints, Floats]:
        """The next batch: dense (B, m), lengths (B, T), ids row by row, targets (B,)."""
        if number == 0:
            self._random = np.random.RandomState(self._spec.seed)
        self._next = number + 1
        size = self._num_rows(number)
        dense = self._random.rand(size, self._spec.num_dense).astype(np.float32)
        tables = range(len(self._spec.num_rows))
        bags = [[self._draw_bag(table) for _ in range(size)] for table in tables]
        targets = self._random.rand(size, 1).astype(np.float32)[:, 0]
        lengths = np.array(
            [[len(bags[table][row]) for table in tables] for row in range(size)], np.int64
        )
        ids = np.concatenate([bags[table][row] for row in range(size) for table in tables])
        return dense, lengths, ids, np.round(targets) if self._spec.round_targets else targets

    def _num_rows(self, number: int) -> int:
        spec = self._spec
        return (
            spec.batch_size
            if spec.num_batches
            else min(spec.batch_size, spec.data_size - number * spec.batch_size)
        )

    def _draw_bag(self, table: int) -> Ints:
        rows, spec = self._spec.num_rows[table], self._spec
        size = spec.num_indices
        if not spec.num_indices_fixed:
            number = float(self._random.random_sample(1)[0]) * min(rows, spec.num_indices)
            size = max(1, int(np.round(number)))
        if self._traces:
            return self._inside(np.unique(self._traces[table].draw(size, self._random)), table)
        if spec.distribution == "gaussian":
            return self._draw_gaussian(size, table)
        return np.unique(np.round(self._random.random_sample(size) * (rows - 1))).astype(np.int64)

    def _draw_gaussian(self, size: int, table: int) -> Ints:
        spec = self._spec
        mu = (spec.maximum + spec.minimum) / 2 if spec.mu == -1 else spec.mu
        ids = np.unique(
            np.clip(self._random.normal(mu, spec.sigma, size), spec.minimum, spec.maximum)
        ).astype(np.int64)
        if ids.min() < 0 or ids.max() >= spec.num_rows[table]:
            raise UserError(
                f"gaussian data drew id {ids.max() if ids.min() >= 0 else ids.min()} for table"
                f" {table} of {spec.num_rows[table]} rows: let --rand-data-min and"
                " --rand-data-max lie inside every table",
                everywhere=True,
            )
        return ids

    def _inside(self, ids: Ints, table: int) -> Ints:
        rows = self._spec.num_rows[table]
        if ids.max() >= rows:
            warnings.warn(
                f"the trace of table {table} has ids beyond its {rows} rows: taken modulo",
                stacklevel=2,
            )
        return ids % rows

    def _share(self, dense: Floats, lengths: Ints, ids: Ints, targets: Floats) -> Batch:
        """This rank's rows of a drawn batch as one block."""
        process = self._process
        shares = split_rows(len(dense), process.world_size)
        begin, end = share_of_rows(len(dense), process.rank, process.world_size)
        ends = np.concatenate([[0], np.cumsum(lengths.sum(1))])
        block = np.concatenate(
            [
                dense[begin:end].reshape(-1).view(np.int32),
                targets[begin:end].astype(np.float32).view(np.int32),
                lengths[begin:end].reshape(-1).astype(np.int32),
                ids[ends[begin] : ends[end]].astype(np.int32),
            ]
        )
        ids_per_rank = np.array([part.sum(0) for part in np.split(lengths, np.cumsum(shares)[:-1])])
        self.rows_read += end - begin
        widths = self._spec.num_dense, len(self._spec.num_rows)
        return BagBatch(torch.from_numpy(block), end - begin, tuple(shares), *widths, ids_per_rank)


def make(spec: RandomSpec, process: Process) -> Data:
    """Random training data, and test data drawn likewise by a generator of its own."""
    return Data(RandomData(spec, process), RandomData(spec, process), spec.num_rows, spec.num_dense)
