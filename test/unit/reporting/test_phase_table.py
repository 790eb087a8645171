"""The arithmetic of the table of phases."""

import pytest
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from common.phases import PHASES
from reporting.phase_table import OTHER, Range, phase_rows, phase_table, read_events, timeline


def event(name, begin, end, thread=1, **settings):
    settings = {"is_user_annotation": True, "use_device": "cuda"} | settings
    return FunctionEvent(0, name, thread, begin, end, **settings)


def rows_of(events, num_steps):
    return {row.name: row for row in phase_rows(read_events(events, num_steps))}


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
    found = rows_of(events, num_steps=3)
    assert list(found) == [*PHASES, OTHER, "step"]
    times = {"embedding": 2.0, "exchange": 1.0, "backward": 1.25, "update": 1.25, OTHER: 4.5}
    want = dict.fromkeys(PHASES, 0.0) | times | {"step": 10.0}
    assert {name: row.ms for name, row in found.items()} == pytest.approx(want)
    names = ("embedding", "exchange", "backward", "update", "load")
    assert [found[name].calls for name in names] == [1.5, 1.0, 0.5, 1.0, 0.0]


def test_a_run_of_one_step_has_its_table_and_a_run_of_none_says_so():
    steps = [event("ProfilerStep*", 0, 4000), event("ProfilerStep*", 4000, 4100)]
    events = [*steps, event("load", 0, 1000)]
    found = rows_of(events, num_steps=1)
    assert (found["load"].ms, found[OTHER].ms, found["step"].ms) == (1.0, 3.0, 4.0)
    assert "after a first one" not in phase_table(read_events(events, 1))
    none = phase_table(read_events(events, 0))
    assert none == "phases of a training step: no step has ended"


def test_a_closed_phase_keeps_the_time_inside_it():
    events = [
        event("ProfilerStep*", 0, 10000),
        event("MLPs", 0, 1000),
        event("evaluation", 2000, 8000),
        event("MLPs", 3000, 6000),
    ]
    found = rows_of(events, num_steps=1)
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
    rows = rows_of(events, 1)
    device = {name: row.device_ms for name, row in rows.items() if row.device_ms}
    want = {"backward": 0.5, "update": 3.0, OTHER: 0.22, "step": 3.72}
    assert device == pytest.approx(want)
    assert (rows["backward"].calls, rows["backward"].ms) == (1.0, 7.0)
    assert (rows["update"].calls, rows["update"].ms) == (1.0, 1.0)
    lines = phase_table(read_events(events, 1)).splitlines()
    of_update = lines[2 + PHASES.index("update")]
    assert lines[1].endswith("device ms/step") and of_update.split()[-1] == "3.000"
    assert len({len(line) for line in lines[1:-1]}) == 1


def test_without_a_device_the_table_has_no_column_for_it():
    steps = [event("ProfilerStep*", 0, 1000), event("ProfilerStep*", 1000, 3000)]
    events = [*steps, event("load", 1000, 1500)]
    lines = phase_table(read_events(events, 2)).splitlines()
    assert lines[0] == "phases of a training step, mean of 1 after a first one of 1.000 ms"
    words = [line.split() for line in lines[1:]]
    assert words[:2] == [
        ["phase", "calls/step", "ms/step", "share", "%"],
        ["load", "1.00", "0.500", "25.0"],
    ]
    assert words[-2:] == [[OTHER, "1.500", "75.0"], ["step", "2.000", "100.0"]]
