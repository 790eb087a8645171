"""Prepared data on disk: which the flags ask for, and whether what lies there is that.

docs/preparation.md describes the format. It is one directory beside --processed-data-file, complete
or absent: meta.json, report.json and three files of rows. With --mlperf-bin-loader the rows stand
as `<processed>_{train,test,val}.bin`, the original's flat form: 40 int32 a row.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import original_files
from command_line import UserError, number_in
from criteo_files import RAW_NAMES, RawFile, day_numbers
from criteo_text import Bytes
from row_layout import FLAT, Layout

FORMAT_VERSION = 2
PROCESSED_NAMES = {
    "kaggle": "kaggleAdDisplayChallenge_processed.npz",
    "terabyte": "terabyte_processed.npz",
}
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
    max_bad_lines: int = 0

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

    @property
    def work_folder(self) -> Path:
        """Where finished pieces lie until all is prepared."""
        return self.stem.with_name(self.stem.name + ".prepared.partial")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """The flags that `spec_from_options` reads; shared by this program and the trainer."""
    group = parser.add_argument_group("Criteo data")
    flag = group.add_argument
    flag("--data-set", choices=("kaggle", "terabyte"), help="kaggle: train.txt; terabyte: day_<d>")
    flag("--data_path", default="", metavar="DIR", help="folder of day_0, day_1, ... or train.txt")
    flag("--raw-data-file", default="", metavar="PATH", help=".../train.txt, or .../day without _0")
    flag("--processed-data-file", default="", metavar="PATH", help="where prepared data is or goes")
    flag("--data-randomize", choices=("total", "day", "none"), default="total", help="row shuffle")
    flag("--max-ind-range", type=int, default=-1, help="> 0: most rows; categories modulo this")
    flag(
        "--data-sub-sample-rate",
        type=number_in(float, 0, 1),
        default=0.0,
        help="drop a row of label 0 with this probability",
    )
    flag(
        "--max-bad-lines",
        type=number_in(int, 0),
        default=0,
        help="skip and count this many bad lines; the next one ends the run",
    )
    flag("--memory-map", action="store_true", help="map the rows from disk instead of loading them")
    flag("--dataset-multiprocessing", action="store_true", help="prepare with all cores")
    flag("--mlperf-bin-loader", action="store_true", help="write, read one flat int32 file a split")
    flag("--numpy-rand-seed", type=number_in(int, 0, 2**32 - 1), default=123, help="of all draws")


def spec_from_options(options: argparse.Namespace) -> DataSpec:
    """The flags of `add_data_options` as a DataSpec.

    Raises:
        UserError: no data is named, or the folder holds none, or two kinds.
    """
    data_set, raw = options.data_set, options.raw_data_file
    if options.data_path:
        data_set, raw = _find_raw(Path(options.data_path), data_set)
    data_set = data_set or "kaggle"
    if not raw and not options.processed_data_file:
        raise UserError(
            "no data is named: give --data_path=DIR or --raw-data-file=PATH", everywhere=True
        )
    processed = Path(options.processed_data_file or Path(raw).parent / PROCESSED_NAMES[data_set])
    raw = Path(raw or processed.parent / RAW_NAMES[data_set])
    if not 1 <= options.max_ind_range <= 2**32 and options.max_ind_range != -1:
        raise UserError(
            f"--max-ind-range={options.max_ind_range}: expected 1 to 2^32, or -1 for no limit",
            True,
        )
    return DataSpec(
        data_set=data_set,
        raw=raw,
        processed=processed,
        max_ind_range=options.max_ind_range,
        sub_sample_rate=options.data_sub_sample_rate,
        randomize=options.data_randomize,
        memory_map=options.memory_map,
        flat=options.mlperf_bin_loader,
        parallel=options.dataset_multiprocessing,
        seed=options.numpy_rand_seed,
        max_bad_lines=options.max_bad_lines,
    )


def _find_raw(folder: Path, data_set: str | None) -> tuple[str, Path]:
    """Which data set a folder holds, and what its raw files' names begin with."""
    if not folder.is_dir():
        raise UserError(f"--data_path={folder}: no such folder", everywhere=True)
    found = [data_set] if data_set else [name for name in RAW_NAMES if _holds(folder, name)]
    if len(found) > 1:
        both = "train.txt and day files: say --data-set=kaggle or terabyte"
        raise UserError(f"--data_path={folder} holds {both}", everywhere=True)
    if not found:
        none = "found neither day_0, day_1, ... nor train.txt there"
        raise UserError(f"--data_path={folder}: {none}", everywhere=True)
    return found[0], folder / RAW_NAMES[found[0]]


def _holds(folder: Path, data_set: str) -> bool:
    """Is there raw data of that kind, or what was prepared from it?"""
    raw = folder / RAW_NAMES[data_set]
    prepared = Path(PROCESSED_NAMES[data_set]).stem
    theirs = [*folder.glob(f"{prepared}*"), *folder.glob(f"{raw.stem}_*_reordered.npz")]
    packed = raw.with_name(raw.name + ".gz")
    return raw.is_file() or packed.is_file() or bool(day_numbers(raw)) or bool(theirs)


@dataclass(frozen=True)
class Prepared:
    """Prepared data on disk.

    Attributes:
        files: by split.
        counts: rows of each table.
        rows_per_part: kept rows of each part; the last is test and val.
        layout: of a row.
    """

    files: dict[str, Path]
    counts: tuple[int, ...]
    rows_per_part: tuple[int, ...]
    layout: Layout

    def rows(self, split: str) -> Bytes:
        """The split's rows, mapped read-only: (rows, bytes of a row) uint8."""
        path = self.files[split]
        if path.stat().st_size == 0:  # numpy maps no empty file
            return np.zeros((0, self.layout.row_bytes), np.uint8)
        return np.memmap(path, np.uint8, mode="r").reshape(-1, self.layout.row_bytes)


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
        check_range(spec, spec.directory, prepared.counts)
    except _DAMAGES as error:
        raise UserError(
            f"{meta_file} is damaged ({error}): {_how_to_rebuild(spec)}", everywhere=True
        ) from error
    for split, rows in meta["rows"].items():
        path = prepared.files[split]
        size = path.stat().st_size if path.is_file() else 0
        if size != prepared.layout.row_bytes * rows:
            expected = f"expected {prepared.layout.row_bytes * rows} bytes, got {size}"
            raise UserError(
                f"{path} is damaged ({expected}): {_how_to_rebuild(spec)}", everywhere=True
            )
    return prepared


def from_meta(directory: Path, meta: dict[str, Any]) -> Prepared:
    """The prepared data in `directory` as its meta.json describes it; looks at no file."""
    files = {split: directory / f"{split}.bin" for split in SPLITS}
    layout = Layout.from_columns(meta["columns"])
    return Prepared(files, tuple(meta["counts"]), tuple(meta["rows_per_part"]), layout)


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
    check_range(spec, files["train"], counts)
    if not num_train or not files["test"].stat().st_size:
        raise UserError(f"{files['train']} or {files['test']} is empty: expected rows", True)
    return Prepared(files, counts, (num_train, num_eval), FLAT)


def check_range(spec: DataSpec, path: Path, counts: tuple[int, ...]) -> None:
    """Raise a UserError where a table of `path` is larger than --max-ind-range allows."""
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
        if path.is_file() and RawFile.at(path).fingerprint != then:
            raise UserError(
                f"{path} is not the file that {spec.directory} was made from"
                f" (its size or time changed): {_how_to_rebuild(spec)}",
                everywhere=True,
            )
    days = day_numbers(spec.raw) if spec.data_set == "terabyte" else []
    if days and len(days) != len(meta["sources"]) and not meta.get("imported"):
        got = f"made from {len(meta['sources'])} days, now there are {len(days)}"
        raise UserError(f"{spec.directory} was {got}: {_how_to_rebuild(spec)}", everywhere=True)
