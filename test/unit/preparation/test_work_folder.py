"""Pieces of a long job: complete or absent, made once, and found where they are damaged."""

import contextlib
import errno
import fcntl
import os
import select
import signal
import threading
import time

import numpy as np
import pytest
from conftest import ROOT  # noqa: F401  # puts the program on the path

from common.errors import UserError
from preparation.work_folder import Crew, DamagedError, FolderGoneError, Task, WorkFolder, key_of

SECTIONS = (
    [np.arange(5, dtype=np.int32)],
    [],
    [b"abc", np.zeros((3, 2), np.uint8), b"", np.array([7], np.int64)],
    [b""],
    [bytes(range(64))],
)
CONTENTS = [b"".join(bytes(buffer) for buffer in section) for section in SECTIONS]
META = {"rows": 12345, "name": "schön", "runs": [[0, 3], [1, 4]]}
KEY, OTHER = key_of("what it is made from"), key_of("something else")


def write(writer):
    for section in SECTIONS:
        writer.section(section)
    return META


def task_of(name="stage/a", make=write, key=KEY, size=1):
    return Task(name, key, make, size)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "work" / "stage").mkdir(parents=True)
    return WorkFolder(tmp_path / "work")


def files_in(folder):
    return sorted(path.name for path in (folder.path / "stage").iterdir())


def readers(folder, task):
    """By name: all ways to read the piece, as (what it gives, what it should give)."""
    yield "meta", lambda: folder.meta(task), META
    sizes = [len(content) for content in CONTENTS]
    yield "section_sizes", lambda: folder.section_sizes(task).tolist(), sizes
    for number, content in enumerate(CONTENTS):
        yield f"section {number}", lambda n=number: folder.section(task, n), content


def wrong_answers(folder, task, must_find):
    """Readers that give anything but what was written or a DamagedError."""
    wrong = []
    for name, read, want in readers(folder, task):
        try:
            if read() != want or must_find:
                wrong.append(f"{name}: took it for intact")
        except DamagedError:
            pass
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    try:
        folder.has(task)
    except Exception as error:
        wrong.append(f"has: {type(error).__name__}: {error}")
    return wrong


@contextlib.contextmanager
def process(action):
    """Another process (a fork), which says when it is ready and lives until the block ends.

    Args:
        action: called there with a function that says that it is ready and then waits to be killed.
    """
    read, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action(lambda: (os.write(say, b"."), time.sleep(60)))
        finally:
            os._exit(1)
    try:
        assert select.select([read], [], [], 30)[0], "the other process was never ready"
        os.read(read, 1)
        yield child
    finally:
        os.close(read), os.close(say)
        kill(child)


def kill(child):
    """End a child and wait for it; one that was waited for already is no mistake."""
    with contextlib.suppress(ChildProcessError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---------------------------------------------------------------- a piece


def test_a_piece_is_read_as_it_was_written(folder):
    """Sections of arrays and bytes, empty ones too, and the meta."""
    task = task_of()
    assert not folder.has(task)
    assert folder.build(task) and folder.has(task)
    assert folder.meta(task) == META
    assert [folder.section(task, k) for k in range(len(CONTENTS))] == CONTENTS
    assert folder.section_sizes(task).tolist() == [len(content) for content in CONTENTS]
    assert files_in(folder) == ["a"] and folder.built == {"stage/a"}
    with pytest.raises(DamagedError):
        folder.section(task, len(CONTENTS))


def test_a_piece_without_sections_has_its_meta(folder):
    task = task_of(make=lambda _: {})
    folder.ensure(task)
    assert folder.meta(task) == {} and folder.section_sizes(task).tolist() == []


def test_a_finished_piece_is_not_made_again(folder):
    folder.ensure(task_of())
    later = WorkFolder(folder.path)
    assert later.build(task_of(make=lambda _: pytest.fail("made again")))
    assert later.built == set() and files_in(folder) == ["a"]


def test_a_piece_of_another_key_counts_as_absent(folder):
    """It is made anew, and then the first one counts as absent."""
    folder.ensure(task_of())
    other = task_of(key=OTHER, make=lambda _: {"other": True})
    assert not folder.has(other)
    for _, read, _ in readers(folder, other):
        with pytest.raises(DamagedError):
            read()
    folder.ensure(other)
    assert folder.meta(other) == {"other": True} and not folder.has(task_of())


def test_a_discarded_piece_is_absent(folder):
    folder.ensure(task_of())
    folder.discard(task_of())
    assert not folder.has(task_of()) and files_in(folder) == []
    folder.discard(task_of())


def test_keys_differ_where_facts_do():
    facts = ["a", 1, None, [1, 2], {"n": 1.5}]
    assert key_of(*facts) == key_of(*facts)
    assert len({key_of(*facts), key_of(*facts[:4]), key_of("ab"), key_of("a", "b"), key_of()}) == 5


# ---------------------------------------------------------------- damage


def test_no_flipped_byte_gives_wrong_bytes(folder):
    """In sections, meta, index and trailer: a DamagedError, or what that byte has no part in."""
    task = task_of()
    folder.ensure(task)
    path = folder.path / task.name
    whole = path.read_bytes()
    wrong = []
    for place in range(len(whole)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(whole)
            damaged[place] ^= mask
            path.write_bytes(damaged)
            wrong += [
                f"byte {place} of {len(whole)} ^ {mask:#x}: {answer}"
                for answer in wrong_answers(folder, task, False)
            ]
    assert not wrong, "\n".join([f"{len(wrong)} of these:", *wrong[:20]])


def test_each_part_of_a_piece_is_checked_by_who_reads_it(folder):
    """A flipped byte of a section, and of the meta, is found: not only harmless."""
    task = task_of()
    folder.ensure(task)
    path = folder.path / task.name
    whole = path.read_bytes()
    parts = {"meta": whole.index(b'{"rows"')}
    parts |= {f"section {k}": whole.index(CONTENTS[k]) for k in (0, 2, 4)}
    found = {name: read for name, read, _ in readers(folder, task)}
    for name, place in parts.items():
        damaged = bytearray(whole)
        damaged[place + 2] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            found[name]()


def test_a_truncated_or_longer_piece_counts_as_absent(folder):
    """Cut at any byte, the first too; after a crash its end may be zeros, which is found too."""
    task = task_of()
    folder.ensure(task)
    path = folder.path / task.name
    whole = path.read_bytes()
    cut = [whole[:size] for size in range(len(whole))]
    for content in (*cut, whole + b"\0", whole + whole[-10:], bytes(len(whole))):
        path.write_bytes(content)
        assert not folder.has(task)
        assert not wrong_answers(folder, task, must_find=True)
    for size in range(len(whole)):
        path.write_bytes(whole[:size] + bytes(len(whole) - size))
        assert not wrong_answers(folder, task, must_find=False)
    path.unlink()
    folder.ensure(task)
    assert path.read_bytes() == whole


# ---------------------------------------------------------------- who makes it


@pytest.mark.parametrize("how", ["descriptor", "process"])
def test_a_piece_that_another_one_is_making_is_left_to_it(folder, how):
    """Another process, or another thread of this one; when it is gone, the piece is made."""
    with contextlib.ExitStack() as stack:
        if how == "descriptor":
            file = stack.enter_context(open(folder.path / "stage" / "a.new", "wb"))
            file.write(b"half a piece" * 1000)
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
        else:

            def make(writer, ready):
                writer.section([b"half a piece" * 1000])
                ready()

            stack.enter_context(
                process(lambda ready: folder.build(task_of(make=lambda w: make(w, ready))))
            )
        assert folder.build(task_of()) is False
        assert files_in(folder) == ["a.new"] and not folder.built
        assert folder.build(task_of("stage/b")), "another piece is free"
    assert folder.build(task_of()) and files_in(folder) == ["a", "b"]
    assert folder.meta(task_of()) == META and folder.section(task_of(), 4) == CONTENTS[4]
    fresh = WorkFolder(folder.path)
    fresh.ensure(task_of("stage/c"))
    a, c = ((folder.path / "stage" / name).read_bytes() for name in "ac")
    assert a == c, "something of the half piece is in it"


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_the_rename_the_piece_is_complete_or_absent(folder, when):
    def die(*names):
        if when == "after":
            real(*names)
        os.kill(os.getpid(), signal.SIGKILL)

    real, child = os.rename, os.fork()
    if child == 0:
        os.rename = die
        folder.build(task_of())
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert folder.has(task_of()) == (when == "after")
    folder.ensure(task_of())
    assert files_in(folder) == ["a"] and folder.meta(task_of()) == META


def test_many_who_want_the_same_pieces_make_each_once(folder):
    """Threads with folders of their own, as processes have."""
    made, lock = [], threading.Lock()

    def make(name):
        def count(writer):
            with lock:
                made.append(name)
            time.sleep(0.002)
            return write(writer)

        return count

    names = [f"stage/{k}" for k in range(12)]
    tasks = [task_of(name, make(name)) for name in names]

    def work(rank):
        WorkFolder(folder.path).run(tasks, Crew(2, rank, 3), lambda _: None)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted(names)
    assert files_in(folder) == sorted(name.removeprefix("stage/") for name in names)
    assert all(folder.meta(task) == META for task in tasks)


def test_a_file_that_another_one_renames_before_it_is_locked_is_let_go(folder, monkeypatch):
    """It is a piece by then, and no more the file to write to; here it is used up already."""
    other, flock, overtaken = WorkFolder(folder.path), fcntl.flock, []

    def late(*args):
        if not overtaken:
            overtaken.append(True)
            assert other.build(task_of())
            other.discard(task_of())
        return flock(*args)

    monkeypatch.setattr(fcntl, "flock", late)
    assert folder.build(task_of()) is False and files_in(folder) == []
    assert folder.build(task_of()) and folder.meta(task_of()) == META
    assert files_in(folder) == ["a"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_where_there_are_no_locks_pieces_are_made_all_the_same(folder, monkeypatch, number):
    """Two may make the same one then; of any other error of a lock the run is told."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    together = threading.Barrier(2)

    def make(writer):
        together.wait(10)  # both are at it
        written = write(writer)
        together.wait(10)
        return written

    task, results = task_of(make=make), []
    threads = [threading.Thread(target=lambda: results.append(folder.build(task))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True, True]
    assert folder.meta(task) == META and folder.section(task, 4) == CONTENTS[4]
    with folder.joined(KEY, ["stage"]):
        folder.ensure(task_of("stage/b"))
    assert folder.has(task_of("stage/b"))
    assert [name for name in files_in(folder) if not name.endswith(".new")] == ["a", "b"]
    assert not [name for name in files_in(folder) if str(os.getpid()) in name]
    number = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        folder.build(task_of("stage/c"))


def test_make_that_raises_leaves_no_file(folder):
    for error in (UserError("a bad line"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()):

        def make(writer, error=error):
            writer.section([bytes(100_000)])
            raise error

        with pytest.raises(type(error)):
            folder.build(task_of(make=make))
        assert files_in(folder) == [] and not folder.built
    assert folder.build(task_of()) and folder.meta(task_of()) == META


# ---------------------------------------------------------------- run


@pytest.mark.parametrize("threads", [1, 4])
def test_run_makes_all_pieces_and_tells_of_each_once(folder, threads):
    """Also of those that are there already."""
    tasks = [task_of(f"stage/{k:02}", lambda _, k=k: {"k": k}) for k in range(20)]
    folder.ensure(tasks[3])
    told = []
    folder.run(tasks, Crew(threads), told.append)
    assert sorted(told, key=lambda task: task.name) == tasks
    assert [folder.meta(task)["k"] for task in tasks] == list(range(20))
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


def test_run_waits_for_what_another_one_makes(folder):
    """And makes it when that one has died."""
    task = task_of()
    with process(lambda ready: folder.build(task_of(make=lambda _: ready()))) as child:
        threading.Timer(0.2, lambda: os.kill(child, signal.SIGKILL)).start()
        begin, told = time.monotonic(), []
        folder.run([task, task_of("stage/b")], Crew(2), told.append)
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
    assert files_in(folder) == ["0", "2"] and folder.meta(tasks[2]) == META


# ---------------------------------------------------------------- the folder


def refused(folder, key=OTHER):
    """The one line that tells that somebody is at work there."""
    with pytest.raises(UserError) as error, WorkFolder(folder.path).joined(key, ["stage"]):
        pytest.fail("got in")
    assert "\n" not in str(error.value) and "other flags or files" in str(error.value)
    assert str(folder.path) in str(error.value)
    return True


def test_two_jobs_do_not_share_a_folder(folder):
    """The second is refused, and harms nothing, although the first has not finished any piece."""

    def work(ready):
        with WorkFolder(folder.path).joined(KEY, ["stage"]):
            WorkFolder(folder.path).build(task_of(make=lambda _: ready()))

    with process(work):
        assert refused(folder) and files_in(folder) == ["a.new"]
        with WorkFolder(folder.path).joined(KEY, ["stage"]):  # one of its own ranks
            assert refused(folder)
        assert files_in(folder) == ["a.new"]
        assert refused(folder), "the first is still there"
    with folder.joined(OTHER, ["stage"]):  # nobody is
        folder.ensure(task_of(key=OTHER))
        assert refused(folder, KEY)
    with folder.joined(KEY, ["stage"]):
        assert not folder.has(task_of()) and folder.has(task_of(key=OTHER))


def test_who_stays_keeps_the_folder(folder):
    """Ranks come and go in any order: as long as one is there, no other job gets in."""
    for leaves_first in (0, 1):
        stacks = [contextlib.ExitStack() for _ in range(2)]
        for stack in stacks:
            stack.enter_context(WorkFolder(folder.path).joined(KEY, ["stage"]))
        stacks[leaves_first].close()
        assert refused(folder)
        folder.ensure(task_of())
        stacks[1 - leaves_first].close()
        with folder.joined(OTHER, ["stage"]):
            folder.discard(task_of())


def test_of_jobs_that_come_at_once_one_gets_in(folder):
    """Two jobs of two ranks each, often: both of one of the jobs get in, none of the other."""
    both = []
    for _ in range(12):
        folder.remove()
        children, (read, go) = {}, os.pipe()
        for number in range(4):
            key = (KEY, OTHER)[number % 2]
            child = os.fork()
            if child == 0:
                status = 3
                try:
                    os.close(go)
                    os.read(read, 1)  # all begin when it is closed
                    with WorkFolder(folder.path).joined(key, ["stage"]):
                        time.sleep(0.05)
                        status = 0
                except UserError:
                    status = 1
                finally:
                    os._exit(status)
            children[child] = key
        os.close(read), os.close(go)
        status = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}
        inside = {children[child] for child in children if status[child] == 0}
        assert set(status.values()) <= {0, 1} and len(inside) == 1
        both.append(sum(code == 0 for code in status.values()))
    assert set(both) == {2}, both


def test_nothing_is_left_where_nothing_was_finished(folder):
    folder.remove()

    def fail(_):
        raise UserError("line 1")

    with pytest.raises(UserError, match="line 1"), folder.joined(KEY, ["stage"]):
        folder.run([task_of(make=fail)], Crew(), lambda _: None)
    assert not folder.path.exists()
    with pytest.raises(UserError, match="line 1"), folder.joined(KEY, ["stage"]):
        folder.run([task_of(), task_of("stage/b", fail)], Crew(), lambda _: None)
    assert files_in(folder) == ["a"]


def test_who_fails_first_leaves_the_others_their_folder(folder):
    """One rank leaves before any piece is finished; the other one's piece is finished later."""
    with folder.joined(KEY, ["stage"]):
        other = WorkFolder(folder.path)

        def make(writer):
            with pytest.raises(UserError), other.joined(KEY, ["stage"]):
                raise UserError("line 1")
            return write(writer)

        assert folder.build(task_of(make=make))
        assert folder.meta(task_of()) == META


@pytest.mark.parametrize("owner, name", [(os, "mkdir"), (fcntl, "flock")])
def test_who_comes_while_the_last_one_leaves_has_a_folder(folder, owner, name, monkeypatch):
    """Which the other one takes along at the worst moment, as it has not finished anything."""
    folder.remove()
    calls, real = [], getattr(owner, name)

    def call(*args):
        calls.append(name)
        if len(calls) > 1:
            return real(*args)
        if name == "mkdir":
            real(*args)
            return folder.remove()
        folder.remove()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, call)
        with folder.joined(KEY, ["stage"]):
            assert folder.build(task_of()) and refused(folder)
    assert folder.meta(task_of()) == META


def test_a_removed_folder_is_told_of(folder):
    """All that begins to make a piece says so; reading finds nothing."""
    folder.ensure(task_of())
    folder.remove()
    assert not folder.path.exists()
    folder.remove()
    for action in (
        lambda: folder.build(task_of()),
        lambda: folder.ensure(task_of()),
        lambda: folder.run([task_of()], Crew(2), lambda _: None),
    ):
        with pytest.raises(FolderGoneError):
            action()
    with pytest.raises(DamagedError):
        folder.meta(task_of())
    assert not folder.path.exists()
