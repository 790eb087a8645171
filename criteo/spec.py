"""The flags of Criteo data as one record: which data, and how it is prepared."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.flags import number_in
from criteo.raw_files import RAW_NAMES, day_numbers

PROCESSED_NAMES = {
    "kaggle": "kaggleAdDisplayChallenge_processed.npz",
    "terabyte": "terabyte_processed.npz",
}


@dataclass(frozen=True)
class DataSpec:
    """Which data, and how it is prepared.

    Attributes:
        data_set: kaggle or terabyte.
        raw: train.txt, or the days' common name without _0, _1, ...
        processed: the path that the names of prepared files are made from.
        max_ind_range: most rows of a table: categories are taken modulo this; -1: no limit.
        sub_sample_rate: probability with which a row of label 0 is dropped.
        randomize: how training rows are shuffled: total, day or none.
        memory_map: training maps the rows from the disk.
        flat: prepared data has the original's flat form (--mlperf-bin-loader).
        parallel: preparation uses all cores.
        seed: decides which rows are dropped, and the shuffle.
        max_bad_lines: number of bad lines that are skipped before one is an error.
    """

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

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "DataSpec":
        """The flags of `add_data_options` as a record.

        Raises:
            UserError: no data is named, a path ends in no name, the folder holds none or two kinds,
                or --max-ind-range is out of range.
        """
        data_set, raw = options.data_set, options.raw_data_file
        _check_name("--raw-data-file", raw, "DIR/train.txt or DIR/day; --data_path takes a folder")
        _check_name("--processed-data-file", options.processed_data_file, "DIR/terabyte")
        if options.data_path:
            data_set, raw = _find_raw(Path(options.data_path), data_set)
        data_set = data_set or "kaggle"
        if not raw and not options.processed_data_file:
            raise UserError("no data is named: give --data_path=DIR or --raw-data-file=PATH")
        processed = options.processed_data_file or Path(raw).parent / PROCESSED_NAMES[data_set]
        processed = Path(processed)
        if not 1 <= options.max_ind_range <= 2**32 and options.max_ind_range != -1:
            raise UserError(
                f"--max-ind-range={options.max_ind_range}: expected 1 to 2^32, or -1 for no limit"
            )
        return cls(
            data_set=data_set,
            raw=Path(raw or processed.parent / RAW_NAMES[data_set]),
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

    @property
    def mapped(self) -> bool:
        """Whether training reads the rows from the disk, in their order there."""
        return self.memory_map or self.flat

    @property
    def order(self) -> str:
        """Order of the training rows on disk: file, total or day.

        Rows that are loaded into memory are shuffled there, so on disk they keep the file's order.
        """
        return self.randomize if self.mapped and self.randomize != "none" else "file"

    @property
    def stem(self) -> Path:
        """`processed` without its .npz: the beginning of all names of prepared data."""
        return self.processed.with_suffix("") if self.processed.suffix == ".npz" else self.processed

    @property
    def directory(self) -> Path:
        """The folder of the prepared data."""
        return self.stem.with_name(self.stem.name + ".prepared")

    @property
    def work_folder(self) -> Path:
        """The folder that keeps finished files until all data is prepared."""
        return self.stem.with_name(self.stem.name + ".prepared.partial")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `DataSpec.from_options` reads, to the trainer and to data_utils.py."""
    group = parser.add_argument_group("Criteo data")
    flag = group.add_argument
    flag(
        "--data-set",
        choices=("kaggle", "terabyte"),
        help="train.txt, or day_0, day_1, ...; default: what is there",
    )
    flag("--data_path", default="", metavar="DIR", help="folder of day_0, day_1, ... or train.txt")
    flag("--raw-data-file", default="", metavar="PATH", help=".../train.txt, or .../day without _0")
    flag(
        "--processed-data-file",
        default="",
        metavar="PATH",
        help="where prepared data is or goes; default: beside the raw data",
    )
    flag(
        "--data-randomize",
        choices=("total", "day", "none"),
        default="total",
        help="shuffle of training rows",
    )
    flag(
        "--max-ind-range",
        type=int,
        default=-1,
        help="> 0: categories modulo this, so at most that many rows a table",
    )
    flag(
        "--data-sub-sample-rate",
        type=number_in(float, 0, 1),
        default=0.0,
        help="drop a row of label 0 with this probability, also of test rows",
    )
    flag(
        "--max-bad-lines",
        type=number_in(int, 0),
        default=0,
        help="skip and count this many bad lines; the next one ends the run",
    )
    flag("--memory-map", action="store_true", help="map the rows from disk instead of loading them")
    flag("--dataset-multiprocessing", action="store_true", help="prepare with all cores")
    flag(
        "--mlperf-bin-loader",
        action="store_true",
        help="one flat file of int32 a split: PATH_{train,test,val}.bin",
    )
    flag(
        "--numpy-rand-seed",
        type=number_in(int, 0, 2**32 - 1),
        default=123,
        help="seed of all draws",
    )


def _check_name(flag: str, path: str, example: str) -> None:
    """Raise a UserError if a path is given but ends in no name, which others are made from."""
    if path and os.path.basename(path) in ("", ".", ".."):
        raise UserError(f"{flag}={path} ends in no file's name: expected a path as in {example}")


def _find_raw(folder: Path, data_set: str | None) -> tuple[str, Path]:
    """Find the data in a folder; returns DataSpec's (data_set, raw)."""
    if not folder.is_dir():
        what = "no such folder" if not os.path.lexists(folder) else "not a folder"
        hint = "; --raw-data-file takes a file" if folder.is_file() else ""
        raise UserError(f"--data_path={folder}: {what}{hint}")
    found = [data_set] if data_set else [name for name in RAW_NAMES if _holds(folder, name)]
    if len(found) > 1:
        both = "train.txt and day files: say --data-set=kaggle or terabyte"
        raise UserError(f"--data_path={folder} holds {both}")
    if not found and os.path.lexists(folder / RAW_NAMES["kaggle"]):
        found = ["kaggle"]  # find_raw_files says what it is, if not a file
    if not found:
        none = "found neither day_0, day_1, ... nor train.txt there"
        raise UserError(f"--data_path={folder}: {none}")
    return found[0], folder / RAW_NAMES[found[0]]


def _holds(folder: Path, data_set: str) -> bool:
    """Whether the folder has raw data of that data set, or data prepared from it."""
    raw = folder / RAW_NAMES[data_set]
    prepared = Path(PROCESSED_NAMES[data_set]).stem
    made_of_it = [*folder.glob(f"{prepared}*"), *folder.glob(f"{raw.stem}_*_reordered.npz")]
    packed = raw.with_name(raw.name + ".gz")
    return raw.is_file() or packed.is_file() or bool(day_numbers(raw)) or bool(made_of_it)
