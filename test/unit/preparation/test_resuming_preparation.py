"""However often preparation is stopped, and whoever does the work, the same bytes come of it."""

import errno
import fcntl
import gzip
import itertools
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter, namedtuple
from pathlib import Path

import pytest
from other_process import wait_for
from preparation_runs import (
    DAY,
    FLAT,
    NAMES,
    ROWS,
    SAMPLED,
    TOTAL,
    Data,
    Run,
    at_call,
    counting,
    kill_at,
    ranks,
    stopped_at,
    stopped_before,
    watching,
)

import data_utils
from criteo.raw_files import RawFile
from preparation.shared_folder import SharedFolder
from preparation.shuffle import Shuffle


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data():
    """In memory if the system lets us: thousands of tiny files are made and removed here."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="dlrm_test_") as folder:
        yield Data(Path(folder))


def assert_one_line(result, *words):
    assert result.status == 2 and result.err.count("\n") == 1, result.err
    assert all(str(word) in result.err for word in words), result.err


def assert_ended_well(*results):
    assert [(each.status, each.err) for each in results] == [(0, "")] * len(results)


# ---------------------------------------------------------------- killed anywhere


KILLS = {  # flags, calls to be killed at and how, names of files that are among them
    "plain": (
        (*TOTAL, *SAMPLED),
        [("rename", "before"), ("rename", "after"), ("fsync", "before"), ("pwrite", "half")],
        {
            *data_utils.STAGES,
            "published",
            "a.prepared",
            "meta.json",
            "train.bin",
            "final",
            "vocabulary.bin",
        },  # fmt: skip
    ),
    "packed": (DAY, [("rename", "after")], set(data_utils.STAGES[1:])),
    "flat": (
        (*TOTAL, *FLAT),
        [("replace", "before")],
        {f"a_{name}" for name in NAMES},
    ),
}


@pytest.mark.parametrize("kind", KILLS)
def test_killed_anywhere(data, kind):
    """At a finished file of each stage, each sync and write, and some calls; often twice."""
    flags, wanted, names = KILLS[kind]
    if kind == "packed":
        data.pack(0, 2)
    seen, draw = [], random.Random(1)
    with watching(lambda event, do: seen.append(event) or do()):
        assert data.run(*flags).status == 0
    want, kills = data.take(is_flat=kind == "flat"), []
    for event in dict.fromkeys(seen):
        numbers = [number for number, each in enumerate(seen) if each == event]
        kills += [(numbers[len(numbers) // 2], how) for call, how in wanted if call == event[0]]
    assert {seen[number][1] for number, _ in kills} >= names
    kills += zip(range(3, len(seen), len(seen) // 4), ["after", "before"] * 2, strict=False)
    for number, how in kills:
        act = kill_at(number, how)
        assert Run(data, *flags, act=act).outcome.status == -signal.SIGKILL
        if draw.random() < 0.3:  # the next run is killed too, if it gets so far
            again = kill_at(draw.randrange(len(seen)), draw.choice(["before", "after", "half"]))
            assert Run(data, *flags, act=again).outcome.status in (0, -signal.SIGKILL)
        assert_ended_well(data.run(*flags))
        assert data.take(is_flat=kind == "flat") == want, (seen[number], how)


# ---------------------------------------------------------------- nothing twice


@pytest.mark.parametrize("packed", [(), (0, 1)])
def test_what_is_finished_is_not_done_again(data, packed):
    """Stopped in each stage after some tasks: the next run does the others.

    Parsed pieces are deleted once their rows are in buckets: the disk need not hold both.
    """
    data.pack(*packed)
    with counting() as whole:
        want = data.bytes_of(*TOTAL)
    stages = {"parsed": 3, "ids": 20, "scattered": 4, "gathered": 2}
    for number, (stage, after) in enumerate(stages.items()):
        stopped_at(data, stage, *TOTAL, after=after)
        left = len(list(data.work_folder.glob("parsed/*_*")))
        assert (
            left == {"parsed": 2 if packed else 3, "ids": 6, "scattered": 2, "gathered": 0}[stage]
        )
        with counting() as made:
            assert data.bytes_of(*TOTAL) == want
        assert not any(made[done] for done in list(stages)[:number])
        assert made[stage] == whole[stage] - after
        assert all(made[later] == whole[later] for later in list(stages)[number + 1 :])


def test_other_flags_begin_anew_and_the_first_ones_too(data):
    """What other flags or another seed left behind is never taken for one's own."""
    flags = [(*TOTAL, *SAMPLED), (*DAY, *SAMPLED, "--numpy-rand-seed=9"), ("--max-ind-range=3",)]
    want = [data.bytes_of(*each) for each in flags]
    for (one, other), function in zip(
        itertools.permutations(range(3), 2), itertools.cycle(["number", "publish"]), strict=False
    ):
        stopped_before(data, function, *flags[one])
        assert data.bytes_of(*flags[other]) == want[other]


def test_a_mended_line_costs_its_file_alone(data):
    """The pieces of the day before are not parsed again."""
    want = data.bytes_of()
    path = data.raw / "day_1"
    good, times = path.read_text().splitlines()[30], path.stat()
    data.edit_line(1, 31, "1\t2\t3")
    for _ in range(2):
        assert_one_line(data.run(), f"{path}, line 31: 3 tab-separated fields")
    data.edit_line(1, 31, good)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with counting() as made:
        found = data.bytes_of()
    assert made["parsed"] == 2 + 2 + 1, "two pieces of days 1 and 2 each, and the totals"
    assert {**found, "meta.json": ""} == {**want, "meta.json": ""}


def test_allowed_bad_lines_can_be_raised_after_a_run_that_failed(data):
    """Its pieces serve, and no run with a lower limit takes them as good."""
    for day in range(3):
        data.edit_line(day, 5, "x")
    assert_one_line(data.run(), "day_0, line 5")
    assert_one_line(data.run("--max-bad-lines=2"), "3 bad lines")
    assert_one_line(data.run(), f"{data.raw}/day_0, line 5")
    with counting() as made:
        result = data.run("--max-bad-lines=3")
    assert result.status == 0 and "bad lines skipped: 3" in result.err
    assert made["parsed"] == 0 and f"Prepared {3 * ROWS - 3} rows" in result.out


def test_draws_of_a_line_depend_on_the_lines_before_it(data):
    """If a file changes between two runs, the files behind it are parsed again too."""
    flags = [*TOTAL, *SAMPLED]
    stopped_before(data, "number", *flags)
    line = (data.raw / "day_0").read_text().splitlines()[8]
    data.edit_line(0, 7, f"{line}\n{line}")
    with counting() as made:
        found = data.bytes_of(*flags)
    assert made["parsed"] == 6 + 1 and found == data.bytes_of(*flags, name="b")


# ---------------------------------------------------------------- damage

STAGES = {  # what is damaged: when, which files
    "lines": ("number", "lines/*"),
    "parsed": ("number", "parsed/*_*"),
    "totals": ("number", "parsed/totals"),
    "pieces of a packed day": ("number", "parsed/000_*"),
    "a packed day": ("number", "parsed/000"),
    "ids": ("place", "ids/*"),
    "ids at the end": ("publish", "ids/*"),
    "scattered": ("gathered", "scattered/*"),
    "gathered": ("publish", "gathered/*"),
    "scattered at the end": ("publish", "scattered/*"),
    "rows": ("publish", "final/*"),
}


def flip(path, share=0.1):
    """Flip bits of a byte."""
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 0x55
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [flip, Path.unlink, lambda path: os.truncate(path, 5)])
@pytest.mark.parametrize("stage", STAGES)
def test_damage_in_each_stage_is_mended(data, stage, harm):
    """In all files of the stage; test_checked_file has all kinds of damage."""
    when, pattern = STAGES[stage]
    flags = [*TOTAL, *SAMPLED]
    if "packed" in stage:
        data.pack(0)
    want = data.bytes_of(*flags)
    if when in data_utils.STAGES:
        stopped_at(data, when, *flags)
    else:
        stopped_before(data, when, *flags)
    paths = sorted(data.work_folder.glob(pattern))
    assert paths
    for path in paths:
        harm(path)
    assert data.bytes_of(*flags) == want


# ---------------------------------------------------------------- ranks


def test_ranks_share_the_work(data):
    """Each parses some, one of them tells of it, and the bytes are those of one process."""
    want = data.bytes_of(*TOTAL)
    notes = [data.folder / f"made_{rank}" for rank in range(3)]

    def act(rank):
        def note(event, do):
            if event == ("rename", "parsed"):
                with open(notes[rank], "ab") as file:
                    file.write(b".")
                wait_for(lambda: all(path.exists() for path in notes))
            return do()

        return note

    results = ranks(data, 3, *TOTAL, act=act)
    assert_ended_well(*results)
    assert data.take() == want
    text = "".join(each.out for each in results)
    assert text.count(f"Prepared {3 * ROWS} rows") == text.count("As JSON:") == 1
    made = [path.stat().st_size for path in notes]
    assert min(made) >= 1 and sum(made) >= 6 + 1


def test_a_killed_rank_leaves_its_work_to_the_others(data):
    """It is killed at any call; the two others end well, and the next run clears what it left."""
    want, draw = data.bytes_of(*DAY, *SAMPLED), random.Random(3)
    for _ in range(5):
        at = draw.randrange(60), draw.choice(["before", "half", "after"])

        def act(rank, at=at):
            return kill_at(*at) if rank == 1 else lambda _, do: do()

        results = ranks(data, 3, *DAY, *SAMPLED, act=act)
        assert_ended_well(results[0], results[2])
        assert results[1].status in (0, -signal.SIGKILL)
        assert "Prepared already" in data.run(*DAY, *SAMPLED).out
        assert data.take() == want


@pytest.mark.parametrize("kind", ["packed", "flat", "no locks"])
def test_ranks_that_come_at_any_time_end_with_the_same_bytes(data, kind):
    """If the file system has no locks, the first rank does it all."""
    flags = (*TOTAL, *FLAT) if kind == "flat" else TOTAL
    data.pack(1)
    want, draw = data.bytes_of(*flags), random.Random(4)

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    for _ in range(3):
        delays = [draw.random() * draw.choice([0.02, 0.15]) for _ in range(4)]

        def first(rank, delays=delays):
            time.sleep(delays[rank])
            if kind == "no locks":
                fcntl.flock = refuse
                data_utils.run_stages = data_utils.run_stages if rank == 0 else None

        results = ranks(data, 4, *flags, first=first)
        assert_ended_well(*results)
        assert data.take(is_flat=kind == "flat") == want


@pytest.mark.parametrize(
    "owner, name",
    [(data_utils, "number"), (data_utils, "place"), (Shuffle, "gather_tasks"), (os, "mkdir")],
)
def test_a_rank_that_falls_behind_finds_all_done(data, owner, name, monkeypatch):
    """Another one publishes all meanwhile; nothing is made once more.

    If the folder of the rows is moved while this one is about to make it, that is no mistake.
    """
    want, real, others = data.bytes_of(*TOTAL), getattr(owner, name), []

    def overtaken(*args):
        if not others and (name != "mkdir" or Path(args[0]).name == "final"):
            others.append(None)
            others.append(Run(data, *TOTAL).outcome)
            made.clear()
            if name == "mkdir":
                raise FileExistsError(errno.EEXIST, "there", str(args[0]))
        return real(*args)

    with counting() as made, monkeypatch.context() as patch:
        patch.setattr(owner, name, overtaken)
        result = data.run(*TOTAL)
    assert_ended_well(others[1], result)
    assert data.take() == want and not set(made) & set(data_utils.STAGES)


def test_ranks_that_find_a_bad_line_tell_of_nothing_else(data):
    """None stumbles over another one that cleans up."""
    data.edit_line(0, 1, "label\tI1")
    for _ in range(3):
        for result in ranks(data, 3):
            assert_one_line(result, "day_0, line 1: column 1: got 'label'")


# ---------------------------------------------------------------- two jobs


@pytest.mark.parametrize("after", [0, 3])
def test_a_run_with_other_flags_is_sent_away(data, after):
    """In one line, and the one at work is not disturbed, even in its first piece."""
    want = data.bytes_of(*TOTAL)
    reached, go_on = data.folder / "reached", data.folder / "go_on"

    def pause():
        reached.touch()
        wait_for(go_on.exists)

    first = Run(data, *TOTAL, act=at_call(("rename", "parsed"), pause, after))
    wait_for(reached.exists)
    before = set(data.work_folder.rglob("*"))
    for flags in (DAY, (*TOTAL, *SAMPLED), (*TOTAL, "--max-ind-range=9"), ()):
        assert_one_line(data.run(*flags), "another run prepares", data.work_folder)
    assert before <= set(data.work_folder.rglob("*"))
    go_on.touch()
    assert_ended_well(first.outcome)
    assert data.take() == want


def test_flat_files_and_prepared_data_of_the_same_name_do_not_hide_each_other(data):
    want = {flags: data.bytes_of(*TOTAL, *flags) for flags in ((), FLAT)}
    for first, second in ((), FLAT), (FLAT, ()):
        assert data.run(*TOTAL, *first).status == 0
        assert data.run(*TOTAL, *second).status == 0
        for flags in first, second:
            assert "Prepared already" in data.run(*TOTAL, *flags).out
            assert data.take(is_flat=flags == FLAT) == want[flags]


@pytest.mark.parametrize("event, after", [(("rename", "parsed"), 0), (("mkdir", ""), 7)])
def test_a_folder_that_somebody_removes_is_told_of_in_a_line(data, event, after):
    """While a file is made, or between two."""
    with watching(at_call(event, SharedFolder(data.work_folder).remove, after)):
        assert_one_line(data.run(*TOTAL), data.work_folder)
    assert data.run(*TOTAL).status == 0


# ---------------------------------------------------------------- raw files


@pytest.mark.parametrize("kind", ["kaggle", "plain", "packed"])
@pytest.mark.parametrize("event", [("rename", "parsed"), ("rename", "ids"), ("rename", "gathered")])
def test_a_file_that_grows_is_told_of(data, kind, event):
    """While it is read or after; nothing is published, and when it is complete all goes well."""
    path, more = data.raw / "day_1", "".join("\t".join(row) + "\n" for row in data.days[1][:4])
    more = more.encode()
    if kind == "kaggle":
        data.to_kaggle()
        path = data.raw / "train.txt"
    if kind == "packed":
        data.pack(1)
        path, more = data.raw / "day_1.gz", gzip.compress(more)

    def grow():
        with open(path, "ab") as file:
            file.write(more)

    with watching(at_call(event, grow)):
        result = data.run(*TOTAL)
    assert_one_line(result, f"{path} changed while it was read")
    assert not (data.folder / "a.prepared").exists()
    found = data.bytes_of(*TOTAL)
    assert found == data.bytes_of(*TOTAL, name="b")
    assert json.loads(found["meta.json"])["sources"] == [
        RawFile.at(file).fingerprint for file in sorted(data.raw.iterdir())
    ]


def test_a_file_that_vanishes_is_told_of(data):
    path = data.raw / "day_2"
    with watching(at_call(("rename", "parsed"), path.unlink, after=1)):
        assert_one_line(data.run(), path)


# ---------------------------------------------------------------- the disk


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["section", "finish", "pwrite", "fsync", "rename", "mkdir"])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_full_disk_is_told_of_and_what_is_finished_stays(data, call, share):
    """At the first, middle and last call of each kind; with room again the rest is made."""
    seen = Counter()
    with watching(lambda event, do: seen.update([event[0]]) or do()):
        want = data.bytes_of(*TOTAL)
    calls, last = itertools.count(), int(share * (seen[call] - 1))

    def act(event, do):
        if event[0] == call and next(calls) >= last:
            full()
        return do()

    if call == "rename" and share == 1:
        last -= 1  # the last rename removes the work folder, when all is done
    with watching(act):
        result = data.run(*TOTAL)
    assert_one_line(result, "no space left", "is kept", data.folder)
    nothing_is_finished = share == 0 and call in ("section", "finish", "mkdir")
    assert data.work_folder.exists() != nothing_is_finished
    assert data.bytes_of(*TOTAL) == want


def test_a_read_only_disk_is_told_of(data):
    def refuse():
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with watching(at_call(("pwrite", "train.bin"), refuse)):
        assert_one_line(data.run(*TOTAL), "name a writable --processed-data-file")


def test_a_rank_whose_disk_is_full_tells_of_it(data):
    """It may be the only one: a launcher ends the others before they come to it."""
    full_at = at_call(("pwrite", "train.bin"), full)
    env = {"RANK": "1", "WORLD_SIZE": "2"}
    assert_one_line(Run(data, *TOTAL, act=full_at, env=env).outcome, "no space left")


Usage = namedtuple("Usage", "total used free")


def test_too_little_room_is_told_of_before_anything_is_written(data, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 1000, 1000))
    assert_one_line(data.run(*TOTAL), " needs ", " free", "--processed-data-file")
    assert [path.name for path in data.folder.iterdir()] == ["raw"]


@pytest.mark.parametrize(
    "flags, vocabulary", [((), 4 * 3 * ROWS), (("--max-ind-range=1",), 4 * 26)]
)
def test_the_estimate_has_room_for_buckets_ids_rows_and_two_vocabularies(
    data, monkeypatch, flags, vocabulary
):
    """The second one is in the files of ids; a table has no more values than --max-ind-range."""
    needed = 3 * ROWS * (100 + 12 + 100) + 2 * vocabulary
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed - 1))
    assert_one_line(data.run(*TOTAL, *flags), " needs ", " free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, needed))
    assert data.run(*TOTAL, *flags).status == 0


def test_what_is_finished_already_counts_as_room(data, monkeypatch):
    """A run that goes on needs no room for what it has."""
    stopped_before(data, "publish", *TOTAL)
    there = sum(path.stat().st_blocks * 512 for path in data.work_folder.rglob("*"))
    assert there > 3 * ROWS * 100, "the test needs more"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 0))
    assert data.run(*TOTAL).status == 0
