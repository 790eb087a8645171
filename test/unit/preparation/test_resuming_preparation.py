"""However often preparation is stopped, and whoever does the work, the same bytes come of it."""

import contextlib
import errno
import fcntl
import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import pytest
from by_hand import by_hand, spec
from conftest import ROOT, Result, train, write_days

import data_utils
from criteo import raw_files
from criteo.raw_files import RawFile
from data_utils import STAGES, Preparation, crew_of_this_launch, main, prepare
from preparation import parsed_piece, publish, row_files
from preparation.shuffle import Shuffle
from preparation.sources import TextPieces
from preparation.work_folder import WorkFolder, Writer

ROWS = 36  # of a day: about 5,700 bytes, two pieces of text
PIECE, BLOCK, BUCKET = 3000, 700, 1000
TOTAL = ("--memory-map", "--data-randomize=total")
DAY = ("--memory-map", "--data-randomize=day")
SAMPLED = ("--data-sub-sample-rate=0.4",)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces, blocks and buckets so small that tiny days have many; no launcher's environment."""
    monkeypatch.setattr(parsed_piece, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(row_files, "SMALLEST_BUCKET", BUCKET)
    monkeypatch.setattr(row_files, "LARGEST_BUCKET", BUCKET)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


class Data:
    """A folder of raw files, and what is prepared from them: `a`, `b`, ... beside the folder."""

    def __init__(self, folder, num_days=3, rows=ROWS):
        self.folder, self.raw = folder, folder / "raw"
        self.days = write_days(self.raw, num_days, rows)

    def flags(self, name="a"):
        return [f"--data_path={self.raw}", f"--processed-data-file={self.folder / name}"]

    def run(self, *flags, name="a"):
        return train(*self.flags(name), *flags, program=main)

    def bytes_of(self, *flags, name="a"):
        """Prepare in this process; gives all files by name, and takes them away."""
        result = self.run(*flags, name=name)
        assert result.status == 0 and result.err == "", result.err
        return self.take(name)

    def take(self, name="a"):
        folder = self.folder / f"{name}.prepared"
        assert not self.left(name)
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert sorted(found) == ["meta.json", "report.json", "test.bin", "train.bin", "val.bin"]
        shutil.rmtree(folder)
        return found

    def take_flat(self):
        """Likewise the flat files; the counts lie beside the raw files, or, the next time, not."""
        assert not self.left()
        counts = list(self.folder.rglob("*_fea_count.npz"))
        tables = [np.load(path)["counts"].tolist() for path in counts]
        assert tables and all(table == tables[0] for table in tables)
        for path in self.folder.rglob("*fea_count.npz*"):
            path.unlink()
        paths = [path for path in self.folder.iterdir() if path.name.startswith("a_")]
        found = {path.name: path.read_bytes() for path in paths}
        assert {f"a_{split}.bin" for split in ("train", "test", "val")} < set(found)
        for path in paths:
            path.unlink()
        return found | {"counts": tables[0]}

    def partial(self, name="a"):
        return self.folder / f"{name}.prepared.partial"

    def left(self, name="a"):
        """What lies beside prepared data but is none."""
        return [path.name for path in self.folder.glob(f"{name}.prepared?*")]

    def pack(self, day):
        """Let a day be a .gz instead."""
        path = self.raw / f"day_{day}"
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path.unlink()

    def to_kaggle(self):
        """Let the first day be Kaggle's train.txt."""
        for path in self.raw.glob("day_[1-9]"):
            path.unlink()
        os.rename(self.raw / "day_0", self.raw / "train.txt")

    def edit_line(self, day, number, text):
        path = self.raw / f"day_{day}"
        lines = path.read_text().splitlines()
        lines[number - 1] = text
        path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def data():
    """In memory where the system lets us: thousands of tiny files are made and removed here."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="dlrm_test_") as folder:
        yield Data(Path(folder))


class StoppedError(Exception):
    """A test stops the run."""


def stopped_at(owner, name, *flags, data, after=0):
    """Run until the function was called `after` times and once more."""
    calls, real = itertools.count(), getattr(owner, name)

    def stop(*args):
        if next(calls) == after:
            raise StoppedError
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(StoppedError):
            data.run(*flags)


@pytest.fixture
def calls(monkeypatch):
    """Counts the tasks that are worked on, by stage."""
    counted, lock = Counter(), threading.Lock()
    stages = {
        "parsed": (TextPieces, "_parse"),
        "ids": (Preparation, "_number_column"),
        "scattered": (Shuffle, "_scatter"),
        "gathered": (Shuffle, "_gather"),
    }

    def counting(real, stage):
        def count(*args):
            with lock:
                counted[stage] += 1
            return real(*args)

        return count

    for stage, (owner, name) in stages.items():
        monkeypatch.setattr(owner, name, counting(getattr(owner, name), stage))
    return counted


# ---------------------------------------------------------------- other processes


class Child:
    """A fork of this process that prepares; everything is imported and compiled already.

    Args:
        argv: of data_utils.
        report: file that takes what it printed.
        env: of its own.
        first: is called there before.
    """

    def __init__(self, argv, report, env=None, first=None):
        self._report, self._result = report, None
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                os.environ.update(env or {})
                if first is not None:
                    first()
                result = train(*argv, program=main)
                report.write_text(json.dumps([result.out, result.err]))
                status = result.status
            except Exception:
                report.write_text(json.dumps(["", traceback.format_exc()]))
            finally:
                os._exit(status)

    def result(self):
        """Wait for its end; of a killed one the status is minus the signal."""
        if self._result is None:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            texts = json.loads(self._report.read_text()) if self._report.exists() else ["", ""]
            self._report.unlink(missing_ok=True)
            self._result = Result(status, *texts)
        return self._result

    def end(self):
        """Kill it where it has not ended."""
        if self._result is None:
            os.kill(self.pid, signal.SIGKILL)
            self.result()


def ranks(data, number, *flags, first=lambda rank: None, name="a"):
    """Prepare by so many forks; gives their Results."""
    children = [
        Child(
            [*data.flags(name), *flags],
            data.folder / f"rank_{rank}",
            {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)},
            lambda rank=rank: first(rank),
        )
        for rank in range(number)
    ]
    return [child.result() for child in children]


@contextlib.contextmanager
def at_work(data, *flags, at=(TextPieces, "_parse"), after=0):
    """A fork that prepares and, while the block runs, is about to call that function once more.

    Its file `made` grows by a byte a piece.
    """
    reached, go_on, made = (data.folder / name for name in ("reached", "go_on", "made"))

    def first():
        owner, name = at
        calls, real, finish = itertools.count(), getattr(owner, name), Writer.finish

        def wait(*args):
            if next(calls) == after:
                reached.touch()
                wait_for(go_on)
            return real(*args)

        def note(*args):
            with open(made, "ab") as file:
                file.write(b".")
            finish(*args)

        setattr(owner, name, wait)
        Writer.finish = note

    child = Child([*data.flags(), *flags], data.folder / "report", first=first)
    try:
        wait_for(reached)
        yield child
        go_on.touch()
        child.result()
    finally:
        child.end()
        reached.unlink(missing_ok=True), go_on.unlink(missing_ok=True)


def wait_for(path, seconds=30):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.005)


# ---------------------------------------------------------------- the same bytes

ORDERS = {
    "file": (),
    "file_sampled": SAMPLED,
    "none": ("--memory-map", "--data-randomize=none"),
    "total": TOTAL,
    "day": DAY,
    "total_sampled": (*TOTAL, *SAMPLED, "--max-ind-range=7"),
    "day_sampled": (*DAY, *SAMPLED, "--numpy-rand-seed=5"),
}


@pytest.mark.parametrize("data_set", ["terabyte", "kaggle"])
@pytest.mark.parametrize("order", ORDERS)
def test_threads_and_blocks_do_not_show_in_the_bytes(data, order, data_set, monkeypatch, calls):
    """Nor do they in the report and in meta.json."""
    if data_set == "kaggle":
        data.to_kaggle()
    want = data.bytes_of(*ORDERS[order])
    pieces = {"terabyte": 6, "kaggle": 2}[data_set]
    assert calls["parsed"] == calls["scattered"] == pieces and calls["ids"] == 26
    assert (calls["gathered"] > 1) == (order[:4] not in ("file", "none"))
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 4 << 20)
    assert data.bytes_of(*ORDERS[order]) == want
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    assert crew_of_this_launch(True).threads == 3
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 97)
    assert data.bytes_of(*ORDERS[order], "--dataset-multiprocessing") == want


def rows_of(data, *flags):
    """(prepared, its training rows)."""
    prepared = prepare(spec(*data.flags(), *flags))
    return prepared, prepared.layout.unpack(np.array(prepared.rows("train")))


@pytest.mark.parametrize("packed", [(), (0,), (0, 1, 2)])
def test_pieces_buckets_and_threads_keep_to_what_was_made_by_hand(data, packed, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    for day in packed:
        data.pack(day)
    parts, counts = by_hand(data.days)
    prepared, rows = rows_of(data, "--dataset-multiprocessing")
    np.testing.assert_array_equal(rows, np.concatenate(parts[:2]))
    assert list(prepared.counts) == counts and prepared.rows_per_part == (ROWS,) * 3
    shutil.rmtree(prepared.files["train"].parent)
    _, shuffled = rows_of(data, *TOTAL, "--dataset-multiprocessing")
    assert sorted(shuffled.tolist()) == sorted(rows.tolist())
    assert shuffled.tolist() != rows.tolist()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_a_line_that_begins_with_a_piece_is_read_once(data, more, packed, monkeypatch):
    """Lines of one length, a whole number of them in a piece, or a byte more or less."""
    for day, rows in enumerate(data.days):
        for k, row in enumerate(rows):
            row[1:] = [f"{k + 10}"] * 13 + [f"{day}{k:07}"] * 26
        (data.raw / f"day_{day}").write_text("".join("\t".join(row) + "\n" for row in rows))
    lengths = {len("\t".join(row)) + 1 for rows in data.days for row in rows}
    monkeypatch.setattr(parsed_piece, "PIECE_BYTES", 4 * lengths.pop() + more)
    assert not lengths
    if packed:
        data.pack(1)
    parts, _ = by_hand(data.days)
    prepared, rows = rows_of(data)
    np.testing.assert_array_equal(rows, np.concatenate(parts[:2]))
    assert prepared.rows_per_part == (ROWS,) * 3


# ---------------------------------------------------------------- gzip


def without_names(files):
    """What does not tell plain files from packed ones."""
    meta = json.loads(files["meta.json"])
    del meta["sources"]
    return files | {"meta.json": meta}


@pytest.mark.parametrize("order", ["file_sampled", "total", "total_sampled", "day"])
@pytest.mark.parametrize("packed", [(0,), (1, 2), (0, 1, 2)])
def test_packed_days_give_the_bytes_of_plain_ones(data, packed, order, monkeypatch):
    """And are never unpacked on disk: nothing there holds a line of them."""
    plain = data.bytes_of(*ORDERS[order])
    line = (data.raw / f"day_{packed[0]}").read_bytes().splitlines()[3]
    for day in packed:
        data.pack(day)
    looked, number = [], Preparation._number

    def look(self):
        files = [path for path in data.folder.rglob("*") if path.is_file()]
        looked.append(len(files))
        assert not [path for path in files if line in path.read_bytes()]
        return number(self)

    monkeypatch.setattr(Preparation, "_number", look)
    found = data.bytes_of(*ORDERS[order])
    assert looked[0] > 6 and without_names(found) == without_names(plain)
    sources = [source["name"] for source in json.loads(found["meta.json"])["sources"]]
    assert sources == [f"day_{day}.gz" if day in packed else f"day_{day}" for day in range(3)]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(3))
    assert data.bytes_of(*ORDERS[order], "--dataset-multiprocessing") == found


def test_a_packed_train_txt_gives_the_bytes_of_a_plain_one(data):
    data.to_kaggle()
    plain = data.bytes_of(*TOTAL)
    path = data.raw / "train.txt"
    (data.raw / "train.txt.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert without_names(data.bytes_of(*TOTAL)) == without_names(plain)


@pytest.mark.parametrize("ends", ["newline", "none", "members"])
def test_a_packed_day_that_ends_with_a_piece_gives_the_same_bytes(data, ends, monkeypatch):
    """Its text is as long as a number of whole pieces; also without a last newline."""
    path = data.raw / "day_0"
    text = path.read_bytes()
    text = text if ends != "none" else text[:-1]
    text = text if len(text) % 2 == 0 else b"\t".join([text[:1], b"0" + text[2:]])
    monkeypatch.setattr(parsed_piece, "PIECE_BYTES", len(text) // 2)
    path.write_bytes(text)
    plain = data.bytes_of(*TOTAL)
    data.pack(0)
    if ends == "members":  # as pigz or cat make them
        parts = (text[:1000], text[1000:1001], text[1001:])
        packed = b"".join(gzip.compress(part) for part in parts)
        path.with_name("day_0.gz").write_bytes(packed)
    assert without_names(data.bytes_of(*TOTAL)) == without_names(plain)


# ---------------------------------------------------------------- killed anywhere

WATCHED = ("rename", "replace", "fsync", "pwrite", "unlink", "mkdir")


class Killer:
    """Counts all that the run does to the disk and kills its process at one of them.

    Args:
        at: number of the call, from 0; none: all are only listed in `seen`.
        how: before, after, or half: when half of the bytes are written, where some are.
    """

    def __init__(self, at=None, how="before"):
        self.seen, self._at, self._how = [], at, how

    def install(self, patch):
        for name in WATCHED:
            patch.setattr(os, name, self._watched(name, getattr(os, name)))
        for name in ("section", "finish"):
            real = getattr(Writer, name)
            patch.setattr(Writer, name, self._watched(name, real))

    def install_for_good(self):
        self.install(pytest.MonkeyPatch())

    def _watched(self, name, real):
        def call(*args, **settings):
            number = len(self.seen)
            self.seen.append((name, self._where(name, args)))
            if number != self._at:
                return real(*args, **settings)
            try:
                self._do_last(name, real, args, settings)
            finally:  # a call may fail, as that of a folder that is there already
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    def _do_last(self, name, real, args, settings):
        if self._how == "half" and name == "pwrite":
            real(args[0], args[1][: len(args[1]) // 2], args[2])
        elif self._how != "before":
            real(*args, **settings)
        if self._how == "half" and name == "section":
            args[0]._file.flush()
            os.ftruncate(args[0]._file.fileno(), args[0]._size // 2)

    @staticmethod
    def _where(name, args):
        if name in ("fsync", "pwrite"):
            return Path(os.readlink(f"/proc/self/fd/{args[0]}")).name
        if name in ("rename", "replace"):
            path = Path(args[1])
            return path.parent.name if path.parent.name in STAGES else path.name
        return ""


def plan(seen, most, wanted):
    """Where to kill: all of `wanted` both before and after, and evenly over all other calls."""
    chosen = [
        (index, how)
        for event in wanted
        for places in [[index for index, each in enumerate(seen) if each == event]]
        for index in places[len(places) // 2 :][:1]
        for how in ("before", "half", "after")[:: 1 if event[0] == "pwrite" else 2]
    ]
    step = len(seen) / max(most - len(chosen), 1)
    hows = itertools.cycle(["after", "half", "before"])
    spread = [int(step * k) for k in range(max(most - len(chosen), 0))]
    return chosen + [(index, how) for index, how in zip(spread, hows, strict=False)]


def killed_often(data, flags, most, wanted, take):
    """Kill runs anywhere, run again to the end, each time the bytes are an unbroken run's."""
    killer = Killer()
    with pytest.MonkeyPatch.context() as patch:
        killer.install(patch)
        assert data.run(*flags).status == 0
    want, seen, draw = take(), killer.seen, random.Random(1)
    assert set(wanted) <= set(seen), sorted(set(seen))
    wanted = [*wanted, *dict.fromkeys(event for event in seen if event[0] == "fsync")]
    killed = Counter()
    for at, how in plan(seen, most, wanted):
        assert in_child(data, flags, Killer(at, how)) == -signal.SIGKILL
        killed[seen[at], how] += 1
        while draw.random() < 0.4:  # the next one is killed too, if it gets so far
            again = Killer(draw.randrange(len(seen)), draw.choice(["before", "after", "half"]))
            assert in_child(data, flags, again) in (0, -signal.SIGKILL)
        result = data.run(*flags)
        assert result.status == 0 and result.err == "", (seen[at], how, result.err)
        assert not data.left(), (seen[at], how)
        assert take() == want, (seen[at], how)
    assert all(killed[event, how] for event in wanted for how in ("before", "after"))
    return killed


def in_child(data, flags, killer):
    argv, report = [*data.flags(), *flags], data.folder / "report"
    return Child(argv, report, first=killer.install_for_good).result().status


PLACES = [("rename", stage) for stage in ("parsed", "ids", "scattered", "gathered")]


def test_killed_anywhere_fifty_times(data):
    """In each rename and each fsync, in writes, while it removes; also in the run after it."""
    wanted = [*PLACES, ("rename", "lines"), ("rename", "a.prepared"), ("rename", "published")]
    wanted += [("pwrite", "train.bin"), ("pwrite", "val.bin")]
    killed = killed_often(data, [*TOTAL, *SAMPLED], 54, wanted, data.take)
    assert killed.total() >= 50
    places = {place for (name, place), _ in killed if name == "fsync"}
    assert places == {
        *("report.json", "meta.json", "train.bin", "test.bin", "val.bin"),
        *("final", data.folder.name),
    }
    assert {name for (name, _), _ in killed} >= {"section", "unlink"}


def test_killed_anywhere_with_packed_days(data):
    for day in (0, 2):
        data.pack(day)
    killed_often(data, list(DAY), 26, PLACES, data.take)


def test_killed_while_the_flat_files_are_moved(data):
    """Each of them appears by a rename; the last ones make it complete."""

    parts = ["a_report.json", "a_meta.json", *(f"a_{s}.bin" for s in ("train", "test", "val"))]
    killer = Killer()
    with pytest.MonkeyPatch.context() as patch:
        killer.install(patch)
        assert data.run("--mlperf-bin-loader", *TOTAL).status == 0
    data.take_flat()
    moves = [event for event in dict.fromkeys(killer.seen) if event[0] == "replace"]
    assert len(moves) == 1 + len(parts)
    killed_often(data, ["--mlperf-bin-loader", *TOTAL], 28, moves, data.take_flat)


# ---------------------------------------------------------------- nothing twice


@pytest.mark.parametrize("packed", [(), (0, 1)])
def test_what_is_finished_is_not_done_again(data, calls, packed):
    """Stopped in each stage after some tasks: the next run does the others."""
    for day in packed:
        data.pack(day)
    want = data.bytes_of(*TOTAL)
    whole = dict(calls)
    stages = {
        "parsed": (TextPieces, "_parse", 3),
        "ids": (Preparation, "_number_column", 20),
        "scattered": (Shuffle, "_scatter", 4),
        "gathered": (Shuffle, "_gather", 2),
        "published": (Preparation, "_publish", 0),
    }
    for number, (stage, (owner, name, after)) in enumerate(stages.items()):
        stopped_at(owner, name, *TOTAL, data=data, after=after)
        left = len(list((data.partial() / "parsed").glob("*_*")))
        assert left == {"parsed": 3, "ids": 6, "scattered": 2}.get(stage, 0), "of no use"
        calls.clear()
        assert data.bytes_of(*TOTAL) == want
        before, later = list(stages)[:number], list(stages)[number + 1 :]
        assert not any(calls[done] for done in before)
        assert calls[stage] == whole.get(stage, after) - after
        assert all(calls[rest] == whole[rest] for rest in later if rest in whole)


def test_stopped_after_every_task_it_comes_to_an_end(data, calls):
    """Each run finishes one piece of text more."""
    want = data.bytes_of(*TOTAL)
    assert calls["parsed"] == 6
    for _ in range(6):
        stopped_at(TextPieces, "_parse", *TOTAL, data=data, after=1) if _ < 5 else None
    assert len(list((data.partial() / "parsed").glob("*_*"))) == 5
    calls.clear()
    assert data.bytes_of(*TOTAL) == want and calls["parsed"] == 1


def test_other_flags_begin_anew_and_the_first_ones_too(data, calls):
    """What other flags, or another seed, left behind is never taken for one's own."""
    flags = [(*TOTAL, *SAMPLED), (*DAY, *SAMPLED, "--numpy-rand-seed=9"), ("--max-ind-range=3",)]
    want = [data.bytes_of(*each) for each in flags]
    for (one, other), stage in itertools.product(
        itertools.permutations(range(3), 2), ["_number", "_publish"]
    ):
        stopped_at(Preparation, stage, *flags[one], data=data)
        assert data.bytes_of(*flags[other]) == want[other]
    for owner, name in ((Preparation, "_publish"), (os, "replace"), (publish, "sync_folder")):
        stopped_at(owner, name, "--mlperf-bin-loader", *TOTAL, data=data)
        assert data.bytes_of(*flags[0]) == want[0]
        shutil.rmtree(data.partial(), ignore_errors=True)


def test_what_another_job_finished_does_not_end_this_one(data, calls, monkeypatch):
    """It was killed before it removed its folder; what this one finishes in there stays."""
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "remove", lambda _: None)
        assert data.run(*DAY).status == 0
    assert data.partial().exists()
    shutil.rmtree(data.folder / "a.prepared")
    stopped_at(Preparation, "_number", *TOTAL, data=data)
    calls.clear()
    assert data.run(*TOTAL).status == 0 and calls["parsed"] == 0
    data.take()


@pytest.mark.parametrize("what", ["file", "link to nowhere"])
def test_something_else_in_the_place_of_the_folder_is_told_of(data, what):
    """No endless wait for it to go."""
    data.partial().touch() if what == "file" else data.partial().symlink_to(data.folder / "no")
    child = Child([*data.flags(), *TOTAL], data.folder / "report")
    end = time.monotonic() + 5
    while time.monotonic() < end and not (data.folder / "report").exists():
        time.sleep(0.01)
    assert (data.folder / "report").exists() or child.end(), "it waits"
    result = child.result()
    assert result.status == 2 and result.err.count("\n") == 1 and str(data.partial()) in result.err


def test_a_mended_line_costs_its_file_alone(data, monkeypatch):
    """The pieces of the day before are not parsed again."""
    good = (data.raw / "day_1").read_text().splitlines()[30]
    data.edit_line(1, 31, "1\t2\t3")
    result = data.run()
    assert result.status == 2 and result.err.count("\n") == 1
    assert f"{data.raw}/day_1, line 31: 3 tab-separated fields" in result.err
    again = data.run()
    assert (again.status, again.err) == (result.status, result.err)
    data.edit_line(1, 31, good)
    parsed, real = Counter(), TextPieces._parse

    def parse(self, *args):
        parsed[self._raw.path.name] += 1
        return real(self, *args)

    monkeypatch.setattr(TextPieces, "_parse", parse)
    _, rows = rows_of(data)
    assert parsed == {"day_1": 2, "day_2": 2}
    np.testing.assert_array_equal(rows, np.concatenate(by_hand(data.days)[0][:2]))
    assert not data.partial().exists()


def test_allowed_bad_lines_can_be_raised_after_a_run_that_failed(data, calls):
    """Its pieces serve, and no run with a lower limit takes them as good."""
    for day in range(3):
        data.edit_line(day, 5, "x")
    assert "day_0, line 5" in data.run().err
    result = data.run("--max-bad-lines=2")
    assert result.status == 2 and "3 bad lines" in result.err and calls["ids"] == 0
    parsed = calls["parsed"]
    lower = data.run()
    assert lower.status == 2 and f"{data.raw}/day_0, line 5" in lower.err
    result = data.run("--max-bad-lines=3")
    assert result.status == 0 and "bad lines skipped: 3" in result.err
    assert calls["parsed"] == parsed and f"Prepared {3 * ROWS - 3} rows" in result.out


# ---------------------------------------------------------------- damage

STOPS = {
    "lines": (Preparation, "_number", "lines/*"),
    "parsed": (Preparation, "_number", "parsed/*_*"),
    "totals": (Preparation, "_number", "parsed/totals"),
    "in_turn": (Preparation, "_number", "parsed/000"),
    "ids": (Preparation, "_place", "ids/*"),
    "scattered": (Shuffle, "gather_tasks", "scattered/*"),
    "gathered": (Preparation, "_publish", "gathered/*"),
    "scattered_at_the_end": (Preparation, "_publish", "scattered/*"),
    "final": (Preparation, "_publish", "final/*"),
}


def flip(place, mask=0x55):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= mask
        path.write_bytes(content)

    return damage


def in_meta(path):
    content = path.read_bytes()
    at = content.rfind(b'{"') + 3
    path.write_bytes(content[:at] + b"\0" + content[at + 1 :])


DAMAGES = {
    "begin": flip(0),
    "middle": flip(0.5),
    "behind": flip(0.75),
    "meta": in_meta,
    "trailer": flip(1),
    "many": lambda path: [flip(k / 9, 1 << k % 8)(path) for k in range(10)],
    "deleted": Path.unlink,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("stage", STOPS)
def test_damaged_pieces_are_found_and_made_again(data, stage):
    """One of them, or all together; the bytes are those of a run without damage."""
    owner, name, pattern = STOPS[stage]
    if stage == "in_turn":
        data.pack(0)
    flags = [*TOTAL, *SAMPLED]
    want = data.bytes_of(*flags)
    stopped_at(owner, name, *flags, data=data)
    kept, draw, wrong = data.folder / "kept", random.Random(2), []
    os.rename(data.partial(), kept)
    for number, (kind, damage) in enumerate(DAMAGES.items()):
        paths = sorted(kept.glob(pattern))
        for chosen in ([draw.choice(paths)], paths)[: 2 if number % 2 else 1]:
            shutil.copytree(kept, data.partial())
            for path in chosen:
                damage(data.partial() / path.relative_to(kept))
            try:
                right = data.bytes_of(*flags) == want
            except Exception as error:
                right = f"{type(error).__name__}: {error}"
            if right is not True:
                wrong.append(f"{len(chosen)} {kind}: {str(right)[:200]}")
            shutil.rmtree(data.partial(), ignore_errors=True)
            shutil.rmtree(data.folder / "a.prepared", ignore_errors=True)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("stage", ["parsed", "ids", "scattered"])
def test_damage_that_many_find_at_once_is_mended_once_for_all(data, stage, monkeypatch):
    """Threads, and then ranks, that read the same damaged pieces at the same time."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    draw = random.Random(5)
    for method in ("discard", "ensure"):  # so that they meet in all orders

        def slowly(*args, real=getattr(WorkFolder, method)):  # noqa: B008
            time.sleep(draw.random() * 0.004)
            real(*args)
            time.sleep(draw.random() * 0.004)

        monkeypatch.setattr(WorkFolder, method, slowly)
    owner, name, pattern = STOPS[stage]
    flags = [*TOTAL, *SAMPLED, "--dataset-multiprocessing"]
    want = data.bytes_of(*flags)
    stopped_at(owner, name, *flags, data=data)
    kept, wrong = data.folder / "kept", []
    os.rename(data.partial(), kept)
    for number, how_many in enumerate([1, 1, 3, 3]):
        shutil.copytree(kept, data.partial())
        for path in data.partial().glob(pattern):
            flip(0.1)(path)
        try:
            results = ranks(data, how_many, *flags)
            assert [(each.status, each.err) for each in results] == [(0, "")] * how_many
            assert data.take() == want
        except Exception as error:
            wrong.append(f"run {number} of {how_many}: {str(error)[:200]}")
        shutil.rmtree(data.partial(), ignore_errors=True)
        shutil.rmtree(data.folder / "a.prepared", ignore_errors=True)
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------- ranks

DRIVER = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import data_utils
from criteo import raw_files
from preparation import parsed_piece, row_files, sources
parsed_piece.PIECE_BYTES, raw_files.BLOCK_BYTES = {PIECE}, {BLOCK}
row_files.SMALLEST_BUCKET = row_files.LARGEST_BUCKET = {BUCKET}
rank, notes, parsed, real = os.environ["RANK"], sys.argv[1], [], sources.TextPieces._parse

def parse(*args):
    parsed.append(time.sleep(0.05))
    open(notes + "/parsed_" + rank, "w").write(str(len(parsed)))
    return real(*args)

sources.TextPieces._parse = parse
open(notes + "/ready_" + rank, "w").close()
while not all(os.path.exists(notes + "/ready_" + other) for other in "012"):
    time.sleep(0.01)
sys.exit(data_utils.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("launcher", ["environment", "torchrun"])
def test_three_ranks_share_the_work(data, launcher):
    """As processes; each parses some, and the bytes are one process's."""
    driver, notes = data.folder / "driver.py", data.folder / "notes"
    driver.write_text(DRIVER)
    notes.mkdir()
    want = data.bytes_of(*TOTAL)
    command = [str(word) for word in (driver, notes, *data.flags(), *TOTAL)]
    if launcher == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3"]
        runs = [subprocess.Popen([*run, *command], stdout=subprocess.PIPE, text=True)]
    else:
        size = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
        runs = [
            subprocess.Popen(
                [sys.executable, *command],
                env=os.environ | size | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(3)
        ]
    texts = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0] * len(runs), texts
    assert data.take() == want
    together = "".join(texts)
    assert together.count(f"Prepared {3 * ROWS} rows") == together.count("As JSON:") == 1
    parsed = [int((notes / f"parsed_{rank}").read_text()) for rank in range(3)]
    assert min(parsed) >= 1 and sum(parsed) >= 6


def test_a_rank_that_is_killed_leaves_its_work_to_the_others(data):
    """At any call; the two others end well. What it leaves as the last one goes with the next."""
    want, draw = data.bytes_of(*DAY, *SAMPLED), random.Random(3)
    for _ in range(8):
        killer = Killer(draw.randrange(60), draw.choice(["before", "half", "after"]))

        def first(rank, killer=killer):
            if rank == 1:
                killer.install_for_good()

        results = ranks(data, 3, *DAY, *SAMPLED, first=first)
        assert [(results[r].status, results[r].err) for r in (0, 2)] == [(0, "")] * 2
        assert results[1].status in (0, -signal.SIGKILL)
        assert "Prepared already" in data.run(*DAY, *SAMPLED).out
        assert data.take() == want


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("kind", ["prepared", "packed", "flat"])
def test_ranks_that_come_at_any_time_end_with_the_same_bytes(data, kind, locks):
    """Also where the file system has no locks: the first one does it all there."""
    flags, take = TOTAL, data.take
    if kind == "packed":
        data.pack(1)
    if kind == "flat":
        flags, take = [*TOTAL, "--mlperf-bin-loader"], data.take_flat
    assert data.run(*flags).status == 0
    want, draw = take(), random.Random(4)

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    for _ in range(5):
        delays = [draw.random() * draw.choice([0.02, 0.15]) for _ in range(4)]

        def first(rank, delays=delays):
            time.sleep(delays[rank])
            if not locks:
                fcntl.flock = refuse
                if rank:
                    Preparation.run = None

        results = ranks(data, 4, *flags, first=first)
        assert [(each.status, each.err) for each in results] == [(0, "")] * 4, delays
        assert take() == want


BEHIND = [(Preparation, "_number"), (Preparation, "_place"), (Shuffle, "gather_tasks")]


@pytest.mark.parametrize("owner, name", BEHIND)
def test_a_rank_that_falls_behind_makes_nothing_of_what_is_removed(data, owner, name, monkeypatch):
    """Another one has published all and takes the folder away while this one goes on."""
    want, rmtree = data.bytes_of(*TOTAL), shutil.rmtree
    made, go_on = data.folder / "made", data.folder / "go_on"
    with at_work(data, *TOTAL, at=(owner, name)) as late:
        before = made.stat().st_size

        def remove(path, **settings):
            for piece in [*Path(path).glob("parsed/*"), *Path(path).glob("ids/*")]:
                piece.unlink()
            go_on.touch()
            late.result()
            rmtree(path, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", remove)
            assert data.run(*TOTAL).status == 0
    assert (late.result().status, late.result().err) == (0, "")
    assert data.take() == want
    assert made.stat().st_size == before, "what was there already was made once more"


def test_files_that_are_moved_while_another_rank_looks_are_no_mistake(data, monkeypatch):
    """It would make the folder of the files, which is there, and then it is not: all is done."""
    want, mkdir, others = data.bytes_of(*TOTAL), os.mkdir, []

    def overtaken(path, *args):
        if Path(path).name != "final" or others:
            return mkdir(path, *args)
        others.extend(ranks(data, 1, *TOTAL, first=lambda _: setattr(os, "mkdir", mkdir)))
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", overtaken)
        result = data.run(*TOTAL)
    assert (others[0].status, others[0].err) == (result.status, result.err) == (0, "")
    assert data.take() == want


def test_a_rank_that_comes_late_finds_all_done(data, monkeypatch, calls):
    """And takes away what a killed one left."""
    assert data.run(*TOTAL).status == 0
    calls.clear()
    monkeypatch.setenv("RANK", "2"), monkeypatch.setenv("WORLD_SIZE", "3")
    data.partial().mkdir()
    result = data.run(*TOTAL)
    assert result.status == 0 and not calls and not data.partial().exists()
    assert "Prepared already" in result.out and "rows/s" not in result.out


def test_ranks_that_find_a_bad_line_tell_of_nothing_else(data):
    """None stumbles over another one that cleans up."""
    data.edit_line(0, 1, "label\tI1")
    for _ in range(6):
        for result in ranks(data, 3):
            assert result.status == 2 and result.err.count("\n") == 1, result.err
            assert "day_0, line 1: column 1: got 'label'" in result.err


# ---------------------------------------------------------------- two jobs


@pytest.mark.parametrize("piece", [0, 1, 3])
def test_a_run_with_other_flags_is_sent_away(data, piece):
    """In one line, and the one at work is not disturbed, even in its first piece."""
    want = data.bytes_of(*TOTAL)
    with at_work(data, *TOTAL, after=piece) as first:
        before = sorted(data.partial().rglob("*"))
        for flags in (DAY, (*TOTAL, *SAMPLED), (*TOTAL, "--max-ind-range=9"), ()):
            result = data.run(*flags)
            assert result.status == 2 and result.err.count("\n") == 1
            assert "another run prepares" in result.err and str(data.partial()) in result.err
        assert set(before) <= set(data.partial().rglob("*"))
    assert (first.result().status, first.result().err) == (0, "")
    assert data.take() == want


def test_after_a_killed_run_another_job_gets_in(data):
    want = data.bytes_of(*DAY)
    with at_work(data, *TOTAL, after=2) as first:
        first.end()
        assert data.bytes_of(*DAY) == want


@pytest.mark.parametrize("first", [(), ("--mlperf-bin-loader",)])
def test_flat_files_are_made_beside_prepared_data_of_the_same_name(data, first):
    """And the other way round: neither hides the other."""
    flat = ("--mlperf-bin-loader",)
    assert data.run(*TOTAL, *first).status == 0
    if first:
        want = data.take_flat()
        prepared = data.bytes_of(*TOTAL)
        assert data.run(*TOTAL, *flat).status == 0
        assert data.bytes_of(*TOTAL) == prepared
    else:
        prepared = data.take()
        assert data.run(*TOTAL, *flat).status == 0
        want = data.take_flat()
        assert data.run(*TOTAL).status == 0
        assert data.run(*TOTAL, *flat).status == 0
        assert data.take() == prepared
    assert data.take_flat() == want


def test_who_finds_prepared_data_leaves_another_job_its_folder(data):
    """Flat files are made while training begins on the others of the same name."""
    assert data.run(*TOTAL).status == 0
    with at_work(data, *TOTAL, "--mlperf-bin-loader", after=2) as first:
        assert "Prepared already" in data.run(*TOTAL).out
        assert len(list((data.partial() / "parsed").glob("*_*"))) >= 2
    assert (first.result().status, first.result().err) == (0, "")


@pytest.mark.parametrize("owner, name", [(TextPieces, "_parse"), (Preparation, "_place")])
def test_a_folder_that_somebody_removes_is_told_of_in_a_line(data, owner, name):
    """While a piece is made, or between two."""
    real = getattr(owner, name)

    def remove(*args):
        shutil.rmtree(data.partial(), ignore_errors=True)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, remove)
        result = data.run(*TOTAL)
    assert result.status == 2 and result.err.count("\n") == 1 and str(data.partial()) in result.err
    assert data.run(*TOTAL).status == 0


# ---------------------------------------------------------------- raw files


def while_parsing(monkeypatch, number, action):
    """Do something before that piece of text is parsed."""
    calls, real = itertools.count(), TextPieces._parse

    def parse(*args):
        if next(calls) == number:
            action()
        return real(*args)

    monkeypatch.setattr(TextPieces, "_parse", parse)


@pytest.mark.parametrize(
    "data_set, day",
    [("kaggle", 0), *itertools.product(["terabyte", "packed"], [0, 1, 2])],
)
def test_a_file_that_grows_while_it_is_read_is_told_of(data, data_set, day, monkeypatch):
    """In a line that names it; when it is complete all goes well."""
    path = data.raw / f"day_{day}"
    more = "".join("\t".join(row) + "\n" for row in data.days[day][:4]).encode()
    if data_set == "kaggle":
        data.to_kaggle()
        path = data.raw / "train.txt"
    if data_set == "packed":
        data.pack(day)
        path, more = data.raw / f"day_{day}.gz", gzip.compress(more)

    def append():
        with open(path, "ab") as file:
            file.write(more)

    with monkeypatch.context() as patch:
        while_parsing(patch, 1, append)
        result = data.run(*TOTAL)
    assert result.status == 2 and result.err.count("\n") == 1, result.err
    assert f"{path} changed while it was read" in result.err
    assert not (data.folder / "a.prepared").exists()
    found = data.bytes_of(*TOTAL)
    assert found == data.bytes_of(*TOTAL, name="b")
    assert json.loads(found["meta.json"])["sources"] == [
        RawFile.at(file).fingerprint for file in sorted(data.raw.iterdir())
    ]


def test_what_is_drawn_for_a_line_depends_on_the_lines_before_it(data, calls):
    """Those of another file too: when it changes between two runs, later days are parsed again."""
    flags = [*TOTAL, *SAMPLED]
    stopped_at(Preparation, "_number", *flags, data=data)
    line = (data.raw / "day_0").read_text().splitlines()[8]
    data.edit_line(0, 7, f"{line}\n{line}")
    calls.clear()
    found = data.bytes_of(*flags)
    assert calls["parsed"] == 6 and found == data.bytes_of(*flags, name="b")


@pytest.mark.parametrize("name", ["_number", "_place", "_publish"])
def test_a_file_that_changes_after_it_was_read_is_told_of(data, name, monkeypatch):
    """Nothing is published of it."""
    path, real, flags = data.raw / "day_0", getattr(Preparation, name), [*TOTAL, *SAMPLED]

    def change(*args):
        line = path.read_text().splitlines()[8]
        data.edit_line(0, 7, f"{line}\n{line}")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Preparation, name, change)
        result = data.run(*flags)
    assert result.status == 2 and result.err.count("\n") == 1, result.err
    assert f"{path} changed while it was read" in result.err
    assert data.bytes_of(*flags) == data.bytes_of(*flags, name="b")


@pytest.mark.parametrize(
    "owner, name, day",
    [(data_utils, "check_space", 1), (TextPieces, "_make", 0), (TextPieces, "_parse", 1)],
)
def test_a_file_that_vanishes_is_told_of(data, owner, name, day, monkeypatch):
    """Before the first piece is finished, and later."""
    path, real = data.raw / f"day_{day}", getattr(owner, name)

    def remove(*args):
        path.unlink(missing_ok=True)
        return real(*args)

    monkeypatch.setattr(owner, name, remove)
    result = data.run()
    assert result.status == 2 and result.err.count("\n") == 1 and str(path) in result.err


@pytest.mark.parametrize("cut", [0.3, 0.9, -4])
def test_a_truncated_gz_is_told_of_and_what_is_finished_stays(data, cut, calls):
    """Replaced by a whole one only its own pieces are made."""
    for day in range(3):
        data.pack(day)
    want = data.bytes_of(*TOTAL)
    path = data.raw / "day_1.gz"
    status, whole = path.stat(), path.read_bytes()
    path.write_bytes(whole[:cut] if cut < 0 else whole[: int(cut * len(whole))])
    result = data.run(*TOTAL)
    assert result.status == 2 and result.err.count("\n") == 1
    assert f"{path} is truncated or damaged" in result.err
    path.write_bytes(whole)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    calls.clear()
    assert data.bytes_of(*TOTAL) == want
    assert calls["parsed"] == 4


def test_a_damaged_gz_is_told_of(data):
    data.pack(1)
    path = data.raw / "day_1.gz"
    flip(0.5)(path)
    result = data.run()
    assert result.status == 2 and result.err.count("\n") == 1 and str(path) in result.err
    flip(0.5)(path)
    prepared, rows = rows_of(data)
    np.testing.assert_array_equal(rows, np.concatenate(by_hand(data.days)[0][:2]))


# ---------------------------------------------------------------- the disk


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FILLED = {
    **{f"section_{part}": (Writer, "section", part) for part in (0, 0.2, 0.8, 1)},
    **{f"finish_{part}": (Writer, "finish", part) for part in (0, 0.3, 1)},
    **{f"pwrite_{part}": (os, "pwrite", part) for part in (0, 0.5, 1)},
    **{f"fsync_{part}": (os, "fsync", part) for part in (0, 0.5, 1)},
    "rename": (os, "rename", 0.2),
    "mkdir": (os, "mkdir", 0),
}


@pytest.mark.parametrize("case", FILLED)
def test_a_full_disk_is_told_of_and_what_is_finished_stays(data, case, monkeypatch):
    """At the first, last and some other call; with room again the rest is made."""
    owner, name, part = FILLED[case]
    done, real = [], getattr(owner, name)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args: done.append(name) or real(*args))
        want = data.bytes_of(*TOTAL)
    count, last = itertools.count(), int(part * (len(done) - 1))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, lambda *args: full() if next(count) >= last else real(*args))
        result = data.run(*TOTAL)
    assert result.status == 2 and result.err.count("\n") == 1, result.err
    assert "no space left" in result.err
    assert data.partial().exists() == (case not in ("section_0", "finish_0", "mkdir"))
    assert data.bytes_of(*TOTAL) == want


def test_a_rank_whose_disk_is_full_tells_of_it(data, monkeypatch):
    """It may be the only one: a launcher ends the others before they come to it."""
    monkeypatch.setenv("RANK", "1"), monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "pwrite", full)
    result = data.run(*TOTAL)
    assert result.status == 2 and result.err.count("\n") == 1 and "no space left" in result.err


Usage = namedtuple("Usage", "total used free")


def test_too_little_room_is_told_of_before_anything_is_written(data, monkeypatch):
    monkeypatch.setattr(
        shutil,
        "disk_usage",
        lambda _: Usage(10**12, 10**12 - 1000, 1000),
    )
    result = data.run(*TOTAL)
    assert result.status == 2 and result.err.count("\n") == 1
    assert " needs " in result.err and " free" in result.err
    assert "--processed-data-file" in result.err
    assert [path.name for path in data.folder.iterdir()] == ["raw"]


def test_what_lies_there_already_counts_as_room(data, monkeypatch):
    """Resumed, a run needs no room for what it has; others may move it meanwhile."""
    stopped_at(Preparation, "_publish", *TOTAL, data=data)
    there = sum(path.stat().st_blocks * 512 for path in data.partial().rglob("*"))
    assert there > 3 * ROWS * 100, "the test needs more"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    rglob = Path.rglob
    monkeypatch.setattr(
        Path,
        "rglob",
        lambda self, pattern: [*rglob(self, pattern), self / "parsed" / "gone.new"],
    )
    assert data.run(*TOTAL).status == 0
