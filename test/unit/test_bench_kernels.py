"""bench/kernels.py measures what it says, passes over what fails, and runs without a GPU."""

import argparse
import csv
import gzip
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from bench import kernel_compilation, kernel_settings, kernel_timer, kernels
from bench.floors import count
from bench.gpu import TABLES, TARGETS
from bench.kernel_cases import Copy, Inputs, Shape, Work, works
from devices.gpu import OLDEST_TRITON, triton_version

PROGRAM = ROOT / "bench" / "kernels.py"
A, B, SMALL_BATCH = (Shape.of(target.case, TABLES) for target in TARGETS)
TINY = Shape("tiny", 4, 16, (16, 8), (24, 8, 1), (5, 3))
INTERPRET = "0" if torch.cuda.is_available() else "1"  # other tests of this process import too
needs_triton = pytest.mark.skipif(triton_version() < OLDEST_TRITON, reason="Triton is missing")


def start(*flags, **environment):
    command = [sys.executable, PROGRAM, *flags]
    variables = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)


def read(folder):
    with gzip.open(folder / "kernels.csv.gz", "rt", newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- what is counted


@pytest.mark.parametrize(
    "name, detail, moved, row_bytes, operations, times",
    [
        ("decode", "", 32768 * (87 + 16 * 2 + 26 * 4 + 4), 0, 0, 1),
        ("look_up", "skewed", 851968 * (4 + 64 * 2), 256, 0, 1),
        ("look_up", "uniform", 851968 * (4 + 64 * 2), 256, 0, 0),
        ("sgd", "skewed", 851968 * (4 + 64 * 2), 512, 0, 1),
        ("sgd, equal rows summed", "one row", 851968 * (4 + 64 * 2), 512, 0, 0),
        ("dot_forward", "", 140_509_184, 0, 0, 1),
        ("dot_backward", "", 253_755_392, 0, 0, 1),
        ("head_with_loss", "256 columns", 33_816_576, 0, 0, 1),
        ("relu_backward", "512 columns", 100_663_296, 0, 0, 3),
        ("relu_backward", "64 columns, copied", 12_582_912, 0, 0, 1),
        ("update_parameters", "sgd", 764_225 * 22, 0, 0, 1),
        ("product forward", "512 to 256", 50_331_648 + 262_144, 0, 8_589_934_592, 2),
        ("product of weights", "416 to 512", 60_817_408 + 851_968, 0, 13_958_643_712, 1),
    ],
)
def test_bytes_and_operations_of_model_a(name, detail, moved, row_bytes, operations, times):
    (work,) = (one for one in works(A) if (one.name, one.detail) == (name, detail))
    assert (work.moved, work.row_bytes) == (moved, row_bytes)
    assert (work.operations, work.times) == (operations, times)


@pytest.mark.parametrize("target", TARGETS)
def test_products_are_all_of_a_step(target):
    """All but the head's, with rows filled up to multiples of 8 columns."""
    shape = Shape.of(target.case, TABLES)
    found = sum(work.times * work.operations for work in works(shape))
    assert found == pytest.approx(count(target.case).mlp_operations, rel=0.01)
    names = {(work.name, work.detail) for work in works(shape)}
    assert ("product of weights", "16 to 512") in names
    assert ("product of inputs", "16 to 512") not in names, "nobody wants the data's gradient"


def test_a_row_counts_once_however_often_it_comes():
    work = Work(TINY, "look_up", "", lambda inputs: None, moved=100, row_bytes=10)
    rows = torch.tensor([7, 7, 2, 7, 0], dtype=torch.int32)
    assert work.bytes(Copy(print, rows)) == 130 and work.bytes(Copy(print)) == 100


def test_ids_are_drawn_as_they_are_called():
    shape = Shape("", 4000, 16, (16, 8), (24, 8, 1), (100, 60))
    inputs = Inputs("cpu", torch.float16)
    for kind, low in (("uniform", 0.1), ("skewed", 0.1 ** (1 / 3)), ("one row", 0.91)):
        first, second = inputs.rows(shape, kind).view(-1, 2).unbind(1)
        assert first.min() == 0 and first.max() < 100
        assert second.min() == 100 and 150 < second.max() < 160
        assert (first < 10).float().mean() == pytest.approx(low, abs=0.03), kind


# ---------------------------------------------------------------- settings


@needs_triton
def test_a_setting_lasts_as_long_as_its_block(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", INTERPRET)
    rows = kernel_settings.triton_kernels("rows")
    before = rows._look_up, rows.LOOKUP_IDS
    (work,) = (one for one in works(TINY) if (one.name, one.detail) == ("look_up", "skewed"))
    copy = work.make(Inputs("meta", torch.float16))
    own = work.own_setting(copy)
    assert own == {"LOOKUP_IDS": rows.LOOKUP_IDS, "warps": 4}
    setting = {"LOOKUP_IDS": 8, "warps": 2}
    ((_, _, launched),) = kernel_settings.recorded(work.kernel, setting, copy.call)
    assert launched["IDS"] == 8 and launched["num_warps"] == 2
    assert (rows._look_up, rows.LOOKUP_IDS) == before
    assert own not in [{**own, **other} for other in work.other_settings(own)]


@needs_triton
def test_all_that_a_card_needs_is_compiled_ahead(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", INTERPRET)
    launches = kernel_compilation.to_compile([A, B, SMALL_BATCH], torch.bfloat16)
    names = {kernel.__name__ for kernel, *_ in launches}
    assert names == {work.kernel[1] for work in works(A) if work.kernel[0]}
    assert 80 < len(launches) < 160
    dims = {constants.get("D") for _, _, constants in launches}
    assert dims == {64, 128, None}


# ---------------------------------------------------------------- time


class Clock:
    """A card on which a recorded call takes 7 us, and a replay 3 more."""

    def __init__(self, monkeypatch):
        self.now, self.recorded = 0.0, None
        names = {"CUDAGraph": self.graph, "Event": self.event, "synchronize": lambda: None}
        for name, value in names.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, kind):
        if self.recorded is not None:
            self.recorded.append(kind)

    def graph(self):
        def begin(capture_error_mode):
            self.recorded = []

        def end():
            self.launched, self.recorded = self.recorded, None

        def replay():
            self.now += 3 + 7 * len(self.launched)

        return SimpleNamespace(capture_begin=begin, capture_end=end, replay=replay)

    def event(self, enable_timing):
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: (other.at - event.at) / 1e3
        return event


def test_a_time_is_that_of_one_launch(monkeypatch):
    clock = Clock(monkeypatch)
    calls = [lambda: clock.call("first"), lambda: clock.call("second")]
    found = kernel_timer.Timer(on_gpu=True).microseconds(calls, expected=5)
    assert clock.launched == ["first", "second"] * 40
    assert found == pytest.approx([7, *[7] * (len(found) - 1)], rel=0.01) and len(found) >= 5


def test_a_recording_that_fails_is_ended(monkeypatch):
    clock = Clock(monkeypatch)

    def fail():
        if clock.recorded is not None:
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        kernel_timer.Timer(on_gpu=True).microseconds([fail], expected=5)
    assert clock.recorded is None


# ---------------------------------------------------------------- failures


def measurements(device="cpu", seconds=math.inf):
    return kernels.Measurements(argparse.Namespace(seconds=seconds), Inputs(device, torch.float16))


def failing(inputs):
    def fail():
        raise RuntimeError("out of registers\nand a trace")

    return Copy(fail)


WORKS = [
    Work(TINY, "good", "", lambda inputs: Copy(lambda: sum(range(1000))), 100),
    Work(TINY, "bad", "", failing, 100),
    Work(TINY, "unmakeable", "", lambda inputs: 1 / 0, 100),
    Work(TINY, "good too", "", lambda inputs: Copy(lambda: sum(range(1000))), 100),
]


def report(monkeypatch, tmp_path, device, seconds=math.inf):
    monkeypatch.setattr(kernels, "works", lambda shape: WORKS)
    monkeypatch.setattr(kernels, "shapes_of", lambda options: [TINY])
    options = argparse.Namespace(device=device, seconds=seconds, out=tmp_path / "new")
    return kernels.report(options, kernel_compilation.Compilers([], 0))


def test_a_failure_is_told_and_passed_over(monkeypatch, tmp_path, capsys):
    assert report(monkeypatch, tmp_path, "cpu") == 0
    text = capsys.readouterr().out
    assert re.search(r"^tiny +bad +1 x failed: RuntimeError: out of registers$", text, re.M)
    assert re.search(r"^tiny +unmakeable +1 x failed: ZeroDivisionError", text, re.M)
    assert "WITHOUT 2 that failed" in text
    lines = {line["kernel"]: line for line in read(tmp_path / "new")}
    assert float(lines["good too"]["us"]) > 0 and lines["good too"]["failure"] == ""
    assert lines["bad"]["us"] == "nan" and "out of registers" in lines["bad"]["failure"]


def test_a_card_that_is_broken_ends_it_with_what_there_is(monkeypatch, tmp_path, capsys):
    """The first failure leaves the card unusable."""
    made, real = [], kernels.Inputs

    def on_cpu(device, lower):
        made.append(real("cpu", lower))
        return made[0]

    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    def bad(inputs):
        inputs.device = torch.device("cuda")
        return failing(inputs)

    monkeypatch.setattr(kernels, "Inputs", on_cpu)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setitem(globals(), "WORKS", [WORKS[0], Work(TINY, "bad", "", bad, 100), WORKS[3]])
    assert report(monkeypatch, tmp_path, "cpu") == 1
    text = capsys.readouterr().out
    assert "the card has failed, this is the end: RuntimeError: out of registers" in text
    assert [line["kernel"] for line in read(tmp_path / "new")][-2:] == ["good", "bad"]


def test_what_is_late_is_skipped_and_counted():
    found = measurements(seconds=0)
    assert list(found.own(WORKS[0])) == [] and found.num_skipped == 1
    work = Work(TINY, "many", "", failing, 1, settings=({"warps": 1}, {"warps": 2}))
    assert list(found.others(work)) == [] and found.num_skipped == 3


def test_with_no_time_at_all_it_says_that_nothing_was_measured(monkeypatch, tmp_path, capsys):
    assert report(monkeypatch, tmp_path, "cpu", seconds=0) == 0
    text = capsys.readouterr().out
    assert "nothing measured" in text and "the time is over: 4 measurements skipped" in text


def test_the_best_setting_is_told_with_its_gain():
    own = kernels.Line("A", "relu_backward", "512 columns", "ROWS=32", True, 3, us=40.0)
    better = kernels.Line("A", "relu_backward", "512 columns", "ROWS=16", False, 3, us=30.0)
    told = "\n".join(kernels.best_settings([own, better]))
    assert "30.0 us, 10.0 us less, 3 times a step" in told
    assert "ROWS=16   (own: ROWS=32)" in told


# ---------------------------------------------------------------- as a user runs it


@needs_triton
def test_the_rehearsal_measures_every_kernel(tmp_path):
    finished = start("--device=cpu", "--small", f"--out={tmp_path}", "--seconds=40")
    assert finished.returncode == 0, finished.stderr
    assert "no time below means anything" in finished.stdout
    assert re.search(r"^small +both +[\d.]+ us: [\d.]+ M rows/s$", finished.stdout, re.M)
    lines = read(tmp_path)
    assert not [line["failure"] for line in lines if line["failure"]]
    small = Shape.of(kernels.SMALL, kernels.SMALL_TABLES)
    wanted = {(work.name, work.detail) for work in works(small)}
    assert wanted <= {
        (line["kernel"], line["detail"]) for line in lines if line["is_own"] == "True"
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    finished = start()
    assert finished.returncode == 2 and finished.stdout == ""
    line = "error: bench/kernels.py: no CUDA device found (--device=cpu tries it)\n"
    assert finished.stderr == line


def test_a_batch_size_of_no_shape_is_one_line():
    finished = start("--only=7")
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: --only=7: no shape has this batch size")
    assert finished.stderr.count("\n") == 1
