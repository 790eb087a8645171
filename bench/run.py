"""All measurements as one table, with the machine and the commit that it holds for.

    bash bench/run.sh [--pairs 5] [--rows 89000000] [--prepare-rows 10000000]

Speeds are ratios to the yardstick beside this file, taken in pairs; figures are medians. Where
there is an NVIDIA GPU its lines come first, and the CPU's are measured once only.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench import preparation  # noqa: E402
from bench.common import HEADER, output, row  # noqa: E402
from bench.machine import machine  # noqa: E402
from bench.training import CASES, make_rows, measure  # noqa: E402

METRICS_ROWS = 89_000_000
GPU_PARTS = "program,yardstick,roofline"
MOST_SECONDS, MOST_GB = {"cpu": 60, "cuda": 1}, 6
PAIRS, PREPARE_ROWS = {False: 5, True: 1}, {False: 10_000_000, True: 1_000_000}  # with a GPU?


def gpu_name() -> str:
    """The NVIDIA GPU that torch finds; empty if none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def metric_work(num_rows: int, device: str = "cpu") -> tuple[float, float]:
    """Seconds and peak GB of the metrics of that many scores, in a process of their own."""
    text = output("bench/evaluation.py", f"--rows={num_rows}", f"--device={device}")
    work = re.search(r"^metric work +([\d.]+) s$", text, re.M)
    peak = re.search(r"^peak memory +([\d.]+) GB$", text, re.M)
    assert work and peak, text
    return float(work[1]), float(peak[1])


def metrics_line(num_rows: int, device: str) -> str:
    """A line of the table."""
    work, peak = metric_work(num_rows, device)
    wanted = f"at most {MOST_SECONDS[device]} s, {MOST_GB} GB"
    where = " on the GPU" if device == "cuda" else ""
    return row(
        f"metrics of {num_rows:,} rows{where}", f"{work:.2f} s, {peak:.2f} GB", wanted=wanted
    )


def main() -> int:
    """Print the table, line by line as it is measured."""
    gpu = gpu_name()
    pairs, rows = PAIRS[bool(gpu)], PREPARE_ROWS[bool(gpu)]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=pairs, help="runs of each program a line")
    parser.add_argument("--rows", type=int, default=METRICS_ROWS, help="scores to evaluate")
    parser.add_argument("--prepare-rows", type=int, default=rows, help="to prepare")
    options = parser.parse_args()
    print(
        machine(),
        "the programs use 2 threads",
        *([gpu] if gpu else []),
        HEADER,
        sep="\n",
        flush=True,
    )
    if gpu:
        print(output("bench/gpu.py", f"--parts={GPU_PARTS}"), end="", flush=True)
        print(metrics_line(options.rows, "cuda"), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make_rows(Path(folder))
        for case in CASES:
            found = measure(case, Path(folder), options.pairs)
            ours, theirs = f"{found.ours_ms:.2f} ms", f"{found.yardstick_ms:.2f} ms"
            what = f"step, batch {case.name}"
            line = row(what, ours, theirs, f"{found.ratio:.2f}", f"{case.at_least:.2f}")
            print(line, flush=True)
    print(metrics_line(options.rows, "cpu"), flush=True)
    print("\n".join(output("bench/loader.py").splitlines()[1:]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = options.prepare_rows
        yardstick_rows = min(rows, preparation.YARDSTICK_ROWS)
        for line in preparation.lines(Path(folder), rows, options.pairs, yardstick_rows):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
