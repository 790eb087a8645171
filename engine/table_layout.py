"""How a model's tables are spread over ranks and filled: the flags, and what follows from them."""

import argparse
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from common.errors import RankError
from common.flags import number_in
from common.free_memory import whole_memory
from common.launch import Launch
from devices.card import card_memory
from devices.execution import LOWER_PRECISION
from engine.model_content import ORIGINAL, SEEDED
from optim.row_optimizers import ELEMENT_OPTIMIZERS, TABLE_OPTIMIZERS
from ranks.collectives import largest_numbers
from ranks.model_shape import ModelShape
from ranks.placement import Matrix, Placement, place_tables
from ranks.plan import MOST_PLANNED, Plan
from ranks.plan_costs import Workload
from ranks.process import Process
from reporting.plan_table import plan_lines

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
        type=number_in(int, 1, MOST_PLANNED),
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
        own = _memory_of_rank(process)
        given = _card_bytes(options)
        plan = _plan(options, shape, process.world_size, given or _least_of_all(process, own))
        if given:
            plan.check()
        if own:
            _check_memory(plan, process, own)
        seed = options.numpy_rand_seed if options.initial_values == SEEDED else None
        return cls(plan.placement, _WIRES[options.exchange_type], seed)


def _plan(
    options: argparse.Namespace, shape: ModelShape, num_ranks: int, card_bytes: float | None
) -> Plan:
    workload = workload_of(options, shape)
    return Plan.make(shape.tables, num_ranks, options.sharding, workload, card_bytes)


def _memory_of_rank(process: Process) -> float | None:
    """Bytes that this rank's device has; None: it is an NPU, which is not asked.

    Ranks on CPUs share their machine's memory.
    """
    if process.device.type == "cuda":
        return card_memory(process.device)
    if process.device.type == "cpu":
        return whole_memory() / Launch.from_environment().local_world_size
    return None


def _least_of_all(process: Process, memory: float | None) -> float | None:
    """The least memory that a rank has, if the ranks have met, so that all make the same plan."""
    if memory is None or not dist.is_initialized():
        return memory
    return -largest_numbers(process, [-memory])[0]


def _check_memory(plan: Plan, process: Process, memory: float) -> None:
    """Raise a RankError if this rank's device cannot hold its tables, whatever else is there.

    Args:
        plan: of the tables.
        process: this rank.
        memory: bytes that its device has for each rank on it.
    """
    ranks, where, more = [process.rank], f"{process.device}", ""
    if process.device.type == "cpu":
        launch = Launch.from_environment()
        first = launch.rank - launch.local_rank
        ranks = [*range(first, first + launch.local_world_size)]
        where, more = "this machine", f", {len(ranks)} on each machine"
    needed, there = sum(plan.costs[rank].bytes_held for rank in ranks), memory * len(ranks)
    if needed > there:
        raise RankError(
            f"tables need {needed / 1e9:.4g} GB on {where}, which has {there / 1e9:.4g} GB:"
            f" {plan.what_would_do(memory)}{more};"
            " smaller tables need less (--max-ind-range, --arch-sparse-feature-size)"
        )


def _card_bytes(options: argparse.Namespace) -> float | None:
    return None if options.card_memory is None else 1e9 * options.card_memory


def workload_of(options: argparse.Namespace, shape: ModelShape) -> Workload:
    """What a training step asks of the tables."""
    name = "sgd" if options.predict_file else options.optimizer  # scoring keeps no state
    of_rows, of_elements = TABLE_OPTIMIZERS[name], ELEMENT_OPTIMIZERS[name]

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
        has_lengths=options.data_generation != "dataset",
    )


def _ids_per_bag(options: argparse.Namespace, shape: ModelShape) -> float | tuple[float, ...]:
    """The mean number of ids in a bag of each table; of random bags before equal ids are one."""
    most = options.num_indices_per_lookup
    if options.data_generation == "dataset":
        return 1
    if options.num_indices_per_lookup_fixed:
        return float(most)
    return tuple((1 + min(table.num_rows, most)) / 2 for table in shape.tables)


def print_plan(options: argparse.Namespace, shape: ModelShape) -> None:
    """Print on rank 0 the plan for the ranks of --print-plan, or else for those of this launch.

    A plan that does not fit --card-memory is printed too, and says so.
    """
    launch = Launch.from_environment()
    if launch.rank == 0:
        num_ranks = options.print_plan or launch.world_size
        print(*plan_lines(_plan(options, shape, num_ranks, _card_bytes(options))), sep="\n")
