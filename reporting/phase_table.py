"""Phases of a training step: from time ranges to a table."""

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise

from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent

from common.phases import CLOSED_PHASES, PHASES

OTHER = "other"  # the row of the time of a step that is in no phase


@dataclass(frozen=True)
class Range:
    """The time from begin to end, in us, of a phase or a step."""

    name: str
    begin: float
    end: float

    def within(self, whole: "Range") -> "Range":
        """The part of the range inside `whole`; if there is none, it ends before it begins."""
        return Range(self.name, max(self.begin, whole.begin), min(self.end, whole.end))


@dataclass(frozen=True)
class Recording:
    """Steps and phases as the profiler measured them.

    Attributes:
        steps: whole steps, in order.
        calls: the times of phases, on any thread.
        launches: (when an operator began, device time of the kernels that it launched) in us; none
            on a CPU.
    """

    steps: Sequence[Range]
    calls: Sequence[Range]
    launches: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """A row of the table: calls (None if it is not a phase), host and device ms of a mean step."""

    name: str
    calls: float | None
    ms: float
    device_ms: float


def timeline(ranges: Sequence[Range]) -> list[Range]:
    """Turn ranges that overlap into ranges that do not, in order.

    An instant belongs to the range that began last among those that are open then, on any thread:
    autograd may update the tables on a thread of its own while `backward` waits on another.
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
    """The calls that did not begin inside a call of a closed phase."""
    outer = [call for call in calls if call.name in closed]
    return [
        call
        for call in calls
        if not any(one.begin <= call.begin < one.end for one in outer if one is not call)
    ]


def _device_times(recording: Recording, parts: Sequence[Range], whole: Range) -> dict[str, float]:
    """Device time in us by phase: a kernel counts for the phase that launched it."""
    begins = [part.begin for part in parts]
    times: defaultdict[str, float] = defaultdict(float)
    for when, us in recording.launches:
        if whole.begin <= when < whole.end:
            last = bisect_right(begins, when) - 1
            inside = last >= 0 and when < parts[last].end
            times[parts[last].name if inside else OTHER] += us
    return times


def phase_rows(recording: Recording) -> list[Row]:
    """A row for each of PHASES, one for all other time, and one for the step, which is their sum.

    They are means over the steps after the first one, which warms up. A single step counts itself.
    """
    steps = recording.steps[1:] or recording.steps
    whole = Range("step", steps[0].begin, steps[-1].end)
    calls = _without_inner(recording.calls, set(CLOSED_PHASES))
    parts = timeline([call.within(whole) for call in calls])
    times: defaultdict[str, float] = defaultdict(float)
    for part in parts:
        times[part.name] += part.end - part.begin
    left = whole.end - whole.begin - sum(times.values())
    device = _device_times(recording, parts, whole)
    counts = Counter(call.name for call in calls if whole.begin <= call.begin < whole.end)
    num, scale = len(steps), 1000 * len(steps)
    found = [
        Row(name, counts[name] / num, times[name] / scale, device[name] / scale) for name in PHASES
    ]
    found.append(Row(OTHER, None, left / scale, device[OTHER] / scale))
    total = sum(row.ms for row in found), sum(row.device_ms for row in found)
    return [*found, Row(whole.name, None, *total)]


def phase_table(recording: Recording) -> str:
    """The rows as text, with device times if anything was launched on a device."""
    steps = recording.steps
    if not steps:
        return "phases of a training step: no step has ended"
    first = (steps[0].end - steps[0].begin) / 1000
    after = f" after a first one of {first:.3f} ms" if len(steps) > 1 else ""
    found = phase_rows(recording)
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


def read_events(events: Iterable[FunctionEvent], num_steps: int) -> Recording:
    """The profiler's events as steps, calls and launches; only the first `num_steps` steps."""
    steps, calls, launches = [], [], []
    for event in events:
        when, name = event.time_range, event.name
        if event.device_type != DeviceType.CPU:
            continue
        if name.startswith("ProfilerStep"):
            steps.append(Range(name, when.start, when.end))
        elif event.is_user_annotation and name in PHASES:
            calls.append(Range(name, when.start, when.end))
        elif _launches(event):
            launches.append((when.start, sum(kernel.duration for kernel in event.kernels)))
    steps.sort(key=lambda step: step.begin)
    return Recording(steps[:num_steps], calls, launches)


def _launches(event: FunctionEvent) -> bool:
    """Whether the kernels of an event are its own.

    Annotations repeat the kernels that are launched inside them; calls of the driver, and events of
    the legacy profiler, can repeat those of an operator.
    """
    repeats = event.is_user_annotation or event.is_legacy or event.name.startswith("cu")
    return bool(event.kernels) and not repeats
