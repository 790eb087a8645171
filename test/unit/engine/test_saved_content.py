"""A value of a model file that makes no sense is one line, on the rank that can see it."""

import copy

import pytest
import torch
from conftest import SMALL_MODEL, train

import dlrm_s_pytorch as dlrm
from common.errors import RankError, UserError
from engine.model_file import ModelState, load_model_file
from engine.saved_content import SavedContent
from optim.dense import make_dense_optimizer
from ranks.process import Process

LEARNED_ADAGRAD = ["--optimizer=adagrad", "--weighted-pooling=learned"]
NAN, INF = float("nan"), float("inf")


def load(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A file's content: tables 0 to 3, weights of pooling 4 to 7, dense parameters from 8 on."""
    path = tmp_path_factory.mktemp("saved") / "m.pth"
    assert train(*SMALL_MODEL, *LEARNED_ADAGRAD, f"--save-model={path}").status == 0
    return load(path)


def put(*keys_and_value):
    """A change of a file's content: content[keys[0]][keys[1]]... = value."""
    *keys, last, value = keys_and_value

    def change(content):
        for key in keys:
            content = content[key]
        content[last] = value

    return change


def drop(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def fill(*keys_and_value):
    """A change of one number of a tensor in a file's content."""
    *keys, value = keys_and_value

    def change(content):
        for key in keys:
            content = content[key]
        content.view(-1)[-1] = value

    return change


def state(number, name):
    return "opt_state_dict", "state", number, name


def numpy_state(position, value):
    def change(content):
        words = list(content["generators"]["numpy"])
        words[position] = value
        content["generators"]["numpy"] = tuple(words)

    return change


ROWS = (100, 16)
WRONG = {
    "epoch": [put("epoch", -3), put("epoch", 0.0), put("epoch", True), put("epoch", 10**400)],
    "iter": [put("iter", 11), put("iter", "ten"), put("iter", None), put("iter", -1)],
    "nbatches": [put("nbatches", 0), put("nbatches", [10]), put("nbatches", -10)],
    "lacks iter": [drop("iter")],
    "lacks state_dict": [drop("state_dict")],
    "state_dict": [put("state_dict", [torch.zeros(3)])],
    "progress": [put("progress", "far")],
    "progress['speed']": [put("progress", "speed", 3)],
    "progress['saved']": [put("progress", "saved", True)],
    "progress.epoch": [drop("progress", "epoch"), put("progress", "epoch", "one")],
    "progress.iter": [put("progress", "iter", "ten"), put("progress", "iter", 11)],
    "progress.epoch and .iter": [put("iter", 0), put("epoch", 1)],
    "progress.num_steps": [put("progress", "num_steps", "10"), put("progress", "num_steps", 11)],
    "progress.resume_iter": [put("progress", "resume_iter", 11)],
    "progress.train_loss": [put("progress", "train_loss", x) for x in ("low", INF)],
    "progress.best_auc": [put("progress", "best_auc", 1.5), put("progress", "best_auc", "high")],
    "progress.best_accuracy": [put("progress", "best_accuracy", torch.zeros(2))],
    "progress.accuracy": [put("progress", "accuracy", None)],
    "progress.auc": [put("progress", "auc", [0.5])],
    "since_best": [put("since_best", 3), put("since_best", [1])],
    "since_best.0": [put("since_best", [-1, 0]), put("since_best", [0.5, 0])],
    "since_best.1": [put("since_best", [0, "many"]), put("since_best", [0, NAN])],
    "emb_l.0.weight": [
        put("state_dict", "emb_l.0.weight", "rows"),
        put("state_dict", "emb_l.0.weight", torch.zeros(ROWS, dtype=torch.int64)),
        put("state_dict", "emb_l.0.weight", torch.zeros(ROWS, dtype=torch.complex64)),
        put("state_dict", "emb_l.0.weight", torch.zeros(ROWS).to_sparse()),
        put("state_dict", "emb_l.0.weight", torch.zeros(ROWS, device="meta")),
        put("state_dict", "emb_l.0.weight", torch.zeros(16, 100)),
        fill("state_dict", "emb_l.0.weight", NAN),
        fill("state_dict", "emb_l.0.weight", INF),
        put("state_dict", "emb_l.0.weight", torch.full(ROWS, 1e300, dtype=torch.float64)),
    ],
    "v_W_l.3": [
        fill("state_dict", "v_W_l.3", -INF),
        put("state_dict", "v_W_l.3", torch.ones(40, 1)),
    ],
    "top_l.0.bias": [fill("state_dict", "top_l.0.bias", NAN), put("state_dict", "top_l.0.bias", 3)],
    "'x', which this model lacks": [put("state_dict", "x", torch.zeros(1))],
    "5, which this model lacks": [put("state_dict", 5, torch.zeros(1))],
    "opt_state_dict": [put("opt_state_dict", None), put("opt_state_dict", [1])],
    "opt_state_dict.state": [put("opt_state_dict", "state", "none")],
    "opt_state_dict.state.0": [put("opt_state_dict", "state", 0, [])],
    "opt_state_dict.state.0.sum": [
        put(*state(0, "sum"), torch.zeros(3)),
        put(*state(0, "sum"), torch.zeros(16, 100)),
        put(*state(0, "sum"), torch.zeros(ROWS, dtype=torch.int32)),
        put(*state(0, "sum"), None),
        fill(*state(0, "sum"), NAN),
        fill(*state(0, "sum"), -1.0),
    ],
    "opt_state_dict.state.7.sum": [fill(*state(7, "sum"), INF)],
    "opt_state_dict.state.9.sum": [
        put(*state(9, "sum"), torch.zeros(3)),
        fill(*state(9, "sum"), -1),
    ],
    "opt_state_dict.state.9.step": [
        put(*state(9, "step"), torch.zeros(3)),
        put(*state(9, "step"), "ten"),
        put(*state(9, "step"), 10**400),
        put(*state(9, "step"), -1),
        put(*state(9, "step"), NAN),
    ],
    "optimiser state 9 has no step": [drop("opt_state_dict", "state", 9)],
    "optimiser state 0 has no sum": [drop(*state(0, "sum"))],
    "generators": [put("generators", [3])],
    "generators.numpy": [
        put("generators", {}),
        put("generators", "numpy", 3),
        numpy_state(0, "PCG64"),
    ],
    "generators.numpy.1": [
        numpy_state(1, torch.zeros(3, dtype=torch.int64)),
        numpy_state(1, torch.zeros(624)),
        numpy_state(1, torch.full((624,), -1)),
        numpy_state(1, 3),
    ],
    "generators.numpy.2": [numpy_state(2, 625), numpy_state(2, "x")],
    "generators.numpy.3": [numpy_state(3, 2)],
    "generators.numpy.4": [numpy_state(4, NAN), numpy_state(4, [])],
    "generators.torch": [
        drop("generators", "torch"),
        put("generators", "torch", torch.zeros(3, dtype=torch.uint8)),
        put("generators", "torch", torch.zeros(5056, dtype=torch.uint8)),
        put("generators", "torch", torch.zeros(5056)),
    ],
    "loss_scale": [put("loss_scale", 3.0), put("loss_scale", [1.0])],
    "loss_scale.0": [put("loss_scale", [0.0, 1.0]), put("loss_scale", ["large", 1.0])],
    "loss_scale.1": [put("loss_scale", [65536.0, -1.0]), put("loss_scale", [65536.0, NAN])],
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_one_line_that_names_file_and_key(tmp_path, saved, key):
    path = tmp_path / "m.pth"
    for change in WRONG[key]:
        content = copy.deepcopy(saved)
        change(content)
        torch.save(content, path)
        result = train(*SMALL_MODEL, *LEARNED_ADAGRAD, "--nepochs=2", f"--load-model={path}")
        assert result.status == 2 and result.err.count("\n") == 1 and not result.losses, result
        assert result.err.startswith(f"error: --load-model={path}")
        after_path = result.err.removeprefix(f"error: --load-model={path}")
        assert f" {key}" in after_path, result.err


@pytest.mark.parametrize("change, counts", [(put("since_best", [3, 4]), (3, 4)),
                                            (drop("since_best"), (0, 0))])  # fmt: skip
def test_evaluations_since_the_best_are_read_and_files_of_before_have_none(
    tmp_path, saved, change, counts
):
    content = copy.deepcopy(saved)
    change(content)
    torch.save(content, tmp_path / "m.pth")
    progress = SavedContent(str(tmp_path / "m.pth")).progress(1)
    assert (progress.since_best_accuracy, progress.since_best_auc) == counts


@pytest.mark.parametrize("more", [["--inference-only"], ["--nepochs=2", "--test-freq=10"]])
def test_weights_that_are_nan_are_the_files_and_not_the_learning_rates(tmp_path, saved, more):
    path = tmp_path / "m.pth"
    for name in ("bot_l.0.weight", "emb_l.2.weight"):
        content = copy.deepcopy(saved)
        content["state_dict"][name][3, 5] = NAN
        torch.save(content, path)
        result = train(*SMALL_MODEL, *LEARNED_ADAGRAD, f"--load-model={path}", *more)
        assert result.status == 2 and result.err.count("\n") == 1
        assert f"{name} has numbers that are nan or infinite in the file" in result.err
        assert "learning-rate" not in result.err


def state_of_rank(rank, world_size):
    """What a rank of that many loads a model file into; loading needs no other rank."""
    process = Process(rank, world_size, rank, torch.device("cpu"), "gloo")
    options = dlrm.parse_options([*SMALL_MODEL, *LEARNED_ADAGRAD])
    architecture = dlrm.Architecture.from_options(options, options.arch_embedding_size, 13)
    model = dlrm.DLRM_Net(architecture, process, "adagrad")
    return ModelState(
        process=process,
        model=model,
        tables=model.emb_l,
        dense_optimizer=make_dense_optimizer("adagrad", model.dense_parameters(), 0.1, False),
        optimizer_name="adagrad",
        num_epochs=2,
        num_batches=10,
        num_test_batches=10,
    )


def errors_of_ranks(path, content, num_ranks=3):
    torch.save(content, path)
    found = []
    for rank in range(num_ranks):
        try:
            load_model_file(str(path), state_of_rank(rank, num_ranks), 1)
            found.append(None)
        except UserError as error:
            found.append(type(error))
    return found


@pytest.mark.parametrize("keys", [("state_dict", "emb_l.1.weight"), state(1, "sum")])
def test_numbers_of_a_table_are_told_by_the_rank_that_holds_it(tmp_path, saved, keys):
    content = copy.deepcopy(saved)
    tables = state_of_rank(0, 3).tables
    (part,) = tables.parts_of(tables.all_matrices[1])
    owner = part.rank
    assert owner > 0, "the first rank is to see nothing"
    fill(*keys, NAN)(content)
    wanted = [RankError if rank == owner else None for rank in range(3)]
    assert errors_of_ranks(tmp_path / "m.pth", content) == wanted


@pytest.mark.parametrize(
    "change",
    [
        put(*state(1, "sum"), torch.zeros(3)),
        drop(*state(1, "sum")),
        put("state_dict", "emb_l.1.weight", torch.zeros(3)),
        fill("state_dict", "bot_l.0.weight", NAN),
        fill(*state(9, "sum"), NAN),
    ],
)
def test_what_all_ranks_see_is_told_by_all(tmp_path, saved, change):
    """Also the shape of a state that one rank alone takes: the first rank prints it for all."""
    content = copy.deepcopy(saved)
    change(content)
    assert errors_of_ranks(tmp_path / "m.pth", content) == [UserError] * 3


def test_steps_of_older_torch_and_wider_floats_are_taken(tmp_path, saved):
    content = copy.deepcopy(saved)
    content["opt_state_dict"]["state"][9]["step"] = 10
    content["state_dict"]["emb_l.0.weight"] = content["state_dict"]["emb_l.0.weight"].double()
    del content["generators"], content["loss_scale"]
    assert errors_of_ranks(tmp_path / "m.pth", content) == [None] * 3


def test_a_file_of_the_originals_sgd_remembers_none_of_each_parameter(tmp_path):
    """Torch 1's SGD did so, and without momentum that is no state of another optimiser."""
    path = tmp_path / "m.pth"
    train(*SMALL_MODEL, f"--save-model={path}")
    content = load(path)
    content["opt_state_dict"]["state"] = {0: {"momentum_buffer": None}}
    torch.save(content, path)
    assert train(*SMALL_MODEL, f"--load-model={path}", "--nepochs=2").status == 0
    content["opt_state_dict"]["state"] = {0: {"momentum_buffer": torch.zeros(100, 16)}}
    torch.save(content, path)
    refused = train(*SMALL_MODEL, f"--load-model={path}", "--nepochs=2")
    assert refused.status == 2 and "give that --optimizer" in refused.err
