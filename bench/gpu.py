"""Training speed on one GPU: rows a second of three models, what the card allows, the yardstick.

    python bench/gpu.py [--only 2048] [--roofline] [--profile] [--variants]

The program runs as a user runs it, with the flags that are printed, on prepared rows in the page
cache, which are read again and again; its speed is the median of its log lines after the first.
docs/gpu.md says what a step does. --device=cpu tries this program where there is no GPU.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench import yardstick  # noqa: E402
from bench.common import ROOT, finish, output, row, start  # noqa: E402
from bench.floors import count  # noqa: E402
from bench.training import Case, write_prepared  # noqa: E402
from reporting.profiling import PROFILED_STEPS

NUM_ROWS = 10_000_000
CRITEO = (
    "10000000-32448-15529-7289-19879-3-6611-1384-62-10000000-1262224-284369-10-2208-10424-89-4-963"
    "-14-10000000-6919756-10000000-397757-11440-103-35"
)
TABLES = [int(rows) for rows in CRITEO.split("-")]
FAST = ("--amp=bf16", "--cuda-graphs")
LINES, ROWS_OF_A_LINE = 12, 2_000_000  # log lines of a run; rows of each
YARDSTICK_STEPS = {"warmup": 2, "iters": 5}
TOP_KERNELS = 14
THREADS = 8


@dataclass(frozen=True)
class Target:
    """A line of the table: a model, and rows/s to reach and to aim at."""

    case: Case
    wanted: float
    aim: float


TARGETS = (
    Target(Case("32768, D 64", 32768, 64, "13-512-256-64", "512-512-256-1", 0, 0), 10e6, 20e6),
    Target(
        Case("65536, D 128", 65536, 128, "13-512-256-128", "1024-1024-512-256-1", 0, 0), 6e6, 8e6
    ),
    Target(Case("2048, D 64", 2048, 64, "13-512-256-64", "512-512-256-1", 0, 0), 4e6, 8e6),
)


@dataclass(frozen=True)
class Setting:
    """What the measurements share.

    Args:
        device: cuda or cpu.
        folder: of the prepared rows.
        tables: rows of each table.
        num_rows: prepared.
        rows_a_line: rows between two log lines.
    """

    device: str
    folder: Path
    tables: list[int]
    num_rows: int
    rows_a_line: int


def make_rows(setting: Setting) -> None:
    """Prepared rows drawn as the yardstick draws its own: low ids are frequent."""
    random = np.random.default_rng(0)
    columns = np.empty((40, setting.num_rows), np.int32)
    columns[0] = random.integers(0, 2, setting.num_rows, dtype=np.int32)
    for column in range(1, 14):
        columns[column] = random.integers(0, 200, setting.num_rows, dtype=np.int32)
    for column, rows in enumerate(setting.tables, 14):
        columns[column] = random.random(setting.num_rows) ** 3 * rows
    folder = setting.folder / "kaggleAdDisplayChallenge_processed.prepared"
    write_prepared(folder, columns, setting.tables)


def run(setting: Setting, case: Case, flags: tuple[str, ...], folder: Path = ROOT) -> str:
    """What the program prints; it runs in `folder`."""
    print_freq = max(1, setting.rows_a_line // case.batch)
    epochs = -(-LINES * print_freq * case.batch // setting.num_rows)
    device = ["--use-gpu"] if setting.device == "cuda" else []
    words = [
        f"--data_path={setting.folder}",
        "--memory-map",
        "--loss-function=bce",
        "--learning-rate=0.1",
        "--print-time",
        "--performance",
        "--tensor-board-filename=",
        f"--arch-sparse-feature-size={case.dim}",
        f"--arch-mlp-bot={case.bottom}",
        f"--arch-mlp-top={case.top}",
        f"--mini-batch-size={case.batch}",
        f"--print-freq={print_freq}",
        f"--nepochs={epochs}",
        *device,
        *flags,
    ]
    cores = {"OMP_NUM_THREADS": str(min(THREADS, os.cpu_count() or 1))}
    return finish(start("dlrm_s_pytorch.py", *words, environment=cores, folder=folder))


def ms_a_step(text: str) -> float:
    """The median of the log lines after the first, which has the warm-up."""
    times = [float(ms) for ms in re.findall(r"^Finished training .* ([\d.]+) ms/it", text, re.M)]
    if len(times) < 2:
        raise SystemExit(f"fewer than two log lines: {text}")
    return statistics.median(times[1:])


def yardstick_ms(setting: Setting, case: Case) -> float:
    """Ms a step of the yardstick on the same device, with the same tables."""
    shapes = ["--dim", case.dim, "--bot", case.bottom, "--top", case.top, "--batch", case.batch]
    steps = [word for name, n in YARDSTICK_STEPS.items() for word in (f"--{name}", n)]
    tables = "-".join(str(rows) for rows in setting.tables)
    own = ["--device", setting.device, "--yardstick", tables, "--"]
    text = output(Path(__file__).relative_to(ROOT), *own, "train", *shapes, *steps)
    return float(re.findall(r"([\d.]+) ms/it", text)[-1])


def run_yardstick(device: str, tables: str, words: list[str]) -> None:
    """The yardstick as it is, with everything it makes on the device."""
    torch.set_default_device(device)
    yardstick.ROWS[:] = [int(rows) for rows in tables.split("-")]
    sys.argv = ["yardstick.py", *words]
    yardstick.main()


# ---------------------------------------------------------------- what the card allows


def seconds(device: str, work: Callable[[], object], runs: int = 20) -> float:
    """Of a call, the mean of the faster of two series."""
    series = []
    for _ in range(3):  # the first one warms up
        wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
        wait()
        begin = time.perf_counter()
        for _ in range(runs):
            work()
        wait()
        series.append((time.perf_counter() - begin) / runs)
    return min(series[1:])


def product_rate(device: str, rows: int, width: int) -> float:
    """Operations a second of a product (rows, width) (width, width) in bfloat16."""
    left, right = (
        torch.randn(n, width, device=device, dtype=torch.bfloat16) for n in (rows, width)
    )
    return 2 * rows * width * width / seconds(device, lambda: torch.mm(left, right))


def copy_rate(device: str, numbers: int) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source = torch.zeros(numbers, device=device)
    target = torch.empty_like(source)
    return 8 * numbers / seconds(device, lambda: target.copy_(source))


def roofline(setting: Setting, case: Case, step_ms: float) -> Iterator[str]:
    """Both floors of a step with --amp=bf16, and what share of the step they are."""
    counts = count(case)
    # activations are bfloat16, tables and updates float32, vectors and their gradients bfloat16
    moved = counts.table_bytes * 4 / 5 + counts.activation_bytes / 2 + counts.parameter_bytes
    small = setting.device == "cpu"
    products = product_rate(setting.device, 256 if small else case.batch, 512)
    best = product_rate(setting.device, 256 if small else 8192, 256 if small else 8192)
    copies = copy_rate(setting.device, 1 << (18 if small else 28))
    floors = {"products": counts.operations / products, "copies": moved / copies}
    yield (
        f"roofline, batch {case.name}: {counts.operations * 1e-9:.0f} GFLOP,"
        f" {moved * 1e-9:.2f} GB a step; products of 512 columns {products * 1e-12:.1f} TFLOP/s"
        f" (largest {best * 1e-12:.1f}), copies {copies * 1e-9:.0f} GB/s"
    )
    for name, floor in floors.items():
        share = 1e3 * floor / step_ms
        yield f"  floor of {name:<9} {1e3 * floor:8.3f} ms, {share:4.0%} of {step_ms:.3f} ms"
    total = 1e3 * sum(floors.values())
    yield f"  both in turn       {total:8.3f} ms, {total / step_ms:4.0%}"


def kernels(setting: Setting, case: Case, flags: tuple[str, ...]) -> Iterator[str]:
    """Where a step's time goes: the kernels that take longest, of 50 steps."""
    with tempfile.TemporaryDirectory() as folder:
        run(setting, case, (*flags, "--enable-profiling"), Path(folder))
        (trace,) = Path(folder).glob("dlrm_s_pytorch*.json")
        events = json.loads(trace.read_text())["traceEvents"]
    times: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            times[event["name"]] += event["dur"]
    total = sum(times.values()) or 1
    per_step = total / PROFILED_STEPS / 1e3
    yield f"kernels, batch {case.name}: {per_step:.3f} ms a step in all"
    for name, duration in times.most_common(TOP_KERNELS):
        yield f"  {duration / PROFILED_STEPS:9.1f} us {duration / total:4.0%}  {name[:90]}"


VARIANTS = {
    "float32": (),
    "TF32": ("--tf32",),
    "bf16": ("--amp=bf16",),
    "bf16, graphs": FAST,
    "fp16, graphs": ("--amp=fp16", "--cuda-graphs"),
    "bf16, graphs, no Triton": (*FAST, "--triton=false"),
    "bf16, graphs, no copy stream": (*FAST, "--copy-stream=false"),
    "bf16, graphs, rwsadagrad": (*FAST, "--optimizer=rwsadagrad"),
}


# ---------------------------------------------------------------- the table


def lines(setting: Setting, options: argparse.Namespace) -> Iterator[str]:
    """Lines of the table, each as soon as it is measured."""
    flags = FAST if setting.device == "cuda" else ()
    for target in TARGETS:
        case = target.case
        if options.only not in (0, case.batch):
            continue
        ours = ms_a_step(run(setting, case, flags))
        theirs = yardstick_ms(setting, case)
        speed = f"{1e3 * case.batch / ours:,.0f}"
        wanted = f"{target.wanted:,.0f}, aim {target.aim:,.0f} rows/s; {ours:.3f} ms"
        other = f"{1e3 * case.batch / theirs:,.0f}"
        yield row(f"GPU, batch {case.name}, rows/s", speed, other, f"{theirs / ours:.1f}", wanted)
        if options.roofline:
            yield from roofline(setting, case, ours)
        if options.profile:
            yield from kernels(setting, case, flags)
        for name, variant in VARIANTS.items() if options.variants else ():
            found = ms_a_step(run(setting, case, variant))
            yield row(f"  {name}, rows/s", f"{1e3 * case.batch / found:,.0f}")


def parse() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flag = parser.add_argument
    flag("--only", type=int, default=0, help="one batch size")
    flag("--rows", type=int, default=NUM_ROWS, help="distinct rows")
    flag("--rows-a-line", type=int, default=ROWS_OF_A_LINE, help="rows between two log lines")
    flag("--most-table-rows", type=int, default=max(TABLES), help="larger tables are cut to it")
    flag("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program")
    flag("--roofline", action="store_true", help="what the card allows, and the share achieved")
    flag("--profile", action="store_true", help="the kernels that take longest")
    flag("--variants", action="store_true", help="each case with other flags too")
    flag("--yardstick", metavar="TABLES", help="run the yardstick on the device with these tables")
    flag("words", nargs="*", help="the yardstick's")
    return parser.parse_args()


def main() -> int:
    """Print the table."""
    options = parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: bench/gpu.py: no CUDA device found (--device=cpu tries it)", file=sys.stderr)
        return 2
    if options.yardstick:
        run_yardstick(options.device, options.yardstick, options.words)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        tables = [min(rows, options.most_table_rows) for rows in TABLES]
        sizes = (options.rows, options.rows_a_line)
        setting = Setting(options.device, Path(folder), tables, *sizes)
        make_rows(setting)
        for line in lines(setting, options):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
