"""The folder of a run, --run-dir: its log, flags and versions, and what other flags put there."""

import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import RankError, UserError
from common.flags_file import FLAGS_FILE, flags_as_json
from common.whole_files import check_place, write_whole
from ranks.process import Process
from reporting.run_log import copied_to_log
from reporting.run_versions import versions_of_run

RUN_DIR = "--run-dir"
LOG, FLAGS, VERSIONS = "train_0.log", "flags.json", "versions.json"
# (where a flag's value is, name of the file that it has if the flag is not given)
FILES_OF_FLAGS = (
    ("tensor_board_filename", "tensorboard"),
    ("metrics_file", "metrics.jsonl"),
    ("report", "report.html"),
)
ANOTHER = "name another folder"


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run's folder and of flags in a file."""
    flag = parser.add_argument_group("Runs").add_argument
    flag(
        RUN_DIR,
        default="",
        metavar="DIR",
        help="keep the run there: what it prints, its flags and versions as JSON, and TensorBoard's"
        " files; a run that is resumed goes on in the same files",
    )
    flag(
        FLAGS_FILE,
        default="",
        metavar="FILE",
        help="take flags from a JSON file, such as a run folder's flags.json; those of the command"
        " line win",
    )


def use_run_folder(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Let files of flags that are not given go into the run's folder; nothing is made yet.

    Raises:
        UserError: the folder cannot be made or written.
    """
    if not options.run_dir:
        return
    try:
        _check(f"{RUN_DIR}={options.run_dir}", Path(options.run_dir))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{RUN_DIR}={options.run_dir}: {reason}: {ANOTHER}") from error
    for name, file in FILES_OF_FLAGS:
        if hasattr(options, name) and getattr(options, name) == parser.get_default(name):
            setattr(options, name, str(Path(options.run_dir, file)))


def _check(name: str, folder: Path) -> None:
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UserError(f"{name}: {there} is not a folder: {ANOTHER}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{name}: {there} is not writable: {ANOTHER}")
    if there == folder:
        for file in (LOG, FLAGS, VERSIONS):
            check_place(f"{name}: {file}", folder / file, ANOTHER)


@contextlib.contextmanager
def run_folder(
    options: argparse.Namespace, process: Process, parser: argparse.ArgumentParser
) -> Iterator[None]:
    """Keep the run in its folder while the block runs, on the first rank.

    Args:
        options: the parsed command line.
        process: this rank.
        parser: the parser of all flags.

    Raises:
        RankError: the folder cannot be made or written.
    """
    if not options.run_dir or options.dry_run or not process.is_first:
        yield
        return
    folder = Path(options.run_dir)
    contents = (
        (FLAGS, flags_as_json(parser, _as_given(options, parser), [RUN_DIR])),
        (VERSIONS, versions_of_run(process)),
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole([(folder / name, _writer(content)) for name, content in contents])
    except OSError as error:
        raise RankError(
            f"{RUN_DIR}={folder}: cannot write it ({error.strerror or error}): {ANOTHER}"
        ) from error
    with copied_to_log(folder / LOG):
        yield


def _as_given(options: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options before `use_run_folder`: another run with these flags has a folder of its own."""
    given = argparse.Namespace(**vars(options))
    for name, file in FILES_OF_FLAGS:
        if getattr(options, name, None) == str(Path(options.run_dir, file)):
            setattr(given, name, parser.get_default(name))
    return given


def _writer(content: Any) -> Callable[[BinaryIO], object]:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    return lambda file: file.write(text.encode())
