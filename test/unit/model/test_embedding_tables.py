"""Embedding tables equal loops over ids and torch's optimisers over dense gradients."""

import numpy as np
import pytest
import torch
from naive_embedding import bags_of, draw_bags, naive_vectors, parameters_of
from placements import PLACEMENTS

from devices.execution import Execution
from model import initial_values
from model.compression import NoCompression
from model.embedding_tables import EmbeddingTables, PoolingWeights
from model.static_exchange import StaticExchange
from optim.update import Update
from ranks.placement import place_tables
from ranks.process import Process

NUM_ROWS, DIM, BATCH = (7, 3, 50), 4, 6
ONE_EACH = pytest.mark.parametrize("one_each", [True, False], ids=["one id", "any length"])
LEARNED = pytest.mark.parametrize("learned", [True, False], ids=["learned", "plain"])


PLACED = pytest.mark.parametrize("place", PLACEMENTS.values(), ids=PLACEMENTS)


def make(optimizer="sgd", learned=False, execution=Execution()):  # noqa: B008
    return make_on(0, 1, place_tables, optimizer, learned, execution)


def make_on(rank, world_size, place, optimizer="sgd", learned=False, execution=Execution()):  # noqa: B008
    process = Process(rank, world_size, rank, torch.device("cpu"), "gloo")
    plain = NoCompression(DIM).make_tables(NUM_ROWS)
    exchange = StaticExchange(process, plain, place(plain, world_size))
    tables = EmbeddingTables(plain, exchange, optimizer, learned, execution)
    np.random.seed(3)
    tables.initialise()
    return tables


def state_of(tables, learned):
    """The state dict under the names that the model gives to both modules."""
    state = tables.state_dict(prefix="emb_l.")
    return PoolingWeights(tables).state_dict(prefix="v_W_l.") | state if learned else state


@ONE_EACH
@LEARNED
def test_vectors_equal_sums_over_bags(learned, one_each):
    tables = make(learned=learned)
    if learned:
        tables.matrices[0].pooling.uniform_(0.5, 2)
    bags, lists = draw_bags(NUM_ROWS, BATCH, one_each)
    got = tables(bags, (BATCH,))
    want = naive_vectors(*parameters_of(state_of(tables, learned), NUM_ROWS), lists)
    torch.testing.assert_close(got, want.detach())


def test_one_lookup_for_each_part_returns_the_vectors_of_one_for_all():
    bags, _ = draw_bags(NUM_ROWS, BATCH, one_each=True)
    one_by_one = make(execution=Execution(one_lookup=False))
    assert torch.equal(one_by_one(bags, (BATCH,)), make()(bags, (BATCH,)))


@ONE_EACH
@LEARNED
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_updated_rows_equal_torch_optim(optimizer, learned, one_each):
    """Three steps, in which rows come several times, against dense gradients of whole tables."""
    tables = make(optimizer, learned)
    weights, pooling = parameters_of(state_of(tables, learned), NUM_ROWS)
    optimizer_class = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adagrad
    reference = optimizer_class([*weights, *(pooling if learned else [])], lr=0.1)
    for step in range(3):
        bags, lists = draw_bags(NUM_ROWS, BATCH, one_each, seed=step)
        gradient = torch.randn(BATCH, len(NUM_ROWS), DIM)
        reference.zero_grad()
        naive_vectors(weights, pooling, lists).backward(gradient)
        tables(bags, (BATCH,), Update(0.1)).backward(gradient)
        reference.step()
    got = parameters_of(state_of(tables, learned), NUM_ROWS)
    for found, wanted in zip(got, (weights, pooling), strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradients_are_kept_until_a_pass_that_updates():
    """Chunks of a batch: all see the same rows, and these change with the last chunk."""
    whole, chunked = make("adagrad"), make("adagrad")
    bags, lists = draw_bags(NUM_ROWS, BATCH, one_each=True)
    gradient = torch.randn(BATCH, len(NUM_ROWS), DIM)
    whole(bags, (BATCH,), Update(0.1)).backward(gradient)
    before = chunked.matrices[0].weight.clone()
    chunked(bags_of(lists[:4], True), (4,), Update(0.1, rows_now=False)).backward(gradient[:4])
    assert torch.equal(chunked.matrices[0].weight, before)
    chunked(bags_of(lists[4:], True), (2,), Update(0.1)).backward(gradient[4:])
    torch.testing.assert_close(chunked.matrices[0].weight, whole.matrices[0].weight)


def test_no_parameter_has_a_gradient_of_a_tables_size_and_evaluation_makes_no_graph():
    tables = make()
    assert list(tables.parameters()) == []
    with torch.no_grad():
        assert tables(draw_bags(NUM_ROWS, BATCH, True)[0], (BATCH,)).grad_fn is None


def test_initial_weights_follow_the_contract():
    """numpy's global generator, table by table."""
    state = make().state_dict()
    np.random.seed(3)
    for table, rows in enumerate(NUM_ROWS):
        bound = np.sqrt(1 / rows)
        want = np.random.uniform(-bound, bound, (rows, DIM)).astype(np.float32)
        np.testing.assert_array_equal(state[f"{table}.weight"].numpy(), want)


@PLACED
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_hold_and_initialise_their_own_parts_of_the_tables(world_size, place, monkeypatch):
    """A piece of what is drawn may have rows of several parts."""
    monkeypatch.setattr(initial_values, "VALUES_PER_DRAW", 7 * DIM)
    whole = make(learned=True).state_dict()
    found = {key: torch.full_like(value, torch.nan) for key, value in whole.items()}
    for rank in range(world_size):
        tables = make_on(rank, world_size, place, learned=True)
        assert tables.all_matrices == make().all_matrices
        held = dict(tables.held_parts("weight"))
        assert [part for part in tables.exchange.placement.parts if part.is_on(rank)] == [*held]
        assert set(tables.state_dict()) == {part.matrix.key for part in held}
        pooling = {str(part.matrix.table) for part in held}
        assert set(PoolingWeights(tables).state_dict()) == pooling
        for part, view in held.items():
            found[part.matrix.key][part.begin : part.end] = view
    for key, value in whole.items():
        assert torch.equal(found[key], value), key


@LEARNED
@PLACED
def test_a_loaded_state_is_what_is_looked_up(learned, place):
    """A rank takes the rows of its own parts from the whole state."""
    whole = make(learned=learned)
    whole.matrices[0].weight.mul_(-2)
    if learned:
        whole.matrices[0].pooling.uniform_(0.5, 2)
    for rank in range(3):
        tables = make_on(rank, 3, place, learned=learned)
        tables.load_state_dict(whole.state_dict())
        if learned:
            PoolingWeights(tables).load_state_dict(PoolingWeights(whole).state_dict())
        for name in ("weight", "pooling") if learned else ("weight",):
            wanted = {part.matrix: view for part, view in whole.held_parts(name)}
            for part, view in tables.held_parts(name):
                assert torch.equal(view, wanted[part.matrix][part.begin : part.end])
