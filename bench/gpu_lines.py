"""What measurements on a GPU have found, as lines of a table."""

from collections.abc import Iterator, Mapping
from typing import Any

from bench.common import row
from bench.gpu_cases import Target
from bench.training import Case

TOP_KERNELS = 14
WORDS = {
    "program": "GPU, batch {}, rows/s",
    "steps": "  steps without the loader, rows/s",
    "replay": "  bare replay of the graph, rows/s",
    "loader": "  loader alone, rows/s",
    "summed": "  steps, equal rows summed, rows/s",
    "yardstick": "  yardstick, rows/s",
}
Facts = Mapping[str, Any]


def lines(target: Target, part: str, found: Facts, program: Facts) -> Iterator[str]:
    """The lines of a measurement.

    Args:
        target: whose model was measured.
        part: what was measured, or one of the variants' names.
        found: what it found, or why it failed.
        program: what the measurement of the whole program has found; empty if there is none.
    """
    case = target.case
    if "failed" in found:
        yield f"{WORDS.get(part, '  ' + part).format(case.name)}: {part} failed: {found['failed']}"
    elif part == "roofline":
        yield from _roofline(case, found, program)
    elif part == "profile":
        yield from _profile(case, found)
    else:
        yield _speed(target, part, found, program)


def _speed(target: Target, part: str, found: Facts, program: Facts) -> str:
    speed, told = f"{found['rows_per_second']:,.0f}", f"{found['ms']:.3f} ms"
    if part == "yardstick":
        ratio = f"{found['ms'] / program['ms']:.1f}" if program else ""
        return row(WORDS[part], "", speed, ratio, told)
    if part == "program":
        told = f"{target.wanted:,.0f}, aim {target.aim:,.0f} rows/s; {told}"
    if "host_us" in found:
        told += f"; the host is done after {found['host_us'] / 1e3:.3f} ms"
    words = WORDS.get(part, f"  {part}, rows/s").format(target.case.name)
    return row(words, speed, wanted=told)


def verdict(target: Target, speeds: Mapping[str, float]) -> str:
    """What keeps the program from its next goal, if it has not reached all.

    Args:
        target: what is to be reached.
        speeds: rows/s of the program, of steps, of replays and of the loader, as far as known.
    """
    reached = speeds["program"]
    if reached >= target.aim:
        return f"  reaches its aim of {target.aim:,.0f} rows/s"
    goal = target.aim if reached >= target.wanted else target.wanted
    slow = {part for part, speed in speeds.items() if speed < goal}
    reasons = []
    if "replay" in slow:
        reasons.append("the kernels: bare replays are slower")
    elif "steps" in slow:
        reasons.append("the host: steps are slower" + ", replays not" * ("replay" in speeds))
    if "loader" in slow:
        reasons.append("the loader: alone it is slower")
    if not reasons and {"steps", "loader"} <= speeds.keys():
        reasons.append("loader and steps together: each alone is fast enough")
    return f"  below {goal:,.0f} rows/s by {'; '.join(reasons) or 'what was not measured'}"


def _roofline(case: Case, found: Facts, program: Facts) -> Iterator[str]:
    """Both floors of a step, and what share of the step they are."""
    yield (
        f"roofline, batch {case.name}: {found['operations'] * 1e-9:.0f} GFLOP,"
        f" {found['bytes'] * 1e-9:.2f} GB a step; products of 512 columns"
        f" {found['products'] * 1e-12:.1f} TFLOP/s (largest {found['largest'] * 1e-12:.1f}),"
        f" copies {found['copies'] * 1e-9:.0f} GB/s"
    )
    products = 1e3 * found["operations"] / found["products"]
    copies = 1e3 * found["bytes"] / found["copies"]
    floors = {
        "  floor of products": products,
        "  floor of copies": copies,
        "  both in turn": products + copies,
    }
    for name, ms in floors.items():
        share = f", {ms / program['ms']:4.0%} of {program['ms']:.3f} ms" if program else ""
        yield f"{name:<19} {ms:8.3f} ms{share}"


def _profile(case: Case, found: Facts) -> Iterator[str]:
    """Idle time of a replay, its kernels in order, and those that take longest."""
    total = sum(one["us"] for one in found["top"])
    yield f"profile, batch {case.name}: {total:.1f} us of kernels a step"
    if "kernels" in found:
        between = found["between_us"]
        yield (
            f"  a replay takes {found['span_us']:.1f} us, of which {found['idle_us']:.1f} us are"
            f" idle; {'?' if between is None else f'{between:.1f}'} us between two replays"
            f" (medians of {found['replays']})"
        )
        yield f"  {'begin, us':>9} {'us':>8}  kernels in the order of their launch"
        for one in found["kernels"]:
            name = f"{one['name'][:80]} {one['shape']}".rstrip()
            yield f"  {one['begin_us']:9.1f} {one['us']:8.2f}  {name}"
    yield f"  {'us':>9} {'share':>5} {'calls':>5}  kernels that take longest"
    for one in found["top"][:TOP_KERNELS]:
        share = one["us"] / total if total else 0
        yield f"  {one['us']:9.2f} {share:5.0%} {one['calls']:5.1f}  {one['name'][:80]}"
