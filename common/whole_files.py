"""Files that are there whole or not at all: written beside their place, then renamed into it."""

import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError
from common.termination import acts_last


def check_place(name: str, path: Path, remedy: str = "name another file") -> None:
    """Raise a UserError before the work begins if no file can be written at its path after it.

    The path need not exist. If it is a link, the link stays and its target is written.

    Args:
        name: what a message begins with: the flag, and the path.
        path: where the file is to be.
        remedy: what the user can do about it.
    """
    try:
        _check_place(name, path, remedy)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}: {remedy}") from error


def _check_place(name: str, path: Path, remedy: str) -> None:
    kind = path.stat().st_mode if path.exists() else stat.S_IFREG
    if stat.S_ISDIR(kind):
        raise UserError(f"{name} is a folder: {remedy}")
    if not stat.S_ISREG(kind):
        raise UserError(
            f"{name} is a device, pipe or socket, which a file cannot replace: {remedy}"
        )
    target = target_of(path)
    if target.is_symlink():
        raise UserError(f"{name} is a link that leads to itself: {remedy}")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        reason = "is not writable" if target.parent.is_dir() else "does not exist"
        raise UserError(f"{name}: its folder {reason}: {remedy}")
    partial = partial_of(target)
    with contextlib.suppress(FileNotFoundError):  # its name may be too long where path's is not
        if not stat.S_ISREG(partial.lstat().st_mode):
            raise UserError(
                f"{name} is written to {partial} first, and {partial.name} is not a regular file:"
                f" remove it or {remedy}"
            )


def target_of(path: Path) -> Path:
    """The path itself or, if it is a link, the file that it leads to, which need not exist."""
    return Path(os.path.realpath(path))


def partial_of(path: Path) -> Path:
    """The file that becomes `path` by a rename as soon as it is complete."""
    return path.with_name(path.name + ".partial")


def write_whole(files: Sequence[tuple[Path, Callable[[BinaryIO], object]]]) -> None:
    """Write files, and give them their names only when all of them are complete and on the disk.

    Args:
        files: (path, function that writes the file's content), in the order of the renames. It may
            read what it has written.

    Raises:
        OSError: one of them cannot be written; those that were there before are kept.
    """

    def remove_partial(*_: object) -> None:
        for path, _write in files:
            partial_of(path).unlink(missing_ok=True)

    with acts_last(remove_partial):
        try:
            for path, write in files:
                _write_to_disk(partial_of(path), write)
            for path, _ in files:
                os.replace(partial_of(path), path)
            _sync_names([path for path, _ in files])
        finally:
            remove_partial()


def link_whole(source: Path, path: Path) -> bool:
    """Give a finished file a second name, which another file may have had.

    Returns:
        False if the file system makes no hard link there; nothing has changed then.
    """
    partial = partial_of(path)
    try:
        partial.unlink(missing_ok=True)
        os.link(target_of(source), partial)
        os.replace(partial, path)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    _sync_names([path])
    return True


def _sync_names(paths: Sequence[Path]) -> None:
    """Without it, a power cut could leave a checkpoint that says the file is there, and no file."""
    for folder in {path.parent for path in paths}:
        with contextlib.suppress(OSError):  # a folder that may be written, but not read
            sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in a folder are on the disk."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _write_to_disk(path: Path, write: Callable[[BinaryIO], object]) -> None:
    # what a killed run left there may be a second name of another file, as link_whole makes them
    path.unlink(missing_ok=True)
    with open(path, "x+b") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
