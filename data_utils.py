"""What the disk holds: raw Criteo text becomes rows of small integers that training maps or loads.

raw text -> parsed rows -> sub-sampled -> ids -> (shuffled) -> three files of int32 rows.
Also a program of its own:

    python data_utils.py --data_path=DIR --max-ind-range=10000000 --memory-map
    python data_utils.py --make-demo=DIR --demo-rows=1000000

What it leaves on disk, and how to read it, stands in prepared_data.
"""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

import criteo_demo
import original_files
from command_line import ArgumentParser, UserError, number_in, reports_errors
from criteo_text import (
    FIRST_SPARSE,
    KAGGLE_PARTS,
    NUM_FIELDS,
    NUM_SPARSE,
    OK,
    ROW_BYTES,
    IdMap,
    Rows,
    cut_evenly,
    cut_into_parts,
    describe_bad_field,
    parse_rows,
)
from external_shuffle import ExternalShuffle
from prepared_data import (
    FORMAT_VERSION,
    DataSpec,
    Prepared,
    day_numbers,
    find_prepared,
    fingerprint,
    from_meta,
    recipe,
)

RAW_NAMES = {"kaggle": "train.txt", "terabyte": "day"}
PROCESSED_NAMES = {
    "kaggle": "kaggleAdDisplayChallenge_processed.npz",
    "terabyte": "terabyte_processed.npz",
}
MAX_LINE_BYTES = 1 << 16
PIECE_BYTES = 4 << 20  # text parsed at a time by one thread
PATIENCE = 30.0  # seconds without anybody preparing after which a waiting rank looks itself

Item = TypeVar("Item")
Result = TypeVar("Result")
Piece = tuple[int, Rows]  # (part, rows of it)


# ---------------------------------------------------------------- options


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
    return raw.is_file() or bool(day_numbers(raw)) or bool(theirs)


def find_sources(spec: DataSpec) -> list[Path]:
    """The raw files, in order.

    Raises:
        UserError: a file is missing, unreadable or empty, or days are too few or have a gap.
    """
    sources = [spec.raw] if spec.data_set == "kaggle" else _find_days(spec.raw)
    for path in sources:
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; --data_path or --raw-data-file names the raw data",
                everywhere=True,
            )
        if not os.access(path, os.R_OK):
            raise UserError(f"{path}: no permission to read it", everywhere=True)
        if path.stat().st_size == 0:
            raise UserError(
                f"{path} is empty: expected lines of label, 13 integers, 26 hex strings",
                everywhere=True,
            )
    return sources


def _find_days(raw: Path) -> list[Path]:
    days = day_numbers(raw)
    gaps = sorted(set(range(days[-1] + 1)) - set(days)) if days else []
    if not days:
        raise UserError(
            f"{raw}_0: no such file; --data_path or --raw-data-file names the raw data",
            everywhere=True,
        )
    if gaps:
        missing = ", ".join(f"{raw.name}_{day}" for day in gaps[:5]) + (
            " ..." if len(gaps) > 5 else ""
        )
        raise UserError(
            f"{raw.parent} lacks {missing} (it has {raw.name}_{days[-1]}):"
            " days are numbered from 0",
            True,
        )
    if len(days) < 2:
        raise UserError(
            f"{raw.parent} holds only {raw.name}_0: at least two days are needed, the last tests",
            True,
        )
    return [raw.with_name(f"{raw.name}_{day}") for day in days]


# ---------------------------------------------------------------- preparation


def prepare(spec: DataSpec) -> Prepared:
    """The prepared data of `spec`, made now if it is not there: complete or absent, never half.

    Raises:
        UserError: raw or prepared data is wrong, or the disk is full or read-only.
    """
    if prepared := find_prepared(spec):
        return prepared
    sources, imported = _find_what_to_read(spec)  # before anything is written
    try:
        spec.directory.parent.mkdir(parents=True, exist_ok=True)
        with _lock(spec.directory.parent, wait=True):
            return find_prepared(spec) or _build(spec, sources, imported)
    except OSError as error:
        raise UserError(_disk_trouble(spec, error), everywhere=True) from error


def wait_until_prepared(spec: DataSpec) -> Prepared:
    """For a rank that leaves preparation to another one on its machine.

    It polls, in no collective, so without a time limit. Where nobody has been preparing for
    PATIENCE seconds, that rank has failed, and this one finds out why.
    """
    if prepared := find_prepared(spec):
        return prepared
    _find_what_to_read(spec)
    last_seen = time.monotonic()
    while (prepared := find_prepared(spec)) is None:
        time.sleep(0.2)
        with _lock(spec.directory.parent, wait=False) as is_free:
            last_seen = last_seen if is_free else time.monotonic()
        if time.monotonic() - last_seen > PATIENCE:
            return prepare(spec)
    return prepared


@contextlib.contextmanager
def _lock(folder: Path, wait: bool) -> Iterator[bool]:
    """Hold the folder itself as a lock, which leaves no file behind; gives whether it is held.

    Where the file system locks no folders (NFS), nobody knows: to wait is to go on, and not to
    wait is not to hold it.
    """
    if not folder.is_dir():
        yield True  # not made yet, so nobody has the lock
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            is_held = True
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(handle)


def _find_what_to_read(spec: DataSpec) -> tuple[list[Path], original_files.Original | None]:
    """The original's prepared files where they lie there, else the raw ones."""
    imported = original_files.find(spec.raw, spec.processed, spec.mapped)
    return (imported.files, imported) if imported else (find_sources(spec), None)


def _disk_trouble(spec: DataSpec, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left for the prepared data in {spec.directory.parent}:"
            " --processed-data-file can name a disk"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"cannot write to {spec.directory.parent}: name a writable --processed-data-file"
    return f"cannot prepare data: {error}"


def _build(
    spec: DataSpec, sources: list[Path], imported: original_files.Original | None
) -> Prepared:
    partial = spec.directory.with_name(spec.directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        begin = time.perf_counter()
        meta = _import(spec, imported, partial) if imported else _convert(spec, sources, partial)
        meta |= {
            "format": FORMAT_VERSION,
            "recipe": recipe(spec),
            "imported": imported is not None,
        }
        meta |= {"sources": [fingerprint(path) for path in sources]}
        _write_synced(partial / "meta.json", json.dumps(meta, indent=1).encode())
        _announce(spec, meta, time.perf_counter() - begin)
        if spec.flat:
            return _publish_flat(spec, partial, meta)
        os.rename(partial, spec.directory)
        return from_meta(spec.directory, meta)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _announce(spec: DataSpec, meta: dict[str, Any], seconds: float) -> None:
    rows = meta["rows"]
    total = sum(rows.values())
    print(
        f"Prepared {total} rows"
        f" ({rows['train']} train, {rows['test']} test, {rows['val']} validation)"
        f" in {seconds:.1f} s, {total / max(seconds, 1e-9):.0f} rows/s: {spec.directory.parent}",
        flush=True,
    )


def _publish_flat(spec: DataSpec, partial: Path, meta: dict[str, Any]) -> Prepared:
    """Move the files to the original's flat names; what `find_flat` wants last goes last."""
    counts = Path(f"{spec.raw}_fea_count.npz")
    if counts.exists() or not os.access(counts.parent, os.W_OK):  # not ours to overwrite
        counts = Path(f"{spec.stem}_fea_count.npz")
    aside = counts.with_name(counts.name + ".partial.npz")
    np.savez(aside, counts=np.array(meta["counts"]))
    os.replace(aside, counts)
    os.replace(partial / "meta.json", f"{spec.stem}_meta.json")
    for split in ("train", "val", "test"):
        os.replace(partial / f"{split}.bin", f"{spec.stem}_{split}.bin")
    prepared = find_prepared(spec)
    assert prepared is not None
    return prepared


def _convert(spec: DataSpec, sources: list[Path], folder: Path) -> dict[str, Any]:
    """Raw text to the three files in `folder`; gives rows and counts."""
    threads = (os.cpu_count() or 1) if spec.parallel else 1
    ids = [IdMap(spec.max_ind_range) for _ in range(NUM_SPARSE)]
    sizes = [path.stat().st_size for path in sources]
    with ThreadPoolExecutor(threads) as pool, _progress(sum(sizes)) as bar:
        pieces = _parse_files(spec, sources, pool, bar)
        if spec.data_set == "kaggle":
            parts = cut_evenly(sum(_count_lines(path) for path in sources), KAGGLE_PARTS)
            pieces = cut_into_parts((rows for _, rows in pieces), parts)
            sizes = [sizes[0] // KAGGLE_PARTS] * KAGGLE_PARTS
        kept = _sub_sample(pieces, spec.sub_sample_rate, np.random.RandomState(spec.seed))
        encoded = ((part, _encode(rows, ids, pool)) for part, rows in kept)
        written = _write_splits(encoded, folder, sizes, spec.order, spec.seed)
    return written | {"counts": [column.num_ids for column in ids]}


def _import(spec: DataSpec, original: original_files.Original, folder: Path) -> dict[str, Any]:
    """The original's own arrays to the three files in `folder`; what it shuffled stays as it is."""
    if 0 < spec.max_ind_range < max(original.counts):
        raise UserError(
            f"{original.files[0]} has a table of {max(original.counts)} rows,"
            f" --max-ind-range={spec.max_ind_range} allows fewer:"
            " give the flag that it was made with",
            everywhere=True,
        )
    order = "file" if original.shuffled else spec.order
    sizes = [ROW_BYTES * rows for rows in original.rows_per_part]
    written = _write_splits(original_files.read(original), folder, sizes, order, spec.seed)
    return written | {"counts": list(original.counts)}


def _progress(total: int) -> "tqdm[Any]":
    return tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=None)


def _parse_files(
    spec: DataSpec, sources: list[Path], pool: ThreadPoolExecutor, bar: "tqdm[Any]"
) -> Iterator[Piece]:
    """Parsed rows with the number of their file, in order; two pieces a thread are under way."""

    def parse(item: tuple[int, Path, int, bytes]) -> Piece:
        number, path, line, text = item
        return number, _parse_piece(path, line, text, spec.max_ind_range)

    work = (
        (number, path, *piece)
        for number, path in enumerate(sources)
        for piece in _read_pieces(path, bar)
    )
    return _map_in_order(pool, parse, work)


def _read_pieces(path: Path, bar: "tqdm[Any]") -> Iterator[tuple[int, bytes]]:
    """(first line's number from 1, whole lines) of a file, about PIECE_BYTES at a time."""
    line, rest = 1, b""
    with open(path, "rb") as file:
        while block := file.read(PIECE_BYTES):
            bar.update(len(block))
            whole, newline, tail = (rest + block).rpartition(b"\n")
            if len(tail) > MAX_LINE_BYTES:  # no line of ours: what there is of it says so
                tail = tail[:MAX_LINE_BYTES]
                yield line + whole.count(b"\n") + len(newline), tail
            rest = tail
            if newline:
                yield line, whole + newline
                line += whole.count(b"\n") + 1
    if rest:
        yield line, rest


def _parse_piece(path: Path, first_line: int, text: bytes, max_ind_range: int) -> Rows:
    rows = np.empty((text.count(b"\n") + 1, NUM_FIELDS), np.int32)
    num_rows, status, field, offset = parse_rows(
        np.frombuffer(text, np.uint8), rows, max(max_ind_range, 0)
    )
    if status != OK:
        line = text[offset:].split(b"\n", 1)[0]
        raise UserError(
            f"{path}, line {first_line + num_rows}: {describe_bad_field(status, field, line)}", True
        )
    return rows[:num_rows]


def _map_in_order(
    pool: ThreadPoolExecutor, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`map` on the pool's threads, in order, with few items under way: memory stays bounded."""
    ahead = 2 * pool._max_workers
    pending: deque[Future[Result]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _count_lines(path: Path) -> int:
    lines, last = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(PIECE_BYTES):
            lines += block.count(b"\n")
            last = block[-1:]
    return lines + (last != b"\n")


def _sub_sample(
    pieces: Iterable[Piece], rate: float, random: np.random.RandomState
) -> Iterator[Piece]:
    """Drop rows of label 0 whose number is below `rate`; rows of label 1 draw one too."""
    for part, rows in pieces:
        if rate > 0:
            number = random.uniform(size=len(rows))
            rows = rows[(rows[:, 0] != 0) | (number >= rate)]
        yield part, rows


def _encode(rows: Rows, ids: list[IdMap], pool: ThreadPoolExecutor) -> Rows:
    """Replace categories by their ids, in place, columns side by side."""
    list(
        pool.map(
            lambda column: ids[column].encode(rows[:, FIRST_SPARSE + column]), range(NUM_SPARSE)
        )
    )
    return rows


def _write_splits(
    pieces: Iterable[Piece], folder: Path, sizes: list[int], order: str, seed: int
) -> dict[str, Any]:
    """Write train.bin, test.bin and val.bin; gives the rows of each part and of each split.

    Args:
        pieces: rows of parts 0, 1, ... in order; the last part is for evaluation.
        sizes: about how many bytes each part has.
        order: of the training rows: file, day (shuffled within each part) or total (over all
            training parts).
        seed: of the shuffle, which has a generator of its own.
    """
    rows_per_part = [0] * len(sizes)
    last = len(sizes) - 1
    shuffle = ExternalShuffle(folder, order, np.random.default_rng(seed), sizes[:-1])
    with open(folder / "train.bin", "wb") as train, open(folder / "test.bin", "wb") as evaluation:
        for part, rows in pieces:
            rows_per_part[part] += len(rows)
            if part == last:
                evaluation.write(rows.tobytes())
            else:
                shuffle.write(part, rows, train)
        shuffle.finish(train)
        for file in (train, evaluation):
            file.flush()
            os.fsync(file.fileno())
    num_test = (rows_per_part[last] + 1) // 2
    _split_file(folder / "test.bin", folder / "val.bin", ROW_BYTES * num_test)
    written = {
        "train": sum(rows_per_part[:last]),
        "test": num_test,
        "val": rows_per_part[last] - num_test,
    }
    if not written["train"] or not written["test"]:
        raise UserError(
            f"too few rows: {written['train']} to train and {written['test']} to test are left",
            everywhere=True,
        )
    return {"rows": written, "rows_per_part": rows_per_part}


def _split_file(first: Path, second: Path, at: int) -> None:
    """Move what `first` has from byte `at` on to `second`."""
    with open(first, "r+b") as head, open(second, "wb") as tail:
        head.seek(at)
        shutil.copyfileobj(head, tail, PIECE_BYTES)
        head.truncate(at)
        for file in (head, tail):
            file.flush()
            os.fsync(file.fileno())


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------- the program


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Prepare Criteo data, or make a demo data set; gives the exit status."""
    parser = ArgumentParser(
        prog="data_utils.py", description="Prepares Criteo's files for training."
    )
    add_data_options(parser)
    criteo_demo.add_demo_options(parser)
    options = parser.parse_args(argv)
    if options.make_demo:
        print(criteo_demo.make(criteo_demo.demo_from_options(options)))
        return 0
    spec = spec_from_options(options)
    already = find_prepared(spec) is not None
    prepared = prepare(spec)
    if already:
        print(f"Prepared already: {prepared.files['train'].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
