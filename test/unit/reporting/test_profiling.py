"""--enable-profiling: the arithmetic of its table, the marks of phases, the files it writes."""

import json
import time
import types

import pytest
import torch
from conftest import ROOT  # noqa: F401 (puts the program's folder on the path)
from torch import nn
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from common.errors import UserError
from ranks.process import Process
from reporting import profiling
from reporting.phase_table import (
    OTHER,
    Phase,
    Range,
    phase_rows,
    phase_table,
    read_events,
    timeline,
)
from reporting.profiling import profiled


def process(rank=0, world_size=1):
    return Process(rank, world_size, rank, torch.device("cpu"), "gloo")


def event(name, begin, end, thread=1, **settings):
    settings = {"is_user_annotation": True, "use_device": "cuda"} | settings
    return FunctionEvent(0, name, thread, begin, end, **settings)


def phases(*names, closed=()):
    return [Phase(name, None, "", closed=name in closed) for name in names]


def read(events, names, num_steps, closed=()):
    found = phases(*names, closed=closed)
    return found, read_events(events, found, num_steps)


def by_name(events, names, num_steps, closed=()):
    return {row.name: row for row in phase_rows(*read(events, names, num_steps, closed))}


def test_an_instant_is_of_the_range_that_began_last():
    got = timeline([Range("b", 2, 6), Range("a", 0, 10), Range("c", 4, 12), Range("none", 3, 3)])
    want = [("a", 0, 2), ("b", 2, 4), ("c", 4, 6), ("c", 6, 10), ("c", 10, 12)]
    assert [(part.name, part.begin, part.end) for part in got] == want
    assert timeline([Range("inner", 0, 1), Range("outer", 0, 2)])[0].name == "inner"
    assert timeline([]) == []


def test_times_are_exclusive_over_nesting_and_threads_and_sum_to_the_step():
    events = [
        event("ProfilerStep*", 0, 9000),  # warms up
        event("embedding", 100, 8000),
        event("ProfilerStep*", 10000, 20000),
        event("embedding", 10000, 13000),
        event("exchange", 11000, 12000),
        event("backward", 14000, 19000),
        event("update", 15000, 17000, thread=2),
        event("exchange", 16500, 17500, thread=3),
        event("aten::mm", 15000, 16000, is_user_annotation=False),
        event("update", 18000, 18500, is_user_annotation=False),  # an operator of that name
        event("ProfilerStep*", 20000, 30000),
        event("embedding", 21000, 22000),
        event("embedding", 23000, 24000),
        event("update", 29000, 31000, thread=2),  # the step does not wait for its end
        event("ProfilerStep*", 30000, 35000),  # has not ended
        event("backward", 30000, 35000),
    ]
    names = ("embedding", "exchange", "backward", "update", "never")
    found = by_name(events, names, num_steps=3)
    assert list(found) == [*names, OTHER, "step"]
    assert {name: row.ms for name, row in found.items()} == pytest.approx({
        "embedding": 2.0, "exchange": 1.0, "backward": 1.25, "update": 1.25, "never": 0.0,
        OTHER: 4.5, "step": 10.0,
    })  # fmt: skip
    assert [found[name].calls for name in names] == [1.5, 1.0, 0.5, 1.0, 0.0]


def test_a_run_of_one_step_has_its_table_and_a_run_of_none_says_so():
    steps = [event("ProfilerStep*", 0, 4000), event("ProfilerStep*", 4000, 4100)]
    events = [*steps, event("load", 0, 1000)]
    found = by_name(events, ["load"], num_steps=1)
    assert (found["load"].ms, found[OTHER].ms, found["step"].ms) == (1.0, 3.0, 4.0)
    assert "after a first one" not in phase_table(*read(events, ["load"], 1))
    assert phase_table(*read(events, ["load"], 0)) == "phases of a training step: no step has ended"


def test_a_closed_phase_keeps_the_time_inside_it():
    events = [
        event("ProfilerStep*", 0, 10000),
        event("MLPs", 0, 1000),
        event("evaluation", 2000, 8000),
        event("MLPs", 3000, 6000),
    ]
    found = by_name(events, ["MLPs", "evaluation"], num_steps=1, closed=["evaluation"])
    assert (found["MLPs"].ms, found["MLPs"].calls, found["evaluation"].ms) == (1.0, 1.0, 6.0)


def launch(name, begin, us, end=None, **settings):
    made = event(name, begin, end or begin + 5, **{"is_user_annotation": False} | settings)
    made.append_kernel("kernel", 0, us)
    return made


def test_device_time_is_of_the_phase_that_launched_it():
    events = [
        event("ProfilerStep*", 0, 10000),
        launch("backward", 1000, 50000, 9000, is_user_annotation=True),  # spans the ones inside
        launch("Optimizer.step", 1000, 50000, 9000, is_user_annotation=True),
        event("update", 2000, 3000, thread=2),
        launch("aten::mm", 1500, 400),
        launch("aten::mm", 3500, 100),
        launch("aten::index_add_", 2500, 3000, thread=2),
        launch("aten::item", 9500, 200),
        launch("aten::item", 500, 20),
        launch("cudaStreamSynchronize", 2500, 7000),  # has an operator's number by chance
        launch("aten::mm", 10500, 9000),  # after the step
        event("gemm", 1600, 2000, device_type=DeviceType.CUDA, is_user_annotation=False),
        event("backward", 1600, 9000, device_type=DeviceType.CUDA),
    ]
    found, recording = read(events, ["backward", "update"], 1)
    device = {row.name: row.device_ms for row in phase_rows(found, recording)}
    want = {"backward": 0.5, "update": 3.0, OTHER: 0.22, "step": 3.72}
    assert device == pytest.approx(want)
    host = {row.name: (row.calls, row.ms) for row in phase_rows(found, recording)}
    assert host["backward"] == (1.0, 7.0) and host["update"] == (1.0, 1.0)
    lines = phase_table(found, recording).splitlines()
    assert lines[1].endswith("device ms/step") and lines[3].split()[-1] == "3.000"
    assert len({len(line) for line in lines[1:-1]}) == 1


def test_without_a_device_the_table_has_no_column_for_it():
    steps = [event("ProfilerStep*", 0, 1000), event("ProfilerStep*", 1000, 3000)]
    events = [*steps, event("load", 1000, 1500)]
    lines = phase_table(*read(events, ["load"], 2)).splitlines()
    assert lines[0] == "phases of a training step, mean of 1 after a first one of 1.000 ms"
    assert [line.split() for line in lines[1:]] == [
        ["phase", "calls/step", "ms/step", "share", "%"],
        ["load", "1.00", "0.500", "25.0"],
        [OTHER, "1.500", "75.0"],
        ["step", "2.000", "100.0"],
    ]


# ---------------------------------------------------------------- marks


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values):
        return 2 * values

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Base:
    def inherited(self):
        return self, "inherited"

    @classmethod
    def of_class(cls):
        return cls, "of_class"


class Part(Base):
    kept = "kept"

    def __init__(self):
        self.attribute = lambda: "attribute"

    def own(self):
        return self, "own"

    @staticmethod
    def static(word):
        return word


def all_kinds():
    part = Part()
    module = types.ModuleType("python_module")
    module.function = lambda: "function"
    owners = [
        (part, "own"), (part, "inherited"), (part, "attribute"), (part, "static"), (Part, "own"),
        (Part, "inherited"), (Part, "static"), (Part, "of_class"), (Double, "backward"),
        (nn.Sequential(nn.Linear(2, 2)), "forward"), (module, "function"),
    ]  # fmt: skip
    return [Phase("p", *owner) for owner in owners]


def attributes(found):
    return [dict(vars(phase.owner)) for phase in found]


def test_marked_methods_do_as_before_and_are_restored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = all_kinds()
    before = attributes(found)
    part, module = found[0].owner, found[-1].owner
    with profiled(True, process(), found, say=lambda _: None):
        assert all(vars(phase.owner)[phase.method] is not old.get(phase.method)
                   for phase, old in zip(found, before, strict=True))  # fmt: skip
        fresh = Part()
        for one in (part, fresh):
            assert one.own() == (one, "own") and one.inherited() == (one, "inherited")
            assert one.static("word") == "word" and one.of_class() == (Part, "of_class")
        assert Part.static("word") == "word" and Part.of_class() == (Part, "of_class")
        assert part.attribute() == "attribute" and module.function() == "function"
        assert found[-2].owner(torch.ones(1, 2)).shape == (1, 2)
    assert attributes(found) == before


def test_methods_are_restored_after_an_exception(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = all_kinds()
    before = attributes(found)
    with (
        pytest.raises(ZeroDivisionError),
        profiled(True, process(), found, lambda _: None) as after_step,
    ):
        after_step()
        raise ZeroDivisionError
    assert attributes(found) == before
    wrong = [*found, Phase("wrong", found[0].owner, "no_such_method")]
    with pytest.raises(AttributeError), profiled(True, process(), wrong):
        pass
    assert attributes(found) == before


def test_off_touches_no_method_and_writes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    found = all_kinds()
    before = attributes(found)
    with profiled(False, process(), found) as after_step:
        assert attributes(found) == before
        after_step()
        assert not torch.autograd.profiler._is_profiler_enabled
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


def test_each_marks_the_making_of_every_item(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Loader:
        def load(self, count):
            for number in range(count):
                time.sleep(0.01)
                yield number

    loader, said = Loader(), []
    with profiled(True, process(), [Phase("load", loader, "load", each=True)], said.append) as done:
        for number in loader.load(4):
            time.sleep(0.02)
            assert number < 4
            done()
    found = numbers(said[0])
    assert found["load"][0] == 1.0 and found["load"][1] > 9 and found[OTHER][1] > 19


# ---------------------------------------------------------------- a run


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bottom, self.top = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, values):
        return self.top(Double.apply(torch.relu(self.bottom(values))))


NAMES = ("MLPs", "forward", "backward", "exchange", "update", "never")


def run(num_steps, where=None):
    """Gives what was said; where = the process."""
    net, said = Net(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    found = [
        Phase("MLPs", net.bottom, "forward"), Phase("MLPs", net.top, "forward"),
        Phase("forward", net, "forward"), Phase("backward", torch.Tensor, "backward"),
        Phase("exchange", Double, "backward"), Phase("update", optimizer, "step"),
        Phase("never", net, "eval"),
    ]  # fmt: skip
    with profiled(True, where or process(), found, said.append) as after_step:
        for _ in range(num_steps):
            net(torch.ones(4, 8)).mean().backward()
            optimizer.step()
            after_step()
    assert "forward" not in vars(net)
    return said


def numbers(text):
    """{phase: (calls a step or None, ms a step, share)} of a table."""
    lines = text.split("\n\n")[0].splitlines()[2:]
    words = [line.split() for line in lines if not line.startswith("profile: ")]
    return {
        word[0]: (float(word[1]) if len(word) == 4 else None, float(word[-2]), float(word[-1]))
        for word in words
    }


def test_a_run_writes_a_trace_and_a_table_that_sums_to_the_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (said,) = run(num_steps=5)
    written = (tmp_path / "dlrm_s_pytorch.prof").read_text()
    by_phase, by_operator = written.split("\n\n", 1)
    assert said == f"{by_phase}\nprofile: dlrm_s_pytorch.prof, dlrm_s_pytorch.json"
    assert "mean of 4 after a first one of" in by_phase
    assert "aten::addmm" in by_operator and "Self CPU" in by_operator
    found = numbers(written)
    assert tuple(found) == (*NAMES, OTHER, "step")
    calls = [found[name][0] for name in NAMES]
    assert calls == [2.0, 1.0, 1.0, 1.0, 1.0, 0.0]
    *parts, step = [ms for _, ms, _ in found.values()]
    assert step > 0 and sum(parts) == pytest.approx(step, abs=0.0005 * len(found))
    *shares, whole = [share for _, _, share in found.values()]
    assert whole == 100 and sum(shares) == pytest.approx(100, abs=0.05 * len(found))
    assert all(found[name][1] > 0 for name in (*NAMES[:-1], OTHER))
    trace = json.loads((tmp_path / "dlrm_s_pytorch.json").read_text())
    assert {*NAMES[:-1], "ProfilerStep#4"} <= {one.get("name") for one in trace["traceEvents"]}


def test_profiling_ends_after_its_steps_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiling, "PROFILED_STEPS", 3)
    net, said = Net(), []
    with profiled(True, process(), [Phase("forward", net, "forward")], said.append) as after_step:
        for step in range(5):
            assert ("forward" in vars(net)) == (step < 3) == (not said)
            net(torch.ones(4, 8))
            after_step()
    assert len(said) == 1 and "mean of 2 after" in said[0]
    assert numbers(said[0])["forward"][0] == 1.0


@pytest.mark.parametrize("num_steps", [0, 1])
def test_short_runs_write_too(num_steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (said,) = run(num_steps)
    assert ("no step has ended" in said) == (num_steps == 0)
    assert ("mean of 1\n" in said) == (num_steps == 1)
    json.loads((tmp_path / "dlrm_s_pytorch.json").read_text())
    assert (tmp_path / "dlrm_s_pytorch.prof").read_text().startswith("phases of a training step")


def test_each_rank_has_files_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(2, process(rank=1, world_size=2))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["dlrm_s_pytorch_1.json", "dlrm_s_pytorch_1.prof"]


@pytest.mark.parametrize("name", ["dlrm_s_pytorch.json", "dlrm_s_pytorch.prof"])
def test_what_cannot_be_written_is_one_line_before_any_step(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"--enable-profiling: .*{name} cannot be written"):
        run(1)


def test_a_trace_that_is_lost_at_the_end_is_an_error(tmp_path, monkeypatch):
    """The profiler logs that it cannot write, and goes on: here it goes on without the log."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda *_: None)
    with pytest.raises(UserError, match=r"dlrm_s_pytorch.json: the trace cannot be written"):
        run(1)
    assert (tmp_path / "dlrm_s_pytorch.prof").read_text().startswith("phases of a training step")
