"""The last stage: prepared data appears by a rename, synced to disk."""

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from criteo.prepared import SPLITS
from criteo.spec import DataSpec


def publish_flat(spec: DataSpec, folder: Path, counts: Sequence[int]) -> None:
    """Move the files to the original's flat names; what `find_flat_files` wants last goes last."""
    found = Path(f"{spec.raw}_fea_count.npz")
    if found.exists() or not os.access(found.parent, os.W_OK):  # not ours to overwrite
        found = Path(f"{spec.stem}_fea_count.npz")
    aside = f"{found}.{socket.gethostname()}.{os.getpid()}.partial.npz"
    np.savez(aside, counts=np.array(counts))
    os.replace(aside, found)
    for name in ("report", "meta"):
        os.replace(folder / f"{name}.json", f"{spec.stem}_{name}.json")
    for split in SPLITS:
        os.replace(folder / f"{split}.bin", f"{spec.stem}_{split}.bin")
    sync_folder(spec.stem.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and have the disk hold it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the disk hold the names in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
