"""Sums, maxima, gathers and broadcasts over ranks; with one rank they do nothing."""

import json
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from common.errors import UserError
from ranks.process import Process

BLOCK_BYTES = 64 << 20


def sum_over_ranks(process: Process, tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in one message."""
    if process.world_size == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, summed in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(summed.view_as(tensor))


def sum_in_rank_order(process: Process, tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the tensors of all ranks, added in the order of the ranks.

    An all-reduce adds in an order that depends on the size of its message; here each sum is the
    same however many are made at a time.
    """
    if process.world_size == 1:
        return tensor
    gathered = [torch.empty_like(tensor) for _ in range(process.world_size)]
    dist.all_gather(gathered, tensor.contiguous())
    return sum(gathered[1:], gathered[0])


def largest_over_ranks(process: Process, numbers: torch.Tensor) -> None:
    """Replace each number by the largest one of all ranks; none of them may be nan."""
    if process.world_size > 1:
        dist.all_reduce(numbers, dist.ReduceOp.MAX)


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
    if not process.is_first:
        dist.send(values.contiguous(), 0)
        return []
    gathered = [values]
    for rank in range(1, process.world_size):
        received = values.new_empty((num_rows[rank], *values.shape[1:]))
        dist.recv(received, rank)
        gathered.append(received)
    return gathered


def send_to_first(
    process: Process, tensor: torch.Tensor | None, like: torch.Tensor, owner: int
) -> torch.Tensor | None:
    """The host tensor of rank `owner`, on rank 0; None on other ranks.

    Args:
        process: this rank.
        tensor: the owner's tensor; what other ranks pass is ignored.
        like: a tensor of the same shape and type; rank 0 receives into it.
        owner: the rank that has the tensor.
    """
    if owner == 0 or process.world_size == 1:
        return tensor if process.is_first else None
    if process.rank == owner:
        assert tensor is not None
        dist.send(tensor.contiguous(), 0)
    if not process.is_first:
        return None
    dist.recv(like, owner)
    return like


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
            else:
                dist.send(block.cpu().contiguous(), 0)
    elif process.is_first:
        received = torch.empty((max(sizes), *shape[1:]))
        for size in sizes:
            dist.recv(received[:size], owner)
            yield received[:size]


def numbers_from_first(process: Process, numbers: Sequence[float]) -> list[float]:
    """Rank 0's numbers on every rank; every rank passes a list of the same length."""
    values = torch.tensor(list(numbers), dtype=torch.float64)
    if process.world_size > 1:
        dist.broadcast(values, 0)
    return [float(value) for value in values]


def text_from_first(process: Process, text: str) -> str:
    """Rank 0's text on every rank."""
    texts = [text]
    if process.world_size > 1:
        dist.broadcast_object_list(texts, 0, device=torch.device("cpu"))
    return texts[0]


def texts_of_all(process: Process, text: str) -> list[str]:
    """Every rank's text, in the ranks' order, on every rank."""
    if process.world_size == 1:
        return [text]
    own = text.encode(errors="surrogatepass")  # a path may be of any bytes
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(process.world_size)]
    dist.all_gather(lengths, torch.tensor([len(own)]))
    longest = max(1, *(int(length) for length in lengths))
    padded = torch.frombuffer(bytearray(own.ljust(longest)), dtype=torch.uint8)
    found = [torch.empty_like(padded) for _ in range(process.world_size)]
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
