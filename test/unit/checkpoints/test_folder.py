"""A checkpoint appears whole, old ones go, and one run at a time has the folder."""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import largest_file
from written import WRITTEN, ends_soon, read_checkpoint, write_checkpoint

from checkpoints.folder import CheckpointFolder, Found, newest_in, remove, set_aside
from checkpoints.index import INDEX, Index
from common.errors import UserError

EMPTY = Index({}, {}, {}, (), {})


def names_in(path):
    return sorted(one.name for one in path.iterdir() if one.name != "lock")


def publish(folder, step=1):
    return folder.publish(folder.begin(step), EMPTY)


@pytest.fixture
def folder(tmp_path):
    found = CheckpointFolder(tmp_path / "all", keep=2)
    with found.opened():
        yield found


def in_fork(act):
    """Run `act` in a forked process; its status."""
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            status = act()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def as_nobody(act):
    """Run `act` in a forked process as a user without rights, if this one is root; its status."""

    def act_without_rights():
        if os.geteuid() == 0:
            os.setuid(65534)
        return act()

    return in_fork(act_without_rights)


# ---------------------------------------------------------------- how one appears and goes


def test_a_checkpoint_appears_whole_under_its_number_and_step(folder):
    assert folder.checkpoints() == []
    path = write_checkpoint(folder, step=3)
    assert path == folder.path / "000001-step-3"
    assert folder.checkpoints() == [Found(path, 1, 3)]
    assert read_checkpoint(folder.path) == WRITTEN


def test_one_that_is_being_written_is_none(folder):
    partial = folder.begin(3)
    assert partial.is_dir() and folder.checkpoints() == []
    (partial / INDEX).write_text(EMPTY.to_text())  # complete but for its name
    assert folder.checkpoints() == []
    with pytest.raises(UserError, match="has none in it"):
        newest_in(folder.path)


def test_all_is_on_the_disk_before_it_appears_and_it_appears_before_old_ones_go(
    folder, monkeypatch
):
    """The order of the calls to the system: what a power cut leaves is whole."""
    for step in (1, 2):
        publish(folder, step)
    partial, calls = folder.begin(3), []
    fsync, rename = os.fsync, os.rename

    def note_sync(file):
        calls.append(f"sync {os.path.basename(os.readlink(f'/proc/self/fd/{file}'))}")
        fsync(file)

    def note_rename(source, target):
        calls.append(f"{os.path.basename(source)} becomes {os.path.basename(target)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    folder.publish(partial, EMPTY)
    assert calls == [
        f"sync {INDEX}",
        "sync 000003-step-3.partial",
        "000003-step-3.partial becomes 000003-step-3",
        "sync all",
        "000001-step-1 becomes 000001-step-1.removed",
    ]


def test_a_new_folder_is_on_the_disk_too(tmp_path, monkeypatch):
    """With the names of those above it that are new."""
    fsync, synced = os.fsync, []

    def note(file):
        synced.append(os.readlink(f"/proc/self/fd/{file}"))
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    with CheckpointFolder(tmp_path / "new" / "all").opened():
        pass
    assert {str(tmp_path), str(tmp_path / "new")} <= set(synced)


def test_the_newest_ones_stay(tmp_path):
    for keep, left in [(1, [5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])]:
        folder = CheckpointFolder(tmp_path / str(keep), keep)
        with folder.opened():
            for step in range(1, 6):
                publish(folder, step)
            assert names_in(folder.path) == [f"{step:06d}-step-{step}" for step in left]


def test_the_number_says_which_is_the_newest_and_no_files_time_does(folder):
    """The clock was set back, and a run that went on from an earlier step saves earlier steps."""
    for number, step in enumerate((50, 40, 60, 7), 1):
        path = publish(folder, step)
        for name in (path / INDEX, path):
            os.utime(name, (2e9 - 1e6 * number,) * 2)
    assert names_in(folder.path) == ["000003-step-60", "000004-step-7"]
    assert [found.step for found in folder.checkpoints()] == [7, 60]
    assert newest_in(folder.path)[0].step == 7
    assert publish(folder, 1).name == "000005-step-1"


def test_numbers_go_on_beyond_six_digits(folder):
    (folder.path / "999999-step-8").mkdir()
    path = publish(folder, 9)
    assert path.name == "1000000-step-9" and folder.checkpoints()[0].path == path


def test_other_names_are_nobodys_and_stay(tmp_path):
    names = (
        "step-3", "00001-step-1", "000001-step-", "000001-step-1x", "x000009-step-9", "notes.txt",
        "a.partial", "000001-step-x.partial", "b.removed", "000009-step-9.damaged",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "000008-step-8").write_text("a file")
    folder = CheckpointFolder(tmp_path, keep=1)
    with folder.opened():
        assert folder.checkpoints() == []
        publish(folder, 1)
        publish(folder, 2)
    assert set(names_in(tmp_path)) == {*names, "000008-step-8", "000002-step-2"}


def test_if_the_index_cannot_be_written_all_is_as_it_was(folder):
    """The disk is full: older ones are whole and none too few."""
    for step in (1, 2):
        write_checkpoint(folder, step)
    partial = folder.begin(3)
    with largest_file(100), pytest.raises(OSError, match="File too large"):
        folder.publish(partial, Index({"long": "x" * 200}, {}, {}, (), {}))
    assert [found.step for found in folder.checkpoints()] == [2, 1]
    shutil.rmtree(partial)
    assert publish(folder, 3).name == "000003-step-3"


def test_what_an_earlier_attempt_left_is_not_in_the_next_one(folder):
    (folder.begin(3) / "left.safetensors").write_text("old")
    assert names_in(folder.begin(3)) == []


def test_a_removed_one_vanishes_at_once_even_if_its_files_cannot_go(folder, monkeypatch):
    path = publish(folder)

    def fail(*_args, **_settings):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "rmtree", fail)
    remove(path)
    assert folder.checkpoints() == [] and names_in(folder.path) == ["000001-step-1.removed"]


def test_a_damaged_one_counts_no_more_and_stays(folder):
    paths = [write_checkpoint(folder, step) for step in (1, 2)]
    aside = set_aside(folder.checkpoints()[0].path)
    assert aside == folder.path / "000002-step-2.damaged" and (aside / INDEX).is_file()
    assert [found.path for found in folder.checkpoints()] == paths[:1]
    again = write_checkpoint(folder, 2)
    assert again.name == "000002-step-2"
    assert set_aside(folder.checkpoints()[0].path) == aside
    for step in (3, 4, 5):
        publish(folder, step)
    assert aside.is_dir()


# ---------------------------------------------------------------- one run at a time


@contextlib.contextmanager
def held(path, forks=False):
    """A process that has the folder; yields its number and that of its child, 0 without one."""
    reader, writer = os.pipe()
    holder = os.fork()
    if not holder:
        with contextlib.suppress(BaseException), CheckpointFolder(path).opened():
            child = os.fork() if forks else 0
            if child or not forks:
                os.write(writer, str(child).encode())
            time.sleep(100)
        os._exit(1)
    child = int(os.read(reader, 20))
    try:
        yield holder, child
    finally:
        kill(holder)
        if child:
            os.kill(child, signal.SIGKILL)
        os.close(reader)
        os.close(writer)


def kill(holder):
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


def refusal(path):
    with pytest.raises(UserError) as error, CheckpointFolder(path).opened():
        pass
    return str(error.value)


def test_a_second_run_is_refused_and_told_who_has_the_folder(tmp_path):
    with held(tmp_path) as (holder, _):
        (tmp_path / "000001-step-1.partial").mkdir()
        who = f"process {holder} on {socket.gethostname()}"
        assert refusal(tmp_path) == (
            f"--checkpoint-dir={tmp_path} is in use by another run ({who}):"
            " wait for it, or name another folder"
        )
        assert refusal(tmp_path)  # a refused one has not taken the lock away
        assert (tmp_path / "000001-step-1.partial").is_dir()  # which the other run writes
        kill(holder)
        with CheckpointFolder(tmp_path).opened():
            assert names_in(tmp_path) == []


def test_a_forked_child_of_the_holder_does_not_keep_the_lock(tmp_path):
    """A loader may outlive its run by some seconds, and the run's restart comes at once."""
    with held(tmp_path, forks=True) as (holder, child):
        assert "in use by another run" in refusal(tmp_path)
        kill(holder)
        os.kill(child, 0)  # it is alive
        with CheckpointFolder(tmp_path).opened():
            pass


def test_a_forked_child_is_refused_while_its_parent_has_the_folder(folder):
    assert in_fork(lambda: int("in use by another run" not in refusal(folder.path))) == 0


def test_the_folder_is_free_after_the_block(tmp_path):
    def open_it():
        with CheckpointFolder(tmp_path).opened():
            return 0

    for _ in range(2):
        with CheckpointFolder(tmp_path).opened():
            pass
        assert in_fork(open_it) == 0


def test_where_there_are_no_locks_the_run_goes_on(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", fail)
    with CheckpointFolder(tmp_path).opened():
        pass


def test_what_a_killed_run_left_is_cleared(tmp_path):
    for name in ("000007-step-70.partial", "000005-step-50.removed", "000006-step-60"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.safetensors").write_text("rows")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "000009-step-9.partial").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "mine").write_text("stays")
    with CheckpointFolder(tmp_path).opened():
        assert (tmp_path / "elsewhere" / "mine").exists()
        left = [name for name in names_in(tmp_path) if not name.endswith("9.partial")]
        assert left == ["000006-step-60", "elsewhere"]


def test_a_link_in_the_locks_place_makes_no_other_file_the_lock(tmp_path):
    """A folder may come from somebody else; the lock is written, and a pipe would be waited for."""
    mine = tmp_path / "mine"
    mine.write_text("stays")
    for why, make in [
        ("Too many levels of symbolic links", lambda path: path.symlink_to(mine)),
        ("lock is no regular file", os.mkfifo),
        ("Is a directory", os.mkdir),
    ]:
        folder = tmp_path / why
        folder.mkdir()
        make(folder / "lock")
        with ends_soon():
            assert f"cannot write there ({why})" in refusal(folder)
    assert mine.read_text() == "stays"


# ---------------------------------------------------------------- places where none can be


def test_a_path_that_cannot_be_a_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path, why in [
        (tmp_path / "file", "File exists"),
        (tmp_path / "file" / "below", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/proc/nowhere"), "No such file or directory"),
    ]:
        assert refusal(path) == (
            f"--checkpoint-dir={path}: cannot write there ({why}):"
            " name a folder that this user may write, on a disk with room"
        )


def test_a_folder_that_may_only_be_read_is_one_line(tmp_path):
    path = tmp_path / "all"
    with CheckpointFolder(path).opened():
        pass
    path.chmod(0o555)
    for name in ("all", "all/below"):
        assert as_nobody(lambda name=name: "Permission denied" not in refusal(tmp_path / name)) == 0


def test_a_lock_that_may_be_written_makes_no_folder_writable(tmp_path, monkeypatch):
    """The run before had the right to make folders, and this one lacks it."""
    path = tmp_path / "all"
    with CheckpointFolder(path).opened():
        pass
    mkdir = os.mkdir

    def refuse(name, *args, **settings):
        if "partial" in str(name):
            raise PermissionError(13, "Permission denied")
        return mkdir(name, *args, **settings)

    monkeypatch.setattr(os, "mkdir", refuse)
    assert "cannot write there (Permission denied)" in refusal(path)


def test_a_full_disk_is_one_line(tmp_path):
    with largest_file(0):
        assert "cannot write there (File too large)" in refusal(tmp_path)


def test_no_trace_is_left_of_the_check(folder):
    assert names_in(folder.path) == []
    assert publish(folder, 4).name == "000001-step-4"


# ---------------------------------------------------------------- room on the disk


@pytest.fixture
def free_bytes(monkeypatch):
    """Sets how much the system says is free."""

    def say(free):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    return say


def test_room_is_checked_for_those_that_are_kept_and_one_more(folder, free_bytes):
    free_bytes(3000)
    folder.check_space(1000)
    free_bytes(2999)
    with pytest.raises(UserError) as error:
        folder.check_space(1000)
    assert str(error.value) == (
        f"--checkpoint-dir={folder.path}: 2 checkpoints and one being written need 3e-06 GB more,"
        " the disk has 3e-06 GB free: free some, lower --keep or name another folder"
    )


def grown(path, num_bytes):
    """Let a checkpoint have so many bytes."""
    (path / "a.safetensors").write_bytes(bytes(num_bytes - (path / INDEX).stat().st_size))


def test_those_that_are_there_have_their_room_already(folder, free_bytes):
    for step in (1, 2):
        grown(publish(folder, step), 1000)
    free_bytes(1000)
    folder.check_space(1000)
    free_bytes(999)
    with pytest.raises(UserError, match="need 1e-06 GB more"):
        folder.check_space(1000)


def test_the_next_one_has_room_before_any_goes(tmp_path, free_bytes):
    """--keep was lowered: five are there until the sixth is complete."""
    with CheckpointFolder(tmp_path, keep=5).opened():
        for step in range(5):
            grown(publish(CheckpointFolder(tmp_path, 5), step), 1000)
        free_bytes(999)
        with pytest.raises(UserError, match="need 1e-06 GB more"):
            CheckpointFolder(tmp_path, keep=1).check_space(1000)
        free_bytes(1000)
        CheckpointFolder(tmp_path, keep=1).check_space(1000)


# ---------------------------------------------------------------- what a path names


def test_a_path_names_a_checkpoint_or_the_folder_of_some(folder, monkeypatch):
    paths = [publish(folder, step) for step in (10, 20)]
    assert [found.path for found in newest_in(folder.path)] == paths[::-1]
    assert newest_in(paths[0]) == [Found(paths[0], 1, 10)]
    moved = folder.path.parent / "best model"
    shutil.copytree(paths[1], moved)
    assert newest_in(moved) == [Found(moved, 0, 0)]
    link = folder.path.parent / "link"
    link.symlink_to(paths[1])
    assert newest_in(link) == [Found(link, 2, 20)]
    monkeypatch.chdir(paths[0])
    here = newest_in(Path("."))
    assert (here[0].number, here[0].step) == (1, 10)


def test_a_path_that_is_no_checkpoint_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "model.pt").mkdir()
    (tmp_path / "model.pt" / INDEX).mkdir()
    for name, why in [
        ("file", "is no folder"),
        ("file/below", "is no folder"),
        ("nowhere", "is no folder"),
        ("empty", "is no checkpoint, and has none in it"),
        ("model.pt", "is no checkpoint, and has none in it"),
        ("circle", "cannot be read (Too many levels of symbolic links)"),
        ("x" * 300, "cannot be read (File name too long)"),
    ]:
        with pytest.raises(UserError) as error:
            newest_in(tmp_path / name)
        assert str(error.value) == (
            f"{tmp_path / name} {why}: give the folder of a checkpoint or a --checkpoint-dir"
        )


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path):
    (tmp_path / "all").mkdir(mode=0o000)

    def act():
        with pytest.raises(UserError, match="cannot be read .Permission denied.: give"):
            newest_in(tmp_path / "all")
        return 0

    assert as_nobody(act) == 0


def test_a_folder_that_does_not_exist_has_no_checkpoints(tmp_path):
    """--resume without a path, at the first start."""
    assert CheckpointFolder(tmp_path / "nowhere").checkpoints() == []
