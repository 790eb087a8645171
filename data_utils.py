"""What the disk holds: raw Criteo text becomes rows of small integers that training maps or loads.

    raw text -> parsed pieces -> ids of all categories -> rows in their places -> prepared data

Each arrow is a stage of many tasks that threads, processes and machines share through a folder of
finished pieces (work_folder); what was finished before a run ended is not done again. Also a
program of its own:

    python data_utils.py --data_path=DIR --max-ind-range=10000000 --memory-map
    python data_utils.py --make-demo=DIR --demo-rows=1000000

docs/preparation.md describes the stages and the format.
"""

import contextlib
import ctypes
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from common.errors import RankError, UserError, reports_errors
from common.flags import ArgumentParser
from common.launch import Launch
from common.shares import split_evenly
from criteo.columns import FIRST_SPARSE, KAGGLE_PARTS, NUM_SPARSE
from criteo.demo import Demo, add_demo_options, make_demo
from criteo.original_files import Original, find_original
from criteo.prepared import FORMAT_VERSION, Prepared, check_range, find_prepared, recipe
from criteo.raw_files import RawFile, find_raw_files
from criteo.report import find_doubts, make_report, report_table
from criteo.row_layout import FLAT, Layout
from criteo.spec import DataSpec, add_data_options
from preparation.category_ids import IdMap
from preparation.disk_space import check_space, disk_trouble
from preparation.parsed_piece import PIECE_BYTES, Piece, Rules
from preparation.publish import publish_flat, sync_folder, write_synced
from preparation.row_files import RowFiles
from preparation.shuffle import PieceRows, Shuffle
from preparation.sources import LinePosition, OriginalPieces, TextPieces, count_tasks
from preparation.work_folder import (
    LAST_PIECE,
    PAUSE,
    Crew,
    FolderGoneError,
    Task,
    WorkFolder,
    Writer,
    has_locks,
    key_of,
)

STAGES = ("lines", "parsed", "ids", "scattered", "gathered")  # folders of pieces
WORK_MEMORY = 1 << 30  # bytes for the work of all threads and processes of a machine
BYTES_OF_A_PARSER = 3 * PIECE_BYTES  # what a thread takes that parses or encodes


# ---------------------------------------------------------------- preparation


def prepare(spec: DataSpec) -> Prepared:
    """The prepared data of `spec`, made now if it is not there: complete or absent, never half.

    All ranks of a launch, on one machine or on many that share the folder, do the work together.
    Where the file system has no locks the first one does it, and the others wait.

    Raises:
        UserError: raw or prepared data is wrong, or the disk is too small, full or read-only.
    """
    folder = WorkFolder(spec.work_folder)
    if prepared := find_prepared(spec):
        folder.remove_if_idle()  # a run that was killed at its end may have left it
        return prepared
    original = find_original(spec.raw, spec.processed, spec.mapped)
    if original:
        check_range(spec, original.files[0], original.counts)
    raw = [] if original else find_raw_files(spec.raw, spec.data_set)
    job = Preparation(spec, raw, original, folder)
    try:
        check_space(spec, raw, original)
        spec.directory.parent.mkdir(parents=True, exist_ok=True)
        if job.crew.rank and not has_locks(spec.directory.parent):
            return _wait_for_prepared(spec)
        with folder.joined(job.key, STAGES):
            return find_prepared(spec) or job.run()
    except (FolderGoneError, FileNotFoundError, FileExistsError) as error:
        return _made_by_others(spec, error)
    except OSError as error:
        raise RankError(disk_trouble(spec, error)) from error


def _wait_for_prepared(spec: DataSpec) -> Prepared:
    """The prepared data, when the first rank has made it; if that fails, the launcher ends all."""
    while (prepared := find_prepared(spec)) is None:
        time.sleep(PAUSE)
    return prepared


def _made_by_others(spec: DataSpec, error: Exception) -> Prepared:
    """The prepared data, where pieces of it are gone because others have just finished it."""
    name = getattr(error, "filename", None) or spec.work_folder
    if not Path(name).is_relative_to(spec.work_folder):
        raise error  # a raw file, say
    for _ in range(100):  # moving flat files takes a moment
        if prepared := find_prepared(spec):
            return prepared
        time.sleep(0.01)
    raise RankError(f"{spec.work_folder} was removed by somebody: start again") from error


def crew_of_this_launch(parallel: bool) -> Crew:
    """This process among the ranks of its launch; with `parallel` its share of the cores."""
    launch = Launch.from_environment()
    cores = len(os.sched_getaffinity(0)) // launch.local_world_size if parallel else 1
    return Crew(max(cores, 1), launch.rank, launch.world_size)


def _with_memory(crew: Crew, bytes_of_one: int) -> Crew:
    """No more threads than WORK_MEMORY lets this machine have."""
    here = Launch.from_environment().local_world_size
    most = max(WORK_MEMORY // max(bytes_of_one, 1) // here, 1)
    return replace(crew, threads=min(crew.threads, most))


class Preparation:
    """The stages from raw files, or the original's arrays, to prepared data.

    Args:
        spec: what to make.
        raw: files of text, or none where `original` is given.
        original: arrays that the original program left.
        folder: for finished pieces.

    Attributes:
        crew: this process among those that work together.
    """

    def __init__(
        self,
        spec: DataSpec,
        raw: Sequence[RawFile],
        original: Original | None,
        folder: WorkFolder,
    ) -> None:
        self._spec, self._raw, self._original, self._folder = spec, raw, original, folder
        self._files = [RawFile.at(path) for path in original.files] if original else list(raw)
        self.crew = crew_of_this_launch(spec.parallel)
        self._rules = Rules(spec.max_ind_range, spec.sub_sample_rate, spec.seed, spec.max_bad_lines)
        self._pieces: list[Piece] = []
        self._bar, self._shown, self._rows_seen = tqdm(disable=True), Counter[str](), 0
        self._begin = time.perf_counter()
        facts = [FORMAT_VERSION, recipe(spec), self._rules.facts, spec.flat]
        self.key = key_of(facts, [file.fingerprint for file in self._files])

    def run(self) -> Prepared:
        """All stages; gives the prepared data, whoever finished it."""
        totals = self._parse()
        self._check_bad_lines(totals)
        counts = self._number()
        target = self._target(totals, counts)
        shuffle = self._place(totals, target)
        publish = Task(LAST_PIECE, key_of(self.key, LAST_PIECE),
                       lambda _: self._publish(totals, counts, target, shuffle))  # fmt: skip
        self._folder.ensure(publish)
        prepared = find_prepared(self._spec)
        assert prepared is not None
        return prepared

    def _run(self, stage: str, tasks: Sequence[Task], crew: Crew, done: Any = None) -> None:
        """Have tasks done, with a progress bar over their bytes, or over them."""
        total = sum(task.size for task in tasks)
        unit = "B" if total > len(tasks) else " columns"
        with tqdm(
            total=total, unit=unit, unit_scale=True, desc=stage, disable=None, leave=False
        ) as bar:

            def finished(task: Task) -> None:
                self._show(task.name, task.size - self._shown[task.name], 0)
                if done is not None:
                    done(task)

            self._bar, self._shown, self._rows_seen = bar, Counter(), 0
            self._folder.run(tasks, crew, finished)
        _give_memory_back()

    def _show(self, name: str, size: int, lines: int) -> None:
        """Move the bar: of the task of that name so much is done."""
        self._shown[name] += size
        self._rows_seen += lines
        if self._rows_seen and not self._bar.disable:
            speed = self._rows_seen / max(self._bar.format_dict["elapsed"], 1e-9)
            self._bar.set_postfix_str(f"{speed:,.0f} rows/s", refresh=False)
        self._bar.update(size)

    # ------------------------------------------------------------ text to pieces

    def _parse(self) -> dict[str, Any]:
        """The first stage: all pieces, and what they add up to."""
        crew = _with_memory(self.crew, BYTES_OF_A_PARSER)
        sources = self._sources(crew)
        summary = Task("parsed/totals", key_of(self.key, "totals"), lambda _: self._totals(sources))
        if not self._folder.has(summary):
            tasks = [task for source in sources for task in source.tasks()]
            self._run("parsing", tasks, crew)
            self._folder.ensure(summary)
        self._pieces = [piece for source in sources for piece in source.pieces()]
        return self._folder.intact(self._folder.meta, summary)

    def _sources(self, crew: Crew) -> list[Any]:
        """What makes the pieces: of each file of text, or of the original's arrays."""
        if self._original:
            return [OriginalPieces(self._original, self._folder, self._show)]
        counts: list[list[int]] = [[] for _ in self._raw]
        ends: tuple[int, ...] = ()
        first_lines = [-1] * len(self._raw)
        if self._spec.data_set == "kaggle" or self._spec.sub_sample_rate > 0:
            counts = self._count_lines(crew)
            lines = [sum(of_file) for of_file in counts]
            first_lines = [sum(lines[:number]) for number in range(len(lines))]
            if self._spec.data_set == "kaggle":
                ends = tuple(int(end) for end in np.cumsum(split_evenly(lines[0], KAGGLE_PARTS)))
        return [
            TextPieces(
                file,
                LinePosition(number, first, ends),
                counted,
                self._rules,
                self._folder,
                self._show,
            )
            for number, (file, first, counted) in enumerate(
                zip(self._raw, first_lines, counts, strict=True)
            )
        ]

    def _count_lines(self, crew: Crew) -> list[list[int]]:
        """Lines of each piece of each file."""
        tasks = [count_tasks(file, number) for number, file in enumerate(self._raw)]
        self._run("counting", [task for of_file in tasks for task in of_file], crew)
        return [
            [n for task in of_file for n in self._folder.intact(self._folder.meta, task)["lines"]]
            for of_file in tasks
        ]

    def _totals(self, sources: Sequence[Any]) -> dict[str, Any]:
        """Sums over all pieces, and the runs of each."""
        totals: dict[str, Any] = {"runs": [], "first_bad": "", "lines_per_file": []}
        sums: Counter[str] = Counter()
        bad: Counter[str] = Counter()
        missing, largest = np.zeros(40, np.int64), np.zeros(FIRST_SPARSE, np.int64)
        for source in sources:
            lines = sums["lines"]
            for piece in source.pieces():
                meta = self._of_piece(piece, self._folder.meta)
                totals["runs"].append(meta["runs"])
                totals["first_bad"] = totals["first_bad"] or meta["first_bad"]
                for name in ("rows", "lines", "clicks", "kept_clicks", "bytes"):
                    sums[name] += meta[name]
                bad.update(meta["bad"])
                missing += meta["missing"]
                np.maximum(largest, meta["largest"], out=largest)
            totals["lines_per_file"].append(sums["lines"] - lines)
        return totals | dict(sums) | {
            "bad": dict(bad), "missing": missing.tolist(), "largest": largest.tolist()
        }  # fmt: skip

    def _of_piece(self, piece: Piece, read: Callable[[Task], Any]) -> Any:
        """What `read` gives of a parsed piece, which is made again if it is damaged."""
        maker = None if piece.maker is piece.task else piece.maker
        return self._folder.intact(read, piece.task, maker)

    def _check_bad_lines(self, totals: dict[str, Any]) -> None:
        found, most = sum(totals["bad"].values()), self._spec.max_bad_lines
        if found > most:
            raise UserError(
                f"{found} bad lines, --max-bad-lines={most}; the first: {totals['first_bad']}",
            )

    # ------------------------------------------------------------ categories to ids

    @cached_property
    def _id_tasks(self) -> list[Task]:
        """A task a column: a section for each piece with the ids of its distinct values."""
        return [
            Task(
                f"ids/{column:02}",
                key_of(self.key, "ids", column),
                lambda writer, column=column: self._number_column(column, writer),
            )
            for column in range(NUM_SPARSE)
        ]

    def _number(self) -> list[int]:
        """The second stage: ids of all categories; gives the rows of each table."""
        if self._original:
            return list(self._original.counts)
        self._run("numbering", self._id_tasks, self.crew)
        return [self._folder.intact(self._folder.meta, task)["count"] for task in self._id_tasks]

    def _number_column(self, column: int, writer: Writer) -> dict[str, Any]:
        ids = IdMap(self._spec.max_ind_range)
        for piece in self._pieces:
            content = self._of_piece(piece, lambda task: self._folder.section(task, 1 + column))
            writer.section([ids.ids(np.frombuffer(content, np.int32))])
        return {"count": ids.num_ids}

    # ------------------------------------------------------------ rows to their places

    def _target(self, totals: dict[str, Any], counts: Sequence[int]) -> RowFiles:
        """The files that training reads.

        Raises:
            UserError: there is nothing to train or to test with.
        """
        spec, original = self._spec, self._original
        num_parts = KAGGLE_PARTS if spec.data_set == "kaggle" else len(self._files)
        if original:
            num_parts = len(original.rows_per_part)
        rows_per_part = [0] * num_parts
        for runs in totals["runs"]:
            for part, rows in runs:
                rows_per_part[part] += rows
        largest = [*totals["largest"], *(count - 1 for count in counts)]
        layout = FLAT if spec.flat else Layout.holding(largest)
        order = "file" if original and original.shuffled else spec.order
        target = RowFiles(
            self._folder.path / "final", layout, order, spec.seed, tuple(rows_per_part)
        )
        if not target.rows["train"] or not target.rows["test"]:
            raise UserError(
                f"too few rows: {target.rows['train']} to train and {target.rows['test']} to test"
                " are left",
            )
        return target

    def _place(self, totals: dict[str, Any], target: RowFiles) -> Shuffle:
        """The third stage: every row to its place in the files."""
        target.make_files()
        shuffle = Shuffle(self._folder, target, totals["runs"], self._encoded, self.key)
        pieces = {
            task.name: piece.task
            for task, piece in zip(shuffle.scatter_tasks, self._pieces, strict=True)
        }
        crew = _with_memory(self.crew, BYTES_OF_A_PARSER)
        self._run("placing", shuffle.scatter_tasks, crew,
                  lambda task: self._folder.discard(pieces[task.name]))  # fmt: skip
        if target.groups:
            crew = _with_memory(self.crew, target.bucket_bytes * 5 // 4)
            self._run("shuffling", shuffle.gather_tasks(), crew)
        return shuffle

    def _encoded(self, number: int) -> PieceRows:
        """A parsed piece's rows, with the ids of its distinct values."""
        piece = self._pieces[number]
        layout = Layout.from_columns(self._of_piece(piece, self._folder.meta)["columns"])
        content = self._of_piece(piece, lambda task: self._folder.section(task, 0))
        rows = np.frombuffer(content, np.uint8).reshape(-1, layout.row_bytes)
        if self._original:
            return PieceRows(rows, layout, None)
        ids = [
            self._folder.intact(lambda task: self._folder.section(task, number), task)
            for task in self._id_tasks
        ]
        return PieceRows(rows, layout, [np.frombuffer(of_column, np.int32) for of_column in ids])

    # ------------------------------------------------------------ the end

    def _publish(
        self, totals: dict[str, Any], counts: list[int], target: RowFiles, shuffle: Shuffle
    ) -> dict[str, Any]:
        """The last stage, by one: all is checked and synced, and appears by a rename."""
        spec, final = self._spec, target.folder
        if find_prepared(spec):  # made by a run that was killed just behind the rename
            return {}
        shuffle.make_whole(shuffle.scatter_tasks)
        shuffle.make_whole(shuffle.gather_tasks())
        for file in self._files:
            file.check_unchanged()
        meta = {
            "format": FORMAT_VERSION,
            "columns": target.layout.columns,
            "rows": target.rows,
            "rows_per_part": target.rows_per_part,
            "counts": counts,
            "recipe": recipe(spec),
            "imported": self._original is not None,
            "sources": [file.fingerprint for file in self._files],
        }
        report = make_report(totals, counts, target.layout.columns, target.rows)
        write_synced(final / "report.json", json.dumps(report, indent=1).encode())
        write_synced(final / "meta.json", json.dumps(meta, indent=1).encode())
        target.sync()
        if spec.flat:
            publish_flat(spec, final, counts)
        else:
            sync_folder(final)
            os.rename(final, spec.directory)
            sync_folder(spec.directory.parent)
        self._announce(report)
        return {}

    def _announce(self, report: dict[str, Any]) -> None:
        rows, total = report["rows"], report["rows_kept"]
        seconds = time.perf_counter() - self._begin
        print(
            f"Prepared {total} rows"
            f" ({rows['train']} train, {rows['test']} test, {rows['val']} validation)"
            f" in {seconds:.1f} s, {total / max(seconds, 1e-9):.0f} rows/s:"
            f" {self._spec.directory.parent}",
            flush=True,
        )
        names = [str(file.path) for file in self._raw]
        doubts = find_doubts(self._spec.data_set, names, report["lines_per_file"])
        if skipped := sum(report["bad_lines"].values()):
            doubts.append(f"bad lines skipped: {skipped}; the first: {report['first_bad_line']}")
        for doubt in doubts:
            print(f"warning: {doubt}", file=sys.stderr, flush=True)


def _give_memory_back() -> None:
    """glibc keeps what was freed, by thread; the next stage has other threads."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


# ---------------------------------------------------------------- the program


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Prepare Criteo data, or make a demo data set; gives the exit status."""
    parser = ArgumentParser(
        prog="data_utils.py", description="Prepares Criteo's files for training."
    )
    add_data_options(parser)
    add_demo_options(parser)
    options = parser.parse_args(argv)
    if options.make_demo:
        print(make_demo(Demo.from_options(options)))
        return 0
    spec = DataSpec.from_options(options)
    already = find_prepared(spec) is not None
    prepared = prepare(spec)
    if already:
        print(f"Prepared already: {prepared.files['train'].parent}")
    _print_report(spec)
    return 0


def _print_report(spec: DataSpec) -> None:
    """The table of what was found, by the first rank, where preparation left one."""
    path = Path(f"{spec.stem}_report.json") if spec.flat else spec.directory / "report.json"
    if Launch.from_environment().rank == 0 and path.is_file():
        print(report_table(json.loads(path.read_text())), f"As JSON: {path}", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
