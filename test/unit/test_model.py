"""The whole model: predictions and a step equal naive references, accumulation a larger batch."""

import numpy as np
import pytest
import torch
from conftest import at, trained
from naive_embedding import draw_bags, naive_vectors, parameters_of
from torch import nn

import dlrm_s_pytorch as dlrm
from model.batch import Bags, Features
from optim.update import Update
from ranks.process import Process

ALONE = Process(0, 1, 0, torch.device("cpu"), "gloo")
ROWS, DIM, BATCH = (7, 3, 50), 4, 6


def make_model(*flags, optimizer="sgd"):
    widths = [f"--arch-mlp-bot=5-8-{DIM}", "--arch-mlp-top=9-1"]
    options = dlrm.parse_options([f"--arch-sparse-feature-size={DIM}", *widths, *flags])
    np.random.seed(3)
    return dlrm.DLRM_Net(dlrm.Architecture.from_options(options, ROWS, 5), ALONE, optimizer)


def naive_forward(weights, pooling, model, dense, lists):
    """Row by row, pair by pair."""
    x = model.bot_l(dense)
    first = 1 if model.architecture.itself else 0
    rows = []
    for own, pooled in zip(x, naive_vectors(weights, pooling, lists), strict=True):
        vectors = [own, *pooled]
        pairs = [(i, j) for i in range(len(vectors)) for j in range(i + first)]
        products = [vectors[i] @ vectors[j] for i, j in pairs]
        is_cat = model.architecture.interaction == "cat"
        rows.append(torch.cat(vectors if is_cat else [own, torch.stack(products)]))
    return model.top_l(torch.stack(rows))


@pytest.mark.parametrize("one_each", [True, False], ids=["one id", "any length"])
@pytest.mark.parametrize(
    "flags",
    ["", "--arch-interaction-itself", "--arch-interaction-op=cat", "--weighted-pooling=learned"],
)
def test_predictions_and_a_step_equal_naive_ones(flags, one_each):
    """Tables are updated in the backward pass, the MLPs' gradients are autograd's."""
    model = make_model(*flags.split())
    if model.architecture.learned_pooling:
        model.emb_l.matrices[0].pooling.uniform_(0.5, 2)
    bags, lists = draw_bags(ROWS, BATCH, one_each)
    dense, label = torch.randn(BATCH, 5), torch.rand(BATCH, 1)
    weights, pooling = parameters_of(model.state_dict(), ROWS)
    want = naive_forward(weights, pooling, model, dense, lists)
    nn.functional.mse_loss(want, label).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    got = model(Features(dense, bags, label), (BATCH,), Update(0.1))
    torch.testing.assert_close(got, want)
    nn.functional.mse_loss(got, label).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=at(name))
    updated = parameters_of(model.state_dict(), ROWS)
    for table in range(len(ROWS)):
        stepped = weights[table] - 0.1 * weights[table].grad
        torch.testing.assert_close(updated[0][table], stepped, msg=at(f"emb_l.{table}"))
        if model.architecture.learned_pooling:
            stepped = pooling[table] - 0.1 * pooling[table].grad
            torch.testing.assert_close(updated[1][table], stepped, msg=at(f"v_W_l.{table}"))


def test_state_dict_has_the_originals_keys():
    keys = set(make_model("--weighted-pooling=learned").state_dict())
    assert {"emb_l.0.weight", "emb_l.2.weight", "v_W_l.1", "bot_l.0.weight", "bot_l.2.bias"} <= keys
    assert {"top_l.0.weight", "top_l.2.bias"} <= keys
    assert len(keys) == 3 + 3 + 4 + 4


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
