"""What a trace of torch's profiler says of a step: its kernels in their order, and idle time.

The kernels of a CUDA graph have the number (`correlation`) of the one call that launched it, and
any other kernel has a number of its own, so a replay is what shares a number.
"""

import gzip
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
NAME_LETTERS = 120  # of a kernel's name: those of product libraries have hundreds


@dataclass(frozen=True)
class Work:
    """A kernel, copy or fill on the device, in microseconds.

    Attributes:
        name: its name.
        begin: when it begins.
        duration: how long it takes.
        launch: the number of the call that launched it.
        shape: blocks and threads of a block; empty for a copy.
    """

    name: str
    begin: float
    duration: float
    launch: int
    shape: str

    @property
    def end(self) -> float:
        """When it ends."""
        return self.begin + self.duration


def read_work(events: Sequence[dict[str, Any]]) -> list[Work]:
    """All work of the device in a trace's events, in the order in which it begins."""
    found = []
    for event in events:
        if event.get("cat") in ON_DEVICE:
            facts = event.get("args", {})
            shape = " ".join(
                "x".join(map(str, facts[key])) for key in ("grid", "block") if key in facts
            )
            name, launch = event["name"][:NAME_LETTERS], int(facts.get("correlation", -1))
            found.append(Work(name, float(event["ts"]), float(event["dur"]), launch, shape))
    return sorted(found, key=lambda work: work.begin)


def find_replays(work: Sequence[Work]) -> list[list[Work]]:
    """The replays of the graph that most of them are of, in order; empty if there is none."""
    by_launch: defaultdict[int, list[Work]] = defaultdict(list)
    for one in work:
        by_launch[one.launch].append(one)
    several = [group for launch, group in by_launch.items() if len(group) > 1 and launch >= 0]
    lengths = Counter(len(group) for group in several)
    if not lengths:
        return []
    length = lengths.most_common(1)[0][0]
    return [group for group in several if len(group) == length]


def busy(work: Sequence[Work]) -> float:
    """Microseconds in which the device does any of the work, which is in the order of begins."""
    total, until = 0.0, float("-inf")
    for one in work:
        total += max(0.0, one.end - max(one.begin, until))
        until = max(until, one.end)
    return total


def span(work: Sequence[Work]) -> float:
    """Microseconds from the first begin to the last end."""
    return max(one.end for one in work) - work[0].begin


def kernels_in_order(replays: Sequence[Sequence[Work]]) -> list[dict[str, Any]]:
    """The kernels of a replay in the order of their launch, with medians over replays.

    Kernels of a graph with one branch begin in that order.
    """
    found = []
    for same in zip(*replays, strict=True):
        after = [one.begin - replay[0].begin for one, replay in zip(same, replays, strict=True)]
        found.append({
            "name": same[0].name,
            "begin_us": round(statistics.median(after), 2),
            "us": round(statistics.median(one.duration for one in same), 2),
            "shape": same[0].shape,
        })  # fmt: skip
    return found


def top(work: Sequence[Work], steps: int) -> list[dict[str, Any]]:
    """Each kernel's calls and microseconds a step, the longest first."""
    times: Counter[str] = Counter()
    calls = Counter(one.name for one in work)
    for one in work:
        times[one.name] += one.duration  # type: ignore[assignment]
    return [
        {"name": name, "us": round(time / steps, 2), "calls": round(calls[name] / steps, 1)}
        for name, time in times.most_common()
    ]


def read_trace(events: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    """What a trace of so many steps says, times in microseconds of a step.

    Returns:
        `top`; and if steps are replays of a graph, their number, the median of their `span`, of
        what is `idle` in it, and of the time `between` two of them, and their `kernels` in order.
    """
    work = read_work(events)
    found: dict[str, Any] = {"top": top(work, steps)}
    replays = find_replays(work)
    if replays:
        gaps = [
            later[0].begin - max(one.end for one in replay)
            for replay, later in zip(replays, replays[1:], strict=False)
        ]
        spans = [span(replay) for replay in replays]
        idle = [one - busy(replay) for one, replay in zip(spans, replays, strict=True)]
        found |= {
            "replays": len(replays),
            "span_us": round(statistics.median(spans), 2),
            "idle_us": round(statistics.median(idle), 2),
            "between_us": round(statistics.median(gaps), 2) if gaps else None,
            "kernels": kernels_in_order(replays),
        }
    return found


def load_events(trace: Path) -> list[dict[str, Any]]:
    """The events of a trace as torch writes it."""
    events: list[dict[str, Any]] = json.loads(trace.read_text(errors="replace"))["traceEvents"]
    return events


def keep_compressed(trace: Path, target: Path) -> None:
    """A trace by gzip, which browsers' viewers of traces read as it is."""
    with gzip.open(target, "wb", compresslevel=6) as file:
        file.write(trace.read_bytes())
