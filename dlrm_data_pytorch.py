"""What the model eats: batches of one compact block, and the data sets and loaders that make them.

A data set is a sequence of batches: `data[i]` is this rank's share of batch i, whoever asks and in
whatever order, so loader workers and a resumed run see the same rows. Data sets read; preparing is
data_utils' work.
"""

import functools
import itertools
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from command_line import UserError
from criteo_text import FIRST_SPARSE, NUM_DENSE, NUM_SPARSE, Bytes
from data_utils import Prepared
from devices import Execution, triton_kernels
from extend_distributed import Bags, Process, share_of_rows, split_rows
from row_layout import Layout

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

GROUPS_AHEAD = 2  # of batches, made while steps are at work
MOST_AHEAD_OF_DEVICE = 16  # batches that are given out and may not be trained on yet
CARD_READERS = 2  # threads that read for a card: one copies 20 to 25 million rows/s
ROWS_AT_A_TIME = 8192  # small batches are read in groups: reading one takes longer than its copy


@dataclass(frozen=True)
class Features:
    """What the device made of a batch of b rows.

    Attributes:
        dense: (b, m) float32.
        bags: of b rows and T tables.
        label: (b, 1) float32.
    """

    dense: torch.Tensor
    bags: Bags
    label: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """A rank's rows of a batch as one contiguous block of bytes, and how many each rank has.

    The block is all that travels to the device; `decode` makes the model's tensors of it there.

    Attributes:
        block: of this rank's rows.
        num_rows: of this rank.
        rows_per_rank: of each rank.
        num_filled: rows at this rank's end that `filled` has added: they do not count.
    """

    block: torch.Tensor
    num_rows: int
    rows_per_rank: tuple[int, ...]
    num_filled: int = field(default=0, kw_only=True)

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory (the loader calls this)."""
        return replace(self, block=self.block.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        """The same with its block on the device."""
        if self.block.device == device:
            return self
        return replace(self, block=self.block.to(device, non_blocking=True))

    def pieces(self, most_rows: int) -> list["Batch"]:
        """This batch in order, as many pieces on each rank; bags of any length are one piece.

        Args:
            most_rows: of a piece, on a rank.
        """
        return [self]

    def filled(self, num_rows: int) -> "Batch":
        """This batch with `num_rows` rows on each rank; bags of any length stay as they are."""
        return self

    def counts(self) -> torch.Tensor | None:
        """(b, 1) 1 for rows that count, 0 for those that fill; None: all count."""
        if not self.num_filled:
            return None
        ones = torch.ones(self.num_rows, 1, device=self.block.device)
        ones[self.num_rows - self.num_filled :] = 0
        return ones

    def decode(self, triton: bool = False) -> Features:
        """The model's tensors, on the block's device; with Triton's kernel, if there is one."""
        raise NotImplementedError


@dataclass(frozen=True)
class CriteoBatch(Batch):
    """Block (b, bytes of a row) uint8 of rows in a layout: label, 13 integers, 26 ids."""

    layout: Layout

    def pieces(self, most_rows: int) -> list[Batch]:
        """As Batch.pieces, of nearly equal size; the blocks are views."""
        number = -(-max(self.rows_per_rank) // most_rows)
        if number <= 1:
            return [self]
        of_ranks = zip(*(split_rows(rows, number) for rows in self.rows_per_rank), strict=True)
        blocks = self.block.split(split_rows(self.num_rows, number))
        return [
            CriteoBatch(block, len(block), rows, self.layout)
            for block, rows in zip(blocks, of_ranks, strict=True)
        ]

    def filled(self, num_rows: int) -> Batch:
        """With zeros at the end, which are rows of label 0 and of the first id of each table."""
        if set(self.rows_per_rank) == {num_rows}:
            return self
        missing = num_rows - self.num_rows
        return replace(
            self,
            block=F.pad(self.block, (0, 0, 0, missing)),
            num_rows=num_rows,
            rows_per_rank=(num_rows,) * len(self.rows_per_rank),
            num_filled=missing,
        )

    def decode(self, triton: bool = False) -> Features:
        """Integers x become log(x + 1); every bag holds one id."""
        if triton:
            places = _places_on(self.block.device, self.layout)
            found = triton_kernels().decode(self.block, places, NUM_DENSE, NUM_SPARSE)
            return Features(found[0], Bags(found[1].view(-1)), found[2])
        if self.block.device.type == "cpu":
            arrays = self.layout.decode(self.block.numpy())
            dense, ids, label = (torch.from_numpy(array) for array in arrays)
        else:
            columns = _unpacked(self.block, self.layout)
            dense, ids = columns[:, 1:FIRST_SPARSE].float(), columns[:, FIRST_SPARSE:]
            label = columns[:, :1].float()
        return Features(dense.add_(1).log_(), Bags(ids.reshape(-1)), label)


@functools.cache
def _places_on(device: torch.device, layout: Layout) -> torch.Tensor:
    """(2, 40) int32: first byte and width of each column."""
    places = np.stack([layout.offsets, layout.widths]).astype(np.int32)
    return torch.from_numpy(places).to(device)


def _unpacked(rows: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Rows (b, bytes of a row) uint8 as int32 (b, 40), by operators that any device has."""
    columns = {}
    for width, begin, end in layout.groups:
        part = rows[:, begin:end].clone(memory_format=torch.contiguous_format)  # so it is aligned
        if width == 4:
            columns[width] = part.view(torch.int32)
        elif width == 2:  # unsigned, which not all devices know
            columns[width] = part.view(torch.int16).int() & 0xFFFF
        else:
            columns[width] = part.int()
    return torch.cat([columns[width][:, begin:end] for width, begin, end in layout.runs], dim=1)


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


def load(
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
        batches = DataLoader(
            data,  # type: ignore[arg-type]
            batch_size=None,
            sampler=numbers,
            num_workers=num_workers,
            pin_memory=execution.pin_memory,
            generator=torch.Generator(),  # leaves torch's global generator alone
        )
    return _copied_ahead(batches, device) if execution.copy_stream else batches


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
    side = _side_stream(device)
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


@functools.cache
def _side_stream(device: torch.device) -> Any:
    """One for all loaders: memory is kept by stream."""
    return torch.get_device_module(device.type).Stream()


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
        return tuple(split_rows(self._size(number), self._process.world_size))

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
            raise UserError(
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
        raise UserError(
            f"--eval-split={split} has no rows in {prepared.files[split]}", everywhere=True
        )
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
