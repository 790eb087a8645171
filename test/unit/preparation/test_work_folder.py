"""Files of a work folder: complete or absent, made once, and made again if damaged."""

import contextlib
import errno
import fcntl
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from other_process import process

from common.errors import RankError, UserError
from preparation.checked_file import DamagedError, key_of
from preparation.crew import Crew
from preparation.work_folder import Task, WorkFolder

META = {"rows": 12345}
CONTENT = bytes(range(64))
KEY, OTHER = key_of("what it is made from"), key_of("something else")


def write(writer):
    writer.section([CONTENT])
    return META


def task_of(name="stage/a", make=write, key=KEY):
    return Task(name, key, make)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "work" / "stage").mkdir(parents=True)
    return WorkFolder(tmp_path / "work")


def files_in(folder):
    return sorted(path.name for path in (folder.path / "stage").iterdir())


def in_threads(count, action):
    """Call `action(number)` in threads; returns the results."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(action, range(count)))


def is_whole(folder, task=None):
    file = folder.file(task or task_of())
    return file.meta() == META and file.section(0) == CONTENT


# ---------------------------------------------------------------- one file


def test_a_finished_file_is_not_made_again(folder):
    assert not folder.file(task_of()).exists()
    assert folder.build(task_of()) and is_whole(folder)
    assert files_in(folder) == ["a"] and folder.built == {"stage/a"}
    later = WorkFolder(folder.path)
    assert later.build(task_of(make=lambda _: pytest.fail("made again")))
    assert later.built == set() and files_in(folder) == ["a"]


@pytest.mark.parametrize("how", ["descriptor", "process"])
def test_a_file_that_another_one_is_making_is_left_to_it(folder, how):
    """Another process, or another thread of this one; when it is gone, the file is made."""
    with contextlib.ExitStack() as stack:
        if how == "descriptor":
            file = stack.enter_context(open(folder.path / "stage" / "a.new", "wb"))
            file.write(b"half a file" * 1000)
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
        else:

            def make(writer, ready):
                writer.section([b"half a file" * 1000])
                ready()

            stack.enter_context(
                process(lambda ready: folder.build(task_of(make=lambda w: make(w, ready))))
            )
        assert folder.build(task_of()) is False
        assert files_in(folder) == ["a.new"] and not folder.built
        assert folder.build(task_of("stage/b")), "another file is free"
    assert folder.build(task_of()) and files_in(folder) == ["a", "b"]
    a, b = ((folder.path / "stage" / name).read_bytes() for name in "ab")
    assert a == b, "something of the half file is in it"


def test_a_temporary_file_that_is_renamed_before_it_is_locked_is_let_go(folder, monkeypatch):
    """It is a finished file by then, and no longer the one to write to."""
    other, flock, overtaken = WorkFolder(folder.path), fcntl.flock, []

    def late(*args):
        if not overtaken:
            overtaken.append(True)
            assert other.build(task_of())
            other.discard(task_of())
        return flock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    assert folder.build(task_of()) is False and files_in(folder) == []
    assert folder.build(task_of()) and is_whole(folder)
    assert files_in(folder) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_without_locks_files_are_made_all_the_same(folder, monkeypatch, number):
    """Two may make the same one then; any other error of a lock is raised."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    together = threading.Barrier(2)

    def make(writer):
        together.wait(10)  # both are at it
        meta = write(writer)
        together.wait(10)
        return meta

    assert in_threads(2, lambda _: folder.build(task_of(make=make))) == [True, True]
    assert is_whole(folder)
    assert not [name for name in files_in(folder) if str(os.getpid()) in name]
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        folder.build(task_of("stage/c"))


def test_a_task_that_fails_leaves_no_file(folder):
    for error in (UserError("a bad line"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):

        def make(writer, error=error):
            writer.section([bytes(100_000)])
            raise error

        with pytest.raises(type(error)):
            folder.build(task_of(make=make))
        assert files_in(folder) == [] and not folder.built
    assert folder.build(task_of()) and is_whole(folder)


# ---------------------------------------------------------------- damage


def damage(folder, name="stage/a"):
    """Flip a byte of the section."""
    path = folder.path / name
    content = bytearray(path.read_bytes())
    content[3] ^= 0xFF
    path.write_bytes(content)


def test_a_damaged_or_missing_file_is_made_again_when_it_is_read(folder):
    made = []
    task = task_of(make=lambda writer: made.append(1) or write(writer))
    for harm in (lambda: None, lambda: None, lambda: damage(folder), lambda: folder.discard(task)):
        harm()
        assert folder.read_or_rebuild(task, lambda file: file.section(0)) == CONTENT
    assert len(made) == 3 and files_in(folder) == ["a"]


def test_a_damaged_file_is_made_by_the_task_that_makes_many(folder):
    """Its own file says that all are there, so it is discarded too."""
    made = []

    def make_all(_):
        made.append("all")
        for name in "bc":
            folder.ensure(task_of(f"stage/{name}"))
        return {}

    maker, piece = task_of(make=make_all), task_of("stage/b", make=lambda _: pytest.fail("alone"))
    folder.ensure(maker)
    damage(folder, "stage/b")
    assert folder.read_or_rebuild(piece, lambda file: file.section(0), maker) == CONTENT
    assert made == ["all"] * 2 and files_in(folder) == ["a", "b", "c"]


def test_a_file_that_never_can_be_read_is_told_of(folder):
    def read(_):
        raise DamagedError

    with pytest.raises(RankError, match="damaged whenever it is made: check the disk"):
        folder.read_or_rebuild(task_of(), read)


def test_damage_that_many_find_at_once_is_mended_once(folder):
    """By readers of their own, as processes have; none discards what another one mended."""
    made, begin = [], threading.Barrier(6)

    def make(writer):
        made.append(1)
        time.sleep(0.01)
        return write(writer)

    def read(_):
        begin.wait(10)
        task = task_of(make=make)
        return WorkFolder(folder.path).read_or_rebuild(task, lambda file: file.section(0))

    folder.ensure(task_of())
    for _ in range(5):
        damage(folder)
        assert in_threads(6, read) == [CONTENT] * 6
    assert len(made) == 5


# ---------------------------------------------------------------- many files


@pytest.mark.parametrize("threads", [1, 4])
def test_run_makes_all_files_and_tells_of_each_once(folder, threads):
    """Also of those that are there already."""
    tasks = [task_of(f"stage/{k:02}", lambda _, k=k: {"k": k}) for k in range(20)]
    folder.ensure(tasks[3])
    told = []
    folder.run(tasks, Crew(threads), told.append)
    assert sorted(told, key=lambda task: task.name) == tasks
    assert [folder.file(task).meta()["k"] for task in tasks] == list(range(20))
    assert len(files_in(folder)) == 20
    folder.run([], Crew(threads), told.append)


def test_each_rank_begins_at_its_share(folder):
    for rank, first in ((0, 0), (1, 3), (2, 6)):
        made = []
        tasks = [
            task_of(f"stage/{rank}_{k}", lambda _, k=k, made=made: made.append(k) or {})
            for k in range(10)
        ]
        folder.run(tasks, Crew(1, rank, 3), lambda _: None)
        assert made == [*range(first, 10), *range(first)]


def test_many_who_want_the_same_files_make_each_once(folder):
    """Threads with folders of their own, as processes have."""
    made = []

    def task(name):
        def make(writer):
            made.append(name)
            time.sleep(0.002)
            return write(writer)

        return task_of(name, make)

    tasks = [task(f"stage/{k}") for k in range(12)]
    in_threads(3, lambda rank: WorkFolder(folder.path).run(tasks, Crew(2, rank, 3), lambda _: None))
    assert sorted(made) == sorted(task.name for task in tasks)
    assert all(is_whole(folder, task) for task in tasks) and len(files_in(folder)) == 12


def test_run_waits_for_what_another_one_makes(folder):
    """And makes it when that one has died."""
    with process(lambda ready: folder.build(task_of(make=lambda _: ready()))) as child:
        threading.Timer(0.2, lambda: os.kill(child.pid, signal.SIGKILL)).start()
        begin, told = time.monotonic(), []
        folder.run([task_of(), task_of("stage/b")], Crew(2), told.append)
    assert time.monotonic() - begin > 0.1 and folder.built == {"stage/a", "stage/b"}
    assert [done.name for done in told] == ["stage/b", "stage/a"]


def test_the_first_of_the_tasks_that_fail_is_told_of(folder):
    """Those under way are finished and stay, none is begun after it."""
    together, begun = threading.Barrier(4), []

    def make(number):
        def do(writer):
            begun.append(number)
            together.wait(10)
            if number in (1, 3):
                time.sleep(0.2 if number == 1 else 0)  # the later task fails first
                raise UserError(f"task {number}")
            time.sleep(0.1)
            return write(writer)

        return do

    tasks = [task_of(f"stage/{k}", make(k)) for k in range(12)]
    with pytest.raises(UserError, match="task 1"):
        folder.run(tasks, Crew(4), lambda _: None)
    assert sorted(begun) == [0, 1, 2, 3]
    assert files_in(folder) == ["0", "2"] and is_whole(folder, tasks[2])
