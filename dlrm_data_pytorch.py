"""What the model eats: random, synthetic and Criteo data sets, and batches loaded ahead of steps.

A data set is a sequence of batches. Batch i holds the same rows whoever asks for it and in any
order, so loader processes and resumed runs see the same data. Each rank reads its own share of a
batch. Data sets only read; data_utils.py prepares.
"""

import argparse
import itertools
import math
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from common.bag_kernels import Normal, Size, start_stream
from common.draw_state import DrawState
from common.errors import RankError, UserError
from common.random_bags import (
    BagSource,
    DrawnRows,
    GaussianBags,
    TracedBags,
    UniformBags,
    draw_rows,
)
from common.shares import share_of_rows, split_evenly
from common.stack_distances import StackDistances
from criteo.columns import NUM_DENSE, NUM_SPARSE, Bytes
from criteo.prepared import Prepared
from criteo.vocabulary import VocabularySource
from devices.card import side_stream
from devices.execution import Execution
from model.batch import BagBatch, Batch, CriteoBatch
from ranks.process import Process

Ints = npt.NDArray[np.int64]

ROWS_PER_READ = 8192  # small batches are read in groups: each read costs more than copying it
READS_AHEAD = 2  # reads that are done or under way while steps train on earlier batches
MAX_BATCHES_ON_DEVICE = 16  # most batches handed out before the device has done their steps
MOST_IDS = 2**31  # of a table: an id is an int32, from 0 on
MOST_INDICES = 2**31 - 1  # of a bag: its length is an int32
ROWS_PER_STATE = 1024  # of random data, between notes of its state; each takes 30 to 40 us
NUM_CARD_READERS = 2  # threads that read for a card: one copies 20 to 25 million rows/s


class BatchedDataset(Protocol):
    """A sequence of batches.

    Attributes:
        num_rows: number of rows, over all batches and ranks.
        num_batches_per_read: number of batches that are best read together.
        num_readers: number of threads that may call `read` at the same time.
    """

    num_rows: int
    num_batches_per_read: int
    num_readers: int

    @property
    def num_rows_read(self) -> int:
        """Number of rows that this rank has read so far."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Batch: ...

    def read(self, numbers: Sequence[int], pin_memory: bool = False) -> list[Batch]:
        """The batches of these numbers in order, in page-locked memory if that spares a copy."""

    def seek(self, state: DrawState | None) -> None:
        """Go to where a batch's `state_after` says, so that the batches before need not be drawn.

        It changes no batch and is called while nothing loads; loader processes are started later.

        Raises:
            ValueError: the state is that of other data.
        """


@dataclass(frozen=True)
class RunData:
    """Training and evaluation batches, rows of each table, dense features, and categories."""

    train: BatchedDataset
    test: BatchedDataset
    num_rows: tuple[int, ...]
    num_dense: int
    vocabulary: VocabularySource | None = None

    def batches_of_epoch(self, most: int) -> int:
        """Batches of an epoch of training, at most so many; 0: all."""
        return min(len(self.train), most or len(self.train))


def describe_batches(data: BatchedDataset, max_batches: int) -> str:
    """The first batches as text, for --debug-mode."""
    lines: list[str] = []
    for number in range(min(len(data), max_batches)):
        features = data[number].decode()
        ids, lengths = features.bags.ids, features.bags.lengths
        bags = [ids.view(-1, NUM_SPARSE)] if lengths is None else [lengths, ids]
        tensors = (features.dense, *bags, features.label)
        lines += [f"mini-batch: {number}", *(str(tensor.numpy()) for tensor in tensors)]
    return "\n".join(lines)


# ---------------------------------------------------------------- loading ahead


def batch_order(options: argparse.Namespace, num_batches: int, epoch: int) -> list[int] | range:
    """Numbers of an epoch's batches in the order in which they are trained."""
    if not options.mlperf_bin_shuffle:
        return range(num_batches)
    generator = np.random.default_rng([options.numpy_rand_seed, epoch])
    order: list[int] = generator.permutation(num_batches).tolist()
    return order


def load_batches(
    data: BatchedDataset,
    numbers: Iterable[int],
    num_workers: int,
    device: torch.device,
    execution: Execution = Execution(),  # noqa: B008 (it is frozen)
) -> Iterable[Batch]:
    """Batches in the order of `numbers`; the next ones are read while a step trains on one.

    Args:
        data: the data set.
        numbers: the numbers of the batches to load.
        num_workers: number of loader processes; 0: threads of this process read.
        device: the device of the steps.
        execution: whether batches wait in page-locked memory, and whether a batch is copied to the
            device during the step before its own.

    Raises:
        UserError: a batch could not be read; all batches before it come first.
    """
    batches: Iterable[Batch]
    if num_workers == 0:
        batches = _read_ahead(data, numbers, device, execution.pin_memory)
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
    """A data set for loader processes that returns a UserError as an item.

    If a loader process raised it, the DataLoader would put a traceback in place of its one line.
    """

    def __init__(self, data: BatchedDataset) -> None:
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


def _read_ahead(
    data: BatchedDataset, numbers: Iterable[int], device: torch.device, pin_memory: bool
) -> Iterator[Batch]:
    """Batches that threads of this process read in groups; the threads end with the iterator."""

    def read(group: Sequence[int]) -> list[Batch]:
        batches = data.read(group, pin_memory and device.type == "cuda")
        return [batch.pin_memory() for batch in batches] if pin_memory else batches

    def use_device() -> None:  # each thread has a current card of its own
        if device.type != "cpu":
            torch.get_device_module(device.type).set_device(device)

    readers = ThreadPoolExecutor(data.num_readers, initializer=use_device)
    ahead: deque[Future[list[Batch]]] = deque()
    remaining = iter(numbers)
    try:
        while group := list(itertools.islice(remaining, data.num_batches_per_read)):
            ahead.append(readers.submit(read, group))
            if len(ahead) > READS_AHEAD:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        readers.shutdown(cancel_futures=True)


def _copied_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on the device; the copy of each begins before the step on the batch before it.

    The main stream waits for the copy and is recorded as a user of its memory (record_stream): the
    notes on torch.cuda.Stream ask for both, and torch_npu follows them. A block's memory is free
    again only when its step is done, so the host waits if it is far ahead of the device.
    """
    streams = torch.get_device_module(device.type)
    side = side_stream(device)
    begun: deque[Any] = deque()  # for each batch handed out, an event after all steps before it

    def hand_out(batch: Batch, copied: Any) -> Batch:
        main = streams.current_stream()
        main.wait_event(copied)
        batch.block.record_stream(main)
        begun.append(streams.Event())
        begun[-1].record(main)
        if len(begun) > MAX_BATCHES_ON_DEVICE:
            begun.popleft().synchronize()
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
                yield hand_out(*ahead.popleft())
    except Exception:  # a later batch could not be read: those before it come first
        yield from itertools.starmap(hand_out, ahead)
        raise
    yield from itertools.starmap(hand_out, ahead)


# ---------------------------------------------------------------- Criteo data


def make_criteo_data(
    prepared: Prepared,
    randomize: str,
    in_memory: bool,
    batch_sizes: tuple[int, int],
    split: str,
    process: Process,
) -> RunData:
    """Training and evaluation batches of prepared Criteo data.

    Args:
        prepared: the data on disk.
        randomize: total, day or none: the order of training rows if they are loaded; mapped rows
            keep their order on disk.
        in_memory: load this rank's rows instead of mapping the files.
        batch_sizes: rows of a training and of an evaluation batch, over all ranks.
        split: the evaluation batches: test or val.
        process: the rank whose shares are read.

    Raises:
        UserError: the split has no rows.
    """
    if not len(prepared.rows(split)):
        raise UserError(f"--eval-split={split} has no rows in {prepared.files[split]}")
    order = draw_training_order(prepared, randomize) if in_memory else None
    train = open_criteo_split(prepared, "train", batch_sizes[0], process, order, in_memory)
    test = open_criteo_split(prepared, split, batch_sizes[1], process, None, in_memory)
    return RunData(train, test, prepared.counts, NUM_DENSE)


def draw_training_order(prepared: Prepared, randomize: str) -> Ints | None:
    """(rows,) entry k is the file's row that comes k-th in an epoch; None: the file's own order.

    Numpy's global generator draws it. The original draws a second order, which it does not use,
    for test data; so does this function, because later draws have to be those of the original.
    """
    if randomize == "none":
        return None
    days = prepared.rows_per_part[:-1]
    parts = (sum(days),) if randomize == "total" else days
    begins = np.cumsum([0, *parts[:-1]])
    order = np.concatenate(
        [begin + np.random.permutation(rows) for begin, rows in zip(begins, parts, strict=True)]
    )
    for rows in parts:
        np.random.permutation(rows)
    return order


def open_criteo_split(
    prepared: Prepared,
    split: str,
    batch_size: int,
    process: Process,
    order: Ints | None,
    in_memory: bool,
) -> "CriteoDataset":
    """The batches of one split: mapped from disk, or this rank's rows loaded in `order`."""
    rows = prepared.rows(split)
    if in_memory:
        wanted = _rows_of_rank(len(rows), batch_size, process)
        wanted = wanted if order is None else order[wanted]
        loaded = rows[wanted]
        _check_rows(prepared, loaded, prepared.files[split], lambda row: wanted[row])
        return CriteoDataset(prepared, loaded, len(rows), batch_size, process, shares_only=True)
    return CriteoDataset(prepared, rows, len(rows), batch_size, process)


def _check_rows(
    prepared: Prepared, rows: Bytes, file: object, row_in_file: Callable[[int], int]
) -> None:
    """Raise a RankError that names the first row with a label or an id that cannot be."""
    if fault := prepared.layout.first_fault(rows, prepared.counts):
        what_to_do = "delete the prepared data to have it made again"
        raise RankError(f"row {row_in_file(fault[0])} of {file}: {fault[1]}; {what_to_do}")


def _rows_of_rank(num_rows: int, batch_size: int, process: Process) -> Ints:
    """(n,) numbers of the epoch's rows that belong to this rank, in ascending order."""
    rank, world_size = process.rank, process.world_size
    begin, end = share_of_rows(batch_size, rank, world_size)
    rest = num_rows - num_rows % batch_size  # the first row of a last batch that is not full
    of_full_batches = np.arange(rest).reshape(-1, batch_size)[:, begin:end]
    of_last_batch = rest + np.arange(*share_of_rows(num_rows - rest, rank, world_size))
    return np.concatenate([of_full_batches.reshape(-1), of_last_batch])


class CriteoDataset:
    """Batches of prepared Criteo rows.

    Args:
        prepared: says how a row is packed and how many rows each table has.
        rows: (n, bytes of a row) uint8: all rows of the split, or with `shares_only` this rank's
            rows of batch 0, 1, ... in order.
        num_rows: number of rows of the split, over all ranks.
        batch_size: rows of a batch, over all ranks.
        process: the rank whose shares are read.
        shares_only: whether `rows` holds this rank's rows only.
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
        self._prepared, self._file = prepared, getattr(rows, "filename", None) or "the epoch"
        self._rows, self.num_rows, self._batch_size = np.asarray(rows), num_rows, batch_size
        self._process, self._shares_only = process, shares_only
        self._rows_of_thread: Counter[int] = Counter()
        self.num_batches_per_read = max(1, ROWS_PER_READ // batch_size)
        # on a CPU, more readers would take cores from the steps
        self.num_readers = 1 if process.device.type == "cpu" else NUM_CARD_READERS

    def __len__(self) -> int:
        return -(-self.num_rows // self._batch_size)

    def __getitem__(self, number: int) -> Batch:
        return self.read([number])[0]

    def read(self, numbers: Sequence[int], pin_memory: bool = False) -> list[Batch]:
        """The batches of these numbers; neighbours are read and checked at once.

        Raises:
            RankError: a row of this rank's shares has a label or an id that cannot be.
        """
        ranges = [self._range_of_share(number) for number in numbers]
        are_neighbours = all(end == begin for (_, end), (begin, _) in itertools.pairwise(ranges))
        if not are_neighbours:
            return [batch for number in numbers for batch in self.read([number], pin_memory)]
        begin, end = ranges[0][0], ranges[-1][1]
        size = (end - begin, self._rows.shape[1])
        copied = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
        rows = copied.numpy()
        np.copyto(rows, self._rows[begin:end])
        sizes = [end - begin for begin, end in ranges]
        _check_rows(self._prepared, rows, self._file, lambda row: self._row_of_epoch(numbers, row))
        self._rows_of_thread[threading.get_ident()] += len(rows)
        blocks = copied.split(sizes)
        return [
            CriteoBatch(block, len(block), self._rows_per_rank(number), self._prepared.layout)
            for number, block in zip(numbers, blocks, strict=True)
        ]

    def seek(self, state: DrawState | None) -> None:
        """Do nothing: rows are read wherever they are."""

    @property
    def num_rows_read(self) -> int:
        """Number of rows that this rank has read so far."""
        return self._rows_of_thread.total()

    def _size(self, number: int) -> int:
        """Rows of a batch, over all ranks."""
        return min(self._batch_size, self.num_rows - number * self._batch_size)

    def _rows_per_rank(self, number: int) -> tuple[int, ...]:
        return tuple(split_evenly(self._size(number), self._process.world_size))

    def _share_of_epoch(self, number: int) -> tuple[int, int]:
        """(begin, end) of this rank's share of a batch among the rows of an epoch."""
        rank, world_size = self._process.rank, self._process.world_size
        begin, end = share_of_rows(self._size(number), rank, world_size)
        return number * self._batch_size + begin, number * self._batch_size + end

    def _range_of_share(self, number: int) -> tuple[int, int]:
        """(begin, end) of this rank's share of a batch within `rows`."""
        begin, end = self._share_of_epoch(number)
        if not self._shares_only:
            return begin, end
        first_begin, first_end = self._share_of_epoch(0)  # earlier shares are all as long
        first = number * (first_end - first_begin)
        return first, first + end - begin

    def _row_of_epoch(self, numbers: Sequence[int], row: int) -> int:
        """Which row of the epoch a row of this rank's shares of batches is."""
        rows = [np.arange(*self._share_of_epoch(number)) for number in numbers]
        return int(np.concatenate(rows)[row])


# ---------------------------------------------------------------- random and synthetic data


@dataclass(frozen=True)
class RandomSpec:
    """How the flags ask for random batches; `num_rows` has the rows of each table."""

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

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "RandomSpec":
        """The trainer's flags for random and synthetic data as a record.

        Raises:
            UserError: no number can be drawn as they ask.
        """
        if (rows := max(options.arch_embedding_size)) > MOST_IDS:
            raise UserError(
                f"--arch-embedding-size has a table of {rows} rows: expected at most {MOST_IDS},"
                " because ids of random data have 32 bits"
            )
        least, most = options.rand_data_min, options.rand_data_max
        if not -math.inf < least <= most < math.inf:
            got = f"--rand-data-min={least} and --rand-data-max={most}"
            raise UserError(f"{got}: expected two numbers, the first at most the second")
        if not math.isfinite(options.rand_data_mu):
            raise UserError(f"--rand-data-mu={options.rand_data_mu}: expected a number")
        indices, fixed = options.num_indices_per_lookup, options.num_indices_per_lookup_fixed
        if (indices if fixed else min(indices, max(options.arch_embedding_size))) > MOST_INDICES:
            got = f"--num-indices-per-lookup={indices}"
            raise UserError(f"{got}: expected at most {MOST_INDICES} indices in a bag")
        return cls(
            num_rows=options.arch_embedding_size,
            num_dense=options.arch_mlp_bot[0],
            batch_size=options.mini_batch_size,
            data_size=options.data_size,
            num_batches=options.num_batches,
            num_indices=options.num_indices_per_lookup,
            num_indices_fixed=options.num_indices_per_lookup_fixed,
            distribution=options.rand_data_dist,
            minimum=options.rand_data_min,
            maximum=options.rand_data_max,
            mu=options.rand_data_mu,
            sigma=options.rand_data_sigma,
            round_targets=options.round_targets,
            seed=options.numpy_rand_seed,
            trace=options.data_trace_file if options.data_generation == "synthetic" else "",
            trace_padding=options.data_trace_enable_padding,
        )

    def source(self, table: int) -> BagSource:
        """What draws the bags of a table.

        Raises:
            UserError: the table's trace cannot be read.
        """
        rows = self.num_rows[table]
        most = self.num_indices if self.num_indices_fixed else min(rows, self.num_indices)
        size = Size(most, self.num_indices_fixed)
        if self.trace:
            path = Path(self.trace)
            path = path.with_name(path.name.replace("j", str(table)))
            return TracedBags(rows, size, StackDistances(path, self.trace_padding))
        if self.distribution == "gaussian":
            mu = (self.maximum + self.minimum) / 2 if self.mu == -1 else self.mu
            numbers = (mu, self.sigma, self.minimum, self.maximum)
            return GaussianBags(rows, size, Normal(*map(float, numbers)))
        return UniformBags(rows, size)


def make_random_data(spec: RandomSpec, process: Process) -> RunData:
    """Random training batches, and evaluation batches from a second generator of the same seed."""
    train, test = RandomDataset(spec, process), RandomDataset(spec, process)
    return RunData(train, test, spec.num_rows, spec.num_dense)


class RandomDataset:
    """Random or synthetic batches from one generator, which starts anew at batch 0.

    Every rank draws whole batches and keeps its shares; skipping ahead draws the skipped ones too,
    unless `seek` comes first.
    """

    def __init__(self, spec: RandomSpec, process: Process) -> None:
        self._spec, self._process = spec, process
        self.num_rows = spec.num_batches * spec.batch_size or spec.data_size
        self._sources = [spec.source(table) for table in range(len(spec.num_rows))]
        self._next, self._stream = 0, start_stream(spec.seed)
        self._state: DrawState | None = None  # the last one noted
        self._batches_per_state = -(-ROWS_PER_STATE // spec.batch_size)
        self.num_batches_per_read, self.num_readers, self.num_rows_read = 1, 1, 0

    def __len__(self) -> int:
        return self._spec.num_batches or -(-self._spec.data_size // self._spec.batch_size)

    def __getitem__(self, number: int) -> Batch:
        if number < self._next:
            self._next = 0
        while self._next < number:
            self._draw(self._next, (0, 0))
        size, process = self._size(number), self._process
        begin, end = share_of_rows(size, process.rank, process.world_size)
        drawn = self._draw(number, (begin, end))
        self.num_rows_read += end - begin
        shares = split_evenly(size, process.world_size)
        by_rank = np.split(drawn.bags.lengths, np.cumsum(shares)[:-1], axis=1)
        ids_per_rank = np.stack([lengths.sum(1, dtype=np.int64) for lengths in by_rank])
        widths = self._spec.num_dense, len(self._spec.num_rows)
        block = torch.from_numpy(drawn.block())
        rows_per_rank, state = tuple(shares), self._state
        return BagBatch(block, end - begin, rows_per_rank, *widths, ids_per_rank, state_after=state)

    def read(self, numbers: Sequence[int], pin_memory: bool = False) -> list[Batch]:
        """The batches of these numbers, drawn one after the other."""
        return [self[number] for number in numbers]

    def seek(self, state: DrawState | None) -> None:
        """Draw from the state on; None: from batch 0 on.

        Raises:
            ValueError: the state is that of other data.
        """
        if state is not None and state.number > len(self):
            raise ValueError(f"it is the state of batch {state.number}, of {len(self)} batches")
        self._state = state
        self._next = 0 if state is None else state.number
        self._stream = start_stream(self._spec.seed) if state is None else state.stream()

    def _draw(self, number: int, kept: tuple[int, int]) -> DrawnRows:
        """The next batch, of whose rows only (begin, end) `kept` are."""
        if number == 0:
            self.seek(None)
        self._next = number + 1
        spec, size = self._spec, self._size(number)
        drawn = draw_rows(
            self._stream, self._sources, size, spec.num_dense, kept, spec.round_targets
        )
        if self._next % self._batches_per_state == 0:
            self._state = DrawState.of_stream(self._stream, self._next)
        return drawn

    def _size(self, number: int) -> int:
        """Rows of a batch, over all ranks."""
        size, rows_left = self._spec.batch_size, self._spec.data_size
        return size if self._spec.num_batches else min(size, rows_left - number * size)
