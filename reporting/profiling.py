"""--enable-profiling writes a chrome trace and a table of the phases of the first steps."""

import contextlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

from common.errors import RankError
from common.phases import phases_measured
from devices.npu import npu_profiler
from ranks.process import Process
from reporting.phase_table import Range, Recording, phase_rows, phase_table, read_events
from reporting.reporter import Reporter

PROFILED_STEPS = 50


@contextlib.contextmanager
def profiled(
    enabled: bool,
    process: Process,
    reporter: Reporter = Reporter(),  # noqa: B008 (it has no state)
    num_steps: int = PROFILED_STEPS,
) -> Iterator[Callable[[], None]]:
    """Profile the first steps of the block; yields a function to call after each step.

    After these steps, or at the end of the block, the chrome trace is written to
    `dlrm_s_pytorch.json`, the tables of phases and operators to `dlrm_s_pytorch.prof`. If there are
    several ranks each has its own files, with `_<rank>` in their names.

    Args:
        enabled: False: nothing is profiled, and the function does nothing.
        process: this rank.
        reporter: is told the table of phases; the first rank prints it, the others are silent.
        num_steps: steps to profile.

    Raises:
        RankError: a file cannot be written.
    """
    if not enabled:
        yield lambda: None
        return
    name = "dlrm_s_pytorch" + (f"_{process.rank}" if process.world_size > 1 else "")
    for path in (Path(f"{name}.json"), Path(f"{name}.prof")):
        _check_writable(path)
    profiled_here = _profiled_npu if process.device.type == "npu" else _profiled_by_torch
    with profiled_here(process.device, name, reporter, num_steps) as after_step:
        yield after_step


def _check_writable(path: Path) -> None:
    """Raise a RankError now if the file cannot be written.

    The profiler would only log that, after all steps, and go on.
    """
    try:
        path.write_text("")
    except OSError as error:
        raise RankError(
            f"--enable-profiling: {path.absolute()} cannot be written ({error.strerror})"
        ) from error


def _tell(reporter: Reporter, recording: Recording, text: str) -> None:
    reporter.say(text)
    if recording.steps:
        reporter.note_phases(phase_rows(recording))


# ---------------------------------------------------------------- torch's profiler


@contextlib.contextmanager
def _profiled_by_torch(
    device: torch.device, name: str, reporter: Reporter, num_steps: int
) -> Iterator[Callable[[], None]]:
    trace_file, table_file = Path(f"{name}.json"), Path(f"{name}.prof")

    def write(profiler: torch.profiler.profile) -> None:
        measuring.close()
        recording = read_events(profiler.events(), profiler.step_num)
        by_phase = phase_table(recording)
        by_operator = profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=100)
        table_file.write_text(f"{by_phase}\n\n{by_operator}", encoding="utf-8")
        _export(profiler, trace_file)
        _tell(reporter, recording, f"{by_phase}\nprofile: {table_file}, {trace_file}")

    def after_step() -> None:
        if profiler.step_num < num_steps:
            profiler.step()

    with contextlib.ExitStack() as measuring:
        measuring.enter_context(phases_measured(record_function))
        with _make_profiler(device, write, num_steps) as profiler:
            yield after_step


def _make_profiler(
    device: torch.device, write: Callable[..., None], num_steps: int
) -> torch.profiler.profile:
    """A profiler that calls `write(profiler)` after `num_steps` steps, or at the end of the run."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with warnings.catch_warnings():
        # torch asks for a warm-up step, which a run of one step cannot give
        warnings.simplefilter("ignore")
        schedule = torch.profiler.schedule(wait=0, warmup=0, active=num_steps, repeat=1)
    return torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write)


def _export(profiler: torch.profiler.profile, path: Path) -> None:
    profiler.export_chrome_trace(str(path))
    if not path.is_file() or not path.stat().st_size:
        raise RankError(f"--enable-profiling: {path.absolute()}: the trace cannot be written")


# ---------------------------------------------------------------- torch_npu's profiler


class Stopwatch:
    """Measures phases and steps by the host's clock, and marks them in any trace.

    torch_npu's profiler needs it: its events cannot be read back.
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
        """Measure the block as a call of the phase `name`; on any thread."""
        begin = self._now()
        with record_function(name):
            yield
        self._calls.append(Range(name, begin, self._now()))

    def end_step(self) -> None:
        """End a step and begin the next one."""
        now = self._now()
        self.steps.append(Range("ProfilerStep", self._begin, now))
        self._begin = now

    def recording(self) -> Recording:
        """All steps and calls so far."""
        return Recording(self.steps, self._calls, [])


def _find_traces(folder: str) -> set[Path]:
    """The traces that torch_npu's profiler has left there, of this run and of earlier ones."""
    return set(Path(folder).glob("*/ASCEND_PROFILER_OUTPUT/trace_view.json"))


@contextlib.contextmanager
def _profiled_npu(
    device: torch.device, name: str, reporter: Reporter, num_steps: int
) -> Iterator[Callable[[], None]]:
    """Profile by torch_npu, whose own files (operators, kernels) go to the folder {name}_npu."""
    watch = Stopwatch()
    folder, trace_file, table_file = f"{name}_npu", Path(f"{name}.json"), Path(f"{name}.prof")
    earlier = _find_traces(folder)

    def write() -> None:
        measuring.close()
        recording = watch.recording()
        by_phase = phase_table(recording)
        table_file.write_text(f"{by_phase}\n\noperators and kernels: {folder}\n", encoding="utf-8")
        traces = _find_traces(folder) - earlier
        if not traces:
            raise RankError(
                f"--enable-profiling: torch_npu's profiler has left no trace in {folder}"
            )
        shutil.copyfile(traces.pop(), trace_file)
        text = f"{by_phase}\nprofile: {table_file}, {trace_file}, {folder}"
        _tell(reporter, recording, text)

    def after_step() -> None:
        if len(watch.steps) < num_steps:
            watch.end_step()
            profiler.step()
            if len(watch.steps) == num_steps:
                write()

    with contextlib.ExitStack() as measuring:
        measuring.enter_context(phases_measured(watch.mark))
        with npu_profiler(num_steps, folder) as profiler:
            yield after_step
        if len(watch.steps) < num_steps:
            write()
