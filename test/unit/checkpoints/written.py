"""A small checkpoint as the modules write one, and what a resumed run reads of it."""

import contextlib
import json
import os
import re
import resource
import signal
import zlib
from pathlib import Path

import torch

from checkpoints.folder import newest_in
from checkpoints.index import INDEX, Index, ShardFile
from checkpoints.matrices import HeldRows, MatrixShape, Shard, cut_into_files, named_tensors
from checkpoints.shard_file import DamagedError, FilesToSync, read_tensors, write_tensors
from common.errors import UserError

MATRICES = {
    "emb_l.0.weight": MatrixShape(5, {"weight": (3,), "sum": ()}),
    "top_l.0.bias": MatrixShape(2, {"weight": ()}),
}


def new_rows(fill=None):
    """The rows of all matrices: different numbers, or the same one everywhere."""
    found, first = [], 0.5
    for key, shape in MATRICES.items():
        tensors = {}
        for name, of_row in shape.row_shapes.items():
            size = (shape.num_rows, *of_row)
            numbers = torch.arange(torch.Size(size).numel(), dtype=torch.float32)
            tensors[name] = numbers.view(size) + first if fill is None else torch.full(size, fill)
            first += 100
        found.append(HeldRows(Shard(key, 0, shape.num_rows), tensors, False))
    return found


def values_of(rows):
    return {(held.shard.key, name): t.tolist() for held in rows for name, t in held.tensors.items()}


WRITTEN = values_of(new_rows())


def write_one(path, tensors):
    """Write one file of tensors, synced; returns its facts."""
    with FilesToSync() as files:
        return write_tensors(path, tensors, files)


def write_checkpoint(folder, step=3, most_bytes=40):
    """Write and publish a checkpoint of several files in a CheckpointFolder; returns its path."""
    partial, files = folder.begin(step), []
    for number, content in enumerate(cut_into_files(new_rows(), most_bytes)):
        name = f"rank-000-{number:04d}.safetensors"
        facts = write_one(partial / name, named_tensors(content))
        files.append(ShardFile(name, facts, tuple(content)))
    return folder.publish(partial, Index({"seed": 1}, {}, MATRICES, files, {"step": step}))


def read_checkpoint(path):
    """The values of the newest checkpoint at a path, read by the steps of a resumed run."""
    (found, *_) = newest_in(path)
    index = Index.read(found.path)
    if index.matrices != MATRICES:
        raise UserError("another model")
    rows = new_rows(-1.0)
    for file in index.files:
        tensors = read_tensors(found.path / file.name, file.facts)
        for shard in file.shards:
            for held in (one for one in rows if one.overlap(shard)):
                try:
                    held.copy_from(shard, tensors)
                except ValueError as error:  # as RunState does
                    raise DamagedError(f"{found.path / file.name}: {error}") from error
    return values_of(rows)


def rewrite_index(path, change, with_right_checksum=True):
    """Let `change` change what the index holds; the checksum is made right, as a forger would."""
    whole = json.loads((path / INDEX).read_text())
    content = whole["content"]
    change(content)
    if with_right_checksum:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        whole["crc32"] = zlib.crc32(text.encode())
    (path / INDEX).write_text(json.dumps(whole))


class EndlessError(BaseException):
    """What reads has not ended in time; no `except Exception` hides it."""


@contextlib.contextmanager
def ends_soon(seconds=20, more_memory=1 << 30):
    """What reads in the block for ever fails, and leaves memory to the other tests."""

    def fail(*_):
        raise EndlessError

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, fail)
    most = pages * os.sysconf("SC_PAGE_SIZE") + more_memory
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def checkpoints_in(folder):
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"\d+-step-\d+", path.name))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 4
    path.write_bytes(content)
