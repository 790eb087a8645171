"""Time of each kernel and each product of a step on one GPU, and settings that may be faster.

    python bench/kernels.py [--out=DIR] [--seconds=65] [--only=2048]

Shapes are those of bench/gpu.py, tables Criteo's. Kernels run as the program calls them, recorded
in a CUDA graph as its steps are, and then with other constants and warps. Between two uses of the
same numbers the launches of a graph move as many bytes as the activations of a step have, or 256
MB if those are more: what a step finds in the card's cache is there, and nothing else. A floor is
the time that the least bytes take at the rate of a copy, or the operations at that of a large
product, both measured here. --device=cpu tries this program where there is no GPU.
"""

import argparse
import csv
import gzip
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

BEGIN = time.monotonic()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench.common import listed  # noqa: E402
from bench.gpu import TABLES, TARGETS  # noqa: E402
from bench.kernel_cases import ESTIMATED_US, Copy, Inputs, Shape, Work, works  # noqa: E402
from bench.kernel_compilation import Compilers, compile_share, to_compile  # noqa: E402
from bench.kernel_settings import Setting, applied  # noqa: E402
from bench.kernel_timer import Rates, Timer, measure_rates  # noqa: E402
from common.errors import UserError, reports_errors  # noqa: E402
from common.flags import ArgumentParser, number_in  # noqa: E402
from common.termination import ends_on_signals  # noqa: E402
from devices.gpu import has_triton, set_product_precision, triton_version  # noqa: E402

SECONDS = 65
COLD_BYTES = 256 << 20  # four times the largest cache
MOST_COPIES = 32
COMPILER_SECONDS = 15  # how long kernels wait for the compilers, at most, and then other settings
WORTH = 0.02  # a setting is told if it takes so much less
SMALL = SimpleNamespace(name="small", batch=20, dim=16, bottom="13-32-16", top="32-16-16-1")
SMALL_TABLES = (50, 3)


class BrokenCardError(Exception):
    """After a failure the card does nothing more for this process."""


@dataclass(frozen=True)
class Line:
    """What was measured of a work with a setting.

    Attributes:
        shape, kernel, detail: the work's.
        setting: constants and warps.
        is_own: the program's own setting.
        times: how often a step calls it.
        us: median of a launch.
        least_us: of the fastest series.
        bytes: that must move.
        operations: of a product.
        floor_us: what they allow.
        apart_mb: bytes that move between two uses of the same numbers.
        failure: why there is no time; "": there is.
    """

    shape: str
    kernel: str
    detail: str
    setting: str
    is_own: bool
    times: int
    us: float = math.nan
    least_us: float = math.nan
    bytes: int = 0
    operations: int = 0
    floor_us: float = math.nan
    apart_mb: float = math.nan
    failure: str = ""

    @property
    def name(self) -> str:
        """Of the work."""
        return f"{self.kernel} {self.detail}".strip()

    @property
    def share(self) -> float:
        """Of the floor in the time."""
        return self.floor_us / self.us

    @property
    def rate(self) -> str:
        """With its unit."""
        if self.operations:
            return f"{self.operations / self.us * 1e-6:6.1f} TFLOP/s"
        return f"{self.bytes / self.us * 1e-3:6.0f} GB/s   "

    def text(self) -> str:
        """As it is printed."""
        name = f"{self.shape:<12} {self.name:<36} {self.times} x"
        if self.failure:
            return f"{name} failed: {self.failure}"
        return f"{name} {self.us:9.1f} us {self.rate} {self.share:5.0%} of the floor"


# ---------------------------------------------------------------- lines


class Measurements:
    """All lines of a run.

    Args:
        options: the flags.
        inputs: makes tensors on the device.
    """

    def __init__(self, options: argparse.Namespace, inputs: Inputs) -> None:
        self._inputs, self._end = inputs, BEGIN + options.seconds
        self._timer = Timer(inputs.device.type == "cuda")
        self._rates = Rates(math.nan, math.nan)
        self.lines: list[Line] = []
        self.num_skipped = 0

    def is_late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() > self._end

    def measure_rates(self) -> str:
        """Measure what floors are of; without graphs if the card cannot record one."""
        note = ""
        try:
            self._rates = measure_rates(self._timer, self._inputs)
        except Exception as error:
            self._check_card(error)
            self._timer.records = False
            note = (
                f"; no graph ({_first_line(error)}): short kernels have the host's time in theirs"
            )
            self._rates = measure_rates(self._timer, self._inputs)
        line = Line("", "copy", "", "", True, 0, us=1.0, least_us=1.0, floor_us=1.0)
        self.lines.append(replace(line, bytes=round(self._rates.copy)))
        product = replace(line, kernel="large product", operations=round(self._rates.product))
        self.lines.append(product)
        copies, products = 1e-3 * self._rates.copy, 1e-6 * self._rates.product
        return f"copies {copies:.0f} GB/s, products {products:.1f} TFLOP/s{note}"

    def own(self, work: Work) -> Iterator[Line]:
        """The line of the program's own setting."""
        if self.is_late():
            self.num_skipped += 1
            return
        yield from self._measured(work, lambda own: [{}])

    def others(self, work: Work) -> Iterator[Line]:
        """Lines of other settings."""
        if self.is_late():
            self.num_skipped += len(work.settings)
        elif work.settings:
            yield from self._measured(work, work.other_settings)

    def _measured(self, work: Work, wanted: Callable[[Setting], list[Setting]]) -> Iterator[Line]:
        line = Line(work.shape.name, work.name, work.detail, "", True, work.times)
        try:
            copies = self._copies(work)
            own = work.own_setting(copies[0])
        except Exception as error:
            self.lines.append(replace(line, failure=_first_line(error)))
            yield self.lines[-1]
            self._check_card(error)
            return
        for setting in wanted(own):
            if self.is_late():
                self.num_skipped += 1
                continue
            words = " ".join(f"{name}={number}" for name, number in {**own, **setting}.items())
            yield self._line(
                replace(line, setting=words, is_own=not setting), work, setting, copies
            )

    def _copies(self, work: Work) -> list[Copy]:
        """So many sets of inputs that their bytes lie between two uses of one."""
        if self._inputs.device.type == "cuda":
            torch.cuda.empty_cache()  # memory of graphs that are gone
        first = work.make(self._inputs)
        if self._inputs.device.type == "cpu":
            return [first]
        apart = COLD_BYTES if work.is_cold else min(COLD_BYTES, work.shape.activation_bytes)
        number = max(1, min(MOST_COPIES, math.ceil(apart / work.bytes(first))))
        return [first, *(work.make(self._inputs) for _ in range(number - 1))]

    def _line(self, line: Line, work: Work, setting: Setting, copies: list[Copy]) -> Line:
        """`line` with what was measured, or why nothing was."""
        num_bytes = work.bytes(copies[0])
        floor = max(num_bytes / self._rates.copy, work.operations / self._rates.product)
        try:
            with applied(work.kernel, setting):
                found = self._timer.microseconds([copy.call for copy in copies], floor)
        except Exception as error:
            self.lines.append(replace(line, failure=_first_line(error)))
            self._check_card(error)
            return self.lines[-1]
        measured = replace(
            line,
            us=statistics.median(found),
            least_us=min(found),
            bytes=num_bytes,
            operations=work.operations,
            floor_us=floor,
            apart_mb=len(copies) * num_bytes / 1e6,
        )
        self.lines.append(measured)
        return measured

    def _check_card(self, error: Exception) -> None:
        """End all if the card is of no more use to this process."""
        if self._inputs.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self._inputs.device).item()
            torch.cuda.empty_cache()
        except Exception:
            raise BrokenCardError(_first_line(error)) from error


def _first_line(error: Exception) -> str:
    """The kind and the beginning of an error."""
    told = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {told[0].strip()[:150] if told else ''}"


def save(lines: Sequence[Line], folder: Path | None) -> None:
    """Write kernels.csv.gz into a folder, in place of an earlier one."""
    if folder is None or not lines:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "kernels.csv.gz", "wt", newline="") as file:
        names = [*asdict(lines[0]), "share"]
        table = csv.DictWriter(file, names)
        table.writeheader()
        for line in lines:
            table.writerow({**asdict(line), "share": line.share})


def sums(lines: Sequence[Line], shape: Shape) -> Iterator[str]:
    """What a step of a shape takes: all that it calls, one after the other."""
    wanted = [line for line in lines if line.shape == shape.name and line.is_own and line.times]
    called = [line for line in wanted if not line.failure]
    parts = {
        "kernels": [line for line in called if not line.operations],
        "products": [line for line in called if line.operations],
    }
    totals = {name: sum(one.times * one.us for one in part) for name, part in parts.items()}
    floors = {name: sum(one.times * one.floor_us for one in part) for name, part in parts.items()}
    for name in totals:
        yield f"{shape.name:<12} all {name:<10} {totals[name]:9.1f} us, floor {floors[name]:.1f}"
    total = sum(totals.values())
    estimated = ESTIMATED_US.get((shape.batch, shape.dim))
    note = f"; estimated for a whole step {estimated}" if estimated else ""
    num_missing = sum(bool(work.times) for work in works(shape)) - len(called)
    note += f"; WITHOUT {num_missing} that failed or were skipped" if num_missing else ""
    rows = f"{shape.batch / total:.2f} M rows/s" if total else "nothing measured"
    yield f"{shape.name:<12} {'both':<14} {total:9.1f} us: {rows}{note}"


def best_settings(lines: Sequence[Line]) -> Iterator[str]:
    """For each work the fastest setting, if it is faster than the program's own."""
    for own in (line for line in lines if line.is_own and not line.failure):
        place = own.shape, own.kernel, own.detail
        tried = [
            line
            for line in lines
            if (line.shape, line.kernel, line.detail) == place and not line.failure
        ]
        best = min(tried, key=lambda line: line.us)
        if len(tried) > 1 and best.us < own.us * (1 - WORTH):
            gain = f"{own.us - best.us:.1f} us less, {own.times} times a step"
            yield f"{own.shape:<12} {own.name}: {best.us:.1f} us, {gain}"
            yield f"    {best.setting}   (own: {own.setting})"
        elif len(tried) > 1:
            yield f"{own.shape:<12} {own.name}: own is best, {own.us:.1f} us"


# ---------------------------------------------------------------- the run


def shapes_of(options: argparse.Namespace) -> list[Shape]:
    """Those that the flags ask for."""
    cases: list[Any] = [SMALL] if options.small else [target.case for target in TARGETS]
    tables = [min(rows, options.most_table_rows) for rows in TABLES]
    tables = list(SMALL_TABLES) if options.small else tables
    return [Shape.of(case, tables) for case in cases if options.only in (0, case.batch)]


def run(found: Measurements, shapes: Sequence[Shape], compilers: Compilers) -> Iterator[str]:
    """What is printed, each line as soon as it is known; lines are added to `found`."""
    yield found.measure_rates()
    all_works = [work for shape in shapes for work in works(shape)]
    for work in (one for one in all_works if one.operations):
        yield from (line.text() for line in found.own(work))
    yield compilers.wait(COMPILER_SECONDS)
    for work in (one for one in all_works if not one.operations):
        yield from (line.text() for line in found.own(work))
    for shape in shapes:
        yield from sums(found.lines, shape)
    yield compilers.wait(COMPILER_SECONDS)
    for work in all_works:
        yield from (line.text() for line in found.others(work) if line.failure)
    yield from best_settings(found.lines)
    if found.num_skipped:
        yield f"the time is over: {found.num_skipped} measurements skipped (--seconds)"
    yield f"{len(found.lines)} measurements, {time.monotonic() - BEGIN:.0f} s"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = ArgumentParser(prog="kernels.py", description=(__doc__ or "").splitlines()[0])
    flag = parser.add_argument
    flag("--only", type=int, default=0, help="one batch size; 0: all")
    flag("--out", type=Path, help="folder for kernels.csv.gz")
    flag(
        "--seconds", type=number_in(float, 0), default=SECONDS, help="what is left then is skipped"
    )
    flag("--most-table-rows", type=number_in(int, 1), default=max(TABLES), help="cut tables to it")
    flag("--small", action="store_true", help="small shapes: to try this program")
    flag("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: interpreted, --small")
    flag("--compile", type=listed(int), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.small |= options.device == "cpu"
    if not shapes_of(options):
        raise UserError(f"--only={options.only}: no shape has this batch size")
    return options


def report(options: argparse.Namespace, compilers: Compilers) -> int:
    """Measure, print, and write the file; returns the exit status."""
    lower = torch.bfloat16 if options.device == "cuda" else torch.float16
    shapes = shapes_of(options)
    found = Measurements(options, Inputs(options.device, lower))
    try:
        with ends_on_signals(lambda error: None):  # what was measured is written
            for text in run(found, shapes, compilers):
                print(text, flush=True)
    except BrokenCardError as error:
        print(f"the card has failed, this is the end: {error}", flush=True)
        return 1
    finally:
        compilers.stop()
        save(found.lines, options.out)
    return 0


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print the lines, and write them into a file."""
    options = parse(argv)
    on_gpu = options.device == "cuda"
    # before the first import of a kernel
    os.environ["TRITON_INTERPRET"] = "0" if on_gpu else "1"
    if options.compile:
        capability, number, count = options.compile
        launches = to_compile(shapes_of(options), torch.bfloat16)
        compile_share(launches[number::count], capability)
        return 0
    if on_gpu and not torch.cuda.is_available():
        raise UserError("bench/kernels.py: no CUDA device found (--device=cpu tries it)")
    device = torch.device(options.device)
    if not has_triton(device, torch.bfloat16 if on_gpu else torch.float16):
        raise UserError("bench/kernels.py: no Triton, or one that is too old")
    set_product_precision(device, False)
    print(f"torch {torch.__version__}, Triton {'.'.join(map(str, triton_version()))}")
    if not on_gpu:
        print("interpreted on the CPU: no time below means anything")
        return report(options, Compilers([], 0))
    words = [f"--only={options.only}", f"--most-table-rows={options.most_table_rows}"]
    words += ["--small"] if options.small else []
    major, minor = torch.cuda.get_device_capability()
    print(f"{torch.cuda.get_device_name()}, capability {major}.{minor}", flush=True)
    command = [sys.executable, __file__, *words]
    with torch.cuda.stream(torch.cuda.Stream()):
        return report(options, Compilers(command, 10 * major + minor))


if __name__ == "__main__":
    sys.exit(main())
