"""A profiler that writes the files of torch_npu's without any content."""

import functools
import os
import socket
import time
from enum import Enum
from pathlib import Path


class ProfilerActivity(Enum):
    CPU = 0
    NPU = 1


class schedule:  # noqa: N801 (the real one's name)
    def __init__(self, wait, active, warmup=0, repeat=0, skip_first=0, skip_first_wait=0):
        self.wait, self.active, self.warmup = wait, active, warmup


def tensorboard_trace_handler(dir_name=None, worker_name=None, analyse_flag=True, async_mode=False):
    return functools.partial(_write, dir_name, worker_name)


def _write(dir_name, worker_name, profiler):
    who = worker_name or f"{socket.gethostname()}_{os.getpid()}"
    name = f"{who}_{time.strftime('%Y%m%d%H%M%S')}_ascend_pt"
    folder = Path(dir_name) / name / "ASCEND_PROFILER_OUTPUT"
    folder.mkdir(parents=True)
    (folder / "trace_view.json").write_text("[]")
    (folder / "kernel_details.csv").write_text("Name,Type,Duration(us)\n")


class profile:  # noqa: N801 (the real one's name)
    def __init__(self, *, activities=None, schedule=None, on_trace_ready=None, **kwargs):
        self._schedule, self._on_trace_ready = schedule, on_trace_ready
        self.step_num, self._written = 0, False

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        pass

    def step(self):
        self.step_num += 1
        if self.step_num == self._schedule.wait + self._schedule.warmup + self._schedule.active:
            self._end()

    def stop(self):
        self._end()

    def _end(self):
        if not self._written and self._on_trace_ready:
            self._written = True
            self._on_trace_ready(self)
