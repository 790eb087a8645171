"""The arithmetic of a training step: operations, bytes, and the time that each allows at best.

    python bench/floors.py [--only 2048]

docs/step.md says how they are counted. Rates of products and of copies are measured in the same
run, and so is the step.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench.training import CASES, Case, make_rows, our_ms  # noqa: E402

NUM_DENSE, NUM_TABLES = 13, 26
RUNS = 3


@dataclass(frozen=True)
class Counts:
    """Of a step: floating-point operations of products, and bytes that must move."""

    mlp_operations: float
    interaction_operations: float
    table_bytes: float
    activation_bytes: float
    parameter_bytes: float

    @property
    def operations(self) -> float:
        """All of them."""
        return self.mlp_operations + self.interaction_operations

    @property
    def bytes(self) -> float:
        """All of them."""
        return self.table_bytes + self.activation_bytes + self.parameter_bytes


def count(case: Case) -> Counts:
    """What a step of SGD costs at least; float32."""
    vectors = NUM_TABLES + 1
    pairs = vectors * (vectors - 1) // 2
    bottom = [int(width) for width in case.bottom.split("-")]
    top = [case.dim + pairs, *(int(width) for width in case.top.split("-"))]
    layers = [*pairwise(bottom), *pairwise(top)]
    weights = sum(n * m for n, m in layers)
    # forward, gradient of the inputs (not of the data), gradient of the weights
    mlp = 2 * case.batch * (3 * weights - bottom[0] * bottom[1])
    # the pairs forward, S V backward
    interaction = 2 * case.batch * case.dim * (pairs + vectors * vectors)
    # rows read and written as vectors; gradients read, rows read and written
    tables = 4 * case.batch * NUM_TABLES * case.dim * 5
    # each tensor is written and read once forward; backward it is read twice (by its activation and
    # by the weights' product), its gradient written, and read by two products
    widths = sum(bottom) + sum(top) + vectors * case.dim
    activations = 4 * case.batch * widths * 7
    parameters = 4 * weights * 4  # read forward, read backward, read and written by the update
    return Counts(mlp, interaction, tables, activations, parameters)


def seconds(function: Callable[[], object], runs: int = 20) -> float:
    """The fastest of some calls: a floor wants the best that the machine does."""
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)


def product_rate() -> float:
    """Operations a second of a 2048 x 512 x 512 product."""
    left, right, out = torch.rand(2048, 512), torch.rand(512, 512), torch.empty(2048, 512)
    return 2 * 2048 * 512 * 512 / seconds(lambda: torch.mm(left, right, out=out))


def copy_rate() -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    source, target = torch.rand(1 << 26), torch.empty(1 << 26)
    return 2 * 4 * (1 << 26) / seconds(lambda: target.copy_(source))


def main() -> int:
    """Print both rates and a line a case."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", type=int, default=0, help="one batch size")
    options = parser.parse_args()
    torch.set_num_threads(2)
    operations, copied = product_rate(), copy_rate()
    print(f"products {operations * 1e-9:.0f} GFLOP/s, copies {copied * 1e-9:.1f} GB/s, 2 threads")
    print(
        f"{'batch, shapes':<20} {'GFLOP':>7} {'products, ms':>12} {'GB':>7} {'copies, ms':>10}"
        f" {'step, ms':>9} {'share of the products':>22}"
    )
    with tempfile.TemporaryDirectory() as folder:
        make_rows(Path(folder))
        for case in CASES:
            if options.only not in (0, case.batch):
                continue
            counts = count(case)
            step = statistics.median(our_ms(case, Path(folder)) for _ in range(RUNS))
            floor = 1e3 * counts.operations / operations
            print(
                f"{case.name:<20} {counts.operations * 1e-9:>7.2f} {floor:>12.2f}"
                f" {counts.bytes * 1e-9:>7.3f} {1e3 * counts.bytes / copied:>10.2f}"
                f" {step:>9.2f} {floor / step:>21.0%}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
