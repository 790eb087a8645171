"""Whole preparations of tiny days, whose calls that change the disk can be watched."""

import contextlib
import functools
import gzip
import itertools
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from by_hand import prepare
from conftest import Result, write_days
from other_process import Fork

import data_utils
from preparation.checked_file import Writer
from preparation.sizes import Sizes

ROWS = 36  # of a day: about 5,700 bytes, two pieces of text
SMALL = Sizes(piece_bytes=3000, block_bytes=700, smallest_bucket=1000, largest_bucket=1000)
TOTAL = ("--memory-map", "--data-randomize=total")
DAY = ("--memory-map", "--data-randomize=day")
SAMPLED = ("--data-sub-sample-rate=0.4",)
FLAT = ("--mlperf-bin-loader",)
PARALLEL = "--dataset-multiprocessing"
NAMES = ["meta.json", "report.json", "test.bin", "train.bin", "val.bin", "vocabulary.bin"]


class Data:
    """A folder of raw files, and what is prepared from them: `a`, `b`, ... beside the folder."""

    def __init__(self, folder):
        self.folder, self.raw = folder, folder / "raw"
        self.days = write_days(self.raw, 3, ROWS)
        self.sizes = SMALL

    def flags(self, name="a"):
        return [f"--data_path={self.raw}", f"--processed-data-file={self.folder / name}"]

    def run(self, *flags, name="a"):
        return prepare(*self.flags(name), *flags, sizes=self.sizes)

    def bytes_of(self, *flags, name="a"):
        """Prepare in this process; returns all files by name, and removes them."""
        result = self.run(*flags, name=name)
        assert result.status == 0 and result.err == "", result.err
        return self.take(name, FLAT[0] in flags)

    def take(self, name="a", is_flat=False):
        """All files of prepared data by name; they are removed, and nothing else is left.

        Counts of flat files are beside the raw files, and after a killed run beside the rows too.
        """
        assert not list(self.folder.glob(f"{name}.prepared?*")), "the work folder is still there"
        paths = sorted((self.folder / f"{name}.prepared").glob("*"))
        if is_flat:
            paths = [*self.folder.glob(f"{name}_*.json"), *self.folder.glob(f"{name}_*.bin")]
            assert len({path.read_bytes() for path in self.folder.rglob("*_fea_count.npz")}) == 1
        found = {path.name.removeprefix(f"{name}_"): path.read_bytes() for path in paths}
        assert sorted(found) == NAMES
        for path in (*paths, *(self.folder.rglob("*fea_count.npz*") if is_flat else ())):
            path.unlink()
        if not is_flat:
            (self.folder / f"{name}.prepared").rmdir()
        return found

    @property
    def work_folder(self):
        return self.folder / "a.prepared.partial"

    def pack(self, *days):
        """Replace days by .gz files."""
        for day in days:
            path = self.raw / f"day_{day}"
            packed = gzip.compress(path.read_bytes(), mtime=0)
            path.with_name(f"{path.name}.gz").write_bytes(packed)
            path.unlink()

    def to_kaggle(self):
        """Keep the first day only, as Kaggle's train.txt."""
        for path in self.raw.glob("day_[1-9]"):
            path.unlink()
        os.rename(self.raw / "day_0", self.raw / "train.txt")

    def edit_line(self, day, number, text):
        """Replace a line, numbered from 1."""
        path = self.raw / f"day_{day}"
        lines = path.read_text().splitlines()
        lines[number - 1] = text
        path.write_text("".join(f"{line}\n" for line in lines))


# ---------------------------------------------------------------- what happens to the disk

CALLS = ("rename", "replace", "fsync", "pwrite", "unlink", "mkdir")


@contextlib.contextmanager
def watching(act):
    """Have `act(event, do)` called in place of each call that changes the disk.

    An event is (name of the call, folder of a work folder's file or name of another one). `do()`
    makes the call; `do(0.5)` of pwrite writes the first half.
    """
    with pytest.MonkeyPatch.context() as patch:
        owners = [*((os, name) for name in CALLS), (Writer, "section"), (Writer, "finish")]
        for owner, name in owners:
            patch.setattr(owner, name, _watched(act, name, getattr(owner, name)))
        yield


def _watched(act, name, real):
    def call(*args, **settings):
        def do(share=1):
            if name == "pwrite":
                return real(args[0], args[1][: int(len(args[1]) * share)], args[2])
            return real(*args, **settings)

        return act((name, _where(name, args)), do)

    return call


def _where(name, args):
    if name in ("fsync", "pwrite"):
        return Path(os.readlink(f"/proc/self/fd/{args[0]}")).name
    if name in ("rename", "replace"):
        path = Path(args[1])
        return path.parent.name if path.parent.name in data_utils.STAGES else path.name
    return ""


@contextlib.contextmanager
def counting():
    """A Counter of the files that are finished in the block, by stage."""
    made = Counter()

    def act(event, do):
        do_now = do()
        if event[0] == "rename":
            made[event[1]] += 1
        return do_now

    with watching(act):
        yield made


def kill_at(number, how):
    """For `watching`: kill this process before, after or half-way through a call."""
    calls = itertools.count()

    def act(_, do):
        if next(calls) != number:
            return do()
        try:
            if how != "before":
                do(0.5 if how == "half" else 1)
        finally:  # the call may fail, as mkdir of a folder that is there already
            os.kill(os.getpid(), signal.SIGKILL)

    return act


class StoppedError(Exception):
    """A test stops the run."""


def at_call(event, action, after=0):
    """For `watching`: call `action()` before the event, once it has happened `after` times."""
    calls = itertools.count()

    def act(seen, do):
        if seen == event and next(calls) == after:
            action()
        return do()

    return act


def stop():
    raise StoppedError


def stopped_at(data, stage, *flags, after=0):
    """Run until so many files of a stage are finished."""
    with watching(at_call(("rename", stage), stop, after)), pytest.raises(StoppedError):
        data.run(*flags)


def stopped_before(data, function, *flags):
    """Run until data_utils is about to call that function of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_utils, function, lambda *_: stop())
        with pytest.raises(StoppedError):
            data.run(*flags)


# ---------------------------------------------------------------- other processes


class Run(Fork):
    """A preparation in another process.

    Args:
        data, flags: of the run.
        act: for `watching` there.
        env: variables of its environment.
        first: is called there before.
    """

    def __init__(self, data, *flags, act=lambda _, do: do(), env=(), first=lambda: None):
        def action():
            os.environ.update(env)
            first()
            with watching(act):
                result = data.run(*flags)
            return result.status, [result.out, result.err]

        super().__init__(action)

    @functools.cached_property
    def outcome(self):
        """Wait for its end; returns its Result."""
        status, texts = self.result()
        out, err = texts if isinstance(texts, list) else ("", str(texts))
        return Result(status, out, err)


def ranks(data, number, *flags, first=lambda rank: None, act=lambda rank: lambda _, do: do()):
    """Prepare by so many processes of one launch; returns their Results."""
    runs = [
        Run(
            data,
            *flags,
            act=act(rank),
            env={"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)},
            first=functools.partial(first, rank),
        )
        for rank in range(number)
    ]
    return [run.outcome for run in runs]
