"""Tables alone: lookup, gradient and update of 26 tables, by the engine and by torch's modules.

    python bench/embedding.py [--rows 100000] [--dim 64] [--batch 2048]

One process, 2 threads, SGD, float32; each takes its turn, and the medians are printed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devices.threads import set_up_threads
from model.batch import Bags
from model.compression import NoCompression
from model.embedding_tables import EmbeddingTables
from model.static_exchange import StaticExchange
from optim.update import Update
from ranks.placement import place_tables
from ranks.process import Process

# isort: split
import torch  # noqa: E402
from torch import nn  # noqa: E402

NUM_TABLES, LR, ROUNDS = 26, 0.1, 30

Step = Callable[[torch.Tensor, torch.Tensor], None]


def engine(rows: int, dim: int) -> Step:
    """The engine of this project."""
    process = Process(0, 1, 0, torch.device("cpu"), "gloo")
    plain = NoCompression(dim).make_tables([rows] * NUM_TABLES)
    exchange = StaticExchange(process, plain, place_tables(plain, 1))
    tables = EmbeddingTables(plain, exchange, "sgd", learned_pooling=False)

    def step(ids: torch.Tensor, gradient: torch.Tensor) -> None:
        tables(Bags(ids.view(-1)), (len(ids),), Update(LR)).backward(gradient)

    return step


def modules(rows: int, dim: int) -> Step:
    """A module a table, sparse gradients, torch.optim.SGD: what is written first."""
    tables = [nn.EmbeddingBag(rows, dim, mode="sum", sparse=True) for _ in range(NUM_TABLES)]
    optimizer = torch.optim.SGD([table.weight for table in tables], lr=LR)

    def step(ids: torch.Tensor, gradient: torch.Tensor) -> None:
        offsets = torch.arange(len(ids))
        pooled = [table(ids[:, t], offsets) for t, table in enumerate(tables)]
        optimizer.zero_grad()
        torch.stack(pooled, 1).backward(gradient)
        optimizer.step()

    return step


def concatenated(rows: int, dim: int) -> Step:
    """All tables in one torch Embedding with sparse gradients."""
    table = nn.Embedding(rows * NUM_TABLES, dim, sparse=True)
    optimizer = torch.optim.SGD([table.weight], lr=LR)
    offsets = rows * torch.arange(NUM_TABLES)

    def step(ids: torch.Tensor, gradient: torch.Tensor) -> None:
        optimizer.zero_grad()
        table(ids + offsets).backward(gradient)
        optimizer.step()

    return step


def main() -> int:
    """Print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="of each table")
    parser.add_argument("--dim", type=int, default=64, help="embedding dimension D")
    parser.add_argument("--batch", type=int, default=2048, help="rows of a batch")
    options = parser.parse_args()
    torch.set_num_threads(2)
    set_up_threads(2)
    ways = {
        "the engine": engine(options.rows, options.dim),
        "one Embedding(sparse)": concatenated(options.rows, options.dim),
        f"{NUM_TABLES} EmbeddingBag(sparse)": modules(options.rows, options.dim),
    }
    gradient = 1e-3 * torch.randn(options.batch, NUM_TABLES, options.dim)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS):
        ids = torch.randint(0, options.rows, (options.batch, NUM_TABLES))
        for name, step in ways.items():
            begin = time.perf_counter()
            step(ids, gradient)
            if number >= ROUNDS // 10:
                times[name].append(1e3 * (time.perf_counter() - begin))
    for name, taken in times.items():
        print(f"{name:<24} {statistics.median(taken):>7.2f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
