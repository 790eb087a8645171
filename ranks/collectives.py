"""Sums, maxima, gathers and broadcasts over ranks; with one rank they do nothing.

All ranks call the same functions in the same order, and each call is counted on each rank.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ranks.process import Process


def sum_over_ranks(process: Process, tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in one message.

    In which order ranks are added depends on the place in the message, and so do the last bits.
    """
    if process.world_size == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    with process.attendance:
        dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, summed in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(summed.view_as(tensor))


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


def gather_texts(process: Process, text: str) -> list[str]:
    """The texts of all ranks, in their order, on rank 0; an empty list on other ranks."""
    own = torch.tensor(list(text.encode("utf-8", "surrogatepass")), dtype=torch.uint8)
    sizes = torch.zeros(process.world_size, dtype=torch.int64)
    sizes[process.rank] = len(own)
    sum_over_ranks(process, [sizes])
    gathered = gather_on_first(process, own, sizes.tolist())
    return [bytes(part.tolist()).decode("utf-8", "surrogatepass") for part in gathered]


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
    with process.attendance:
        if process.rank == owner:
            assert tensor is not None
            dist.send(tensor.contiguous(), 0)
        if not process.is_first:
            return None
        dist.recv(like, owner)
        return like


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
