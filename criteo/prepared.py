"""Prepared data on disk: find it, and check that it was made as the flags ask.

docs/preparation.md describes the format. It is one directory beside --processed-data-file, complete
or absent: meta.json, report.json, vocabulary.bin and three files of rows. With --mlperf-bin-loader
the rows are in `<processed>_{train,test,val}.bin`, the original's flat form: 40 int32 a row.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from criteo.columns import Bytes
from criteo.meta_file import SPLITS, how_to_rebuild, read_meta, recipe
from criteo.original_files import find_flat_files
from criteo.raw_files import RawFile, day_numbers
from criteo.report import find_report
from criteo.row_layout import FLAT, Layout
from criteo.spec import DataSpec
from criteo.vocabulary_file import Vocabulary

VOCABULARY = "vocabulary.bin"


@dataclass(frozen=True)
class Prepared:
    """Prepared data on disk.

    Attributes:
        files: the file of each split.
        counts: rows of each table.
        rows_per_part: kept rows of each part; the last part is divided into test and val.
        layout: how a row is packed.
        vocabulary: which category has which id; None if the data has no such file.
        has_original_ids: whether the original program gave the ids.
    """

    files: dict[str, Path]
    counts: tuple[int, ...]
    rows_per_part: tuple[int, ...]
    layout: Layout
    vocabulary: Vocabulary | None = None
    has_original_ids: bool = False

    @classmethod
    def from_meta(cls, directory: Path, meta: dict[str, Any]) -> "Prepared":
        """The prepared data in `directory` as its meta.json describes it; opens no file."""
        files = {split: directory / f"{split}.bin" for split in SPLITS}
        counts, layout = tuple(meta["counts"]), Layout.from_columns(meta["columns"])
        vocabulary = _vocabulary_of(directory / VOCABULARY, meta)
        imported = meta.get("imported", False)
        return cls(files, counts, tuple(meta["rows_per_part"]), layout, vocabulary, imported)

    def rows(self, split: str) -> Bytes:
        """The split's rows, mapped read-only: (rows, bytes of a row) uint8."""
        path = self.files[split]
        if path.stat().st_size == 0:  # numpy cannot map an empty file
            return np.zeros((0, self.layout.row_bytes), np.uint8)
        return np.memmap(path, np.uint8, mode="r").reshape(-1, self.layout.row_bytes)

    def report(self) -> dict[str, Any]:
        """The report of its preparation (criteo/report.py); empty if there is none."""
        train = self.files["train"]
        return find_report(train.with_name(train.name.removesuffix("train.bin") + "report.json"))


def find_prepared(spec: DataSpec) -> Prepared | None:
    """The prepared data that `spec` describes, or None if there is none yet.

    Raises:
        UserError: the data was made with other flags or from other files, or it is damaged.
    """
    if spec.flat:
        return _find_flat(spec)
    if not _is_there(spec):
        return None
    meta = read_meta(spec, spec.directory / "meta.json")
    _check_meta(spec, meta)
    prepared = Prepared.from_meta(spec.directory, meta)
    check_range(spec, spec.directory, prepared.counts)
    _check_sizes(spec, prepared, meta["rows"])
    return prepared


def _vocabulary_of(path: Path, meta: dict[str, Any]) -> Vocabulary | None:
    """The vocabulary at `path` as a meta.json describes it, if it does."""
    entry = meta.get("vocabulary")
    return Vocabulary(path, tuple(meta["counts"]), entry["digest"]) if entry else None


def _is_there(spec: DataSpec) -> bool:
    """Whether a folder with a meta.json has the name of the prepared data.

    Preparation gives its complete folder that name by a rename. Only an empty folder gives way to
    a rename; with anything else there, preparation would run to its end and fail then.

    Raises:
        UserError: something else is there.
    """
    folder, what_to_do = spec.directory, how_to_rebuild(spec)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        if folder.is_symlink():
            raise UserError(f"{folder} is a link to nothing: {what_to_do}") from None
        return False
    except NotADirectoryError:
        path = folder if os.path.lexists(folder) else folder.parent
        raise UserError(f"{path} is not a folder: {what_to_do}") from None
    if "meta.json" not in names and (names or folder.is_symlink()):
        raise UserError(f"{folder} is not prepared data, it has no meta.json: {what_to_do}")
    return "meta.json" in names


def _check_sizes(spec: DataSpec, prepared: Prepared, rows: dict[str, int]) -> None:
    """Raise a UserError if a file is missing or has another size than its content takes."""
    sizes = {prepared.files[split]: prepared.layout.row_bytes * rows[split] for split in SPLITS}
    if vocabulary := prepared.vocabulary:
        sizes[vocabulary.path] = vocabulary.num_bytes
    for path, expected in sizes.items():
        if not path.is_file():
            raise UserError(f"{path} is missing: {how_to_rebuild(spec)}")
        if path.stat().st_size != expected:
            got = f"expected {expected} bytes, got {path.stat().st_size}"
            raise UserError(f"{path} is damaged ({got}): {how_to_rebuild(spec)}")


def _find_flat(spec: DataSpec) -> Prepared | None:
    """Flat files do not say how they were made, but those of this program have a meta file."""
    flat = find_flat_files(spec.raw, spec.processed, spec.stem)
    if flat is None:
        _check_flat_names(spec)
        return None
    files, counts, num_train, num_eval = flat
    meta_file = Path(f"{spec.stem}_meta.json")
    prepared = Prepared(files, counts, (num_train, num_eval), FLAT, has_original_ids=True)
    if os.path.lexists(meta_file):
        meta = read_meta(spec, meta_file)
        _check_meta(spec, meta)
        vocabulary = _vocabulary_of(Path(f"{spec.stem}_{VOCABULARY}"), meta)
        imported = meta.get("imported", False)
        prepared = replace(prepared, vocabulary=vocabulary, has_original_ids=imported)
        _check_sizes(spec, prepared, meta["rows"])
    check_range(spec, files["train"], counts)
    if not num_train or not files["test"].stat().st_size:
        raise UserError(f"{files['train']} or {files['test']} is empty: expected rows")
    return prepared


def _check_flat_names(spec: DataSpec) -> None:
    """Raise a UserError if a folder has the name of a file that preparation will write."""
    names = [f"{split}.bin" for split in SPLITS]
    for name in ("meta.json", "report.json", "fea_count.npz", VOCABULARY, *names):
        path = Path(f"{spec.stem}_{name}")
        if path.is_dir():
            raise UserError(f"{path} is a folder: delete it, or name another --processed-data-file")


def check_range(spec: DataSpec, path: Path, counts: tuple[int, ...]) -> None:
    """Raise a UserError if a table of `path` has more rows than --max-ind-range allows."""
    if 0 < spec.max_ind_range < max(counts):
        raise UserError(
            f"{path} has a table of {max(counts)} rows, --max-ind-range={spec.max_ind_range}"
            " allows fewer: give the flag that it was made with, or another --processed-data-file"
        )


def _difference(key: str, then: Any, now: Any) -> str:
    """How the flags with which data was prepared differ from this run's."""
    if not key.startswith("order"):
        return f"prepared with {key}={then}; this run has {key}={now}"
    flags = {
        "file": "without --memory-map (or with --data-randomize=none)",
        "total": "with --memory-map and --data-randomize=total",
        "day": "with --memory-map and --data-randomize=day",
    }
    was, has = (flags.get(str(order), str(order)) for order in (then, now))
    return f"prepared {was}; this run is started {has}"


def _check_meta(spec: DataSpec, meta: dict[str, Any]) -> None:
    """Raise a UserError if the data was made with other flags or from other files."""
    wanted = recipe(spec)
    different = [
        key
        for key in wanted
        if meta["recipe"][key] is not None and meta["recipe"][key] != wanted[key]
    ]
    if meta.get("imported"):  # the original's files do not say how they were made
        different = [key for key in different if key.startswith(("--data-set", "order"))]
    for key in different:
        got = _difference(key, meta["recipe"][key], wanted[key])
        raise UserError(f"{spec.directory} was {got}: {how_to_rebuild(spec)}")
    for then in meta["sources"]:
        path = spec.raw.parent / then["name"]
        if path.is_file() and RawFile.at(path).fingerprint != then:
            raise UserError(
                f"{path} is not the file that {spec.directory} was made from"
                f" (its size or time changed): {how_to_rebuild(spec)}"
            )
    days = day_numbers(spec.raw) if spec.data_set == "terabyte" else []
    if days and len(days) != len(meta["sources"]) and not meta.get("imported"):
        got = f"made from {len(meta['sources'])} days, now there are {len(days)}"
        raise UserError(f"{spec.directory} was {got}: {how_to_rebuild(spec)}")
