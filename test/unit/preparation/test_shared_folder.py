"""Who comes to a shared folder and who leaves: one result at a time, and nothing needed is lost."""

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path

import pytest
from other_process import process

from common.errors import UserError
from preparation.checked_file import key_of
from preparation.shared_folder import LAST_FILE, SharedFolder, has_locks, try_lock

KEY, OTHER = key_of("a result"), key_of("another one")
STAGE = ["stage"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "work"


def joined(path, key=KEY):
    return SharedFolder(path, STAGE).joined(key)


def finish(path, name="stage/a"):
    (path / name).write_bytes(b"finished")


def is_refused(path, key=OTHER):
    """True if somebody is at work there for another result, which one line says."""
    with pytest.raises(UserError) as error, joined(path, key):
        pytest.fail("got in")
    assert "\n" not in str(error.value) and "other flags or files" in str(error.value)
    assert str(path) in str(error.value)
    return True


def test_two_jobs_do_not_share_a_folder(path):
    """The second is refused and harms nothing, although the first has not finished any file."""

    def work(ready):
        with joined(path):
            (path / "stage" / "a.new").touch()
            ready()

    with process(work):
        assert is_refused(path)
        with joined(path):  # another rank of the first job
            assert is_refused(path)
        assert (path / "stage" / "a.new").exists()
        assert is_refused(path), "the first is still there"
    with joined(path, OTHER):  # the first was killed
        assert is_refused(path, KEY)


def test_whoever_stays_keeps_the_folder(path):
    """Ranks come and go in any order: as long as one is there, no other job gets in."""
    for leaves_first in (0, 1):
        stacks = [contextlib.ExitStack() for _ in range(2)]
        for stack in stacks:
            stack.enter_context(joined(path))
        stacks[leaves_first].close()
        assert is_refused(path)
        stacks[1 - leaves_first].close()
        assert not path.exists()


def test_one_of_the_jobs_that_come_at_once_gets_in(path):
    """Two jobs of two ranks each: both of one job get in, none of the other, time after time."""
    for _ in range(8):
        children, (read, go) = {}, os.pipe()
        for number in range(4):
            key = (KEY, OTHER)[number % 2]
            child = os.fork()
            if child == 0:
                status = 3
                try:
                    os.close(go)
                    os.read(read, 1)  # all begin when it is closed
                    with joined(path, key):
                        time.sleep(0.05)
                        status = 0
                except UserError:
                    status = 1
                finally:
                    os._exit(status)
            children[child] = key
        os.close(read), os.close(go)
        status = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
        inside = [children[child] for child in children if status[child] == 0]
        assert set(status.values()) == {0, 1} and len(inside) == 2 and inside[0] == inside[1]


@pytest.mark.parametrize("finished, stays", [("", False), ("stage/a.new", False),
                                             ("stage/a", True), (LAST_FILE, False)])  # fmt: skip
def test_the_last_one_removes_a_folder_that_is_of_no_use(path, finished, stays):
    """Nothing in it is finished, or everything is; after an error, too."""
    with pytest.raises(UserError, match="line 1"), joined(path):
        if finished:
            finish(path, finished)
        raise UserError("line 1")
    assert path.exists() == stays
    assert not list(path.parent.glob("*.removed"))


def test_who_fails_first_leaves_the_others_their_folder(path):
    """The first rank leaves before any file is finished; the other one finishes one later."""
    with joined(path):
        with pytest.raises(UserError), joined(path):
            raise UserError("line 1")
        finish(path)
    assert path.exists()


def test_a_result_of_other_flags_does_not_end_this_job(path):
    """Its last file is deleted, its other files have their own keys."""
    with joined(path):
        finish(path)
    finish(path, LAST_FILE)  # the run was killed before it removed the folder
    with joined(path, OTHER):
        assert not (path / LAST_FILE).exists() and (path / "stage" / "a").exists()


@pytest.mark.parametrize("owner, name", [(os, "mkdir"), (fcntl, "flock")])
def test_who_comes_while_the_last_one_leaves_has_a_folder(path, owner, name, monkeypatch):
    """The other one removes it at the worst moment, as nothing in it is finished."""
    calls, real = [], getattr(owner, name)

    def call(*args):
        calls.append(name)
        if len(calls) > 1:
            return real(*args)
        if name == "mkdir":
            real(*args)
            return SharedFolder(path).remove()
        SharedFolder(path).remove()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        with joined(path):
            finish(path)
            assert is_refused(path)
    assert path.exists() and len(calls) > 1


@pytest.mark.parametrize("what", ["file", "link to nowhere"])
def test_something_else_at_the_path_is_told_of(path, what):
    path.touch() if what == "file" else path.symlink_to(path.parent / "nowhere")
    with pytest.raises(UserError, match="is no folder: remove it"), joined(path):
        pytest.fail("got in")


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nothing")])
def test_something_else_in_place_of_a_stages_folder_is_told_of(path, make):
    path.mkdir()
    make(path / "stage")
    with pytest.raises(UserError, match=f"stage is no folder: remove {path}"), joined(path):
        pass


def test_an_idle_folder_is_removed_and_a_busy_one_is_not(path):
    """Also what a process left that was killed while it removed a folder."""
    SharedFolder(path, STAGE).remove_if_idle()
    with joined(path):
        finish(path)
        SharedFolder(path, STAGE).remove_if_idle()
        assert (path / "stage" / "a").exists()
    left = path.with_name(f"{path.name}.123.456.removed")
    (left / "stage").mkdir(parents=True)
    SharedFolder(path, STAGE).remove_if_idle()
    assert not path.exists() and not left.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_everybody_gets_in(path, number, monkeypatch):
    """Any other error of a lock is raised."""
    path.parent.mkdir(exist_ok=True)
    assert has_locks(path.parent)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not has_locks(path.parent)
    with joined(path), joined(path):
        finish(path)
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        has_locks(path.parent)
    with pytest.raises(OSError), open(path / "key", "rb") as file:
        try_lock(file, fcntl.LOCK_EX)
