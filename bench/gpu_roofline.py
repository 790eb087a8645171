"""What the device allows, and the yardstick on the same device."""

import re
import sys
import time
from collections.abc import Callable

import torch

from bench import yardstick
from bench.common import finish, start
from bench.floors import count
from bench.gpu_cases import Setting
from bench.training import Case

YARDSTICK_STEPS = {"warmup": 2, "iters": 5}
YARDSTICK_SECONDS = 60.0
Found = dict[str, float]


def measure_yardstick(setting: Setting, case: Case) -> Found:
    """Ms a step of the yardstick on the same device, with the same tables, in its own process."""
    shapes = ["--dim", case.dim, "--bot", case.bottom, "--top", case.top, "--batch", case.batch]
    steps = [word for name, n in YARDSTICK_STEPS.items() for word in (f"--{name}", n)]
    tables = "-".join(str(rows) for rows in setting.tables)
    own = ["--device", setting.device, "--yardstick", tables, "--"]
    program = start("bench/gpu.py", *own, "train", *shapes, *steps)
    try:
        text = finish(program, YARDSTICK_SECONDS)
    finally:
        program.kill()  # does nothing if it has ended
    ms = float(re.findall(r"([\d.]+) ms/it", text)[-1])
    return {"ms": ms, "rows_per_second": round(1e3 * case.batch / ms)}


def run_yardstick(device: str, tables: str, words: list[str]) -> None:
    """The yardstick as it is, with everything it makes on the device."""
    torch.set_default_device(device)
    yardstick.ROWS[:] = [int(rows) for rows in tables.split("-")]
    sys.argv = ["yardstick.py", *words]
    yardstick.main()


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


def measure_roofline(setting: Setting, case: Case) -> Found:
    """Operations and bytes of a step with --amp=bf16, and the rates at which the device does them.

    Returns:
        `operations`, of products; `bytes`; operations a second of a `products` of 512 columns and
        of the `largest`; bytes a second of `copies`.
    """
    counts = count(case)
    # activations are bfloat16, tables and updates float32, vectors and their gradients bfloat16
    moved = counts.table_bytes * 4 / 5 + counts.activation_bytes / 2 + counts.parameter_bytes
    rows, widest, numbers = (case.batch, 8192, 1 << 28)
    if setting.device == "cpu":
        rows, widest, numbers = (32, 64, 1 << 18)
    return {
        "operations": counts.operations,
        "bytes": moved,
        "products": product_rate(setting.device, rows, 512),
        "largest": product_rate(setting.device, widest, widest),
        "copies": copy_rate(setting.device, numbers),
    }
