"""Sums, maxima, gathers and broadcasts over ranks; with one rank they do nothing.

All ranks call the same functions in the same order, and each call is counted on each rank.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from common.errors import UserError
from ranks.process import Process

BLOCK_BYTES = 64 << 20


class Pending:
    """A collective that goes on while this rank does other work.

    Args:
        process: this rank.
        begin: begins it, and returns torch.distributed's handle.
        tensors: what it reads and writes, which is kept until it has ended.
    """

    def __init__(
        self, process: Process, begin: Callable[[], Any], tensors: Sequence[torch.Tensor]
    ) -> None:
        self._process, self._tensors = process, tensors
        with process.attendance:  # the first one may wait until all ranks have a connection
            self._work = begin()

    def wait(self) -> None:
        """Wait until it has ended or, on a device that runs ahead, let the device wait."""
        with self._process.attendance.waiting():
            self._work.wait()
        self._work, self._tensors = None, ()  # gloo's threads live as long as what they worked on


def begin_all_to_all(
    process: Process,
    received: torch.Tensor,
    sent: torch.Tensor,
    receive: Sequence[int],
    send: Sequence[int],
) -> Pending:
    """Begin to send `send[r]` numbers to each rank r, and to receive `receive[r]` from each.

    Args:
        process: this rank.
        received: flat, written rank by rank; not to be used before the collective has ended.
        sent: flat and contiguous, read rank by rank; not to be changed before that.
        receive: a number for each rank.
        send: a number for each rank.
    """

    def begin() -> Any:
        return dist.all_to_all_single(received, sent, list(receive), list(send), async_op=True)

    return Pending(process, begin, (received, sent))


def all_to_all(
    process: Process, sent: torch.Tensor, send: Sequence[int], receive: Sequence[int]
) -> torch.Tensor:
    """Send `send[r]` numbers of a flat tensor to each rank r; returns what all ranks send here."""
    received = sent.new_empty(sum(receive))
    begin_all_to_all(process, received, sent.contiguous(), receive, send).wait()
    return received


class PendingSum:
    """Tensors that become their sums over all ranks, in one message, during other work.

    In which order ranks are added depends on the place in the message, and so do the last bits.

    Args:
        process: this rank.
        tensors: not to be used before `wait` has returned.
    """

    def __init__(self, process: Process, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = tensors if process.world_size > 1 else ()
        if self._tensors:
            flat = self._flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            self._sum = Pending(process, lambda: dist.all_reduce(flat, async_op=True), (flat,))

    def wait(self) -> None:
        """Wait for the sums, and put them in the tensors' place."""
        if self._tensors:
            self._sum.wait()
            sizes = [tensor.numel() for tensor in self._tensors]
            for tensor, summed in zip(self._tensors, self._flat.split(sizes), strict=True):
                tensor.copy_(summed.view_as(tensor))


def sum_over_ranks(process: Process, tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in one message."""
    PendingSum(process, tensors).wait()


def sum_in_rank_order(process: Process, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's sum over all ranks, rank 0 first: a new tensor, the same bits on every rank.

    An element's sum depends on nothing but that element, so tensors may be joined or split. All
    ranks' tensors are in memory at once.
    """
    if process.world_size == 1:
        return tensor.clone()
    parts = [torch.empty_like(tensor) for _ in range(process.world_size)]
    with process.attendance:
        dist.all_gather(parts, tensor.contiguous())
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def largest_over_ranks(process: Process, numbers: torch.Tensor) -> None:
    """Replace each number by the largest one of all ranks; none of them may be nan."""
    if process.world_size > 1:
        with process.attendance:
            dist.all_reduce(numbers, dist.ReduceOp.MAX)


def largest_numbers(process: Process, numbers: Sequence[float]) -> list[float]:
    """For each place in the list the largest number of all ranks; none of them may be nan.

    The numbers travel through the host, and the device goes on.
    """
    values = torch.tensor(list(numbers), dtype=torch.float64)
    largest_over_ranks(process, values)
    return [float(value) for value in values]


def any_rank(process: Process, flags: Sequence[bool]) -> list[bool]:
    """For each place in the list whether the flag is true on at least one rank."""
    return [number > 0 for number in largest_numbers(process, [float(flag) for flag in flags])]


def gather_on_first(
    process: Process, values: torch.Tensor, num_rows: Sequence[int]
) -> list[torch.Tensor]:
    """The host tensors of all ranks, in their order, on rank 0; an empty list on other ranks.

    Args:
        process: this rank.
        values: this rank's tensor, of num_rows[rank] rows.
        num_rows: rows of each rank's tensor; the shape of a row is the same on all ranks.
    """
    if process.world_size == 1:
        return [values]
    with process.attendance:
        if not process.is_first:
            dist.send(values.contiguous(), 0)
            return []
        gathered = [values]
        for rank in range(1, process.world_size):
            received = values.new_empty((num_rows[rank], *values.shape[1:]))
            dist.recv(received, rank)
            gathered.append(received)
        return gathered


def row_blocks_on_first(
    process: Process, rows: torch.Tensor | None, shape: tuple[int, ...], owner: int
) -> Iterator[torch.Tensor]:
    """The rows of rank `owner`'s tensor on rank 0's host, a block of at most 64 MB at a time.

    All ranks ask for all blocks; other ranks than the first one get none. A block may be part of
    the tensor itself, and lies where the next one will lie.

    Args:
        process: this rank.
        rows: the owner's tensor (n, ...) of float32, on any device; others' is ignored.
        shape: its shape.
        owner: the rank that has it.
    """
    block_rows = max(1, BLOCK_BYTES // (4 * math.prod(shape[1:])))
    sizes = [min(block_rows, shape[0] - begin) for begin in range(0, shape[0], block_rows)]
    if process.rank == owner:
        assert rows is not None
        for block in rows.detach().split(block_rows):
            if process.is_first:
                yield block.cpu()
                continue
            with process.attendance:
                dist.send(block.cpu().contiguous(), 0)
    elif process.is_first:
        received = torch.empty((max(sizes), *shape[1:]))
        for size in sizes:
            with process.attendance:
                dist.recv(received[:size], owner)
            yield received[:size]
    elif owner != 0:
        for _ in sizes:
            with process.attendance:  # counted here too: a rank that has begun fewer is late
                pass


def numbers_from_first(process: Process, numbers: Sequence[float]) -> list[float]:
    """Rank 0's numbers on every rank; every rank passes a list of the same length."""
    values = torch.tensor(list(numbers), dtype=torch.float64)
    if process.world_size > 1:
        with process.attendance:
            dist.broadcast(values, 0)
    return [float(value) for value in values]


def text_from_first(process: Process, text: str) -> str:
    """Rank 0's text on every rank."""
    texts = [text]
    if process.world_size > 1:
        with process.attendance:
            dist.broadcast_object_list(texts, 0, device=torch.device("cpu"))
    return texts[0]


def texts_of_all(process: Process, text: str) -> list[str]:
    """Every rank's text, in the ranks' order, on every rank."""
    if process.world_size == 1:
        return [text]
    own = text.encode(errors="surrogatepass")  # a path may be of any bytes
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(process.world_size)]
    with process.attendance:
        dist.all_gather(lengths, torch.tensor([len(own)]))
    longest = max(1, *(int(length) for length in lengths))
    padded = torch.frombuffer(bytearray(own.ljust(longest)), dtype=torch.uint8)
    found = [torch.empty_like(padded) for _ in range(process.world_size)]
    with process.attendance:
        dist.all_gather(found, padded)
    return [
        bytes(one[: int(length)].numpy()).decode(errors="surrogatepass")
        for one, length in zip(found, lengths, strict=True)
    ]


def agreed(process: Process, act: Callable[[], str]) -> str:
    """The text that the first rank's act returns, on all ranks; the others do not act.

    Raises:
        UserError: the act has raised it; all ranks do.
    """
    error, text = "", ""
    if process.is_first:
        try:
            text = act()
        except UserError as raised:
            error = str(raised)
    error, text = json.loads(text_from_first(process, json.dumps([error, text])))
    if error:
        raise UserError(error)
    return text
