"""Measurements on a GPU, as far as they can go wrong without one."""

import gzip
import json
import os
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, shell

from bench import gpu, gpu_trainer, guard
from bench.common import commit
from bench.gpu_cases import FOLDER, TABLES, Setting, Target, make_rows
from bench.gpu_lines import lines, verdict
from bench.gpu_trace import read_trace
from bench.training import Case

CASE = Case("64, D 8", 64, 8, "13-16-8", "16-1", 0, 0)
TARGET = Target(CASE, 4e6, 8e6)
SMALL = ["--device=cpu", "--rows=640", "--rows-a-line=128", "--most-table-rows=50"]

# ---------------------------------------------------------------- traces


def on_device(name, ts, dur, correlation, cat="kernel", **args):
    facts = {"correlation": correlation, **args}
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": facts}


def a_trace():
    """Two replays of four kernels, of which the third runs beside the second; a copy before each.

    A replay: a 0-10, b 12-20, c 18-25, d 30-31; idle 2 and 5 us. The second one begins at 100.
    """
    events = [
        {"ph": "M", "name": "process_name"},
        {"cat": "cpu_op", "name": "x", "ts": 0, "dur": 9},
    ]
    for number, at in enumerate((0, 100)):
        events.append(on_device("copy", at - 5, 2, 10 + number, "gpu_memcpy"))
        for name, begin, end in (("a", 0, 10), ("b", 12, 20), ("c", 18, 25), ("d", 30, 31)):
            grid = {"grid": [8, 1, 1], "block": [128, 1, 1]}
            events.append(
                on_device(name, at + begin, end - begin + number * 0.5, 90 + number, **grid)
            )
    return events[::-1]  # a trace's events are in no order


def test_idle_time_and_order_of_a_replay():
    found = read_trace(a_trace(), steps=2)
    assert found["replays"] == 2
    assert [one["name"] for one in found["kernels"]] == ["a", "b", "c", "d"]
    assert [one["begin_us"] for one in found["kernels"]] == [0, 12, 18, 30]
    assert [one["us"] for one in found["kernels"]] == [10.25, 8.25, 7.25, 1.25]
    assert found["kernels"][0]["shape"] == "8x1x1 128x1x1"
    assert found["span_us"] == pytest.approx(31.25)
    assert found["idle_us"] == pytest.approx((2 + 5 + 1.5 + 4.5) / 2)
    assert found["between_us"] == pytest.approx(100 - 31)
    assert found["top"][0] == {"name": "a", "us": 10.25, "calls": 1}
    assert found["top"][-2:] == [
        {"name": "copy", "us": 2, "calls": 1}, {"name": "d", "us": 1.25, "calls": 1}
    ]  # fmt: skip


def test_a_trace_without_graphs_has_its_longest_kernels_alone():
    alone = [on_device("k", 10 * n, 4, n) for n in range(6)]
    assert read_trace(alone, steps=3) == {"top": [{"name": "k", "us": 8, "calls": 2}]}
    assert read_trace([], steps=3) == {"top": []}


# ---------------------------------------------------------------- failures and hangs


def test_a_measurement_that_fails_or_lasts_too_long_is_one_line():
    def fails():
        raise ValueError("two\nlines " + 1000 * "x")

    def leaves():
        sys.exit("the yardstick ended with 1")

    failed = guard.measure(guard.Measurement("one", 5, fails))
    assert failed["name"] == "one" and "\n" not in failed["failed"]
    assert failed["failed"].startswith("ValueError: ... xxx") and len(failed["failed"]) < 400
    assert "the yardstick ended" in guard.measure(guard.Measurement("x", 5, leaves))["failed"]
    begin = time.monotonic()
    late = guard.measure(guard.Measurement("two", 0.2, lambda: time.sleep(30)))
    assert late["failed"] == "OutOfTimeError: took longer than 0.2 s" and late["seconds"] < 5
    assert guard.measure(guard.Measurement("three", 5, lambda: {"ms": 3}))["ms"] == 3
    assert time.monotonic() - begin < 10


# what hangs holds Python's lock and hears no signal, as a call that waits for a card
CHILD = """
import ctypes, json, signal, sys, time
sys.path.insert(0, {root!r})
from bench import guard
guard.GRACE = 0.3

def hang():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    ctypes.PyDLL(None).sleep(60)

def fail():
    raise RuntimeError("no such kernel")

works = {{"good": lambda: {{"ms": 1}}, "fails": fail, "hangs": hang, "last": lambda: {{"ms": 2}}}}
recover = fail if "refuses" in {how!r} else lambda: None
asked = json.loads(sys.argv[1])
sys.exit(guard.serve([guard.Measurement(name, 1, works[name]) for name in asked], recover))
"""


def supervised(tmp_path, names, how="", text=CHILD):
    """(records, how many processes it took)."""
    program, started = tmp_path / "child.py", []
    program.write_text(text.format(root=str(ROOT), how=how))

    def command(left):
        started.append(list(left))
        return [sys.executable, str(program), json.dumps(left)]

    measuring = guard.Measuring(command, tmp_path, {})
    return {one["name"]: one for one in guard.supervise(measuring, names)}, started


def test_a_hang_that_nothing_interrupts_costs_one_measurement(tmp_path, capfd):
    names = ["good", "fails", "hangs", "last"]
    found, started = supervised(tmp_path, names)
    assert list(found) == names
    assert found["good"]["ms"] == 1 and found["last"]["ms"] == 2
    assert found["fails"]["failed"] == "RuntimeError: no such kernel"
    assert found["hangs"]["failed"].startswith("the process ended with status 1 after ")
    assert started == [names, ["last"]]
    assert "in hang" in capfd.readouterr().err, "where it hangs is told"


def test_a_card_that_refuses_work_gets_a_new_process(tmp_path):
    found, started = supervised(tmp_path, ["fails", "good", "last"], how="refuses")
    assert started == [["fails", "good", "last"], ["good", "last"]]
    assert found["good"]["ms"] == 1 and found["last"]["ms"] == 2


def test_a_process_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "GRACE", 0.2)
    text = 'import time; print(\'{{"begins": "x", "limit": 0.5}}\', flush=True); time.sleep(60)'
    found, started = supervised(tmp_path, ["x"], text=text)
    assert found["x"]["failed"].startswith("the process did not end by itself and was killed")
    assert len(started) == 1


def test_processes_that_cannot_begin_are_not_started_for_ever(tmp_path):
    found, started = supervised(tmp_path, ["x", "y"], text="raise SystemExit(1)")
    assert [one["failed"] for one in found.values()] == 2 * ["no process could begin it"]
    assert len(started) == 1


# ---------------------------------------------------------------- the table


def test_without_a_gpu_it_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: bench/gpu.py: no CUDA")


def test_all_parts_are_measured_by_the_programs_trainer(tmp_path, capsys, monkeypatch):
    """In this process, with a small model in place of the published ones."""
    monkeypatch.setattr(gpu, "TARGETS", (TARGET,))
    parts = ["program", "steps", "loader", "profile", "roofline"]
    setting = Setting("cpu", tmp_path, None, [min(rows, 50) for rows in TABLES], 640, 128)
    make_rows(setting)
    names = json.dumps([gpu.name_of(TARGET, part) for part in parts])
    own = [f"--parts={','.join(parts)}", f"--measure={names}", f"--data={tmp_path}"]
    assert gpu.main([*SMALL, *own, f"--out={tmp_path}"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {one["name"].rpartition(" ")[2]: one for one in records if "name" in one}
    assert list(found) == parts and not any("failed" in one for one in found.values()), found
    assert found["program"]["lines"] == 11 and 0.3 < found["program"]["loss"] < 1
    for part in ("program", "steps", "loader"):
        speed = 1e3 * CASE.batch / found[part]["ms"]  # the loader takes 0.6 us: few digits
        assert found[part]["rows_per_second"] == pytest.approx(speed, rel=0.2), part
    with gzip.open(tmp_path / "trace_64.json.gz") as trace:
        assert "traceEvents" in json.load(trace)
    text = "\n".join(line for part in found for line in lines(TARGET, part, found[part], {}))
    assert re.search(r"^GPU, batch 64, D 8, rows/s +[\d,]+ +4,000,000, aim 8,000,000", text, re.M)
    assert len(re.findall(r"^  floor of (products|copies) +[\d.]+ ms", text, re.M)) == 2


def test_tables_are_filled_on_the_device_as_they_are_drawn(tmp_path):
    setting = Setting("cpu", tmp_path, None, [min(rows, 5000) for rows in TABLES], 640, 128)
    make_rows(setting)
    trainers = gpu_trainer.Trainers(setting)
    trainer = trainers.get(CASE, ()).trainer
    tables = list(trainer.model.emb_l.held_parts("weight"))
    assert len(tables) == 26
    for part, rows in tables:
        bound = part.matrix.bound
        assert 0 < rows.abs().max() <= bound and len(rows) == min(5000, part.num_rows)
        if len(rows) > 1000:
            assert rows.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert trainers.get(CASE, ()).trainer is trainer
    assert trainers.get(CASE, ("--amp=bf16",)).trainer is not trainer
    trainers.drop()


def test_replays_follow_one_another():
    calls = []
    trained = SimpleNamespace(
        warm_up=lambda: calls.append("warm up"),
        step=lambda: calls.append("step"),
        trainer=SimpleNamespace(step=SimpleNamespace(replays=[lambda: calls.append("replay")])),
        setting=SimpleNamespace(steps_a_line=lambda case: 7),
        case=CASE,
        device=SimpleNamespace(type="cpu"),
    )
    found = gpu_trainer.measure_replay(trained)
    assert calls == ["warm up", "step", *["replay"] * 7 * gpu_trainer.SERIES]
    assert found["least_ms"] <= found["ms"] <= found["most_ms"]
    trained.trainer.step.replays = []
    with pytest.raises(RuntimeError, match="0 steps are recorded"):
        gpu_trainer.measure_replay(trained)


def made(**speeds):
    """Records of measurements with these rows/s; a text is why one failed."""
    for part, speed in speeds.items():
        found = {"rows_per_second": speed, "ms": 1e3 * CASE.batch / speed} if speed else {}
        yield {"name": gpu.name_of(TARGET, part), **(found or {"failed": "RuntimeError: x"})}


def test_results_are_kept_and_a_later_call_knows_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "TARGETS", (TARGET,))
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    commit.cache_clear()
    records = {"program": 2e6, "steps": 3e6, "loader": 20e6}
    monkeypatch.setattr(gpu, "supervise", lambda *_: made(**records, profile=0))
    own = [f"--out={tmp_path / 'out'}", f"--data={tmp_path / 'data'}"]
    assert gpu.main([*SMALL, *own, "--parts=program,steps,loader,profile"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("commit abc; device cpu")
    assert "profile failed: RuntimeError: x" in text
    assert text.endswith("  below 4,000,000 rows/s by the host: steps are slower\n")
    monkeypatch.setattr(gpu, "supervise", lambda *_: made(yardstick=1e6))
    assert gpu.main([*SMALL, *own, "--parts=yardstick"]) == 0
    assert re.search(r"yardstick, rows/s +1,000,000 +2\.0  ", capsys.readouterr().out)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [gpu.RESULTS]
    kept = [json.loads(line) for line in (tmp_path / "out" / gpu.RESULTS).read_text().splitlines()]
    assert len(kept) == 5 and {one["commit"] for one in kept} == {"abc"}
    commit.cache_clear()


@pytest.mark.parametrize(
    "speeds, told",
    [
        ({"program": 9e6}, "reaches its aim of 8,000,000 rows/s"),
        ({"program": 5e6, "replay": 7e6, "steps": 6e6, "loader": 30e6},
         "below 8,000,000 rows/s by the kernels: bare replays are slower"),
        ({"program": 3e6, "replay": 9e6, "steps": 3e6, "loader": 30e6},
         "below 4,000,000 rows/s by the host: steps are slower, replays not"),
        ({"program": 3e6, "replay": 9e6, "steps": 9e6, "loader": 3.5e6},
         "below 4,000,000 rows/s by the loader: alone it is slower"),
        ({"program": 3e6, "replay": 3e6, "steps": 3e6, "loader": 3.5e6},
         "below 4,000,000 rows/s by the kernels: bare replays are slower; the loader: alone it is"
         " slower"),
        ({"program": 3e6, "replay": 9e6, "steps": 9e6, "loader": 9e6},
         "below 4,000,000 rows/s by loader and steps together: each alone is fast enough"),
        ({"program": 3e6}, "below 4,000,000 rows/s by what was not measured"),
    ],
)  # fmt: skip
def test_a_miss_is_attributed(speeds, told):
    assert verdict(TARGET, speeds).strip() == told


def test_rows_are_made_once_for_all_measurements(tmp_path):
    tables = [min(rows, 300) for rows in TABLES]
    setting = Setting("cpu", tmp_path, None, tables, 1000, 100)
    assert make_rows(setting) and not make_rows(setting)
    meta = json.loads((tmp_path / FOLDER / "meta.json").read_text())
    dtype = np.dtype([tuple(column) for column in meta["columns"]])
    rows = np.fromfile(tmp_path / FOLDER / "train.bin", dtype)
    assert len(rows) == 1000 and len(np.unique(rows)) == 1000, "no two are alike"
    for table, count in enumerate(tables, 1):
        assert rows[f"C{table}"].max() < count
    assert make_rows(Setting("cpu", tmp_path, None, tables, 1500, 100))


@pytest.mark.slow
def test_one_command_measures_in_a_process_of_its_own(tmp_path):
    words = "--device=cpu --rows=4096 --rows-a-line=2048 --most-table-rows=50 --only=2048"
    parts = "--parts=program,loader,yardstick"
    done = shell(sys.executable, ROOT / "bench" / "gpu.py", *words.split(), parts, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^GPU, batch 2048, D 64, rows/s +[\d,]+ +4,000,000", done.stdout, re.M)
    assert re.search(r"^  yardstick, rows/s +[\d,]+ +[\d.]+  ", done.stdout, re.M)


# ---------------------------------------------------------------- the first hour

PYTHON = """#!/bin/sh
case "$*" in
*"import xdist"*) exit 1 ;;
*machine.py*) echo "a machine" ;;
*self-check*) echo PASS; exit 0 ;;
*"-m pytest"*) echo "FAILED test_x - assert 1"; exit 1 ;;
*program,steps*) echo "GPU, batch 1, rows/s"; sleep {seconds} ;;
*kernels.py*) echo "a kernel" ;;
esac
"""


def first_hour(tmp_path, *words, seconds=0, **settings):
    python = tmp_path / "python"
    python.write_text(PYTHON.format(seconds=seconds))
    python.chmod(0o755)
    env = {"PYTHON": str(python), **settings}
    return shell("bash", ROOT / "bench" / "first_hour.sh", *words, cwd=tmp_path, env=env)


def test_the_first_hour_notes_what_fails_and_goes_on(tmp_path):
    done = first_hour(tmp_path, "out", "--device=cpu")
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary == done.stdout
    assert len(list((tmp_path / "out").iterdir())) <= 8
    for line in ("a machine", "PASS", "FAILED test_x - assert 1", "GPU, batch 1, rows/s"):
        assert f"\n{line}\n" in summary
    heads = re.findall(r"^== ([\w -]+): (ok|ended with status \d+|there is no)", summary, re.M)
    assert [name for name, _ in heads] == [
        "machine", "self-check", "tests", "speed", "kernels", "profiles", "roofline and yardstick",
        "quality",
    ]  # fmt: skip
    assert dict(heads)["tests"] == "ended with status 1" and dict(heads)["speed"] == "ok"
    assert "==== tests: " in (tmp_path / "out" / "log.txt").read_text()


def test_the_first_hour_has_an_end(tmp_path):
    begin = time.monotonic()
    done = first_hour(tmp_path, "--device=cpu", seconds=60, MOST_SECONDS="6")
    assert time.monotonic() - begin < 30
    assert "== speed: stopped at its limit" in done.stdout
    assert "== quality: not begun, the time is over" in done.stdout
    assert (tmp_path / "first_hour" / "summary.txt").is_file()


def test_a_mistake_in_the_first_hour_is_one_line(tmp_path):
    wrong = first_hour(tmp_path, "--devise=cpu")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: --devise=cpu: expected --device=cpu, or a folder\n"
    none = shell("bash", ROOT / "bench" / "first_hour.sh", env={"PYTHON": os.devnull})
    assert none.returncode == 2 and "PYTHON=... names another Python" in none.stderr
