"""--enable-profiling: the files that it writes and the table that it prints."""

import json

import pytest
import torch
from conftest import SMALL_MODEL
from conftest import train as run_program
from torch import nn

from common.errors import UserError
from common.phases import PHASES, each_in_phase, phase
from ranks.process import Process
from reporting.phase_table import OTHER
from reporting.profiling import profiled
from reporting.reporter import Reporter


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def process(rank=0, world_size=1):
    return Process(rank, world_size, rank, torch.device("cpu"), "gloo")


def train(num_batches, **settings):
    """Steps of a small network; returns what was said, and how often before each step."""
    net, said, said_before = nn.Linear(8, 1), [], []
    reporter = Reporter()
    reporter.say = said.append
    settings = {"process": process(), "reporter": reporter} | settings
    with profiled(True, **settings) as after_step:
        for number in each_in_phase("load", range(num_batches)):
            said_before.append(len(said))
            with phase("MLPs"):
                loss = net(torch.full((4, 8), float(number))).mean()
            with phase("backward"):
                loss.backward()
            after_step()
    return said, said_before


def numbers(text):
    """{phase: (calls a step or None, ms a step, share)} of a table."""
    lines = text.split("\n\n")[0].splitlines()[2:]
    words = [line.split() for line in lines if not line.startswith("profile: ")]
    return {
        word[0]: (float(word[1]) if len(word) == 4 else None, float(word[-2]), float(word[-1]))
        for word in words
    }


def test_a_run_writes_a_trace_and_a_table_that_sums_to_the_step(folder):
    (said,), _ = train(5)
    written = (folder / "dlrm_s_pytorch.prof").read_text()
    by_phase, by_operator = written.split("\n\n", 1)
    assert said == f"{by_phase}\nprofile: dlrm_s_pytorch.prof, dlrm_s_pytorch.json"
    assert "mean of 4 after a first one of" in by_phase
    assert "aten::addmm" in by_operator and "Self CPU" in by_operator
    found = numbers(written)
    assert tuple(found) == (*PHASES, OTHER, "step")
    calls = {name: calls for name, (calls, _, _) in found.items() if calls}
    assert calls == {"load": 1.0, "MLPs": 1.0, "backward": 1.0}
    *parts, step = [ms for _, ms, _ in found.values()]
    assert step > 0 and sum(parts) == pytest.approx(step, abs=0.0005 * len(found))
    *shares, whole = [share for _, _, share in found.values()]
    assert whole == 100 and sum(shares) == pytest.approx(100, abs=0.05 * len(found))
    assert all(found[name][1] > 0 for name in (*calls, OTHER))
    trace = json.loads((folder / "dlrm_s_pytorch.json").read_text())
    assert {*calls, "ProfilerStep#4"} <= {one.get("name") for one in trace["traceEvents"]}


def test_profiling_ends_after_its_steps_and_training_goes_on():
    said, said_before = train(5, num_steps=3)
    assert said_before == [0, 0, 0, 1, 1]
    assert len(said) == 1 and "mean of 2 after" in said[0]
    assert numbers(said[0])["MLPs"][0] == 1.0


def test_without_the_flag_nothing_is_written_or_profiled(folder, capfd):
    with profiled(False, process()) as after_step:
        after_step()
        assert not torch.autograd.profiler._is_profiler_enabled
    assert not list(folder.iterdir()) and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("num_batches", [0, 1])
def test_short_runs_write_too(num_batches, folder):
    (said,), _ = train(num_batches)
    assert ("no step has ended" in said) == (num_batches == 0)
    assert ("mean of 1\n" in said) == (num_batches == 1)
    json.loads((folder / "dlrm_s_pytorch.json").read_text())
    assert (folder / "dlrm_s_pytorch.prof").read_text().startswith("phases of a training step")


def test_each_rank_has_files_of_its_own(folder):
    train(2, process=process(rank=1, world_size=2))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["dlrm_s_pytorch_1.json", "dlrm_s_pytorch_1.prof"]


@pytest.mark.parametrize("name", ["dlrm_s_pytorch.json", "dlrm_s_pytorch.prof"])
def test_a_file_that_cannot_be_written_is_one_line_before_any_step(name, folder):
    (folder / name).mkdir()
    with pytest.raises(UserError, match=f"--enable-profiling: .*{name} cannot be written"):
        train(1)


def test_a_trace_that_is_lost_at_the_end_is_an_error(folder, monkeypatch):
    """The profiler logs that it cannot write, and goes on: here it goes on without the log."""
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda *_: None)
    with pytest.raises(UserError, match=r"dlrm_s_pytorch.json: the trace cannot be written"):
        train(1)
    assert (folder / "dlrm_s_pytorch.prof").read_text().startswith("phases of a training step")


def test_a_training_run_is_told_by_its_phases():
    """Every phase that a step on one CPU has; accumulation makes the update one of its own."""
    flags = ["--enable-profiling", "--test-freq=5", "--mlperf-grad-accum-iter=2"]
    result = run_program(*SMALL_MODEL, *flags)
    assert result.status == 0, result.err
    found = numbers(result.out.partition("phases of a training step")[2])
    assert {name for name in PHASES if found[name][0]} == {*PHASES} - {"graph"}
    assert found["MLPs"][0] == 2.0 and found["load"][0] == 1.0
