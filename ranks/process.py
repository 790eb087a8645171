"""Processes: who this one is, and the group that joins them."""

import contextlib
import importlib
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import PassingError, RankError, UserError
from common.launch import Launch
from common.torchrun import launcher_keeps_store
from devices.find import find_device
from devices.older_torch import SECONDS_BEFORE_GROUP_ENDS
from ranks.attendance import Attendance
from ranks.board import Board
from ranks.store import check_meeting_point, choose_interface, connect_twice, meeting_point
from ranks.watch import Watch, unwatched, watched

TIMEOUT = 1800.0  # torch's own, for the backends that it lets CPU tensors go through
SECONDS_TO_MEET = 1800.0  # torch's own; a short timeout of collectives is none for the start
SECONDS_FOR_STORE = 10.0
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "npu": "hccl"}


@dataclass(frozen=True)
class Process:
    """One rank of a run.

    Attributes:
        rank: its number among world_size ranks.
        world_size: number of ranks.
        local_rank: its number among the ranks of its machine.
        device: where it computes.
        backend: what joins the ranks in torch.distributed: gloo, nccl, hccl or mpi.
        attendance: counts its collectives; entered for each of them if there are several ranks.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    attendance: Attendance = field(default_factory=Attendance, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints, measures and saves."""
        return self.rank == 0


def this_process(device_type: str, card: int = -1, backend: str = "") -> Process:
    """Find this rank in the environment (RANK, WORLD_SIZE, LOCAL_RANK), and its device.

    Args:
        device_type: cpu, cuda or npu.
        card: number of the card; -1: the launcher's LOCAL_RANK.
        backend: the same as in Process; empty: the device's own.

    Raises:
        UserError: the device is not there, or the backend does not serve it.
        RankError: the environment does not say where the ranks meet.
    """
    launch = Launch.from_environment()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if launch.world_size > 1 and missing:
        raise RankError(
            f"WORLD_SIZE={launch.world_size} but {', '.join(missing)} not set:"
            " start the ranks with torchrun"
        )
    if launch.world_size > 1:
        check_meeting_point(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    device = find_device(device_type, card if card >= 0 else launch.local_rank)
    backend = _backend_for(device_type, backend)
    return Process(launch.rank, launch.world_size, launch.local_rank, device, backend)


def _backend_for(device_type: str, backend: str) -> str:
    own = BACKENDS[device_type]
    backend = backend or own
    available = {"mpi": dist.is_mpi_available, "gloo": dist.is_gloo_available}
    if backend not in (own, "mpi", "gloo") or not available.get(backend, lambda: True)():
        have = f"{own}, gloo" + (", mpi" if dist.is_mpi_available() else "; this torch has no mpi")
        raise UserError(
            f"--dist-backend={backend} does not serve {device_type} here: expected {have}"
        )
    return backend


@contextlib.contextmanager
def joined(process: Process, profiles: bool = False, timeout: float = TIMEOUT) -> Iterator[None]:
    """Join the ranks in a process group during the block.

    A group that exists already is used, and stays.

    Args:
        process: this rank.
        profiles: torch's profiler is used in the block.
        timeout: seconds that a collective may wait for other ranks.

    Raises:
        RankError: the ranks cannot meet.
        PassingError: another rank hangs.
        RankGoneError: another rank has ended.
    """
    if process.world_size == 1 or dist.is_initialized():
        yield
        return
    if profiles or process.device.type == "npu":
        # torch.profiler and torch_npu's optimiser import torch._dynamo, and modules below it keep
        # the group that exists when they are imported. Gloo's threads then outlive
        # destroy_process_group and, when Python shuts down under them, end the process with SIGABRT
        # ("terminate called without an active exception"). Nothing else here imports it: it takes
        # 1.3 s of each start.
        importlib.import_module("torch._dynamo")
    with _meet(process, timeout):
        yield
    end_group()  # not after an error: other ranks may be inside a collective


def _meet(process: Process, timeout: float) -> contextlib.AbstractContextManager[None]:
    """Make the process group; returns what watches the ranks in it."""
    try:
        if process.backend == "mpi":  # it has no store
            dist.init_process_group("mpi", rank=process.rank, world_size=process.world_size)
            return unwatched()
        return watched(_make_group(process, timeout))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError):
            raise
        reason = str(error).partition("\n")[0]
        raise PassingError(f"the ranks cannot meet at {meeting_point()}: {reason}") from error


def _make_group(process: Process, timeout: float) -> Watch:
    # nccl and hccl take no CPU tensors, but tables to be saved and scores travel as CPU tensors
    runs_ahead = process.backend in ("nccl", "hccl")
    backend = process.backend
    if runs_ahead:
        backend = f"cpu:gloo,{process.device.type}:{backend}"
    rank, world_size = process.rank, process.world_size
    # the watching thread has a connection of its own, as it must not wait for the main thread's
    store, other = connect_twice(rank, world_size, SECONDS_TO_MEET)
    own = dist.PrefixStore(f"ranks/{next(_GROUPS)}", other)
    choose_interface(world_size)
    board = Board(own, rank, world_size, -1 if launcher_keeps_store() else 0)
    board.enter()
    wait = timedelta(seconds=timeout)
    dist.init_process_group(backend, timeout=wait, rank=rank, world_size=world_size, store=store)
    watch = Watch(board, process.attendance, rank, timeout, runs_ahead)  # waits for all to enter
    own.set_timeout(timedelta(seconds=SECONDS_FOR_STORE))
    return watch


_GROUPS = itertools.count()  # a store may outlive its group, and hold what its ranks have told


def end_group() -> None:
    """Leave the process group, after gloo's threads have freed what they hold."""
    time.sleep(SECONDS_BEFORE_GROUP_ENDS)
    dist.destroy_process_group()
