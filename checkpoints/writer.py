"""Writes this rank's rows of a checkpoint, between two steps or while training goes on."""

import contextlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.index import ShardFile
from checkpoints.matrices import HeldRows, cut_into_files, named_tensors
from checkpoints.shard_file import FilesToSync, write_tensors
from common.termination import show_life
from common.whole_files import sync_folder

NICE = 10  # of threads that write while steps are made


@dataclass(frozen=True)
class Written:
    """What a rank has written.

    Attributes:
        files: the files, if all went well.
        trouble: what went wrong otherwise.
    """

    files: tuple[ShardFile, ...] = ()
    trouble: str = ""


def write_rows(folder: Path, rank: int, rows: Sequence[HeldRows]) -> Written:
    """Write rows into files of a checkpoint's folder, and have the disk keep them.

    Args:
        folder: it exists, on all ranks.
        rank: files have its number in their names.
        rows: what is written; rows on a device are copied to the host a file at a time.
    """
    files = []
    try:
        with FilesToSync() as to_sync:
            for number, content in enumerate(cut_into_files(rows)):
                name = f"rank-{rank:03d}-{number:04d}.safetensors"
                host = {
                    key: tensor.detach().to("cpu").contiguous()
                    for key, tensor in named_tensors(content).items()
                }
                facts = write_tensors(folder / name, host, to_sync)
                files.append(ShardFile(name, facts, tuple(content)))
                show_life()
        sync_folder(folder)
    except OSError as error:
        return Written(trouble=trouble_of(error, folder))
    return Written(tuple(files))


def trouble_of(error: OSError, path: object) -> str:
    """What the system refuses, and where: at the path, if the error names none."""
    return f"{error.filename or path}: {error.strerror or error}"


class CopiedRows:
    """A copy of rows on the host, which stays as it is while the rows change.

    Its memory is kept for the next copy: fresh memory costs ten times as long as the copy itself.
    So a thread can get it ready before the first one.
    """

    def __init__(self) -> None:
        self._buffers: list[dict[str, torch.Tensor]] = []
        self._getting_ready: threading.Thread | None = None

    @property
    def has_room(self) -> bool:
        """Whether there is memory for the copy already."""
        return bool(self._buffers)

    def make_room(self, rows: Sequence[HeldRows]) -> None:
        """Get memory for the copy of these rows, which a thread touches meanwhile.

        Raises:
            RuntimeError, MemoryError: there is no memory.
        """
        self._buffers = [
            {name: _room_for(tensor) for name, tensor in held.tensors.items()} for held in rows
        ]
        self._getting_ready = threading.Thread(target=self._touch, daemon=True)
        self._getting_ready.start()

    def _touch(self) -> None:
        _step_back()
        for buffers in self._buffers:
            for buffer in buffers.values():
                buffer.zero_()

    def take(self, rows: Sequence[HeldRows]) -> list[HeldRows]:
        """Copy rows, which are the same ones in each call but for their numbers.

        Raises:
            RuntimeError, MemoryError: there is no memory.
        """
        if not self._buffers:
            self.make_room(rows)
        if self._getting_ready is not None:
            self._getting_ready.join()
            self._getting_ready = None
        for held, buffers in zip(rows, self._buffers, strict=True):
            for name, tensor in held.tensors.items():
                buffers[name].copy_(tensor, non_blocking=True)
                show_life()
        _wait_for({tensor.device for held in rows for tensor in held.tensors.values()})
        return [
            HeldRows(held.shard, buffers, held.is_shared)
            for held, buffers in zip(rows, self._buffers, strict=True)
        ]


def _room_for(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory for a copy; page-locked memory takes it several times as fast from a card."""
    if tensor.device.type != "cpu":
        with contextlib.suppress(RuntimeError):  # the system limits it, and a card may lack it
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _step_back() -> None:
    """Let this thread have a core only when no step wants it: on Linux a thread has a priority."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def _wait_for(devices: set[torch.device]) -> None:
    for device in devices:
        if device.type != "cpu":
            torch.get_device_module(device.type).synchronize(device)


class BackgroundWriting:
    """A thread that writes copied rows.

    Args:
        folder: where to.
        rank: of this process.
        rows: copies, which must not change.
    """

    def __init__(self, folder: Path, rank: int, rows: Sequence[HeldRows]) -> None:
        self._written = Written(trouble="the writing thread has ended early")
        self._thread = threading.Thread(
            target=self._write, args=(folder, rank, rows), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _write(self, folder: Path, rank: int, rows: Sequence[HeldRows]) -> None:
        _step_back()
        self._written = write_rows(folder, rank, rows)

    @property
    def is_done(self) -> bool:
        """Whether all is written, or something has gone wrong."""
        return not self._thread.is_alive()

    def wait(self) -> Written:
        """What was written, when it is done."""
        while self._thread.is_alive():
            self._thread.join(1.0)
            show_life()
        return self._written
