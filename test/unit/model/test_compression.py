"""Compressed tables have the shapes of their papers, compute what they define, and train alike."""

import math

import naive_compression
import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, train, trained
from naive_compression import KINDS
from naive_embedding import bags_of, draw_bags
from torch.utils._python_dispatch import TorchDispatchMode

import dlrm_s_pytorch as dlrm
from devices.execution import Execution
from model.compression import MixedDimensions, QuotientRemainder, compression_from_options
from model.embedding_tables import EmbeddingTables
from model.static_exchange import StaticExchange
from optim.update import Update
from ranks.placement import place_tables
from ranks.process import Process

NUM_ROWS, DIM, BATCH = (7, 3, 50, 20), 4, 6
OF_EACH_KIND = pytest.mark.parametrize("kind", KINDS)
ONE_EACH = pytest.mark.parametrize("one_each", [True, False], ids=["one id", "any length"])


def options_of(kind):
    return dlrm.parse_options([f"--arch-sparse-feature-size={DIM}", *KINDS[kind].split()])


def make(kind, optimizer="sgd", execution=Execution()):  # noqa: B008
    process = Process(0, 1, 0, torch.device("cpu"), "gloo")
    tables = compression_from_options(options_of(kind)).make_tables(NUM_ROWS)
    exchange = StaticExchange(process, tables, place_tables(tables, 1))
    made = EmbeddingTables(tables, exchange, optimizer, False, execution)
    np.random.seed(3)
    made.initialise()
    return made


def draw(one_each, seed=0):
    """Bags whose ids the host can count, as an exchange and a pick of tables need."""
    _, lists = draw_bags(NUM_ROWS, BATCH, one_each, seed)
    num_ids = np.array([[len(bag) for bag in row] for row in lists])
    return bags_of(lists, one_each, num_ids.sum(0, keepdims=True)), lists


@OF_EACH_KIND
@ONE_EACH
def test_vectors_are_the_papers(kind, one_each):
    tables = make(kind)
    bags, lists = draw(one_each)
    wanted = naive_compression.vectors(tables.state_dict(), lists, options_of(kind))
    torch.testing.assert_close(tables(bags, (BATCH,)), wanted)


@OF_EACH_KIND
@ONE_EACH
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
def test_updates_are_torch_optims_with_dense_gradients(kind, optimizer, one_each):
    tables = make(kind, optimizer)
    state = {key: value.clone().requires_grad_() for key, value in tables.state_dict().items()}
    rule = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adagrad
    reference = rule(state.values(), lr=0.1)
    for step in range(3):
        bags, lists = draw(one_each, seed=step)
        wanted = naive_compression.vectors(state, lists, options_of(kind))
        gradient = torch.randn(wanted.shape)
        reference.zero_grad()
        wanted.backward(gradient)
        tables(bags, (BATCH,), Update(0.1)).backward(gradient)
        reference.step()
    for key, value in tables.state_dict().items():
        torch.testing.assert_close(value, state[key].detach())


@OF_EACH_KIND
def test_gradients_are_kept_until_a_pass_that_updates(kind):
    """Chunks of a batch see the same rows and the same projections."""
    whole, chunked = make(kind, "rwsadagrad"), make(kind, "rwsadagrad")
    bags, lists = draw(one_each=True)
    vectors = whole(bags, (BATCH,), Update(0.1))
    gradient = torch.randn(vectors.shape)
    vectors.backward(gradient)
    before = {key: value.clone() for key, value in chunked.state_dict().items()}
    chunked(bags_of(lists[:4], True), (4,), Update(0.1, rows_now=False)).backward(gradient[:4])
    for key, value in chunked.state_dict().items():
        assert torch.equal(value, before[key])
    chunked(bags_of(lists[4:], True), (2,), Update(0.1)).backward(gradient[4:])
    for key, value in chunked.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[key])
        assert not torch.equal(value, before[key])


@OF_EACH_KIND
def test_initial_values_are_drawn_matrix_by_matrix(kind):
    """Quotients before remainders, vectors before their projection; bounds as the contract says."""
    state = make(kind).state_dict()
    np.random.seed(3)
    for key, value in state.items():  # in the order of the tables
        rows = NUM_ROWS[int(key.partition(".")[0])]
        bound = math.sqrt(6 / sum(value.shape)) if "proj" in key else math.sqrt(1 / rows)
        wanted = np.random.uniform(-bound, bound, tuple(value.shape)).astype(np.float32)
        np.testing.assert_array_equal(value.numpy(), wanted)


def test_quotients_and_remainders_have_the_papers_shapes():
    tables = QuotientRemainder(16, 200, "concat", 7).make_tables([200, 201, 5000])
    shapes = [[(one.key, one.num_rows, one.dim) for one in table.matrices] for table in tables]
    assert shapes == [
        [("0.weight", 200, 32)],
        [("1.weight_q", 29, 16), ("1.weight_r", 7, 16)],
        [("2.weight_q", 715, 16), ("2.weight_r", 7, 16)],
    ]


@pytest.mark.parametrize("round_dims", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 0.3, 0.5, 2.0])
def test_dimensions_are_the_papers(temperature, round_dims):
    """arXiv 1909.11810, section 4: d = D (n0 / n)^temperature, here in exact powers of float64."""
    rows = [3, 10, 27, 105, 1460, 12517, 286181, 5461306, 10131227]
    dims = MixedDimensions(64, 200, temperature, round_dims).dims(rows)
    exact = [max(1.0, 64 * (3 / n) ** temperature) for n in rows]
    if round_dims:
        wanted = [min(64, 2 ** round(math.log2(round(dim)))) for dim in exact]
    else:
        wanted = [round(dim) for dim in exact]
    assert dims == wanted and dims[0] == 64
    tables = MixedDimensions(64, 200, temperature, round_dims).make_tables(rows)
    for n, dim, table in zip(rows, dims, tables, strict=True):
        shapes = [(one.num_rows, one.dim) for one in table.matrices]
        is_narrow = n > 200 and dim < 64
        assert shapes == ([(n, dim), (64, dim)] if is_narrow else [(n, 64)])
        assert table.matrices[0].key.count("embs") == (n > 200)


class Sizes(TorchDispatchMode):
    """Notes the most numbers of a tensor that an operator makes, but for views of some."""

    def __init__(self, known):
        super().__init__()
        self.most, self._known = 0, {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                is_known = tensor.untyped_storage().data_ptr() in self._known
                self.most = max(self.most, 0 if is_known else tensor.numel())
        return made


@pytest.mark.parametrize("kind", ["qr_mult", "md"])
@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad"])
def test_no_gradient_of_a_tables_size_exists(kind, optimizer):
    """A step on tables of 10,000 rows makes no tensor that is as large as a part of one."""
    options, process = options_of(kind), Process(0, 1, 0, torch.device("cpu"), "gloo")
    logical = compression_from_options(options).make_tables([10_000, 10_000])
    exchange = StaticExchange(process, logical, place_tables(logical, 1))
    tables = EmbeddingTables(logical, exchange, optimizer, False)
    bags, _ = draw_bags([10_000, 10_000], BATCH, one_each=True)
    state = [tensor for matrix in tables.matrices for tensor in matrix.row_tensors().values()]
    sizes = Sizes(state)
    with sizes:
        tables(bags, (BATCH,), Update(0.1)).sum().backward()
    assert 0 < sizes.most < 1000 < min(len(matrix.weight) for matrix in tables.matrices)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("flags", ["--qr-flag", "--md-flag --md-threshold=50"])
def test_lower_precision_trains_as_well(amp, flags):
    flags = [*SMALL_MODEL, *flags.split(), "--learning-rate=0.01"]
    trainer, lower = trained(*flags, f"--amp={amp}")
    full = train(*flags)
    assert {value.dtype for value in trainer.model.emb_l.state_dict().values()} == {torch.float32}
    assert lower.losses != full.losses
    for one, other in zip(lower.losses, full.losses, strict=True):
        assert one[3] == pytest.approx(other[3], rel=5e-3)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--qr-flag --md-flag", "--qr-flag and --md-flag"),
        ("--qr-flag --weighted-pooling=fixed", "--qr-flag does not go with --weighted-pooling"),
        ("--md-flag --weighted-pooling=learned", "--md-flag does not go with --weighted-pooling"),
        ("--qr-flag --qr-collisions=1", "--qr-collisions"),
        ("--qr-flag --qr-threshold=-1", "--qr-threshold"),
        ("--md-flag --md-threshold=-1", "--md-threshold"),
        ("--md-flag --md-temperature=-0.1", "--md-temperature"),
        ("--qr-flag --qr-operation=concat", "must equal twice the embedding dimension (32)"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words):
    result = train(*SMALL_MODEL, *flags.split())
    assert result.status == 2 and not result.out
    assert words in result.err and result.err.count("\n") == 1


def test_a_model_file_of_another_kind_is_one_line(tmp_path):
    small = [*SMALL_MODEL, "--data-size=64", "--qr-threshold=250", "--md-threshold=250"]
    files = {kind: tmp_path / f"model{kind}" for kind in ("", "--qr-flag", "--md-flag")}
    for kind, file in files.items():
        assert train(*small, *kind.split(), f"--save-model={file}").status == 0

    def error(kind, *flags):
        result = train(*small, *flags, f"--load-model={files[kind]}", "--nepochs=2")
        assert result.status == 2 and result.err.count("\n") == 1
        return result.err

    plain, pair = "emb_l.2.weight (300, 16)", "emb_l.2.weight_q (75, 16) and emb_l.2.weight_r (4"
    narrow = "emb_l.2.embs.weight (300, 9) and emb_l.2.proj.weight (16, 9)"
    assert f"{plain} there, {pair}" in error("", "--qr-flag")
    assert f"{pair}, 16) there, {plain}" in error("--qr-flag")
    assert f"{plain} there, {narrow}" in error("", "--md-flag")
    assert "(75, 16) there, (60, 16)" in error("--qr-flag", "--qr-flag", "--qr-collisions=5")
    joined = error("--qr-flag", "--qr-flag", "--qr-operation=add")
    assert "table 2 are joined by 'mult' there, by 'add' in this model" in joined
