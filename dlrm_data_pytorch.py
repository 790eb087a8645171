"""What the model eats: batches of one compact block, and the data sets and loaders that make them.

A data set is a sequence of batches: `data[i]` is this rank's share of batch i, whoever asks and in
whatever order, so loader workers and a resumed run see the same rows. Data sets read; preparing is
data_utils' work.
"""

import itertools
import threading
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import RankError, UserError
from common.shares import share_of_rows, split_evenly
from criteo.columns import NUM_DENSE, NUM_SPARSE, Bytes
from criteo.prepared import Prepared
from devices.card import side_stream
from devices.execution import Execution
from model.batch import BagBatch, Batch, CriteoBatch
from ranks.process import Process

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

GROUPS_AHEAD = 2  # of batches, made while steps are at work
MOST_AHEAD_OF_DEVICE = 16  # batches that are given out and may not be trained on yet
CARD_READERS = 2  # threads that read for a card: one copies 20 to 25 million rows/s
ROWS_AT_A_TIME = 8192  # small batches are read in groups: reading one takes longer than its copy


class BatchData(Protocol):
    """A data set: `len` batches, by number.

    Attributes:
        batches_at_a_time: how many `read` makes best at a time.
        readers: threads that may call `read` at a time.
    """

    batches_at_a_time: int
    readers: int

    @property
    def rows_read(self) -> int:
        """This rank's rows so far."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Batch: ...

    def read(self, numbers: Sequence[int], pin_memory: bool = False) -> list[Batch]:
        """Batches `numbers`, in that order; in page-locked memory if that spares a copy."""
        ...


@dataclass(frozen=True)
class Data:
    """The data of a run: training and evaluation batches, table rows, number of dense features."""

    train: BatchData
    test: BatchData
    num_rows: tuple[int, ...]
    num_dense: int


def load_batches(
    data: BatchData,
    numbers: Iterable[int],
    num_workers: int,
    device: torch.device,
    execution: Execution = Execution(),  # noqa: B008 (it is frozen)
) -> Iterable[Batch]:
    """Batches `numbers` in order, the next ones made while one is at work.

    Args:
        data: the data set.
        numbers: of its batches.
        num_workers: processes that make them; 0: threads of this one.
        device: where they go.
        execution: whether they wait in page-locked memory, and whether the next one is copied to
            the device while a step is at work.
    """
    batches: Iterable[Batch]
    if num_workers == 0:
        batches = _made_ahead(data, numbers, device, execution.pin_memory)
    else:
        loader = DataLoader(
            _ErrorsAsItems(data),
            batch_size=None,
            sampler=numbers,
            num_workers=num_workers,
            pin_memory=execution.pin_memory,
            generator=torch.Generator(),  # leaves torch's global generator alone
        )
        batches = map(_batch_or_error, loader)
    return _copied_ahead(batches, device) if execution.copy_stream else batches


class _ErrorsAsItems(Dataset[Batch | UserError]):
    """A data set for loader processes whose UserErrors are items, so that they keep their type.

    The DataLoader would raise them again with a traceback in place of their one line.
    """

    def __init__(self, data: BatchData) -> None:
        self._data = data

    def __getitem__(self, number: int) -> Batch | UserError:
        try:
            return self._data[number]
        except UserError as error:
            return error


def _batch_or_error(item: Batch | UserError) -> Batch:
    if isinstance(item, UserError):
        raise item
    return item


def _made_ahead(
    data: BatchData, numbers: Iterable[int], device: torch.device, pin_memory: bool
) -> Iterator[Batch]:
    def make(group: Sequence[int]) -> list[Batch]:
        batches = data.read(group, pin_memory and device.type == "cuda")
        return [batch.pin_memory() for batch in batches] if pin_memory else batches

    def use_device() -> None:  # which card is the current one, each thread says for itself
        if device.type != "cpu":
            torch.get_device_module(device.type).set_device(device)

    maker = ThreadPoolExecutor(data.readers, initializer=use_device)
    ahead: deque[Future[list[Batch]]] = deque()
    remaining = iter(numbers)
    try:
        while group := list(itertools.islice(remaining, data.batches_at_a_time)):
            ahead.append(maker.submit(make, group))
            if len(ahead) > GROUPS_AHEAD:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        maker.shutdown(cancel_futures=True)


def _copied_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Each batch on the device, its copy begun before the step on the one before it.

    As in torch.cuda.Stream's notes, which torch_npu follows: what one stream makes another may use
    only after waiting for it, and memory is told of the second one (record_stream). A block's
    memory is free again when its step is done, so the host waits where it is far ahead.
    """
    streams = torch.get_device_module(device.type)
    side = side_stream(device)
    given: deque[Any] = deque()  # events behind which the steps on earlier batches are done

    def ready(batch: Batch, copied: Any) -> Batch:
        main = streams.current_stream()
        main.wait_event(copied)
        batch.block.record_stream(main)
        given.append(streams.Event())
        given[-1].record(main)
        if len(given) > MOST_AHEAD_OF_DEVICE:
            given.popleft().synchronize()
        return batch

    ahead: deque[tuple[Batch, Any]] = deque()
    try:
        for batch in batches:
            with streams.stream(side):
                on_device = batch.to(device)
            copied = streams.Event()
            copied.record(side)
            ahead.append((on_device, copied))
            if len(ahead) > 1:
                yield ready(*ahead.popleft())
    except Exception:  # of who makes the batches: those before it come first
        yield from itertools.starmap(ready, ahead)
        raise
    yield from itertools.starmap(ready, ahead)


# ---------------------------------------------------------------- Criteo


class CriteoData:
    """Batches of prepared Criteo rows.

    Args:
        prepared: layout of a row, and rows of each table; an id outside is an error.
        rows: (n, bytes of a row) uint8: the split's rows, or with `shares_only` the rank's rows of
            batch 0, 1, ... in order.
        num_rows: rows of the split, over all ranks.
        batch_size: rows of a batch, over all ranks.
        process: whose share of each batch to read.
        shares_only: what `rows` holds.
    """

    def __init__(
        self,
        prepared: Prepared,
        rows: Bytes,
        num_rows: int,
        batch_size: int,
        process: Process,
        shares_only: bool = False,
    ) -> None:
        self._layout, self._counts = prepared.layout, prepared.counts
        self._rows, self._num_rows, self._batch_size = np.asarray(rows), num_rows, batch_size
        self._file = getattr(rows, "filename", None) or "the data"
        self._process, self._shares_only = process, shares_only
        self._rows_of_thread: Counter[int] = Counter()
        self.batches_at_a_time = max(1, ROWS_AT_A_TIME // batch_size)
        self.readers = 1 if process.device.type == "cpu" else CARD_READERS  # steps want the CPU

    def __len__(self) -> int:
        return -(-self._num_rows // self._batch_size)

    def __getitem__(self, number: int) -> Batch:
        return self.read([number])[0]

    def read(self, numbers: Sequence[int], pin_memory: bool = False) -> list[Batch]:
        """Batches `numbers`; whole ones in a row are one copy and one check."""
        places = [self._place(number) for number in numbers]
        together = all(end == begin for (_, end), (begin, _) in itertools.pairwise(places))
        if not together:
            return [batch for number in numbers for batch in self.read([number], pin_memory)]
        begin, end = places[0][0], places[-1][1]
        size = (end - begin, self._rows.shape[1])
        copied = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
        rows = copied.numpy()
        np.copyto(rows, self._rows[begin:end])
        sizes = [end - begin for begin, end in places]
        self._check_ids(rows, numbers, sizes)
        self._rows_of_thread[threading.get_ident()] += len(rows)
        blocks = copied.split(sizes)
        return [
            CriteoBatch(block, len(block), self._rows_per_rank(number), self._layout)
            for number, block in zip(numbers, blocks, strict=True)
        ]

    @property
    def rows_read(self) -> int:
        """As BatchData says."""
        return self._rows_of_thread.total()

    def _size(self, number: int) -> int:
        return min(self._batch_size, self._num_rows - number * self._batch_size)

    def _rows_per_rank(self, number: int) -> tuple[int, ...]:
        return tuple(split_evenly(self._size(number), self._process.world_size))

    def _place(self, number: int) -> tuple[int, int]:
        """Where this rank's rows of a batch are among `rows`."""
        rank, world_size = self._process.rank, self._process.world_size
        begin, end = share_of_rows(self._size(number), rank, world_size)
        if self._shares_only:
            full_begin, full_end = share_of_rows(self._batch_size, rank, world_size)
            first = number * (full_end - full_begin)
        else:
            first = number * self._batch_size + begin
        return first, first + end - begin

    def _check_ids(self, rows: Bytes, numbers: Sequence[int], sizes: Sequence[int]) -> None:
        found = self._layout.find_outside(rows, self._counts)
        if found is not None:
            row, table, outside = found
            ends = np.cumsum(sizes)
            batch = int(np.searchsorted(ends, row, side="right"))
            in_share = row - int(ends[batch]) + sizes[batch]
            rank, world_size = self._process.rank, self._process.world_size
            begin, _ = share_of_rows(self._size(numbers[batch]), rank, world_size)
            place = numbers[batch] * self._batch_size + begin + in_share
            raise RankError(
                f"row {place} of the epoch in {self._file}:"
                f" id {outside} of table {table} is outside its"
                f" {self._counts[table]} rows; delete the prepared data to have it made again"
            )


def draw_training_order(prepared: Prepared, randomize: str) -> Ints | None:
    """Which row of the file is row k of an epoch, from numpy's global generator; None: file order.

    The original draws the same once more for its test data, which does not use it; so does this.
    """
    parts = prepared.rows_per_part[:-1]
    if randomize == "none":
        return None
    if randomize == "total":
        order = np.random.permutation(sum(parts))
        np.random.permutation(sum(parts))
        return order
    begins = np.cumsum([0, *parts[:-1]])
    order = np.concatenate(
        [begin + np.random.permutation(rows) for begin, rows in zip(begins, parts, strict=True)]
    )
    for rows in parts:
        np.random.permutation(rows)
    return order


def _rows_of_share(num_rows: int, batch_size: int, process: Process) -> Ints:
    """Which rows of an epoch are this rank's, in order."""
    number = np.arange(num_rows)
    begin, end = share_of_rows(batch_size, process.rank, process.world_size)
    in_batch = number % batch_size
    mine = (in_batch >= begin) & (in_batch < end)
    last = num_rows - num_rows % batch_size
    begin, end = share_of_rows(num_rows - last, process.rank, process.world_size)
    mine[last:] = False
    mine[last + begin : last + end] = True
    return number[mine]


def criteo_split(
    prepared: Prepared,
    split: str,
    batch_size: int,
    process: Process,
    order: Ints | None,
    in_memory: bool,
) -> CriteoData:
    """Batches of one split: mapped from disk, or this rank's rows loaded in the epoch's order."""
    rows = prepared.rows(split)
    if in_memory:
        wanted = _rows_of_share(len(rows), batch_size, process)
        loaded = rows[wanted if order is None else order[wanted]]
        return CriteoData(prepared, loaded, len(rows), batch_size, process, shares_only=True)
    return CriteoData(prepared, rows, len(rows), batch_size, process)


def criteo_data(
    prepared: Prepared,
    randomize: str,
    in_memory: bool,
    batch_sizes: tuple[int, int],
    split: str,
    process: Process,
) -> Data:
    """Training and evaluation batches of prepared Criteo data.

    Args:
        prepared: what is on disk.
        randomize: total, day, none: order of training rows that are loaded; mapped rows are read
            as they lie.
        in_memory: load this rank's rows instead of mapping the files.
        batch_sizes: rows of a training and of an evaluation batch, over all ranks.
        split: test or val.
        process: whose share to read.
    """
    if not len(prepared.rows(split)):
        raise UserError(f"--eval-split={split} has no rows in {prepared.files[split]}")
    order = draw_training_order(prepared, randomize) if in_memory else None
    train = criteo_split(prepared, "train", batch_sizes[0], process, order, in_memory)
    test = criteo_split(prepared, split, batch_sizes[1], process, None, in_memory)
    return Data(train, test, prepared.counts, NUM_DENSE)


def describe(data: BatchData, max_batches: int) -> str:
    """The batches as text, for --debug-mode."""
    lines: list[Any] = []
    for number in range(min(len(data), max_batches)):
        features = data[number].decode()
        lines += [f"mini-batch: {number}", features.dense.numpy()]
        if features.bags.lengths is not None:
            lines += [features.bags.lengths.numpy(), features.bags.ids.numpy()]
        else:
            lines += [features.bags.ids.view(-1, NUM_SPARSE).numpy()]
        lines += [features.label.numpy()]
    return "\n".join(str(line) for line in lines)


Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


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
            ) from error
        distances = self._distances
        fits = len(distances) == len(self._probabilities) and distances == sorted(distances)
        if not fits or distances[0] < 0 or distances[-1] > len(self._ids):
            raise UserError(
                f"--data-trace-file: {path}: expected ascending distances from 0 to"
                f" {len(self._ids)} (the number of ids) and as many probabilities",
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
        shares = split_evenly(len(dense), process.world_size)
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


def random_data(spec: RandomSpec, process: Process) -> Data:
    """Random training data, and test data drawn likewise by a generator of its own."""
    return Data(RandomData(spec, process), RandomData(spec, process), spec.num_rows, spec.num_dense)
