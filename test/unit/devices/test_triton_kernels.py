"""The Triton kernels equal the operators beside them; on the CPU Triton's interpreter runs them.

bfloat16 is wrong in the interpreter, so its cases want a GPU.
"""

import json
import re
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, assert_same_losses, losses_of, metrics_of, shell, train
from interpreted import DEVICE, DTYPES, ON_GPU, kernel_module
from naive_interaction import draw, naive, num_pairs

from criteo.row_layout import Layout

# how far from float64, of numbers up to 100
TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.4}
SHAPES = [(7, 3, 4), (5, 26, 16), (1, 1, 1), (3, 2, 64), (0, 3, 4), (9, 26, 17), (2, 40, 128)]


@pytest.fixture(scope="module")
def kernels():
    with kernel_module("kernels") as module:
        yield module


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
    column_bytes = column_bytes.to(DEVICE)
    dense, ids, label = kernels.decode(block, column_bytes, 13, 26)
    _, want_ids, want_label = layout.decode(rows)
    assert np.array_equal(ids.cpu().numpy(), want_ids)
    assert np.array_equal(label.cpu().numpy(), want_label)
    want = np.log(columns[1:14].T.astype(np.float64) + 1)
    np.testing.assert_allclose(dense.cpu().numpy(), want, rtol=1e-6, atol=1e-6)
    if widths == "mixed":
        shifts = torch.arange(26, dtype=torch.int32, device=DEVICE) * 1000
        lower, rows_of_ids, again = kernels.decode(
            block, column_bytes, 13, 26, torch.float16, shifts
        )
        assert torch.equal(again, label)
        assert torch.equal(rows_of_ids, ids + shifts)
        assert lower.shape == (45, 16) and not lower[:, 13:].any()
        assert torch.equal(lower[:, :13], dense.half())


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_without_a_gpu_too(tmp_path):
    fresh = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = shell(sys.executable, ROOT / "test" / "unit" / "compile_kernels.py", env=fresh)
    assert done.returncode == 0, done.stderr
    lines = [line.split(maxsplit=4) for line in done.stdout.splitlines()]
    assert {name for name, *_ in lines} == {
        "_dot_forward", "_dot_backward", "_look_up", "_sgd", "_sgd_summed", "_decode",
        "_cross_entropy", "_relu_backward", "_head", "_head_with_loss", "_update"
    }  # fmt: skip
    for name, _, kind, size, found in lines:
        registers, spilled, products, wide_loads, loads, added, additions, barriers = (
            int(number) for number in re.findall(r"\d+", re.sub("before.*", "", found))
        )
        assert int(size.rstrip(":")) > 1000 and spilled <= 16, name
        assert registers <= 168, "three programs of 4 warps a multiprocessor"
        if name.startswith("_dot") and "tf32" not in kind:
            assert barriers == 0, "one latency: no load waits for another"
            assert registers <= 96 and ("fp32" in kind or products > 0), name
        if name.startswith("_sgd"):
            assert added == additions > 0, "numbers of a row are added four at a time"
        if name == "_look_up":
            assert wide_loads == loads - 1, "all but the id"


# flags of runs on Criteo data that give the same with the kernels as without
RUNS = {
    "sgd": "--arch-sparse-feature-size=16 --arch-mlp-bot=13-24-16 --test-freq=4 --mlperf-logging"
    " --mlperf-events=false --test-mini-batch-size=20",
    "itself, rwsadagrad": "--optimizer=rwsadagrad --learning-rate=0.01 --arch-interaction-itself"
    " --arch-sparse-feature-size=4 --arch-mlp-bot=13-24-4",
    "fp16": "--amp=fp16 --arch-sparse-feature-size=16 --arch-mlp-bot=13-24-16",
    "accumulation": "--mlperf-grad-accum-iter=2 --arch-sparse-feature-size=5 --arch-mlp-bot=13-5",
    "fp16, equal rows summed": "--amp=fp16 --sum-equal-rows=true --arch-sparse-feature-size=16"
    " --arch-mlp-bot=13-24-16",
    "fp16, adagrad, mse": "--amp=fp16 --optimizer=adagrad --learning-rate=0.01 --loss-function=mse"
    " --arch-sparse-feature-size=16 --arch-mlp-bot=13-24-16",
    "fp16, skipping": "--amp=fp16 --on-nan=skip --loss-function=wbce --loss-weights=0.5-2"
    " --arch-sparse-feature-size=16 --arch-mlp-bot=13-24-16",
    "fp16, accumulation": "--amp=fp16 --mlperf-grad-accum-iter=2 --loss-threshold=0.4"
    " --arch-interaction-op=cat --arch-sparse-feature-size=5 --arch-mlp-bot=13-5",
    "learned pooling": "--weighted-pooling=learned --arch-sparse-feature-size=3"
    " --arch-mlp-bot=13-3",
}


OFTEN = ("sgd", "fp16, equal rows summed")
SELDOM = tuple(name for name in RUNS if name not in OFTEN)
EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SELDOM)) for name in RUNS]
)
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
names = ("kernels", "layers", "loss", "rows")
print(*(name for name in names if f"devices.triton_{name}" in sys.modules))
"""


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A folder with 400 rows: 57 of them are for evaluations, which the interpreter is slow in."""
    folder = tmp_path_factory.mktemp("rows")
    lines = (GOLDEN / "data" / "kaggle" / "train.txt").read_text().splitlines(keepends=True)
    (folder / "train.txt").write_text("".join(lines[:400]))
    return folder


@pytest.fixture(scope="module")
def often(rows):
    return interpreted(rows, OFTEN)


@pytest.fixture(scope="module")
def seldom(rows):
    return interpreted(rows, SELDOM)


def interpreted(rows, names):
    """{run: what it printed}."""
    runs = [[*COMMON.split(), f"--data_path={rows}", *RUNS[name].split()] for name in names]
    return dict(zip(names, printed(runs), strict=True))


def printed(runs):
    """What each of the runs, one after the other in a process of their own, has printed."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(runs)]
    done = shell(*command, cwd=ROOT, env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr
    assert "kernels layers loss rows" in done.stdout
    return done.stdout.split("run\n")[1:]


@pytest.mark.skipif(ON_GPU, reason="the interpreter is for where there is no GPU")
@EACH
def test_the_program_gives_the_same_with_the_kernels(name, rows, request):
    found = request.getfixturevalue("seldom" if name in SELDOM else "often")[name]
    plain = train(*COMMON.split(), f"--data_path={rows}", *RUNS[name].split())
    got, want = losses_of(found), plain.losses
    assert len(got) == 4
    for one, other in zip(got, want, strict=True):
        near = 1e-4 if "fp16" in name else 1e-5
        assert one == pytest.approx(other, rel=near, abs=1.1e-6)
    pairs = list(zip(metrics_of(found), metrics_of(plain.out), strict=True))
    assert len(pairs) == (name == "sgd")
    assert all(one == pytest.approx(other, abs=2e-4) for one, other in pairs)


LOWER = (
    "--amp=fp16 --optimizer=adagrad --learning-rate=0.01 --arch-sparse-feature-size=16"
    " --arch-mlp-bot=13-24-16"
)


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="the interpreter is for where there is no GPU")
def test_a_run_in_16_bits_is_resumed_and_its_model_evaluated(rows, tmp_path):
    """The parameters of a file get where they are computed with, Adagrad's sums too."""
    argv = [*COMMON.split(), f"--data_path={rows}", *LOWER.split(), "--mlperf-logging",
            "--mlperf-events=false", "--test-mini-batch-size=20"]  # fmt: skip
    model = tmp_path / "model.pth"
    whole, saved, resumed, evaluated = printed([
        [*argv, "--nepochs=2", "--test-freq=-1"],
        [*argv, f"--save-model={model}", "--test-freq=4"],
        [*argv, "--nepochs=2", "--test-freq=-1", f"--load-model={model}"],
        [*argv, "--inference-only", f"--load-model={model}"],
    ])  # fmt: skip
    assert_same_losses(losses_of(resumed), losses_of(whole)[4:])
    assert metrics_of(evaluated)[-1]["auc"] == metrics_of(saved)[-1]["auc"]


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="the interpreter is for where there is no GPU")
def test_two_ranks_in_16_bits_are_one(rows):
    found = []
    for ranks in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        words = [*COMMON.split(), f"--data_path={rows}", *LOWER.split()]
        variables = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        program = ROOT / "dlrm_s_pytorch.py"
        done = shell(sys.executable, *launcher, program, *words, env=variables)
        assert done.returncode == 0, done.stderr
        found.append(losses_of(done.stdout))
    assert len(found[0]) == 4
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1.1e-6)
