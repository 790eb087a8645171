"""Phases of a training step: from time ranges to a table."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

OTHER = "other"  # the row of the time of a step that is in no phase


@dataclass(frozen=True)
class Phase:
    """A method whose calls are a phase of a training step; several of them may share a name.

    Args:
        name: of the row in the table and of the range in the trace.
        owner: the object, nn.Module or module of Python that has the method; a class where the
            objects are made anew in each step.
        method: its name.
        each: it gives an iterable, and the phase is the making of each item.
        closed: phases inside it are not counted, their time is its own.
    """

    name: str
    owner: Any
    method: str
    each: bool = False
    closed: bool = False


@dataclass(frozen=True)
class Range:
    """Time of a name, from begin to end in us."""

    name: str
    begin: float
    end: float

    def within(self, whole: "Range") -> "Range":
        """The part of it in `whole`; its end is not after its begin where there is none."""
        return Range(self.name, max(self.begin, whole.begin), min(self.end, whole.end))


@dataclass(frozen=True)
class Recording:
    """What the profiler saw.

    Attributes:
        steps: the whole ones, in order.
        calls: of the phases, on any thread.
        launches: (when an operator began, device time of what it launched) in us; none on a CPU.
    """

    steps: Sequence[Range]
    calls: Sequence[Range]
    launches: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """A phase in the mean step: calls (None: it is no phase), host and device time in ms."""

    name: str
    calls: float | None
    ms: float
    device_ms: float


def timeline(ranges: Sequence[Range]) -> list[Range]:
    """Ranges that overlap -> ranges in order that do not: each instant is of one name.

    Of those open at an instant, on whatever threads, the last begun has it: autograd may update
    the tables on a thread of its own while `backward` waits on another.
    """
    marks = sorted(
        mark
        for number, one in enumerate(ranges)
        if one.end > one.begin
        for mark in ((one.begin, 1, -one.end, number), (one.end, 0, 0.0, number))
    )
    is_open: list[int] = []
    parts = []
    for (begin, begins, _, number), (end, *_) in pairwise(marks):
        if begins:
            is_open.append(number)
        else:
            is_open.remove(number)
        if is_open and end > begin:
            parts.append(Range(ranges[is_open[-1]].name, begin, end))
    return parts


def _without_inner(calls: Sequence[Range], closed: set[str]) -> list[Range]:
    """Without those that began inside a call of a closed phase."""
    outer = [call for call in calls if call.name in closed]
    return [
        call
        for call in calls
        if not any(one.begin <= call.begin < one.end for one in outer if one is not call)
    ]


def _device_times(recording: Recording, parts: Sequence[Range], whole: Range) -> dict[str, float]:
    """Device time in us of each phase: it is of the phase that launched it."""
    begins = [part.begin for part in parts]
    times: defaultdict[str, float] = defaultdict(float)
    for when, us in recording.launches:
        if whole.begin <= when < whole.end:
            place = bisect_right(begins, when) - 1
            inside = place >= 0 and when < parts[place].end
            times[parts[place].name if inside else OTHER] += us
    return times


def phase_rows(phases: Sequence[Phase], recording: Recording) -> list[Row]:
    """The phases' rows, that of other time, and the step's, which is the sum of all.

    The mean is of the steps after the first, which warms up; of that one where there is no other.
    """
    steps = recording.steps[1:] or recording.steps
    whole = Range("step", steps[0].begin, steps[-1].end)
    calls = _without_inner(recording.calls, {phase.name for phase in phases if phase.closed})
    parts = timeline([call.within(whole) for call in calls])
    times: defaultdict[str, float] = defaultdict(float)
    for part in parts:
        times[part.name] += part.end - part.begin
    left = whole.end - whole.begin - sum(times.values())
    device = _device_times(recording, parts, whole)
    counts = Counter(call.name for call in calls if whole.begin <= call.begin < whole.end)
    num, scale = len(steps), 1000 * len(steps)
    names = dict.fromkeys(phase.name for phase in phases)
    found = [
        Row(name, counts[name] / num, times[name] / scale, device[name] / scale) for name in names
    ]
    found.append(Row(OTHER, None, left / scale, device[OTHER] / scale))
    total = sum(row.ms for row in found), sum(row.device_ms for row in found)
    return [*found, Row(whole.name, None, *total)]


def phase_table(phases: Sequence[Phase], recording: Recording) -> str:
    """The rows as text; device times where anything was launched on a device."""
    steps = recording.steps
    if not steps:
        return "phases of a training step: no step has ended"
    first = (steps[0].end - steps[0].begin) / 1000
    after = f" after a first one of {first:.3f} ms" if len(steps) > 1 else ""
    found = phase_rows(phases, recording)
    width = max(len(row.name) for row in found)
    lines = [f"{'phase':{width}}  calls/step     ms/step  share %  device ms/step"]
    for name, calls, ms, device_ms in map(astuple, found):
        count = "" if calls is None else f"{calls:.2f}"
        share = 100 * ms / found[-1].ms
        lines.append(f"{name:{width}}  {count:>10}  {ms:10.3f}  {share:7.1f}  {device_ms:14.3f}")
    if recording.launches:
        lines.append("(ms/step: the host's time; device: of what the phase has launched)")
    else:
        lines = [line[: -len("  device ms/step")] for line in lines]
    title = f"phases of a training step, mean of {max(len(steps) - 1, 1)}{after}"
    return "\n".join([title, *lines])


def read_events(
    events: Iterable[FunctionEvent], phases: Sequence[Phase], num_steps: int
) -> Recording:
    """The profiler's events as steps, calls and launches; a step begun after `num_steps` is out."""
    names = {phase.name for phase in phases}
    steps, calls, launches = [], [], []
    for event in events:
        when, name = event.time_range, event.name
        if event.device_type != DeviceType.CPU:
            continue
        if name.startswith("ProfilerStep"):
            steps.append(Range(name, when.start, when.end))
        elif event.is_user_annotation and name in names:
            calls.append(Range(name, when.start, when.end))
        elif _launches(event):
            launches.append((when.start, sum(kernel.duration for kernel in event.kernels)))
    steps.sort(key=lambda step: step.begin)
    return Recording(steps[:num_steps], calls, launches)


def _launches(event: FunctionEvent) -> bool:
    """What it has launched is its own.

    Annotations repeat what is launched inside them; calls of the driver, and what was measured
    without its help, can repeat that of an operator.
    """
    repeats = event.is_user_annotation or event.is_legacy or event.name.startswith("cu")
    return bool(event.kernels) and not repeats
