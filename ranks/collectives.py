"""Sums, gathers and broadcasts over ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ranks.process import Process


def sum_over_ranks(process: Process, tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in one message."""
    if process.world_size == 1:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, part in zip(tensors, flat.split(sizes), strict=True):
        tensor.copy_(part.view_as(tensor))


def gather_on_first(
    process: Process, values: torch.Tensor, sizes: Sequence[int]
) -> list[torch.Tensor]:
    """Each rank's host tensor of `sizes[rank]` leading rows, listed on rank 0; elsewhere none."""
    if process.world_size == 1:
        return [values]
    if not process.is_first:
        dist.send(values.contiguous(), 0)
        return []
    gathered = [values]
    for rank in range(1, process.world_size):
        part = values.new_empty((sizes[rank], *values.shape[1:]))
        dist.recv(part, rank)
        gathered.append(part)
    return gathered


def send_to_first(
    process: Process, tensor: torch.Tensor | None, like: torch.Tensor, owner: int
) -> torch.Tensor | None:
    """`owner`'s host tensor on rank 0 (None elsewhere); `like` has its shape and type on rank 0."""
    if owner == 0 or process.world_size == 1:
        return tensor if process.is_first else None
    if process.rank == owner:
        assert tensor is not None
        dist.send(tensor.contiguous(), 0)
    if not process.is_first:
        return None
    dist.recv(like, owner)
    return like


def from_first(process: Process, numbers: Sequence[float]) -> list[float]:
    """Rank 0's numbers on every rank."""
    values = torch.tensor(list(numbers), dtype=torch.float64)
    if process.world_size > 1:
        dist.broadcast(values, 0)
    return [float(value) for value in values]


def text_from_first(process: Process, text: str) -> str:
    """Rank 0's text on every rank."""
    found = [text]
    if process.world_size > 1:
        dist.broadcast_object_list(found, 0, device=torch.device("cpu"))
    return found[0]
