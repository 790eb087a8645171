"""--enable-profiling: a chrome trace and a table of the phases of the first steps.

Only while steps are profiled, the methods that do the phases' work are replaced by ones that mark
their time. Without the flag nothing of this is in their way.
"""

import contextlib
import functools
import inspect
import shutil
import time
import types
import warnings
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function

from command_line import UserError
from devices import npu_profiler
from extend_distributed import Process

PROFILED_STEPS = 50
OTHER = "other"  # the row of the time of a step that is in no phase
_NOTHING = object()


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


# ---------------------------------------------------------------- marks


# makes a range of that name, for the time of a block
Mark = Callable[[str], contextlib.AbstractContextManager[Any]]


def _mark_calls(name: str, function: Callable[..., Any], mark: Mark) -> Callable[..., Any]:
    @functools.wraps(function, updated=())
    def marked(*args: Any, **kwargs: Any) -> Any:
        with mark(name):
            return function(*args, **kwargs)

    return marked


def _mark_items(name: str, function: Callable[..., Any], mark: Mark) -> Callable[..., Any]:
    @functools.wraps(function, updated=())
    def marked(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with mark(name):  # with the first item: a loader starts its workers here
            items = iter(function(*args, **kwargs))
            item = next(items, _NOTHING)
        while item is not _NOTHING:
            yield item
            with mark(name):
                item = next(items, _NOTHING)

    return marked


@contextlib.contextmanager
def _marked(phase: Phase, mark: Mark = record_function) -> Iterator[None]:
    """The phase's method is replaced for the time of the block."""
    owner, method = phase.owner, phase.method
    before = vars(owner).get(method, _NOTHING)
    replace = _mark_items if phase.each else _mark_calls
    marked: Any = replace(phase.name, getattr(owner, method), mark)
    plain = isinstance(inspect.getattr_static(owner, method), types.FunctionType)
    if isinstance(owner, type) and not plain:  # what a class gives of these takes no self
        marked = staticmethod(marked)
    setattr(owner, method, marked)
    try:
        yield
    finally:
        if before is _NOTHING:  # it was the class's, or a base class's
            delattr(owner, method)
        else:
            setattr(owner, method, before)


# ---------------------------------------------------------------- arithmetic


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


def rows(phases: Sequence[Phase], recording: Recording) -> list[Row]:
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


def table(phases: Sequence[Phase], recording: Recording) -> str:
    """The rows as text; device times where anything was launched on a device."""
    steps = recording.steps
    if not steps:
        return "phases of a training step: no step has ended"
    first = (steps[0].end - steps[0].begin) / 1000
    after = f" after a first one of {first:.3f} ms" if len(steps) > 1 else ""
    found = rows(phases, recording)
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


# ---------------------------------------------------------------- the profiler


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


def _claim(path: Path) -> None:
    """Before the steps, not after them: the profiler would log that it cannot write, and go on."""
    try:
        path.write_text("")
    except OSError as error:
        raise UserError(
            f"--enable-profiling: {path.absolute()} cannot be written ({error.strerror})"
        ) from error


def _export(profiler: torch.profiler.profile, path: Path) -> None:
    profiler.export_chrome_trace(str(path))
    if not path.is_file() or not path.stat().st_size:
        raise UserError(f"--enable-profiling: {path.absolute()}: the trace cannot be written")


def _make_profiler(process: Process, write: Callable[..., None]) -> torch.profiler.profile:
    """Calls `write(profiler)` after PROFILED_STEPS steps, or at the end of the run."""
    activities = [ProfilerActivity.CPU]
    if process.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with warnings.catch_warnings():
        # it wants a warm-up step; a run of one step has none to give
        warnings.simplefilter("ignore")
        schedule = torch.profiler.schedule(wait=0, warmup=0, active=PROFILED_STEPS, repeat=1)
    return torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write)


class Stopwatch:
    """Times of phases and steps by the host's clock, and ranges of their names in any trace.

    For profilers whose events cannot be read back.
    """

    def __init__(self) -> None:
        self.steps: list[Range] = []
        self._calls: list[Range] = []
        self._begin = self._now()

    @staticmethod
    def _now() -> float:
        return time.perf_counter_ns() / 1000

    @contextlib.contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """A call of a phase; on any thread."""
        begin = self._now()
        with record_function(name):
            yield
        self._calls.append(Range(name, begin, self._now()))

    def end_step(self) -> None:
        """A step is done, the next one begins."""
        now = self._now()
        self.steps.append(Range("ProfilerStep", self._begin, now))
        self._begin = now

    def recording(self) -> Recording:
        """What was seen."""
        return Recording(self.steps, self._calls, [])


def _traces(folder: str) -> set[Path]:
    """What torch_npu's profiler has left there, of this run and of earlier ones."""
    return set(Path(folder).glob("*/ASCEND_PROFILER_OUTPUT/trace_view.json"))


@contextlib.contextmanager
def _profiled_npu(
    name: str, phases: Sequence[Phase], say: Callable[[str], Any]
) -> Iterator[Callable[[], None]]:
    """As `profiled`, by torch_npu's profiler.

    Its own files, with operators and kernels, lie in the folder {name}_npu.
    """
    watch, marks = Stopwatch(), contextlib.ExitStack()
    folder, trace_file, table_file = f"{name}_npu", Path(f"{name}.json"), Path(f"{name}.prof")
    earlier = _traces(folder)

    def write() -> None:
        marks.close()
        by_phase = table(phases, watch.recording())
        table_file.write_text(f"{by_phase}\n\noperators and kernels: {folder}\n", encoding="utf-8")
        traces = _traces(folder) - earlier
        if not traces:
            raise UserError(
                f"--enable-profiling: torch_npu's profiler has left no trace in {folder}"
            )
        shutil.copyfile(traces.pop(), trace_file)
        say(f"{by_phase}\nprofile: {table_file}, {trace_file}, {folder}")

    def after_step() -> None:
        if len(watch.steps) < PROFILED_STEPS:
            watch.end_step()
            profiler.step()
            if len(watch.steps) == PROFILED_STEPS:
                write()

    with marks:
        for phase in phases:
            marks.enter_context(_marked(phase, watch.mark))
        with npu_profiler(PROFILED_STEPS, folder) as profiler:
            yield after_step
        if len(watch.steps) < PROFILED_STEPS:
            write()


@contextlib.contextmanager
def profiled(
    enabled: bool,
    process: Process,
    phases: Sequence[Phase] = (),
    say: Callable[[str], Any] = print,
) -> Iterator[Callable[[], None]]:
    """Gives what to call after each step: nothing, or where `enabled` what profiles the first ones.

    Then the chrome trace `dlrm_s_pytorch.json` and, in `dlrm_s_pytorch.prof`, the tables of phases
    and of operators are written, each rank's with `_rank` in its name where there are several.

    Args:
        enabled: profile.
        process: this rank.
        phases: what the step is made of; their methods are replaced while steps are profiled.
        say: takes the table of phases; the first rank's prints, the others' are silent.

    Raises:
        UserError: a file cannot be written.
    """
    if not enabled:
        yield lambda: None
        return
    name = "dlrm_s_pytorch" + (f"_{process.rank}" if process.world_size > 1 else "")
    trace_file, table_file = Path(f"{name}.json"), Path(f"{name}.prof")
    _claim(trace_file)
    _claim(table_file)
    if process.device.type == "npu":
        with _profiled_npu(name, phases, say) as after_npu_step:
            yield after_npu_step
        return

    def write(profiler: torch.profiler.profile) -> None:
        marks.close()
        by_phase = table(phases, read_events(profiler.events(), phases, profiler.step_num))
        by_operator = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=100)
        table_file.write_text(f"{by_phase}\n\n{by_operator}", encoding="utf-8")
        _export(profiler, trace_file)
        say(f"{by_phase}\nprofile: {table_file}, {trace_file}")

    def after_step() -> None:
        if profiler.step_num < PROFILED_STEPS:
            profiler.step()

    with contextlib.ExitStack() as marks:
        for phase in phases:
            marks.enter_context(_marked(phase))
        with _make_profiler(process, write) as profiler:
            yield after_step
