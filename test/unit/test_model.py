"""The model, its gradients and its optimisers equal naive references of a few lines."""

import numpy as np
import pytest
import torch
from conftest import at, train, trained
from torch import nn

import dlrm_s_pytorch as dlrm
from model.batch import Bags, Features
from model.embedding_tables import EmbeddingTables
from model.exchange import Exchange
from model.losses import cross_entropy, make_loss
from optim.row_gradients import sum_duplicates
from optim.update import Update
from ranks.placement import place_tables
from ranks.process import Process

ALONE = Process(0, 1, 0, torch.device("cpu"), "gloo")
ROWS, DIM, BATCH = (7, 3, 50), 4, 6


def make_model(*flags, optimizer="sgd"):
    argv = [
        f"--arch-sparse-feature-size={DIM}",
        f"--arch-mlp-bot=5-8-{DIM}",
        "--arch-mlp-top=9-1",
        *flags,
    ]
    options = dlrm.parse_options(argv)
    np.random.seed(3)
    return dlrm.DLRM_Net(dlrm.Architecture.from_options(options, ROWS, 5), ALONE, optimizer)


def make_bags(one_each, seed=0):
    """(Bags, the same as lists: [row][table] -> ids)."""
    random = np.random.default_rng(seed)
    lists = [
        [random.integers(0, n, 1 if one_each else random.integers(0, 5)).tolist() for n in ROWS]
        for _ in range(BATCH)
    ]
    ids = torch.tensor([i for row in lists for bag in row for i in bag], dtype=torch.int64)
    if one_each:
        return Bags(ids), lists
    lengths = torch.tensor([[len(bag) for bag in row] for row in lists])
    return Bags(ids, lengths, lengths.sum(0).numpy()[None]), lists


def naive_forward(weights, pooling, model, dense, lists):
    """Row by row, pair by pair."""
    x = model.bot_l(dense)
    rows = []
    for b in range(BATCH):
        vectors = [x[b]]
        for table, ids in enumerate(lists[b]):
            vectors.append(
                sum((weights[table][i] * pooling[table][i] for i in ids), torch.zeros(DIM))
            )
        first = 1 if model.architecture.itself else 0
        if model.architecture.interaction == "cat":
            rows.append(torch.cat(vectors))
        else:
            products = [
                vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i + first)
            ]
            rows.append(torch.cat([x[b], torch.stack(products)]))
    return model.top_l(torch.stack(rows))


def naive_parameters(model):
    state = model.state_dict()
    weights = [state[f"emb_l.{t}.weight"].clone().requires_grad_() for t in range(len(ROWS))]
    pooling = [
        state.get(f"v_W_l.{t}", torch.ones(n)).clone().requires_grad_() for t, n in enumerate(ROWS)
    ]
    return weights, pooling


@pytest.mark.parametrize("one_each", [True, False])
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--arch-interaction-itself"],
        ["--arch-interaction-op=cat"],
        ["--weighted-pooling=learned"],
    ],
)
def test_forward_equals_a_naive_one(flags, one_each):
    model = make_model(*flags)
    if model.architecture.learned_pooling:
        model.emb_l.matrix.pooling.uniform_(0.5, 2)
    bags, lists = make_bags(one_each)
    dense = torch.randn(BATCH, 5)
    got = model(Features(dense, bags, torch.zeros(BATCH, 1)), (BATCH,))
    weights, pooling = naive_parameters(model)
    torch.testing.assert_close(got, naive_forward(weights, pooling, model, dense, lists))


@pytest.mark.parametrize("one_each", [True, False])
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_updated_rows_equal_torch_optim(optimizer, learned, one_each):
    """Three steps of the engine against torch's optimiser over dense gradients of whole tables."""
    model = make_model(*(["--weighted-pooling=learned"] if learned else []), optimizer=optimizer)
    weights, pooling = naive_parameters(model)
    make = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adagrad
    reference = make([*weights, *(pooling if learned else [])], lr=0.1)
    for step in range(3):
        bags, lists = make_bags(one_each, seed=step)
        dense, label = torch.randn(BATCH, 5), torch.rand(BATCH, 1)
        reference.zero_grad()
        nn.functional.mse_loss(
            naive_forward(weights, pooling, model, dense, lists), label
        ).backward()
        model.zero_grad()
        predicted = model(Features(dense, bags, label), (BATCH,), Update(0.1))
        nn.functional.mse_loss(predicted, label).backward()
        reference.step()
    state = model.state_dict()
    for table in range(len(ROWS)):
        torch.testing.assert_close(state[f"emb_l.{table}.weight"], weights[table].detach())
        if learned:
            torch.testing.assert_close(state[f"v_W_l.{table}"], pooling[table].detach())


def test_row_wise_adagrad_equals_its_formula():
    """acc += mean over the row of grad^2; row -= lr * grad / (sqrt(acc) + 1e-10).

    Duplicates are summed first.
    """
    placed = place_tables([5], dim=2, world_size=1)
    tables = EmbeddingTables(placed, Exchange(ALONE, placed), "rwsadagrad", learned_pooling=False)
    weight = tables.matrix.weight
    weight.copy_(torch.arange(10.0).view(5, 2))
    expected, accumulated = weight.clone(), torch.zeros(5)
    for ids, scale in (([1, 3, 1], 1.0), ([3, 0, 0], 2.0)):
        pooled = tables(Bags(torch.tensor(ids)), (3,), Update(0.5))
        gradient = scale * torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]])
        (pooled[:, 0] * gradient).sum().backward()
        for row in set(ids):
            total = sum(gradient[k] for k, i in enumerate(ids) if i == row)
            accumulated[row] += (total**2).mean()
            expected[row] -= 0.5 * total / (accumulated[row].sqrt() + 1e-10)
    torch.testing.assert_close(weight, expected)
    torch.testing.assert_close(tables.row_tensors()["momentum"], accumulated)


def test_sum_duplicates_keeps_shapes_and_sums():
    rows, sums = sum_duplicates(
        torch.tensor([4, 0, 4, 2]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    )
    assert rows.shape == (4,) and sums.shape == (4, 1)
    total = torch.zeros(5, 1).index_add_(0, rows, sums)
    assert total.view(-1).tolist() == [2, 0, 4, 0, 4]


def test_no_gradient_of_table_size_and_no_growth_of_the_graph():
    model = make_model()
    assert all(p.shape[0] != sum(ROWS) for p in model.parameters())
    bags, _ = make_bags(True)
    features = Features(torch.randn(BATCH, 5), bags, torch.rand(BATCH, 1))
    with torch.no_grad():
        assert model(features, (BATCH,)).grad_fn is None


def test_state_dict_has_the_originals_keys():
    keys = set(make_model("--weighted-pooling=learned").state_dict())
    assert {"emb_l.0.weight", "emb_l.2.weight", "v_W_l.1", "bot_l.0.weight", "bot_l.2.bias"} <= keys
    assert {"top_l.0.weight", "top_l.2.bias"} <= keys
    assert len(keys) == 3 + 3 + 4 + 4


def test_initial_weights_follow_the_contract():
    model = make_model()
    np.random.seed(3)
    for table, rows in enumerate(ROWS):
        want = np.random.uniform(-np.sqrt(1 / rows), np.sqrt(1 / rows), (rows, DIM)).astype(
            np.float32
        )
        np.testing.assert_array_equal(model.state_dict()[f"emb_l.{table}.weight"].numpy(), want)
    want = np.random.normal(0, np.sqrt(2 / 13), (8, 5)).astype(np.float32)
    np.testing.assert_array_equal(model.bot_l[0].weight.detach().numpy(), want)


def test_interaction_indices_are_made_once():
    model = make_model()
    assert model.interact.pairs.tolist() == [4, 8, 9, 12, 13, 14]
    assert make_model("--arch-interaction-itself").interact.pairs.tolist() == [
        0,
        4,
        5,
        8,
        9,
        10,
        12,
        13,
        14,
        15,
    ]


KINDS = ("mse", "bce", "wbce")
OF_LABEL = (0.5, 3.0)  # weights of wbce


def losses_of(kind, label):
    """(name, predictions -> (sum of losses, gradient)): of the CPU, and of other devices."""
    on_cpu = make_loss(kind, OF_LABEL, torch.device("cpu"))
    yield "cpu", lambda predicted: on_cpu(predicted, label, None)
    if kind != "mse":  # it is the same everywhere
        weights = torch.tensor(OF_LABEL if kind == "wbce" else (1.0, 1.0))
        yield "other", lambda predicted: cross_entropy(predicted, label, weights, None)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_their_gradients_equal_the_formulas(kind):
    label = torch.cat([torch.rand(20, 1), torch.zeros(5, 1), torch.ones(5, 1)])
    predicted = torch.rand(30, 1) * 0.98 + 0.01
    p, y = predicted.double().requires_grad_(), label.double()
    entropy = -(y * p.log() + (1 - y) * (1 - p).log())
    weight = torch.where(y.long() == 0, *OF_LABEL)
    want = {"mse": (p - y).square(), "bce": entropy, "wbce": weight * entropy}[kind].sum()
    want.backward()
    for name, loss in losses_of(kind, label):
        got, gradient = loss(predicted.clone())
        assert gradient.shape == predicted.shape
        torch.testing.assert_close(got, want.float().detach(), rtol=1e-5, atol=0, msg=at(name))
        torch.testing.assert_close(gradient, p.grad.float(), rtol=1e-5, atol=1e-5, msg=at(name))


@pytest.mark.parametrize("kind", ["bce", "wbce"])
def test_predictions_of_exactly_0_and_1_lose_what_torch_says(kind):
    """It cuts logarithms off at -100, so that a sure and wrong prediction ruins no mean."""
    predicted = torch.tensor([[0.0], [0.0], [1.0], [1.0], [0.25], [0.0], [1e-30]])
    label = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0], [0.5], [1.0]])
    p = predicted.clone().requires_grad_()
    weight = torch.where(label.long() == 0, *OF_LABEL) if kind == "wbce" else None
    want = nn.functional.binary_cross_entropy(p, label, weight, reduction="sum")
    want.backward()
    for name, loss in losses_of(kind, label):
        got, gradient = loss(predicted)
        torch.testing.assert_close(got, want.detach(), msg=at(name))
        torch.testing.assert_close(gradient, p.grad, msg=at(name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_that_is_nan_makes_the_loss_nan_and_no_crash(kind):
    """torch's own asserts in its kernel, after which a GPU is lost to the process."""
    predicted = torch.tensor([[0.25], [float("nan")], [0.75]])
    for name, loss in losses_of(kind, torch.tensor([[0.0], [1.0], [1.0]])):
        got, gradient = loss(predicted)
        assert got.isnan(), name
        assert gradient.isnan().view(-1).tolist() == [False, True, False], name


def test_accumulation_steps_on_the_mean_and_on_what_is_left():
    """Batches of 4 in groups of 3 (10 batches: 3, 3, 3, 1) equal batches of 12, 12, 12 and 4."""
    model = [
        "--arch-mlp-bot=4-2",
        "--num-indices-per-lookup=1",
        "--num-indices-per-lookup-fixed=true",
    ]
    for flags in (
        ["--optimizer=sgd"],
        ["--optimizer=adagrad"],
        ["--optimizer=rwsadagrad", "--weighted-pooling=learned"],
    ):
        small, _ = trained(
            *model, "--mini-batch-size=4", "--data-size=40", "--mlperf-grad-accum-iter=3", *flags
        )
        assert small.progress.num_steps == 4
        large = accumulate_by_hand(small, groups=(3, 3, 3, 1))
        for name, value in small.model.state_dict().items():
            torch.testing.assert_close(value, large[name], msg=at(name))


def accumulate_by_hand(trainer, groups):
    """The same batches joined into large ones, and trained without accumulation."""
    options = trainer.options
    np.random.seed(options.numpy_rand_seed)
    model = dlrm.DLRM_Net(trainer.model.architecture, ALONE, options.optimizer)
    make = torch.optim.SGD if options.optimizer == "sgd" else torch.optim.Adagrad
    optimizer = make(model.dense_parameters(), lr=options.learning_rate)
    update, number = Update(options.learning_rate), 0
    for size in groups:
        parts = [trainer.data.train[number + k].decode() for k in range(size)]
        number += size
        rows = sum(len(part.dense) for part in parts)
        bags = Bags(
            torch.cat([p.bags.ids for p in parts]), torch.cat([p.bags.lengths for p in parts])
        )
        features = Features(
            torch.cat([p.dense for p in parts]), bags, torch.cat([p.label for p in parts])
        )
        optimizer.zero_grad()
        nn.functional.mse_loss(model(features, (rows,), update), features.label).backward()
        optimizer.step()
    return model.state_dict()


def test_threads_do_not_wait_inside_a_step():
    """Losses stay on the device between log lines: one read a line, none a step."""
    reads = []
    original = dlrm.LossMeter._read

    def counting(self):
        reads.append(len(self._steps))
        original(self)

    dlrm.LossMeter._read = counting
    try:
        train("--mini-batch-size=2", "--num-batches=20", "--print-freq=10")
    finally:
        dlrm.LossMeter._read = original
    assert reads == [10, 10]
