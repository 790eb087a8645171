"""Prepared data on disk: its layout, and whether what lies there is what the flags ask for.

Prepared data is one directory beside --processed-data-file, complete or absent:

    meta.json                     what it was made from, rows of each part, rows of each table
    train.bin, test.bin, val.bin  int32 rows of 40: label, 13 integers (not below 0), 26 ids

so `numpy.memmap("train.bin", "int32").reshape(-1, 40)` reads it. With --mlperf-bin-loader the
same three files stand as `<processed>_{train,test,val}.bin`, the original's flat form.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import original_files
from command_line import UserError
from criteo_text import NUM_FIELDS, ROW_BYTES, Rows

FORMAT_VERSION = 1
SPLITS = ("train", "test", "val")
_DAMAGES = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class DataSpec:
    """Which data, and how it is prepared: everything that decides the bytes on disk."""

    data_set: str
    raw: Path
    processed: Path
    max_ind_range: int = -1
    sub_sample_rate: float = 0.0
    randomize: str = "total"
    memory_map: bool = False
    flat: bool = False
    parallel: bool = False
    seed: int = 123

    @property
    def mapped(self) -> bool:
        """Training reads rows from the disk in the order in which they lie there."""
        return self.memory_map or self.flat

    @property
    def order(self) -> str:
        """Order of the training rows on disk: file, total, day; loaded data is shuffled later."""
        return self.randomize if self.mapped and self.randomize != "none" else "file"

    @property
    def stem(self) -> Path:
        """`processed` without its .npz: what names of prepared data begin with."""
        return self.processed.with_suffix("") if self.processed.suffix == ".npz" else self.processed

    @property
    def directory(self) -> Path:
        """Where the prepared data goes."""
        return self.stem.with_name(self.stem.name + ".prepared")


@dataclass(frozen=True)
class Prepared:
    """Prepared data on disk.

    Attributes:
        files: by split.
        counts: rows of each table.
        rows_per_part: kept rows of each part; the last is test and val.
    """

    files: dict[str, Path]
    counts: tuple[int, ...]
    rows_per_part: tuple[int, ...]

    def rows(self, split: str) -> Rows:
        """The split's rows, mapped read-only: (rows, 40) int32."""
        path = self.files[split]
        size = path.stat().st_size
        if size == 0:  # numpy maps no empty file
            return np.zeros((0, NUM_FIELDS), np.int32)
        return np.memmap(path, np.int32, mode="r").reshape(-1, NUM_FIELDS)


def find_prepared(spec: DataSpec) -> Prepared | None:
    """The prepared data that fits `spec`, or None where there is none yet.

    Raises:
        UserError: there is some, but made with other flags or from other files, or damaged.
    """
    if spec.flat:
        return _find_flat(spec)
    meta_file = spec.directory / "meta.json"
    if not meta_file.is_file():
        return None
    try:
        meta = json.loads(meta_file.read_text())
        _check_meta(spec, meta)
        prepared = from_meta(spec.directory, meta)
        _check_range(spec, spec.directory, prepared.counts)
    except _DAMAGES as error:
        raise UserError(
            f"{meta_file} is damaged ({error}): {_how_to_rebuild(spec)}", everywhere=True
        ) from error
    for split, rows in meta["rows"].items():
        path = prepared.files[split]
        size = path.stat().st_size if path.is_file() else 0
        if size != ROW_BYTES * rows:
            expected = f"expected {ROW_BYTES * rows} bytes, got {size}"
            raise UserError(
                f"{path} is damaged ({expected}): {_how_to_rebuild(spec)}", everywhere=True
            )
    return prepared


def from_meta(directory: Path, meta: dict[str, Any]) -> Prepared:
    """The prepared data in `directory` as its meta.json describes it; looks at no file."""
    files = {split: directory / f"{split}.bin" for split in SPLITS}
    return Prepared(files, tuple(meta["counts"]), tuple(meta["rows_per_part"]))


def _how_to_rebuild(spec: DataSpec) -> str:
    return f"delete {spec.directory} to have it made again, or name another --processed-data-file"


def _find_flat(spec: DataSpec) -> Prepared | None:
    """Flat files say nothing of their making, but a meta file lies beside those we wrote."""
    flat = original_files.find_flat(spec.raw, spec.processed, spec.stem)
    if flat is None:
        return None
    files, counts, num_train, num_eval = flat
    meta_file = spec.stem.with_name(spec.stem.name + "_meta.json")
    try:
        if meta_file.is_file():
            _check_meta(spec, json.loads(meta_file.read_text()))
    except _DAMAGES as error:
        raise UserError(f"{meta_file} is damaged ({error}): delete it", everywhere=True) from error
    _check_range(spec, files["train"], counts)
    if not num_train or not files["test"].stat().st_size:
        raise UserError(f"{files['train']} or {files['test']} is empty: expected rows", True)
    return Prepared(files, counts, (num_train, num_eval))


def _check_range(spec: DataSpec, path: Path, counts: tuple[int, ...]) -> None:
    if 0 < spec.max_ind_range < max(counts):
        raise UserError(
            f"{path} has a table of {max(counts)} rows, --max-ind-range={spec.max_ind_range}"
            " allows fewer: give the flag that it was made with, or another --processed-data-file",
            everywhere=True,
        )


def recipe(spec: DataSpec) -> dict[str, Any]:
    """What decides the prepared bytes, by flag; the seed counts only where something is drawn."""
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
        raise UserError(f"{spec.directory}: {got}; {_how_to_rebuild(spec)}", everywhere=True)
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
        raise UserError(f"{spec.directory} was {got}: {_how_to_rebuild(spec)}", everywhere=True)
    for then in meta["sources"]:
        path = spec.raw.parent / then["name"]
        if path.is_file() and fingerprint(path) != then:
            raise UserError(
                f"{path} is not the file that {spec.directory} was made from"
                f" (its size or time changed): {_how_to_rebuild(spec)}",
                everywhere=True,
            )
    days = day_numbers(spec.raw) if spec.data_set == "terabyte" else []
    if days and len(days) != len(meta["sources"]) and not meta.get("imported"):
        got = f"made from {len(meta['sources'])} days, now there are {len(days)}"
        raise UserError(f"{spec.directory} was {got}: {_how_to_rebuild(spec)}", everywhere=True)


def fingerprint(path: Path) -> dict[str, Any]:
    """What tells whether a file is the same without reading it: name, size, time."""
    status = path.stat()
    return {"name": path.name, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def day_numbers(raw: Path) -> list[int]:
    """The numbers d of the files `<raw>_<d>`, ascending."""
    prefix = raw.name + "_"
    names = [path.name.removeprefix(prefix) for path in raw.parent.glob(prefix + "*")]
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))
