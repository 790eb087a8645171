"""Syncs finished data to disk, gives it its final name, and announces it."""

import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.whole_files import sync_folder
from criteo.meta_file import SPLITS
from criteo.raw_files import printable
from criteo.report import find_doubts
from criteo.spec import DataSpec
from preparation.row_files import RowFiles


def publish_files(
    spec: DataSpec, files: RowFiles, meta: dict[str, Any], report: dict[str, Any]
) -> None:
    """Write meta.json and report.json beside the rows, sync everything and rename it.

    Args:
        spec: which data it is; it has the final names.
        files: the files of rows, with all rows written.
        meta: what readers must know; see docs/preparation.md.
        report: what criteo.report.make_report returned.
    """
    write_synced(files.folder / "report.json", json.dumps(report, indent=1).encode())
    write_synced(files.folder / "meta.json", json.dumps(meta, indent=1).encode())
    files.sync()
    if spec.flat:
        _rename_flat(spec, files.folder, meta["counts"])
        return
    sync_folder(files.folder)
    os.rename(files.folder, spec.directory)
    sync_folder(spec.directory.parent)


def _rename_flat(spec: DataSpec, folder: Path, counts: Sequence[int]) -> None:
    """Give the files the original's flat names.

    The rows come last, because find_flat_files takes data as prepared once its rows are there.
    """
    path = Path(f"{spec.raw}_fea_count.npz")
    if path.exists() or not os.access(path.parent, os.W_OK):  # not ours to overwrite
        path = Path(f"{spec.stem}_fea_count.npz")
    temporary = f"{path}.{socket.gethostname()}.{os.getpid()}.partial.npz"
    np.savez(temporary, counts=np.array(counts))
    os.replace(temporary, path)
    for name in ("report", "meta"):
        os.replace(folder / f"{name}.json", f"{spec.stem}_{name}.json")
    for split in SPLITS:
        os.replace(folder / f"{split}.bin", f"{spec.stem}_{split}.bin")
    sync_folder(spec.stem.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until its bytes are on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def announce(spec: DataSpec, names: Sequence[str], report: dict[str, Any], seconds: float) -> None:
    """Print that the data is prepared, and warn of what looks wrong.

    Args:
        spec: which data it is.
        names: the raw files' names, in order.
        report: what criteo.report.make_report returned.
        seconds: how long preparation took.
    """
    rows, total = report["rows"], report["rows_kept"]
    print(
        f"Prepared {total} rows"
        f" ({rows['train']} train, {rows['test']} test, {rows['val']} validation)"
        f" in {seconds:.1f} s, {total / max(seconds, 1e-9):.0f} rows/s:"
        f" {printable(spec.directory.parent)}",
        flush=True,
    )
    doubts = find_doubts(spec.data_set, names, report["lines_per_file"])
    if skipped := sum(report["bad_lines"].values()):
        doubts.append(f"bad lines skipped: {skipped}; the first: {report['first_bad_line']}")
    for doubt in doubts:
        print(f"warning: {doubt}", file=sys.stderr, flush=True)
