"""Steps on several CPU ranks: time, bytes sent, and how much of the exchange other work hides.

    python bench/ranks.py [--ranks 1,2,4,8] [--sharding table,auto,row] [--exchange-type float32]

The scripts' network on the yardstick's rows and tables, in batches of 2048 over all ranks. Figures
are medians over the steps of the rank that they are largest on. Every other step waits for each
collective as soon as it has begun it, so that both kinds are of the same moments of one launch:

    sent      bytes that leave a rank in a step, by collective; a sum over ranks counts as on a ring
    planned   what the planner says; of cut tables with ids spread evenly over rows
    largest   most bytes that a rank sends, over the mean
    waits     ms in which a rank waits for vectors, gradients and sums
    at once   the same of the steps that wait at once, which no other figure counts
    hidden    the share of `at once` that other work hides

Ranks that share cores compute more slowly the more there are, and send through memory: ms a step
say nothing about a cluster. Bytes and their balance do. What other work hides takes the cores that
the ranks want, so `hidden` says little, below 0 too, unless each rank has a core of its own.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dlrm_s_pytorch as dlrm

# isort: split
import torch
import torch.distributed as dist

from bench.common import listed, one_of, run_ranks
from bench.training import make_rows
from common.errors import reports_errors
from common.flags import ArgumentParser, number_in
from common.launch import Launch
from engine.step import TrainingStep
from engine.table_layout import TableLayout, workload_of
from ranks import collectives
from ranks.plan_costs import rank_costs
from ranks.process import Process

MODEL = (
    "--arch-sparse-feature-size=64 --arch-mlp-bot=13-512-256-64 --arch-mlp-top=512-512-256-1"
    " --loss-function=bce --memory-map --tensor-board-filename= --print-freq=1000000"
)
WARM_UP = 6  # an even number
HEADER = (
    f"{'ranks, sharding, type':<24} {'ms a step':>9} {'MB sent':>8} {'planned':>8} {'largest':>7}"
    f" {'waits ms':>8} {'at once':>8} {'hidden':>7}"
)


class Counters:
    """What a rank has sent and waited for since it was asked last.

    Attributes:
        sent: bytes to other ranks.
        waited: seconds of waiting for vectors, gradients and sums.
        at_once: each collective is waited for as soon as it has begun.
    """

    def __init__(self) -> None:
        self.sent = self.waited = 0.0
        self.at_once = False

    def take(self) -> tuple[float, float]:
        """(sent, waited), which begin anew."""
        found = self.sent, self.waited
        self.sent = self.waited = 0.0
        return found

    def all_to_all(self, send: Any) -> Any:
        """The collective, counted."""

        def counted(received: Any, sent: Any, receive: Any, sizes: Any, **more: Any) -> Any:
            self.sent += (sum(sizes) - sizes[dist.get_rank()]) * sent.element_size()
            return send(received, sent, receive, sizes, **more)

        return counted

    def all_reduce(self, reduce: Any) -> Any:
        """The collective, counted as on a ring."""

        def counted(tensor: Any, *words: Any, **more: Any) -> Any:
            ranks = dist.get_world_size()
            self.sent += 2 * (ranks - 1) * tensor.numel() * tensor.element_size() / ranks
            return reduce(tensor, *words, **more)

        return counted

    def pending(self) -> type:
        """A collective that measures how long it is waited for: those of floats alone."""
        counters = self

        class Measured(collectives.Pending):
            def __init__(self, process: Any, begin: Any, tensors: Any) -> None:
                super().__init__(process, begin, tensors)
                self._is_over, self._counts = False, tensors[0].is_floating_point()
                if counters.at_once:
                    self.wait()

            def wait(self) -> None:
                began = time.perf_counter()
                if not self._is_over:
                    super().wait()
                    self._is_over = True
                if self._counts:
                    counters.waited += time.perf_counter() - began

        return Measured


def run_as_rank(file: str, flags: list[str]) -> int:
    """Train as one rank and leave its figures of all steps: seconds, bytes sent, seconds waited.

    They are in two lists: of steps that do other work meanwhile, and of those that wait at once.
    Returns the exit status.
    """
    counters, steps = Counters(), []
    step = TrainingStep.run

    def measured(self: TrainingStep, *words: Any) -> Any:
        counters.take()
        counters.at_once = len(steps) % 2 == 1
        began = time.perf_counter()
        found = step(self, *words)
        steps.append((time.perf_counter() - began, *counters.take()))
        return found

    with (
        mock.patch.object(TrainingStep, "run", measured),
        mock.patch.object(collectives, "Pending", counters.pending()),
        mock.patch.object(dist, "all_to_all_single", counters.all_to_all(dist.all_to_all_single)),
        mock.patch.object(dist, "all_reduce", counters.all_reduce(dist.all_reduce)),
    ):
        status = dlrm.main(flags)
    rank = Launch.from_environment().rank
    Path(f"{file}.{rank}").write_text(json.dumps([steps[WARM_UP::2], steps[WARM_UP + 1 :: 2]]))
    return status


def measure(ranks: int, flags: list[str]) -> list[tuple[float, float, float, float]]:
    """For each rank, medians of a step: seconds, bytes sent, seconds waited, the same at once.

    Raises:
        SystemExit: a rank has failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        own = [f"--as-rank={folder}/figures", f"--flags={' '.join(flags)}"]
        run_ranks(ranks, "bench/ranks.py", *own, environment={"OMP_NUM_THREADS": "1"})
        files = [Path(f"{folder}/figures.{rank}") for rank in range(ranks)]
        of_ranks = [json.loads(file.read_text()) for file in files]
    return [(*_medians(meanwhile), _medians(at_once)[2]) for meanwhile, at_once in of_ranks]


def _medians(steps: list[list[float]]) -> list[float]:
    return [statistics.median(column) for column in zip(*steps, strict=True)]


def planned(ranks: int, flags: list[str]) -> float:
    """Most bytes that a rank sends in a step, as the planner has it."""
    options = dlrm.parse_options(flags)
    shape = dlrm.make_architecture(options, dlrm.prepare_data(options))
    process = Process(0, ranks, 0, torch.device("cpu"), "gloo")
    placement = TableLayout.from_options(options, shape, process).placement
    return max(cost.bytes_sent for cost in rank_costs(placement, workload_of(options, shape)))


def line(ranks: int, sharding: str, wire: str, flags: list[str]) -> str:
    """A line of the table."""
    flags = [*flags, f"--sharding={sharding}", f"--exchange-type={wire}"]
    of_plan = planned(ranks, flags)  # first: it finds mistakes in the flags
    found = measure(ranks, flags)
    seconds, sent, waited, at_once = (max(column) for column in zip(*found, strict=True))
    mean = statistics.mean(one[1] for one in found)
    return (
        f"{f'{ranks}, {sharding}, {wire}':<24} {1e3 * seconds:>9.1f} {1e-6 * sent:>8.3f}"
        f" {1e-6 * of_plan:>8.3f} {sent / mean if mean else 1:>7.2f}"
        f" {1e3 * waited:>8.2f} {1e3 * at_once:>8.2f}"
        + (f" {1 - waited / at_once:>7.0%}" if at_once else "")
    )


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or run as a rank of it."""
    parser = ArgumentParser(prog="ranks.py", description=(__doc__ or "").splitlines()[0])
    flag, positive = parser.add_argument, number_in(int, 1)
    ways, types = one_of("table", "auto", "row"), one_of("float32", "bf16", "fp16")
    flag("--ranks", type=listed(positive), default="1,2,4,8", help="numbers of ranks")
    flag("--sharding", type=listed(ways), default="table,auto,row", help="ways to spread tables")
    flag("--exchange-type", type=listed(types), default="float32", help="types on the wire")
    flag("--batch", type=positive, default=2048, help="rows a step, over all ranks")
    steps = number_in(int, WARM_UP + 2)
    flag("--steps", type=steps, default=80, help=f"{WARM_UP} of them are not counted")
    flag("--flags", default="", help="more flags of all runs, or those of a rank")
    flag("--as-rank", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.as_rank:
        return run_as_rank(options.as_rank, options.flags.split())
    with tempfile.TemporaryDirectory() as folder:
        make_rows(Path(folder), options.batch * options.steps)
        sizes = [f"--data_path={folder}", f"--mini-batch-size={options.batch}"]
        flags = [*MODEL.split(), *sizes, *options.flags.split()]
        print(HEADER, flush=True)
        for ranks in options.ranks:
            of_several = itertools.product(options.sharding, options.exchange_type)
            for sharding, wire in of_several if ranks > 1 else [("auto", "float32")]:
                print(line(ranks, sharding, wire, flags), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
