"""What a step takes on many cards: computed from assumptions, not measured.

    python bench/scaling.py [--model=A] [--machine=H200] [--cards=1,8,64,512] [--capacity]

No card has run it. The time of one card is estimated, tables are placed by the program's own
planner, and what ranks send takes as long as the links need. --capacity adds what bench/capacity.py
measures. docs/scaling.md has the tables and what follows from them.
"""

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import capacity
from bench.common import listed, row
from common.errors import reports_errors
from common.flags import ArgumentParser, dashed_ints, number_in
from model.compression import NoCompression
from model.interaction import num_pairs
from ranks.model_shape import ModelShape
from ranks.placement import LogicalTable, Placement
from ranks.plan import MOST_PLANNED
from ranks.plan_costs import ID_BYTES, RankCost, Workload, rank_costs
from ranks.planner import Sharding, plan_tables

CRITEO = (
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208,
    11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
)  # fmt: skip
ROWS_OF_A_CARD, ROWS_OF_ALL = 32768, 65536

# What is assumed of a machine: (field of Machine, what it is, H200, Ascend 910, source).
ASSUMPTIONS = (
    ("cards", "cards in a host", 8, 8, "HGX H200; Atlas 800T A2"),
    ("gb", "GB of memory of a card", 141, 64, "data sheets"),
    ("memory", "TB/s, memory, reached", 2.8, 1.1,
     "assumed by the models' estimates; 0.7 of 1.6 on the data sheet"),
    ("inside", "GB/s each way of a card in its host", 450, 196,
     "NVLink 4: 900 both ways; HCCS: 392 both ways"),
    ("outside", "GB/s each way of a card between hosts", 50, 25,
     "ports of 400 Gb/s; RoCE of 200 Gb/s"),
    ("reached", "share of these two that is reached", 0.8, 0.8,
     "nccl-tests issue 212: 370 of 450 GB/s; guess for the rest"),
    ("start", "us, a collective without data, in a host", 20, 40, "guess"),
    ("message", "us, each further rank in an all-to-all", 1, 2, "guess"),
    ("stage", "us, each doubling of hosts in a sum", 10, 20, "guess"),
    ("rows", "times the H200's time of what grows with rows", 1, 3.8,
     "2.8 / 1.1 by memory, 1.5 for operators in place of kernels (guess)"),
    ("fixed", "times the H200's time of what does not", 1, 2.7,
     "145 operators a step (emulated device), 5 us each (guess)"),
    ("float32", "times --amp=bf16's time of products and activations", 2, 2.5,
     "TF32 has half the rate; 910B2: 85 and 315 TFLOP/s"),
    ("host", "us a step of the host, which runs ahead", 100, 2900,
     "a replayed graph; 145 operators of 20 us (guesses)"),
)  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """Cards and links, as ASSUMPTIONS explains the fields."""

    name: str
    cards: float
    gb: float
    memory: float
    inside: float
    outside: float
    reached: float
    start: float
    message: float
    stage: float
    rows: float
    fixed: float
    float32: float
    host: float


NAMES = ("H200", "Ascend 910")
MACHINES = {
    name: Machine(name, **{field: float(values[k]) for field, _, *values, _ in ASSUMPTIONS})
    for k, name in enumerate(NAMES)
}


@dataclass(frozen=True)
class Model:
    """A model and its estimated times on an H200 with --amp=bf16 --cuda-graphs.

    Attributes:
        name, dim, bottom, top: its name, D, and the widths of its MLPs; Criteo's tables.
        fixed_us: of a step without its tables, whatever its rows.
        row_ns: more for each row of the card's share.
        forward_ns, backward_ns: of row_ns, those of the bottom MLP.
        lookup_ns, update_ns: of each row of a table that is looked up.
    """

    name: str
    dim: int
    bottom: str
    top: str
    fixed_us: float
    row_ns: float
    forward_ns: float
    backward_ns: float
    lookup_ns: float
    update_ns: float

    @property
    def tables(self) -> tuple[LogicalTable, ...]:
        """Criteo's tables with rows of this dimension."""
        return NoCompression(self.dim).make_tables(CRITEO)

    @property
    def num_dense(self) -> int:
        """Parameters of both MLPs."""
        joined = self.dim + num_pairs(len(CRITEO) + 1, itself=False)
        shape = ModelShape(
            tables=self.tables,
            bottom=dashed_ints(self.bottom),
            top=(joined, *dashed_ints(self.top)),
            interaction="dot",
            itself=False,
            pooling="",
            clamp=0,
        )
        return shape.num_dense


# Sums of kernels, estimated one by one; real steps may take up to 1.4 times as long. A: 1430 us at
# batch 32768 and 350 at 2048, of which 205 and 19 are for tables, give a line. B: 4640 us at 65536,
# 690 of them for tables; what is fixed is A's and 34 us more for the update of more parameters.
# The bottom MLP has 20 % of A's products and 39 % of its activations, 7 and 24 % of B's.
MODELS = {
    "A": Model("A", 64, "13-512-256-64", "512-512-256-1", 271, 29.1, 2.0, 4.9, 0.088, 0.153),
    "B": Model("B", 128, "13-512-256-128", "1024-1024-512-256-1", 305, 55.6, 2.0, 4.5, 0.17, 0.235),
}
PASSES_WHOLE, PASSES_CUT = (
    6,
    14,
)  # over arrived vectors, forward and backward (model/static_exchange.py)


@dataclass(frozen=True)
class Run:
    """Types of a run: bytes of a number of a vector, and of one on its way."""

    name: str
    vector_bytes: int
    wire_bytes: int


RUNS = (
    Run("--amp=bf16", 2, 2),
    Run("float32 (on a GPU with --tf32)", 4, 4),
    Run("float32 (on a GPU with --tf32), --exchange-type=bf16", 4, 2),
)


@dataclass(frozen=True)
class Setting:
    """What a step runs on: a model, a machine, types."""

    model: Model
    machine: Machine
    run: Run


@dataclass(frozen=True)
class Step:
    """Microseconds of a step on its slowest rank, in the order of time.

    Attributes:
        ids: sent to the ranks that have the rows.
        tables: lookups and updates.
        vectors: their way, as far as the bottom MLP does not hide it.
        copies: sums of parts, and reordering of what has arrived.
        card: MLPs, interaction, loss, update of the MLPs.
        gradients: their way, as far as the bottom MLP's backward pass does not hide it.
        dense: the sum of dense gradients, as far as the update of rows does not hide it.
        hidden: of the way of vectors and gradients and of the dense sum.
        host: which a step does not take less than.
    """

    ids: float
    tables: float
    vectors: float
    copies: float
    card: float
    gradients: float
    dense: float
    hidden: float
    host: float

    @property
    def total(self) -> float:
        """The whole step."""
        on_card = self.tables + self.copies + self.card
        return max(self.host, on_card + self.ids + self.vectors + self.gradients + self.dense)

    @property
    def parts(self) -> str:
        """A few words."""
        names = ("card", "tables", "copies", "ids", "vectors", "gradients", "dense", "hidden")
        found = " ".join(f"{name} {getattr(self, name) / 1e3:.2f}" for name in names)
        return found + (" (the host is slower)" if self.total == self.host else "")


def all_to_all(machine: Machine, sent: float, ranks: int) -> float:
    """Microseconds in which a rank sends, or receives, so many bytes, equally many of each rank."""
    near = min(machine.cards, ranks) - 1
    far = ranks - 1 - near
    us_a_byte = 1e-3 / machine.reached / (ranks - 1)
    links = (near / machine.inside, far / machine.outside)  # both at the same time
    return machine.start + machine.message * far + sent * us_a_byte * max(links)


def all_reduce(machine: Machine, size: float, ranks: int) -> float:
    """Microseconds of a sum of so many bytes: in hosts, then each card a share between hosts."""
    near = min(machine.cards, ranks)
    hosts = ranks / near
    inside = 2 * size * (near - 1) / near / machine.inside
    outside = 2 * size / near * (hosts - 1) / hosts / machine.outside
    stages = machine.start + 2 * machine.stage * math.log2(hosts)
    return stages + 1e-3 / machine.reached * (inside + outside)


@functools.cache
def plan(
    model: Model,
    wire_bytes: int,
    ranks: int,
    rows: int,
    sharding: Sharding = "auto",
    is_routed: bool = False,
) -> tuple[Placement, tuple[RankCost, ...]]:
    """Where the program would put the tables, and what that costs each rank.

    Args:
        model: the model.
        wire_bytes: of a number of a vector on its way.
        ranks: W.
        rows: of the global batch.
        sharding: as the flag.
        is_routed: ids go to the rank that has their row alone, and are spread evenly.
    """
    load = Workload(rows, wire_bytes=wire_bytes, is_routed=is_routed, num_dense=model.num_dense)
    placement = plan_tables(model.tables, ranks, sharding, load)
    return placement, rank_costs(placement, load)


def step(setting: Setting, ranks: int, rows: int) -> Step:
    """A step on so many ranks; `rows` are those of the global batch."""
    model, machine, run = setting.model, setting.machine, setting.run
    placement, costs = plan(model, run.wire_bytes, ranks, rows)
    own_rows = math.ceil(rows / ranks)
    slower = machine.rows * (machine.float32 if run.vector_bytes == 4 else 1)
    card = model.fixed_us * machine.fixed + 1e-3 * model.row_ns * own_rows * slower
    lookups = 1e-3 * machine.rows * rows * max(cost.lookups for cost in costs)
    tables = lookups * (model.lookup_ns + model.update_ns)
    if ranks == 1:
        return Step(0, tables, 0, 0, card, 0, 0, 0, machine.host)
    arrived = max(cost.gradients_sent for cost in costs)
    departed = max(cost.vectors_sent for cost in costs)
    ids = max(
        max(cost.ids_sent for cost in costs), departed * ID_BYTES / model.dim / run.wire_bytes
    )
    way = all_to_all(machine, max(arrived, departed), ranks)
    dense = all_reduce(machine, costs[0].dense_sent * ranks / (ranks - 1) / 2, ranks)
    hides = [1e-3 * ns * own_rows * slower for ns in (model.forward_ns, model.backward_ns)]
    hides.append(lookups * model.update_ns)
    seen = [max(took - hidden, 0) for took, hidden in zip((way, way, dense), hides, strict=True)]
    passes = PASSES_CUT if placement.is_cut else PASSES_WHOLE
    copies = 1e-6 / machine.memory * passes * arrived * run.vector_bytes / run.wire_bytes
    hidden = 2 * way + dense - sum(seen)
    on_links = all_to_all(machine, ids, ranks)
    return Step(on_links, tables, seen[0], copies, card, *seen[1:], hidden, machine.host)


# ---------------------------------------------------------------- the tables


def assumption_lines() -> Iterator[str]:
    """The table of assumptions."""
    yield f"{'assumed':<55} {'H200':>6} {'Ascend':>7}  source"
    for _, what, *values, source in ASSUMPTIONS:
        yield f"{what:<55} {values[0]:>6} {values[1]:>7}  {source}"


def lines(setting: Setting, cards: Sequence[int]) -> Iterator[str]:
    """A line for each number of cards: a fixed share of a card, then a fixed global batch."""
    model, machine, run = setting.model, setting.machine, setting.run
    yield f"{model.name} on {machine.name}, {run.name}: computed, not measured"
    yield row("", "rows/s", "ms a step", "a card", "ms of it; hidden: at the same time")
    for of_all in (False, True):
        per_card = None  # rows/s of a card where there are the fewest
        for ranks in cards:
            rows = ROWS_OF_ALL if of_all else ROWS_OF_A_CARD * ranks
            what = f"{ranks} cards, {rows:,} rows" if ranks > 1 else f"1 card, {rows:,} rows"
            costs = plan(model, run.wire_bytes, ranks, rows)[1]
            held = max(cost.bytes_held for cost in costs) / 1e9
            if held > machine.gb:
                yield row(what, f"{held:.0f} GB of tables")
                continue
            found = step(setting, ranks, rows)
            speed = 1e6 * rows / found.total
            per_card = per_card or speed / ranks
            share = f"{speed / ranks / per_card:.1%}"
            yield row(what, f"{speed:,.0f}", f"{found.total / 1e3:.2f}", share, found.parts)


def exchange_lines(model: Model, cards: Sequence[int]) -> Iterator[str]:
    """MB of float32 vectors that the rank that sends most sends in a step, of several plans."""
    ways: tuple[tuple[Sharding, bool], ...] = (
        ("auto", False), ("table", False), ("row", False), ("auto", True),
    )  # fmt: skip
    yield f"{model.name}: MB of float32 vectors that the rank sends that sends most, --sharding="
    yield row("", "auto", "table", "row", "routed: auto, ids spread evenly; its mean")
    for ranks in (number for number in cards if number > 1):
        rows = ROWS_OF_A_CARD * ranks
        plans = [plan(model, 4, ranks, rows, *way)[1] for way in ways]
        sent = [f"{max(cost.vectors_sent for cost in costs) / 1e6:,.0f}" for costs in plans]
        mean = sum(cost.vectors_sent for cost in plans[-1]) / ranks / 1e6
        yield row(f"{ranks} cards, {rows:,} rows", *sent[:3], f"{sent[3]}; {mean:,.0f}")


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = ArgumentParser(prog="scaling.py", description=(__doc__ or "").splitlines()[0])
    flag = parser.add_argument
    number = listed(number_in(int, 1, MOST_PLANNED))
    flag("--cards", type=number, default="1,8,64,512", help="numbers of cards, joined by commas")
    flag("--model", choices=tuple(MODELS), help="one of the models")
    flag("--machine", choices=tuple(MACHINES), help="one of the machines")
    flag("--capacity", action="store_true", help="adds bench/capacity.py's table")
    options = parser.parse_args(argv)
    models = [model for name, model in MODELS.items() if options.model in (None, name)]
    machines = [one for name, one in MACHINES.items() if options.machine in (None, name)]
    print(*assumption_lines(), sep="\n")
    for setting in (Setting(*one) for one in product(models, machines, RUNS)):
        print("", *lines(setting, options.cards), sep="\n", flush=True)
    for model in models:
        print("", *exchange_lines(model, options.cards), sep="\n", flush=True)
    if options.capacity:
        print("", *capacity.lines(), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
