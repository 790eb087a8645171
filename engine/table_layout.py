"""How a model's tables are spread over ranks and filled: the flags, and what follows from them."""

import argparse
import math
from dataclasses import dataclass

import torch

from common.errors import RankError
from common.flags import number_in
from common.free_memory import whole_memory
from common.launch import Launch
from devices.card import card_memory
from devices.execution import LOWER_PRECISION
from engine.model_content import ORIGINAL, SEEDED
from optim.row_optimizers import ELEMENT_OPTIMIZERS, TABLE_OPTIMIZERS
from ranks.model_shape import ModelShape
from ranks.placement import Matrix, Placement, place_tables
from ranks.plan_costs import Workload, rank_costs
from ranks.planner import plan_tables, what_would_do
from ranks.process import Process
from reporting.plan_table import Plan, plan_lines

_WIRES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of tables on several ranks."""
    flag = parser.add_argument_group("Tables on several ranks").add_argument
    flag(
        "--sharding",
        choices=("auto", "table", "row"),
        default="auto",
        help="auto: tables are whole, cut by rows or, tiny ones, on every rank, as balances ranks;"
        " table: all are whole; row: all are cut",
    )
    flag(
        "--card-memory",
        type=number_in(float, 1e-9),
        metavar="GB",
        help="what tables may take on a card; more is an error that says how many ranks would do",
    )
    flag(
        "--print-plan",
        type=number_in(int, 1, 4096),
        nargs="?",
        const=0,
        metavar="RANKS",
        help="print where tables would be on so many ranks and what that costs, then stop",
    )
    flag(
        "--exchange-type",
        choices=tuple(_WIRES),
        default="float32",
        help="how vectors and their gradients travel; 16 bits: half the bytes, rounded; vectors of"
        " --amp have 16 bits already",
    )
    flag(
        "--initial-values",
        choices=(ORIGINAL, SEEDED),
        default=ORIGINAL,
        help="of tables; seeded: each rank draws its own rows alone, on its device",
    )


@dataclass(frozen=True)
class TableLayout:
    """Where tables are, how their vectors travel, and what they begin with.

    Attributes:
        placement: which rank holds which rows.
        wire: type of vectors and gradients between ranks; None: as they are.
        seed: of initial values that each rank draws for its own rows; None: the original's.
    """

    placement: Placement
    wire: torch.dtype | None = None
    seed: int | None = None

    @classmethod
    def of_whole_tables(cls, shape: ModelShape, world_size: int) -> "TableLayout":
        """Whole tables on so many ranks, float32 between them, the original's initial values."""
        return cls(place_tables(shape.tables, world_size))

    @classmethod
    def from_options(
        cls, options: argparse.Namespace, shape: ModelShape, process: Process
    ) -> "TableLayout":
        """How the flags want the tables of a model to be laid out on the ranks.

        Raises:
            UserError: they need more than --card-memory.
            RankError: they need more than this rank's card or machine has.
        """
        workload, card_bytes = workload_of(options, shape), _card_bytes(options)
        tables, sharding = shape.tables, options.sharding
        placement = plan_tables(tables, process.world_size, sharding, workload, card_bytes)
        _check_memory(Plan(tables, sharding, placement, workload), process)
        seed = options.numpy_rand_seed if options.initial_values == SEEDED else None
        return cls(placement, _WIRES[options.exchange_type], seed)


def _check_memory(plan: Plan, process: Process) -> None:
    """Raise a RankError if this rank's device cannot hold its tables, whatever else is there.

    Ranks on CPUs share their machine's memory. How much an NPU has is not asked.
    """
    held, launch = rank_costs(plan.placement, plan.workload), Launch.from_environment()
    if process.device.type == "cpu":
        first = launch.rank - launch.local_rank
        needed = sum(one.bytes_held for one in held[first : first + launch.local_world_size])
        there = whole_memory()
        total = sum(one.bytes_held for one in held)
        where, more = "this machine", f"{math.ceil(total / there)} such machines would do"
    elif process.device.type == "cuda":
        needed, there = held[process.rank].bytes_held, card_memory(process.device)
        more = what_would_do(plan.tables, plan.sharding, plan.workload, there)
        where = f"{process.device}"
    else:
        return
    if needed > there:
        raise RankError(
            f"tables need {needed / 1e9:.4g} GB on {where}, which has {there / 1e9:.4g} GB: {more};"
            " smaller tables need less (--max-ind-range, --arch-sparse-feature-size)"
        )


def _card_bytes(options: argparse.Namespace) -> float | None:
    return None if options.card_memory is None else 1e9 * options.card_memory


def workload_of(options: argparse.Namespace, shape: ModelShape) -> Workload:
    """What a training step asks of the tables."""
    of_rows, of_elements = (
        rules[options.optimizer] for rules in (TABLE_OPTIMIZERS, ELEMENT_OPTIMIZERS)
    )

    def state_numbers(matrix: Matrix) -> int:
        rule = of_rows if matrix.is_looked_up else of_elements
        return sum(map(math.prod, rule.state_shapes(matrix.dim).values()))

    wire = _WIRES[options.exchange_type] or LOWER_PRECISION[options.amp] or torch.float32
    pooling = 1 + len(of_elements.state_shapes(1)) if shape.learned_pooling else 0
    return Workload(
        rows=options.mini_batch_size,
        ids_per_bag=_ids_per_bag(options, shape),
        wire_bytes=wire.itemsize,
        is_routed=not (options.use_npu or options.use_gpu),
        state_numbers=state_numbers,
        pooling_numbers=pooling,
        num_dense=shape.num_dense,
    )


def _ids_per_bag(options: argparse.Namespace, shape: ModelShape) -> float | tuple[float, ...]:
    """The mean number of ids in a bag of each table; of random bags before equal ids are one."""
    most = options.num_indices_per_lookup
    if options.data_generation == "dataset" or options.data_path:
        return 1
    if options.num_indices_per_lookup_fixed:
        return float(most)
    return tuple((1 + min(table.num_rows, most)) / 2 for table in shape.tables)


def print_plan(options: argparse.Namespace, shape: ModelShape, world_size: int) -> None:
    """Print the plan that --print-plan asks for: for so many ranks, or else for those of this run.

    A plan that does not fit --card-memory is printed too, and says so.
    """
    workload, num_ranks = workload_of(options, shape), options.print_plan or world_size
    placement = plan_tables(shape.tables, num_ranks, options.sharding, workload)
    plan = Plan(shape.tables, options.sharding, placement, workload, _card_bytes(options))
    print(*plan_lines(plan), sep="\n")
