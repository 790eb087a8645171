"""Prepared data on disk: find it, and check that it was made as the flags ask.

docs/preparation.md describes the format. It is one directory beside --processed-data-file, complete
or absent: meta.json, report.json and three files of rows. With --mlperf-bin-loader the rows are in
`<processed>_{train,test,val}.bin`, the original's flat form: 40 int32 a row.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from criteo.columns import Bytes
from criteo.original_files import find_flat_files
from criteo.raw_files import RawFile, day_numbers
from criteo.row_layout import FLAT, Layout
from criteo.spec import DataSpec

FORMAT_VERSION = 2
SPLITS = ("train", "test", "val")
# what reading a damaged meta.json can raise
_DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class Prepared:
    """Prepared data on disk.

    Attributes:
        files: the file of each split.
        counts: rows of each table.
        rows_per_part: kept rows of each part; the last part is divided into test and val.
        layout: how a row is packed.
    """

    files: dict[str, Path]
    counts: tuple[int, ...]
    rows_per_part: tuple[int, ...]
    layout: Layout

    @classmethod
    def from_meta(cls, directory: Path, meta: dict[str, Any]) -> "Prepared":
        """The prepared data in `directory` as its meta.json describes it; opens no file."""
        files = {split: directory / f"{split}.bin" for split in SPLITS}
        layout = Layout.from_columns(meta["columns"])
        return cls(files, tuple(meta["counts"]), tuple(meta["rows_per_part"]), layout)

    def rows(self, split: str) -> Bytes:
        """The split's rows, mapped read-only: (rows, bytes of a row) uint8."""
        path = self.files[split]
        if path.stat().st_size == 0:  # numpy cannot map an empty file
            return np.zeros((0, self.layout.row_bytes), np.uint8)
        return np.memmap(path, np.uint8, mode="r").reshape(-1, self.layout.row_bytes)


def find_prepared(spec: DataSpec) -> Prepared | None:
    """The prepared data that `spec` describes, or None if there is none yet.

    Raises:
        UserError: the data was made with other flags or from other files, or it is damaged.
    """
    if spec.flat:
        return _find_flat(spec)
    meta_file = spec.directory / "meta.json"
    if not meta_file.is_file():
        return None
    try:
        meta = json.loads(meta_file.read_text())
        _check_meta(spec, meta)
        prepared = Prepared.from_meta(spec.directory, meta)
        check_range(spec, spec.directory, prepared.counts)
    except _DAMAGES as error:
        raise UserError(f"{meta_file} is damaged ({error}): {_how_to_rebuild(spec)}") from error
    for split, rows in meta["rows"].items():
        path = prepared.files[split]
        size = path.stat().st_size if path.is_file() else 0
        if size != prepared.layout.row_bytes * rows:
            expected = f"expected {prepared.layout.row_bytes * rows} bytes, got {size}"
            raise UserError(f"{path} is damaged ({expected}): {_how_to_rebuild(spec)}")
    return prepared


def _find_flat(spec: DataSpec) -> Prepared | None:
    """Flat files do not say how they were made, but those of this program have a meta file."""
    flat = find_flat_files(spec.raw, spec.processed, spec.stem)
    if flat is None:
        return None
    files, counts, num_train, num_eval = flat
    meta_file = spec.stem.with_name(spec.stem.name + "_meta.json")
    try:
        if meta_file.is_file():
            _check_meta(spec, json.loads(meta_file.read_text()))
    except _DAMAGES as error:
        raise UserError(f"{meta_file} is damaged ({error}): delete it") from error
    check_range(spec, files["train"], counts)
    if not num_train or not files["test"].stat().st_size:
        raise UserError(f"{files['train']} or {files['test']} is empty: expected rows")
    return Prepared(files, counts, (num_train, num_eval), FLAT)


def check_range(spec: DataSpec, path: Path, counts: tuple[int, ...]) -> None:
    """Raise a UserError if a table of `path` has more rows than --max-ind-range allows."""
    if 0 < spec.max_ind_range < max(counts):
        raise UserError(
            f"{path} has a table of {max(counts)} rows, --max-ind-range={spec.max_ind_range}"
            " allows fewer: give the flag that it was made with, or another --processed-data-file"
        )


def recipe(spec: DataSpec) -> dict[str, Any]:
    """The flags that decide the prepared bytes; the seed is among them only if something is drawn.

    The keys are frozen: meta.json keeps them, and a run compares them with its own.
    """
    drawn = spec.sub_sample_rate > 0 or spec.order != "file"
    return {
        "--data-set": spec.data_set,
        "--max-ind-range": spec.max_ind_range,
        "--data-sub-sample-rate": spec.sub_sample_rate,
        "order on disk (--memory-map with --data-randomize)": spec.order,
        "--numpy-rand-seed": spec.seed if drawn else None,
    }


def _check_meta(spec: DataSpec, meta: dict[str, Any]) -> None:
    if meta["format"] != FORMAT_VERSION:
        got = f"format {meta['format']}, this program reads {FORMAT_VERSION}"
        raise UserError(f"{spec.directory}: {got}; {_how_to_rebuild(spec)}")
    wanted = recipe(spec)
    different = [
        key
        for key in wanted
        if meta["recipe"][key] is not None and meta["recipe"][key] != wanted[key]
    ]
    if meta.get("imported"):  # the original's files do not say how they were made
        different = [key for key in different if key.startswith(("--data-set", "order"))]
    for key in different:
        got = f"made with {key} = {meta['recipe'][key]}, this run has {wanted[key]}"
        raise UserError(f"{spec.directory} was {got}: {_how_to_rebuild(spec)}")
    for then in meta["sources"]:
        path = spec.raw.parent / then["name"]
        if path.is_file() and RawFile.at(path).fingerprint != then:
            raise UserError(
                f"{path} is not the file that {spec.directory} was made from"
                f" (its size or time changed): {_how_to_rebuild(spec)}"
            )
    days = day_numbers(spec.raw) if spec.data_set == "terabyte" else []
    if days and len(days) != len(meta["sources"]) and not meta.get("imported"):
        got = f"made from {len(meta['sources'])} days, now there are {len(days)}"
        raise UserError(f"{spec.directory} was {got}: {_how_to_rebuild(spec)}")


def _how_to_rebuild(spec: DataSpec) -> str:
    return f"delete {spec.directory} to have it made again, or name another --processed-data-file"
