"""The Triton kernels equal the operators beside them; on the CPU Triton's interpreter runs them.

bfloat16 is wrong in the interpreter, so its cases want a GPU.
"""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, losses_of, metrics_of, shell, train
from naive_interaction import draw, naive, num_pairs

from criteo.row_layout import Layout
from devices.gpu import OLDEST_TRITON, triton_version
from model.losses import cross_entropy

if triton_version() < OLDEST_TRITON:
    here, oldest = (".".join(map(str, one)) for one in (triton_version(), OLDEST_TRITON))
    reason = f"the kernels want triton {oldest} or newer, here: {here or 'none'}"
    pytest.skip(reason, allow_module_level=True)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
# how far from float64, of numbers up to 100
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.4}
SHAPES = [(7, 3, 4), (5, 26, 16), (1, 1, 1), (3, 2, 64), (0, 3, 4), (9, 26, 17), (2, 40, 128)]


@pytest.fixture(scope="module")
def kernels():
    """Interpreted in this process where there is no GPU; other tests do not use them."""
    with pytest.MonkeyPatch.context() as patch:
        import triton  # noqa: F401 (as torch may have done before: it makes no difference)

        patch.setenv("TRITON_INTERPRET", "0" if ON_GPU else "1")
        yield importlib.import_module("devices.triton_kernels")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dot_products_and_gradients_equal_loops(kernels, shape, itself, dtype):
    dense, pooled = (tensor.to(DEVICE, dtype) for tensor in draw(shape))
    assert kernels.dot_fits(shape[1] + 1, shape[2])
    got = kernels.dot_forward(dense, pooled, itself)
    wanted = [tensor.detach().double().cpu().requires_grad_() for tensor in (dense, pooled)]
    want = naive(*wanted, itself)
    width = shape[2] + num_pairs(shape[1], itself)
    assert got.dtype == dtype and got.shape == (shape[0], -(-width // 8) * 8)
    close = {"rtol": TOLERANCE[dtype] / 10, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(got[:, :width].double().cpu(), want, **close)
    assert not got[:, width:].any(), "the columns added are zeros"
    gradient = torch.randn(got.shape, generator=torch.Generator().manual_seed(4)).to(DEVICE, dtype)
    found = kernels.dot_backward(gradient, dense, pooled, itself)
    want.backward(gradient[:, :width].double().cpu())
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.double().cpu(), theirs.grad, **close)


def test_dot_of_too_many_vectors_is_left_to_operators(kernels):
    assert not kernels.dot_fits(200, 64) and not kernels.dot_fits(27, 4096)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 5, 64])
def test_lookup_equals_embedding(kernels, dim, dtype):
    weight = torch.randn(50, dim, device=DEVICE)
    rows = torch.randint(50, (37,), device=DEVICE)
    got = kernels.look_up(weight, rows, dtype)
    assert got.dtype == dtype and torch.equal(got, weight[rows].to(dtype))
    assert kernels.look_up(weight, rows[:0], dtype).shape == (0, dim)


@pytest.mark.parametrize("on_device", [True, False], ids=["rate on device", "rate a number"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sgd_sums_equal_rows_and_skips_what_is_not_finite(kernels, dtype, on_device):
    weight = torch.randn(20, 5, device=DEVICE)
    rows = torch.randint(20, (100,), device=DEVICE)
    gradients = torch.randn(100, 5, device=DEVICE).to(dtype)
    gradients[3, 1], gradients[4, 2], gradients[5, 0] = float("nan"), float("inf"), -float("inf")
    finite = torch.nan_to_num(gradients.float(), nan=0.0, posinf=0.0, neginf=0.0)
    want = weight.double().index_add(0, rows, finite.double(), alpha=-0.25)
    kernels.sgd(weight, rows, gradients, torch.tensor(0.25, device=DEVICE) if on_device else 0.25)
    torch.testing.assert_close(weight.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widths", ["mixed", "4", "1"])
def test_rows_are_decoded_as_on_the_cpu(kernels, widths):
    largest = {"mixed": [1, *[300, 70000, 9] * 4, 5, *[70000, 200, 60000, 3] * 6, 2**30, 7],
               "4": [2**31 - 1] * 40, "1": [255] * 40}[widths]  # fmt: skip
    layout = Layout.holding(largest)
    draws = np.random.default_rng(1)
    columns = np.stack([draws.integers(0, most, 45, endpoint=True) for most in largest])
    rows = layout.pack(columns.astype(np.int32))
    column_bytes = torch.from_numpy(np.stack([layout.offsets, layout.widths]).astype(np.int32))
    block = torch.from_numpy(rows).to(DEVICE)
    dense, ids, label = kernels.decode(block, column_bytes.to(DEVICE), 13, 26)
    _, want_ids, want_label = layout.decode(rows)
    assert np.array_equal(ids.cpu().numpy(), want_ids)
    assert np.array_equal(label.cpu().numpy(), want_label)
    want = np.log(columns[1:14].T.astype(np.float64) + 1)
    np.testing.assert_allclose(dense.cpu().numpy(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 3.0)])
def test_the_loss_and_its_gradient_are_the_operators(kernels, weights, padded):
    random = torch.Generator().manual_seed(1)
    predicted = torch.rand(300, 1, generator=random).to(DEVICE)
    predicted[:4, 0] = torch.tensor([0.0, 1.0, 1e-9, 1 - 1e-7])
    label = torch.rand(300, 1, generator=random).round().to(DEVICE)
    label[:4, 0] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    label[7] = 0.4
    label_weights = torch.tensor(weights, device=DEVICE)
    mask = (torch.arange(300, device=DEVICE) < 290).float()[:, None] if padded else None
    want = cross_entropy(predicted, label, label_weights, mask)
    got = kernels.cross_entropy(predicted, label, label_weights, mask)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-6)
    predicted[5] = float("nan")
    loss, gradient = kernels.cross_entropy(predicted, label, label_weights, mask)
    assert loss.isnan() and gradient[5].isnan() and gradient.isnan().sum() == 1
    assert kernels.cross_entropy(predicted[:0], label[:0], label_weights, None)[0] == 0


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_without_a_gpu_too(tmp_path):
    fresh = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = shell(sys.executable, ROOT / "test" / "unit" / "compile_kernels.py", env=fresh)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == {
        "_dot_forward", "_dot_backward", "_look_up", "_sgd", "_decode", "_cross_entropy"
    }  # fmt: skip
    assert all(int(size) > 1000 for *_, size in lines)


# flags of runs on Criteo data that give the same with the kernels as without
RUNS = {
    "sgd": "--arch-sparse-feature-size=16 --arch-mlp-bot=13-24-16 --test-freq=4 --mlperf-logging"
    " --test-mini-batch-size=20",
    "itself, rwsadagrad": "--optimizer=rwsadagrad --learning-rate=0.01 --arch-interaction-itself"
    " --arch-sparse-feature-size=4 --arch-mlp-bot=13-24-4",
    "fp16": "--amp=fp16 --arch-sparse-feature-size=16 --arch-mlp-bot=13-24-16",
    "accumulation": "--mlperf-grad-accum-iter=2 --arch-sparse-feature-size=5 --arch-mlp-bot=13-5",
    "learned pooling": "--weighted-pooling=learned --arch-sparse-feature-size=3"
    " --arch-mlp-bot=13-3",
}


COMMON = (
    "--arch-mlp-top=24-1 --loss-function=bce --learning-rate=0.1 --mini-batch-size=20"
    " --num-batches=4 --print-freq=1 --memory-map --data-randomize=none"
    " --tensor-board-filename="
)
# the runs one after the other, and whether the kernels were imported
PROGRAM = """
import json, sys
import dlrm_s_pytorch
for words in json.loads(sys.argv[1]):
    print("run", flush=True)
    assert dlrm_s_pytorch.main(words) == 0
print("kernels", "devices.triton_kernels" in sys.modules)
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder with 400 rows: 57 of them are for evaluations, which the interpreter is slow in."""
    folder = tmp_path_factory.mktemp("rows")
    lines = (GOLDEN / "data" / "kaggle" / "train.txt").read_text().splitlines(keepends=True)
    (folder / "train.txt").write_text("".join(lines[:400]))
    return folder


@pytest.fixture(scope="module")
def interpreted(rows):
    """{run: what it printed}."""
    runs = [[*COMMON.split(), f"--data_path={rows}", *flags.split()] for flags in RUNS.values()]
    command = [sys.executable, "-c", PROGRAM, json.dumps(runs)]
    done = shell(*command, cwd=ROOT, env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    assert "kernels True" in done.stdout
    return dict(zip(RUNS, done.stdout.split("run\n")[1:], strict=True))


@pytest.mark.skipif(ON_GPU, reason="the interpreter is for where there is no GPU")
@pytest.mark.parametrize("name", RUNS)
def test_the_program_gives_the_same_with_the_kernels(name, interpreted, rows):
    plain = train(*COMMON.split(), f"--data_path={rows}", *RUNS[name].split())
    got, want = losses_of(interpreted[name]), plain.losses
    assert len(got) == 4
    for one, other in zip(got, want, strict=True):
        assert one == pytest.approx(other, rel=1e-4 if name == "fp16" else 1e-5, abs=1.1e-6)
    pairs = list(zip(metrics_of(interpreted[name]), metrics_of(plain.out), strict=True))
    assert len(pairs) == (name == "sgd")
    assert all(one == pytest.approx(other, abs=2e-4) for one, other in pairs)
