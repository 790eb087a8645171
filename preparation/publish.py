"""Syncs finished data to disk, gives it its final name, and announces it."""

import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.whole_files import sync_folder
from criteo.meta_file import FORMAT_VERSION, SPLITS, recipe
from criteo.prepared import VOCABULARY
from criteo.raw_files import printable
from criteo.report import find_doubts
from criteo.spec import DataSpec
from criteo.vocabulary_file import VALUE_BYTES, begins_of, write_values
from preparation.row_files import RowFiles


def publish_files(
    spec: DataSpec,
    files: RowFiles,
    counts: Sequence[int],
    values: Callable[[], Iterable[Any]] | None,
    made_from: dict[str, Any],
    report: dict[str, Any],
) -> None:
    """Write vocabulary, meta.json and report.json beside the rows, sync everything and rename it.

    Args:
        spec: which data it is; it has the final names.
        files: the files of rows, with all rows written.
        counts: rows of each table.
        values: returns the vocabulary's bytes, block by block; None if nobody knows it.
        made_from: `imported` and `sources` of meta.json; see docs/preparation.md.
        report: what criteo.report.make_report returned.
    """
    folder = files.folder
    meta = {
        "format": FORMAT_VERSION,
        "columns": files.layout.columns,
        "rows": files.rows,
        "rows_per_part": files.rows_per_part,
        "counts": counts,
        "vocabulary": _write_vocabulary(folder / VOCABULARY, values, counts),
        "recipe": recipe(spec),
        **made_from,
    }
    for name, content in (("report", report), ("meta", meta)):
        with _synced(folder / f"{name}.json") as file:
            file.write(json.dumps(content, indent=1).encode())
    files.sync()
    if spec.flat:
        _rename_flat(spec, folder, counts)
        return
    sync_folder(folder)
    os.rename(folder, spec.directory)
    sync_folder(spec.directory.parent)


def _write_vocabulary(
    path: Path, values: Callable[[], Iterable[Any]] | None, counts: Sequence[int]
) -> dict[str, Any] | None:
    """Write the vocabulary's file; returns what meta.json says of it."""
    if values is None:
        path.unlink(missing_ok=True)  # a run before this one may have known it
        return None
    with _synced(path) as file:
        digest = write_values(file, values(), counts)
        assert file.tell() == VALUE_BYTES * sum(counts)
    return {"begins": begins_of(counts), "digest": digest}


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
    for name in ("report.json", VOCABULARY, "meta.json"):
        if (folder / name).exists():
            os.replace(folder / name, f"{spec.stem}_{name}")
    for split in SPLITS:
        os.replace(folder / f"{split}.bin", f"{spec.stem}_{split}.bin")
    sync_folder(spec.stem.parent)


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """A file to write, whose bytes are on the disk after the block."""
    with open(path, "wb") as file:
        yield file
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
