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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from common.errors import RankError
from devices.npu import npu_profiler
from ranks.process import Process
from reporting.phase_table import Phase, Range, Recording, phase_table, read_events

PROFILED_STEPS = 50


_NOTHING = object()


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


def _claim(path: Path) -> None:
    """Before the steps, not after them: the profiler would log that it cannot write, and go on."""
    try:
        path.write_text("")
    except OSError as error:
        raise RankError(
            f"--enable-profiling: {path.absolute()} cannot be written ({error.strerror})"
        ) from error


def _export(profiler: torch.profiler.profile, path: Path) -> None:
    profiler.export_chrome_trace(str(path))
    if not path.is_file() or not path.stat().st_size:
        raise RankError(f"--enable-profiling: {path.absolute()}: the trace cannot be written")


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
        by_phase = phase_table(phases, watch.recording())
        table_file.write_text(f"{by_phase}\n\noperators and kernels: {folder}\n", encoding="utf-8")
        traces = _traces(folder) - earlier
        if not traces:
            raise RankError(
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
        by_phase = phase_table(phases, read_events(profiler.events(), phases, profiler.step_num))
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
