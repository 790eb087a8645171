"""Tables on several ranks return the vectors and updates of one rank. Each rank is a thread here.

test_ranks.py does the same with processes and the whole program.
"""

from dataclasses import dataclass, field

import dlrm_s_pytorch as dlrm

# isort: split
import numpy as np
import pytest
import torch
from conftest import at
from naive_compression import KINDS
from naive_embedding import bags_of, draw_bags
from placements import PLACEMENTS, cut, held, mixed, odd, shared, whole
from thread_ranks import ThreadRanks

from common.shares import split_evenly
from model.batch import Bags
from model.compression import NoCompression, compression_from_options
from model.embedding_tables import EmbeddingTables
from model.routed_exchange import RoutedExchange, make_exchange
from model.static_exchange import StaticExchange
from model.travel import Types
from optim.update import Update
from ranks.collectives import PendingSum
from ranks.plan_costs import Workload, rank_costs
from ranks.process import Process

NUM_ROWS, DIM, LR = (7, 3, 50, 20, 11, 2), 4, 0.5
PLAIN = NoCompression(DIM).make_tables(NUM_ROWS)
ALONE = Process(0, 1, 0, torch.device("cpu"), "gloo")
PLACED = pytest.mark.parametrize("place", PLACEMENTS.values(), ids=PLACEMENTS)
EXCHANGES = pytest.mark.parametrize(
    "exchange", [StaticExchange, RoutedExchange], ids=["static", "route"]
)
ONE_EACH = pytest.mark.parametrize("one_each", [True, False], ids=["one id", "any length"])


@dataclass(frozen=True)
class Run:
    """What ranks train, and on which batches.

    Attributes:
        tables: all tables.
        batches: (rows of the batch as lists of bags, gradient of all vectors) of each pass.
        one_each: every bag holds one id.
        optimizer: sgd, adagrad or rwsadagrad.
        learned: with learned pooling.
        every: passes that share an update.
        types: of the vectors, and on their way.
    """

    tables: tuple
    batches: list
    one_each: bool
    optimizer: str = "sgd"
    learned: bool = False
    every: int = 1
    types: Types = field(default_factory=Types)


def draw_batches(tables, num_passes, num_rows, one_each):
    """Batches and gradients for that many passes; ids of small tables come several times."""
    ids_of = [table.num_rows for table in tables]
    random = torch.Generator().manual_seed(1)
    size = num_rows, len(tables), tables[0].dim
    return [
        (draw_bags(ids_of, num_rows, one_each, seed)[1], torch.randn(size, generator=random))
        for seed in range(num_passes)
    ]


def fill(tables):
    """Initial values, the same wherever the rows are."""
    for number, matrix in enumerate(tables.all_matrices):
        random = torch.Generator().manual_seed(number)
        values = torch.randn(matrix.num_rows, matrix.dim, generator=random)
        weights = torch.rand(matrix.num_rows, generator=random) + 0.5
        for part in tables.parts_of(matrix):
            for name, wanted in (("weight", values), ("pooling", weights)):
                view = tables.part_view(part, name) if name in tables.row_shapes(matrix) else None
                if view is not None:
                    view.copy_(wanted[part.begin : part.end])


def train(process, run, place, exchange):
    """Vectors of this rank's rows in all passes, and its rows of the tables after them."""
    placement = place(run.tables, process.world_size)
    made = exchange(process, run.tables, placement, run.types)
    tables = EmbeddingTables(run.tables, made, run.optimizer, run.learned)
    fill(tables)
    vectors = []
    for number, (lists, gradient) in enumerate(run.batches, 1):
        vectors.append(one_pass(tables, run, lists, gradient, number % run.every == 0))
    return torch.cat(vectors, dim=1), held(tables)


def one_pass(tables, run, lists, gradient, is_due):
    """Forward, backward and, if it is due, the update, as engine/step.py does them."""
    process, pending = tables.exchange.process, []
    shares = split_evenly(len(lists), process.world_size)
    begin = sum(shares[: process.rank])
    own = slice(begin, begin + shares[process.rank])
    num_ids = np.array([[len(bag) for bag in row] for row in lists])
    by_rank = np.array([part.sum(0) for part in np.split(num_ids, np.cumsum(shares)[:-1])])

    def begin_sum():
        pending.append(PendingSum(process, tables.shared_gradients()))

    update = Update(LR / run.every, is_due, dense_is_ready=begin_sum if is_due else None)
    vectors = tables(bags_of(lists[own], run.one_each, by_rank), shares, update)
    vectors.backward(gradient[own].to(vectors.dtype))
    if is_due:
        sends = tables.exchange.is_routed or any(tables.exchange.slots)
        assert len(pending) == (sends and process.world_size > 1)
        if not pending:
            begin_sum()
        pending[0].wait()
        tables.apply_kept(update)
    return vectors.detach()


def merged(states):
    """{(key, name): all rows} of what ranks hold; what several hold is the same on all."""
    rows = {}
    for state in states:
        for key, value in state.items():
            assert torch.equal(rows.setdefault(key, value), value), f"ranks differ in {key}"
    names = dict.fromkeys(key[:2] for key in rows)
    return {name: torch.cat([rows[key] for key in sorted(rows) if key[:2] == name])
            for name in names}  # fmt: skip


def assert_as_one_rank(run, world_size, place, exchange, rtol=1.3e-6, atol=1e-5):
    wanted, state = train(ALONE, run, whole, StaticExchange)
    found = ThreadRanks(world_size).run(lambda process: train(process, run, place, exchange))
    vectors = torch.cat([own for own, _ in found]).to(wanted.dtype)
    torch.testing.assert_close(vectors, wanted, rtol=rtol, atol=atol)
    of_ranks, of_one = merged([own for _, own in found]), merged([state])
    assert of_ranks.keys() == of_one.keys()
    for key, value in of_one.items():
        torch.testing.assert_close(of_ranks[key], value, rtol=rtol, atol=atol, msg=at(key))


@ONE_EACH
@EXCHANGES
@PLACED
@pytest.mark.parametrize("world_size, batch", [(2, 6), (3, 2), (9, 10)])
def test_several_ranks_do_what_one_does(world_size, batch, place, exchange, one_each):
    """Also ranks without rows of a batch (3 of 2 rows), and without rows of tables (9 ranks)."""
    run = Run(PLAIN, draw_batches(PLAIN, 2, batch, one_each), one_each)
    assert_as_one_rank(run, world_size, place, exchange)


@EXCHANGES
@pytest.mark.parametrize("place", [cut, shared, odd])
@pytest.mark.parametrize("learned", [True, False], ids=["learned", "plain"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rwsadagrad"])
def test_optimisers_and_pooling_weights_are_those_of_one_rank(optimizer, learned, place, exchange):
    """Two updates, each of the gradients of two passes: the second one begins where one ended."""
    run = Run(PLAIN, draw_batches(PLAIN, 4, 5, False), False, optimizer, learned, every=2)
    assert_as_one_rank(run, 3, place, exchange, atol=5e-5)


@ONE_EACH
@EXCHANGES
@pytest.mark.parametrize("place", [whole, cut, mixed])
@pytest.mark.parametrize("kind", ["qr_mult", "qr_add", "qr_concat", "md"])
def test_compressed_tables_are_those_of_one_rank(kind, place, exchange, one_each):
    """Quotients may be cut and remainders not; matrices of several dimensions travel together."""
    words = [f"--arch-sparse-feature-size={DIM}", *KINDS[kind].split()]
    tables = compression_from_options(dlrm.parse_options(words)).make_tables(NUM_ROWS)
    run = Run(tables, draw_batches(tables, 2, 5, one_each), one_each, "adagrad")
    assert_as_one_rank(run, 3, place, exchange, atol=5e-5)


@EXCHANGES
@pytest.mark.parametrize("place", [whole, cut, mixed], ids=["whole", "cut", "mixed"])
@pytest.mark.parametrize("wire, tolerance", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_numbers_of_two_bytes_are_close_to_those_of_four(wire, tolerance, place, exchange):
    """A part's vector is rounded once on its way, and so is its gradient."""
    run = Run(PLAIN, draw_batches(PLAIN, 1, 6, False), False, types=Types(wire=wire))
    wanted = ThreadRanks(2).run(lambda process: train(process, run, place, exchange))
    exact = Run(PLAIN, run.batches, False)
    assert_as_one_rank(run, 2, place, exchange, rtol=tolerance, atol=8 * tolerance)
    found = ThreadRanks(2).run(lambda process: train(process, exact, place, exchange))
    assert any(not torch.equal(one[0], other[0]) for one, other in zip(wanted, found, strict=True))
    assert all(one[0].dtype == torch.float32 for one in wanted)


def sent_by(ranks, number):
    """What a rank has sent to all ranks, in order."""
    return [
        sent for rank, what, sent in ranks.events if (rank, what) == (number, "begin all_to_all")
    ]


@pytest.mark.parametrize("wire", [None, torch.float16, torch.bfloat16])
@EXCHANGES
def test_vectors_and_gradients_travel_in_the_wires_type_and_ids_as_int32(exchange, wire):
    run = Run(PLAIN, draw_batches(PLAIN, 1, 6, False), False, types=Types(wire=wire))
    ranks = ThreadRanks(2)
    ranks.run(lambda process: train(process, run, mixed, exchange))
    sent = [one.dtype for one in sent_by(ranks, 0)]
    assert sent[-2:] == [wire or torch.float32] * 2
    assert sent[-4:-2] == [torch.int32] * 2  # ids and lengths of bags
    assert set(sent[:-4]) <= {torch.int64}  # how many there will be


@PLACED
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "qr_mult", "md"])
@pytest.mark.parametrize("num_ids", [0, 3], ids=["no lengths", "3 ids"])
def test_ranks_send_as_many_bytes_as_the_planner_says(num_ids, kind, wire, place):
    """Ids, vectors, gradients and sums of a static exchange; shares of 5 rows are uneven."""
    words = [f"--arch-sparse-feature-size={DIM}", *KINDS.get(kind, "").split()]
    tables = compression_from_options(dlrm.parse_options(words)).make_tables(NUM_ROWS)
    batches = draw_batches(tables, 1, 5, True)
    if num_ids:
        batches = [([[bag * num_ids for bag in row] for row in rows], g) for rows, g in batches]
    run = Run(tables, batches, not num_ids, types=Types(wire=wire))
    ranks = ThreadRanks(3)
    ranks.run(lambda process: train(process, run, place, StaticExchange))
    load = Workload(5, num_ids or 1, wire.itemsize, has_lengths=num_ids > 0)
    planned = [cost.bytes_sent for cost in rank_costs(place(tables, 3), load)]
    assert [ranks.bytes_sent[rank] for rank in range(3)] == pytest.approx(planned)


@pytest.mark.parametrize("kind", ["plain", "md"])
def test_where_all_tables_are_on_every_rank_only_their_gradients_are_sent(kind):
    words = [f"--arch-sparse-feature-size={DIM}", *KINDS.get(kind, "").split()]
    tables = compression_from_options(dlrm.parse_options(words)).make_tables(NUM_ROWS)
    ranks, run = ThreadRanks(2), Run(tables, draw_batches(tables, 1, 6, False), False)
    ranks.run(lambda process: train(process, run, shared, StaticExchange))
    assert [what for rank, what, _ in ranks.events if rank == 0] == [
        "begin all_reduce", "wait all_reduce",
    ]  # fmt: skip


@pytest.mark.parametrize("ids", ["first", "last"])
def test_vectors_of_all_parts_travel_or_only_of_those_that_have_rows_of_a_bag(ids):
    """Sizes of a static exchange do not depend on ids, those of a routed one do."""
    bags = [[0] if ids == "first" else [rows - 1] for rows in NUM_ROWS]

    def numbers_sent(exchange):
        def work(process):
            made = exchange(process, PLAIN, cut(PLAIN, 2), Types())
            EmbeddingTables(PLAIN, made, "sgd", False)(bags_of([bags] * 3, True), (3, 3))

        ranks = ThreadRanks(2)
        ranks.run(work)
        return [len(sent_by(ranks, rank)[-1]) for rank in range(2)]

    all_vectors = 2 * 3 * len(NUM_ROWS) * DIM
    assert numbers_sent(StaticExchange) == [all_vectors] * 2
    with_rows = [all_vectors, 0]
    assert numbers_sent(RoutedExchange) == (with_rows if ids == "first" else with_rows[::-1])


@pytest.mark.parametrize("more", [0, 1])
def test_rows_have_numbers_as_large_as_ranks_have_rows(more):
    """Below one another on rank 1: 2 ** 30 rows twice, whose last one int32 can tell, or more."""
    half = 1 << 30
    tables = NoCompression(DIM).make_tables((2 * half, 2 * half + 2 * more))
    ids = torch.tensor([[2 * half - 1, 2 * half + 2 * more - 1], [0, 5]])

    def work(process):
        exchange = RoutedExchange(process, tables, cut(tables, 2))
        return exchange.begin(Bags(ids.view(-1)), (2, 2), None).bags[0].ids.tolist()

    ranks = ThreadRanks(2)
    found = ranks.run(work)
    assert found == [[0, half + 5] * 2, [half - 1, 2 * half + more - 1] * 2]
    assert [one.dtype for one in sent_by(ranks, 0)][1] == (torch.int64 if more else torch.int32)


def test_a_cpu_routes_ids_if_a_matrix_is_cut_and_a_card_never_does():
    processes = [Process(0, 2, 0, torch.device(kind), "gloo") for kind in ("cpu", "meta")]
    kinds = [
        [type(make_exchange(process, PLAIN, place(PLAIN, 2), Types())) for place in (whole, cut)]
        for process in processes
    ]
    assert kinds == [[StaticExchange, RoutedExchange], [StaticExchange, StaticExchange]]


@pytest.mark.parametrize("kind", ["plain", "qr_mult", "md", "several ranks", "shared", "cut"])
def test_rows_may_come_instead_of_ids_where_one_matrix_has_all_tables(kind):
    """A card decodes rows then; they are those that the ids lead to."""
    words = [f"--arch-sparse-feature-size={DIM}", *KINDS.get(kind, "").split()]
    tables = compression_from_options(dlrm.parse_options(words)).make_tables(NUM_ROWS)
    ranks = 2 if kind == "several ranks" else 1
    place = {"shared": shared, "cut": cut}.get(kind, whole)
    process = Process(0, ranks, 0, torch.device("cpu"), "gloo")
    exchange = StaticExchange(process, tables, place(tables, ranks))
    if kind not in ("plain", "cut"):  # a table that is cut for one rank is whole
        assert exchange.shifts is None
        return
    assert exchange.shifts.dtype == torch.int32
    ids = torch.stack([torch.arange(8) % rows for rows in NUM_ROWS], dim=1)
    (want,) = exchange.begin(Bags(ids.view(-1)), (8,), None).bags
    rows = Bags((ids + exchange.shifts).view(-1), are_rows=True)
    (got,) = exchange.begin(rows, (8,), None).bags
    assert torch.equal(got.ids, want.ids)
