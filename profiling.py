"""--enable-profiling: a chrome trace and a table of the first steps."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from extend_distributed import Process

PROFILED_STEPS = 50


@contextlib.contextmanager
def profiled(enabled: bool, process: Process) -> Iterator[Callable[[], None]]:
    """Gives what to call after each step: nothing, or where `enabled` the profiler's step."""
    if not enabled:
        yield lambda: None
        return
    name = "dlrm_s_pytorch" + (f"_{process.rank}" if process.world_size > 1 else "")

    def write(profiler: torch.profiler.profile) -> None:
        Path(f"{name}.prof").write_text(
            profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=100)
        )
        profiler.export_chrome_trace(f"{name}.json")

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # it wants a warm-up step; a run of one step has none to give
        schedule = torch.profiler.schedule(wait=0, warmup=0, active=PROFILED_STEPS, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profiler:
        yield profiler.step
