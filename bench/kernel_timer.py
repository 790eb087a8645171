"""How long a launch takes on a GPU, for bench/kernels.py."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.kernel_cases import Inputs

SERIES_US, MOST_LAUNCHES = 400.0, 128  # of a graph, whose own start takes a few us
SERIES_MS = 25.0  # of all replays
REPLAYS = (5, 40)


@dataclass(frozen=True)
class Rates:
    """Bytes and operations a microsecond."""

    copy: float
    product: float


class Timer:
    """Microseconds of launches.

    Args:
        on_gpu: else launches are timed one by one on the host, and tell nothing.
    """

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu, self.records = on_gpu, on_gpu

    def microseconds(self, calls: Sequence[Callable[[], Any]], expected: float) -> list[float]:
        """Mean of a launch, for each of several series.

        Args:
            calls: the same launch on different inputs, which take turns.
            expected: about what a launch takes.
        """
        if not self._on_gpu:
            return [_on_host(call) for call in calls]
        rounds = math.ceil(SERIES_US / (max(expected, 3.0) * len(calls)))
        rounds = max(1, min(rounds, MOST_LAUNCHES // len(calls)))
        for call in calls:
            call()
        torch.cuda.synchronize()
        if self.records:
            graph = _record(calls, rounds)
            return [us / rounds / len(calls) for us in _series(graph.replay)]
        return [us / rounds / len(calls) for us in _series(lambda: _rounds(calls, rounds))]


def _on_host(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - begin)


def _rounds(calls: Sequence[Callable[[], Any]], rounds: int) -> None:
    """Each call in turn; a result lives until the same call has its next one."""
    results: list[Any] = [None] * len(calls)
    for _ in range(rounds):
        for number, call in enumerate(calls):
            results[number] = call()


def _record(calls: Sequence[Callable[[], Any]], rounds: int) -> Any:
    """A graph of all launches; torch.cuda.graph would collect garbage each time."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        _rounds(calls, rounds)
    except Exception:
        with contextlib.suppress(Exception):
            graph.capture_end()
        raise
    graph.capture_end()
    return graph


def _series(work: Callable[[], Any]) -> list[float]:
    """Microseconds of several runs, which the host queues ahead of the card."""

    def run(times: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        for event in events[:-1]:
            event.record()
            work()
        events[-1].record()
        torch.cuda.synchronize()
        pairs = zip(events, events[1:], strict=False)
        return [1e3 * begin.elapsed_time(end) for begin, end in pairs]

    about_ms = min(run(2)) / 1e3
    least, most = REPLAYS
    return run(max(least, min(most, int(SERIES_MS / max(about_ms, 1e-3)))))


def measure_rates(timer: Timer, inputs: Inputs) -> Rates:
    """Those of a copy that no cache holds, and of a large product of 16-bit numbers."""
    on_gpu = inputs.device.type == "cuda"
    numbers, width = (1 << 28, 8192) if on_gpu else (1 << 12, 64)
    source, target = inputs.zeros(numbers), inputs.zeros(numbers)
    left, right = inputs.numbers(width, width), inputs.numbers(width, width)
    copy = statistics.median(timer.microseconds([lambda: target.copy_(source)], 600))
    product = statistics.median(timer.microseconds([lambda: torch.mm(left, right)], 1500))
    return Rates(8 * numbers / copy, 2 * width**3 / product)
