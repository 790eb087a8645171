"""Turns raw Criteo text into rows of small integers on disk, which training maps or loads.

    raw text --parse--> pieces --number--> ids --place--> rows in order --publish--> prepared data

Each arrow is a stage of many tasks. Threads, processes and machines share them through a folder of
finished files (preparation.work_folder), so a run that was stopped continues where it ended.
docs/preparation.md describes stages and format. This module is also a program:

    python data_utils.py --data_path=DIR --max-ind-range=10000000 --memory-map
    python data_utils.py --make-demo=DIR --demo-rows=1000000
"""

from common.versions import demand

demand(__name__, "numpy", "numba", "tqdm")

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from common.errors import RankError, UserError, reports_errors
from common.flags import ArgumentParser
from common.launch import Launch
from criteo.columns import KAGGLE_PARTS
from criteo.demo import Demo, add_demo_options, make_demo
from criteo.meta_file import FORMAT_VERSION, recipe
from criteo.original_files import Original, find_original, read_dictionaries
from criteo.prepared import Prepared, check_range, find_prepared
from criteo.raw_files import RawFile, find_raw_files, printable
from criteo.report import make_report, read_report_table
from criteo.row_layout import FLAT, Layout
from criteo.spec import DataSpec, add_data_options
from preparation.checked_file import CheckedFile, key_of
from preparation.crew import Crew, crew_of_this_launch
from preparation.disk_space import check_space, disk_trouble
from preparation.parsed_piece import ParseRules
from preparation.piece_store import IdStore, PieceRows, PieceStore, Totals, add_up
from preparation.publish import announce, publish_files
from preparation.row_files import RowFiles
from preparation.shared_folder import LAST_FILE, FolderGoneError, SharedFolder, has_locks
from preparation.shuffle import Shuffle
from preparation.sizes import DEFAULT_SIZES, Sizes
from preparation.sources import (
    CutFile,
    LinePosition,
    OriginalPieces,
    Source,
    TextPieces,
    count_tasks,
    line_positions,
    read_counts,
)
from preparation.stage import StageProgress, run_stage
from preparation.work_folder import PAUSE, Task, WorkFolder

STAGES = ("lines", "parsed", "ids", "scattered", "gathered")  # folders of finished files

# ---------------------------------------------------------------- preparation


def prepare(spec: DataSpec, sizes: Sizes = DEFAULT_SIZES) -> Prepared:
    """The prepared data of `spec`; if there is none, it is made now, completely or not at all.

    All ranks of a launch do the work together, on one machine or on many that share the folder. If
    the file system has no locks, the first rank does it and the others wait.

    Args:
        spec: which data, and how it is prepared.
        sizes: how large the units of work are.

    Raises:
        UserError: raw or prepared data is wrong, or the disk is too small, full or read-only.
    """
    shared = SharedFolder(spec.work_folder, STAGES)
    if prepared := find_prepared(spec):
        shared.remove_if_idle()  # a run that was killed at its end may have left it
        return prepared
    original = find_original(spec.raw, spec.processed, spec.mapped)
    if original:
        check_range(spec, original.files[0], original.counts)
    raw = [] if original else find_raw_files(spec.raw, spec.data_set)
    job = Job(spec, raw, original, sizes)
    try:
        check_space(spec, raw, original)
        spec.directory.parent.mkdir(parents=True, exist_ok=True)
        if job.crew.rank and not has_locks(spec.directory.parent):
            return _wait_for_prepared(spec)
        with shared.joined(job.key):
            return find_prepared(spec) or run_stages(job)
    except (FolderGoneError, FileNotFoundError, FileExistsError) as error:
        return _made_by_others(spec, error)
    except OSError as error:
        raise RankError(disk_trouble(spec, error)) from error


def _wait_for_prepared(spec: DataSpec) -> Prepared:
    """Wait until the first rank has prepared the data; if it fails, the launcher ends all ranks."""
    while (prepared := find_prepared(spec)) is None:
        time.sleep(PAUSE)
    return prepared


def _made_by_others(spec: DataSpec, error: Exception) -> Prepared:
    """The prepared data, after an error which means that others just finished it."""
    name = getattr(error, "filename", None) or spec.work_folder
    if not Path(name).is_relative_to(spec.work_folder):
        raise error  # a raw file is missing, for example
    for _ in range(100):  # renaming flat files takes a moment
        if prepared := find_prepared(spec):
            return prepared
        time.sleep(0.01)
    raise RankError(f"{spec.work_folder} was removed by somebody: start again") from error


@dataclass(frozen=True)
class Job:
    """The record that all stages share: which data, from which files, and who does the work.

    Attributes:
        spec: which data, and how it is prepared.
        raw: files of text; none if there is an `original`.
        original: arrays that the original program left.
        sizes: how large the units of work are.
        progress: shows the stage that runs.
    """

    spec: DataSpec
    raw: Sequence[RawFile]
    original: Original | None
    sizes: Sizes
    progress: StageProgress = field(default_factory=StageProgress)

    @cached_property
    def folder(self) -> WorkFolder:
        """The finished files of all stages."""
        return WorkFolder(self.spec.work_folder)

    @cached_property
    def crew(self) -> Crew:
        """This process among the ranks of its launch."""
        return crew_of_this_launch(self.spec.parallel)

    @cached_property
    def files(self) -> list[RawFile]:
        """All files that are read."""
        return [RawFile.at(path) for path in self.original.files] if self.original else [*self.raw]

    @cached_property
    def rules(self) -> ParseRules:
        """How lines become rows."""
        spec = self.spec
        return ParseRules(spec.max_ind_range, spec.sub_sample_rate, spec.seed, spec.max_bad_lines)

    @cached_property
    def key(self) -> str:
        """The key of the files and of everything that decides the prepared bytes."""
        facts = [FORMAT_VERSION, recipe(self.spec), self.rules.facts, self.spec.flat]
        return key_of(facts, self.sizes.piece_bytes, [file.fingerprint for file in self.files])

    def run(
        self,
        stage: str,
        tasks: Sequence[Task],
        thread_bytes: int = 0,
        done: Callable[[Task], None] = lambda _: None,
    ) -> None:
        """Run the tasks of a stage, and call `done` for each one whose file is there.

        `thread_bytes` is the memory that one thread takes.
        """
        crew = self.crew.within_memory(thread_bytes)
        run_stage(stage, tasks, self.folder, crew, self.progress, done)


def run_stages(job: Job) -> Prepared:
    """Run all stages; returns the prepared data, also if another process finished it."""
    parsed = parse(job)
    numbered = number(job, parsed)
    files = find_row_files(job, parsed.totals, numbered.counts)
    shuffle = place(job, parsed, numbered, files)

    def finish(_: object) -> dict[str, Any]:
        publish(job, parsed.totals, numbered, files, shuffle)
        return {}

    job.folder.ensure(Task(LAST_FILE, key_of(job.key, LAST_FILE), finish))
    prepared = find_prepared(job.spec)
    assert prepared is not None
    return prepared


# ---------------------------------------------------------------- text to pieces


@dataclass(frozen=True)
class Parsed:
    """All parsed pieces, and their totals."""

    pieces: PieceStore
    totals: Totals


def parse(job: Job) -> Parsed:
    """The first stage: the text, or the original's arrays, becomes pieces of parsed rows.

    Raises:
        UserError: there are more bad lines than --max-bad-lines allows.
    """
    sources = _find_sources(job)

    def stores() -> list[PieceStore]:
        return [PieceStore(job.folder, source.pieces()) for source in sources]

    summary = Task("parsed/totals", key_of(job.key, "totals"), lambda _: add_up(stores()).to_json())
    if not job.folder.file(summary).exists():
        tasks = [task for source in sources for task in source.tasks()]
        job.run("parsing", tasks, job.sizes.parser_bytes)
        job.folder.ensure(summary)
    pieces = [piece for source in sources for piece in source.pieces()]
    totals = Totals.from_json(job.folder.read_or_rebuild(summary, CheckedFile.meta))
    if totals.text.num_bad > job.spec.max_bad_lines:
        raise UserError(
            f"{totals.text.num_bad} bad lines, --max-bad-lines={job.spec.max_bad_lines};"
            f" the first: {totals.text.first_bad}"
        )
    return Parsed(PieceStore(job.folder, pieces), totals)


def _find_sources(job: Job) -> Sequence[Source]:
    """The makers of pieces: one for each file of text, or one for all of the original's arrays."""
    if job.original:
        return [OriginalPieces(job.original, job.folder, job.progress)]
    files = [CutFile(raw, index, job.sizes) for index, raw in enumerate(job.raw)]
    return [
        TextPieces(file, position, job.rules, job.folder, job.progress)
        for file, position in zip(files, _find_line_positions(job, files), strict=True)
    ]


def _find_line_positions(job: Job, files: Sequence[CutFile]) -> list[LinePosition]:
    """Where the files' lines are among all lines; they are counted only if the flags need it.

    Kaggle's file is cut into parts by lines, and sub-sampling draws a number for each line.
    """
    is_kaggle = job.spec.data_set == "kaggle"
    if not is_kaggle and job.spec.sub_sample_rate == 0:
        return [LinePosition()] * len(files)
    tasks = [count_tasks(file) for file in files]
    every = [task for of_file in tasks for task in of_file]
    job.run("counting", every, job.sizes.parser_bytes)
    lines_per_piece = [read_counts(job.folder, of_file) for of_file in tasks]
    return line_positions(lines_per_piece, KAGGLE_PARTS if is_kaggle else 0)


# ---------------------------------------------------------------- categories to ids


@dataclass(frozen=True)
class Numbered:
    """The ids of all categories.

    Attributes:
        counts: rows of each of the 26 tables.
        read: takes a piece's number and returns its rows with their ids.
        values: returns the vocabulary's bytes, block by block; None if nobody knows it.
    """

    counts: list[int]
    read: Callable[[int], PieceRows]
    values: Callable[[], Iterator[Any]] | None


def number(job: Job, parsed: Parsed) -> Numbered:
    """The second stage: each category gets an id, in order of first appearance over all rows."""
    if original := job.original:
        paths, counts = original.dictionaries, list(original.counts)
        values = partial(read_dictionaries, paths, counts) if paths else None
        return Numbered(counts, parsed.pieces.rows, values)
    ids = IdStore(job.folder, parsed.pieces, job.spec.max_ind_range, job.key)
    job.run("numbering", ids.tasks)
    return Numbered(ids.counts(), ids.rows, ids.values)


# ---------------------------------------------------------------- rows in order


def find_row_files(job: Job, totals: Totals, counts: Sequence[int]) -> RowFiles:
    """The files that training reads: their layout, and how many rows go where.

    Args:
        job: what to prepare.
        totals: the totals of all pieces.
        counts: rows of each table.

    Raises:
        UserError: no rows are left to train or to test with.
    """
    spec, original = job.spec, job.original
    num_parts = KAGGLE_PARTS if spec.data_set == "kaggle" else len(job.files)
    if original:
        num_parts = len(original.rows_per_part)
    largest = [*totals.text.largest, *(count - 1 for count in counts)]
    layout = FLAT if spec.flat else Layout.holding(largest)
    order = "file" if original and original.shuffled else spec.order
    folder = job.folder.path / "final"
    files = RowFiles(folder, layout, order, spec.seed, totals.rows_per_part(num_parts), job.sizes)
    if not files.rows["train"] or not files.rows["test"]:
        raise UserError(
            f"too few rows: {files.rows['train']} to train and {files.rows['test']} to test are"
            f" left, expected some of each (the last of {num_parts} parts is for tests):"
            " add lines, or lower --data-sub-sample-rate"
        )
    return files


def place(job: Job, parsed: Parsed, numbered: Numbered, files: RowFiles) -> Shuffle:
    """The third stage: every row goes to its position in the files. Pieces are deleted on the way.

    Returns:
        The shuffle, which knows what was written.
    """
    files.make_files()
    shuffle = Shuffle(job.folder, files, parsed.totals.runs, numbered.read, job.key)
    pieces = {task.name: piece for piece, task in enumerate(shuffle.scatter_tasks)}
    job.run(
        "placing",
        shuffle.scatter_tasks,
        job.sizes.parser_bytes,
        lambda task: parsed.pieces.discard(pieces[task.name]),
    )
    if files.group_rows:
        job.run("shuffling", shuffle.gather_tasks(), files.bucket_bytes * 5 // 4)
    return shuffle


# ---------------------------------------------------------------- the end


def publish(
    job: Job, totals: Totals, numbered: Numbered, files: RowFiles, shuffle: Shuffle
) -> None:
    """The last stage, done by one process: verify all rows and give the data its final name."""
    if find_prepared(job.spec):  # a run was killed right after the rename
        return
    shuffle.verify()
    for file in job.files:
        file.check_unchanged()
    counts, sources = numbered.counts, [file.fingerprint for file in job.files]
    made_from = {"imported": job.original is not None, "sources": sources}
    report = make_report(
        totals.text, totals.lines_per_file, counts, files.layout.columns, files.rows
    )
    publish_files(job.spec, files, counts, numbered.values, made_from, report)
    announce(job.spec, [str(file.path) for file in job.raw], report, job.progress.seconds)


# ---------------------------------------------------------------- the program


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Prepare Criteo data, or make a demo data set; returns the exit status."""
    return run(argv)


def run(argv: Sequence[str] | None, sizes: Sizes = DEFAULT_SIZES) -> int:
    """The program without the catching of errors; `sizes` is what `prepare` takes."""
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
    prepared = prepare(spec, sizes)
    if already:
        print(f"Prepared already: {printable(prepared.files['train'].parent)}")
    _print_report(spec)
    return 0


def _print_report(spec: DataSpec) -> None:
    """Print the table of the report, if there is one, by the first rank only."""
    path = Path(f"{spec.stem}_report.json") if spec.flat else spec.directory / "report.json"
    if Launch.from_environment().rank == 0 and path.is_file():
        print(read_report_table(path), f"As JSON: {printable(path)}", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
