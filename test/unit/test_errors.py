"""A user's mistake is one clear line, exit status 2, and nothing left behind."""

import os
import sys

import pytest
import torch
from conftest import CRITEO_MODEL, ROOT, SMALL_MODEL, shell, train

import dlrm_s_pytorch as dlrm

MISTAKES = {
    "--mini-batch-sise=3": "unknown flag --mini-batch-sise=3, did you mean --mini-batch-size?",
    "--mini-batch-size=0": "'0' is not a whole number at least 1",
    "--nepochs=0": "at least 1",
    "--data-sub-sample-rate=1.5": "'1.5' is not a number in [0, 1]",
    "--data-set=avazu": "choose from 'kaggle', 'terabyte'",
    "--optimizer=adam": "choose from 'sgd', 'adagrad', 'rwsadagrad'",
    "--activation-function=gelu": "choose from 'relu'",
    "--round-targets=maybe": "'maybe' is neither true nor false",
    "--arch-mlp-bot=4-3": "--arch-mlp-bot=4-3 ends in 3, --arch-sparse-feature-size=2",
    "--arch-mlp-top=4-2": "--arch-mlp-top ends in 2: expected 1",
    "--loss-threshold=0.7": "expected 0, or a number in (0, 0.5)",
    "--loss-weights=1.0": "--loss-weights=1.0: expected two numbers, as in 1.0-3.5",
    "--test-mini-batch-size=0": "expected at least 1, or -1",
    "--mlperf-acc-threshold=80": "in [0, 1]",
    "--max-ind-range=0 --data-generation=dataset --raw-data-file=x": "--max-ind-range=0",
    "--data-generation=dataset": "no data is named",
    "--data_path=/no/such/folder": "no such folder",
    "--load-model=/no/such/file": "--load-model=/no/such/file: no such file",
    "--save-model=/no/such/folder/x": "its folder does not exist",
    "--save-model=.": "is a folder",
    "--use-npu --use-gpu": "give one of them",
    "--dist-backend=nccl": "--dist-backend=nccl does not serve cpu",
    "--quantize-mlp-with-bit=8": "--quantize-mlp-with-bit=8 is no training: add --inference-only",
    "--quantize-emb-with-bit=5": "choose from 4, 8, 32",
    "--onnx-file=m.onnx": "--onnx-file=m.onnx without --save-onnx writes nothing: add --save-onnx",
    "--save-onnx --onnx-file=/no/such/folder/x": "--onnx-file=/no/such/folder/x: its folder does",
    "--data-generation=synthetic --data-trace-file=no_j.log": "--data-trace-file: no_",
    "--arch-embedding-size=2000000000 --arch-sparse-feature-size=999999 --arch-mlp-bot=4-999999": (
        "error: tables need 8e+06 GB on this machine, which has "
    ),
    "--arch-embedding-size=3000000000-3-2 --qr-flag": "table of 3000000000 rows: expected at most",
    "--arch-embedding-size=99999999999999999999-3-2": "rows: expected at most 2147483648",
    "--arch-mlp-bot=4-1000000-100000000000-2": (
        "no memory for an MLP of 4-1000000-100000000000-2 (400000801 GB of weights) on cpu"
    ),
    "--arch-mlp-bot=4-10000000000000000000-2": "no memory for an MLP of 4-10000000000000000000-2",
    "--mini-batch-size=1000000000000 --num-batches=1": "error: out of memory",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_on_the_command_line(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(*flags.split(), "--tensor-board-filename=board")
    assert result.status == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert MISTAKES[flags] in result.err
    assert os.listdir(tmp_path) == []


def test_flags_keep_their_values_in_either_spelling():
    options = dlrm.parse_options(["--local-rank=3", "--world_size", "8", "--data-path=x"])
    assert (options.local_rank, options.world_size, options.data_path) == (3, 8, "x")


def test_a_broken_torch_npu_ends_only_runs_that_ask_for_it(tmp_path):
    """Its entry point would import it with torch, if that were not switched off before.

    This run is one from a shell, so it also shows one line and status 2 there.
    """
    package = tmp_path / "torch_npu"
    package.mkdir()
    package.joinpath("__init__.py").write_text("raise ImportError('libhccl.so: cannot open it')")
    installed = tmp_path / "torch_npu-0.dist-info"
    installed.mkdir()
    installed.joinpath("entry_points.txt").write_text("[torch.backends]\nnpu = torch_npu:load\n")
    command = [sys.executable, ROOT / "dlrm_s_pytorch.py", "--use-npu"]
    finished = shell(*command, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert finished.returncode == 2 and "libhccl.so" in finished.stderr, finished.stderr
    assert finished.stderr.startswith("error: --use-npu: ") and finished.stderr.count("\n") == 1


def test_torch_npu_is_no_part_of_a_run_on_the_cpu():
    assert train().status == 0 and "torch_npu" not in sys.modules


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_an_error_not_a_cpu_run():
    result = train("--use-gpu")
    assert result.status == 2 and result.err.count("\n") == 1
    assert "no cuda device found" in result.err and torch.__version__ in result.err


@pytest.mark.parametrize("loss", ["mse", "bce", "wbce"])
def test_a_loss_that_becomes_nan_stops_and_saves_nothing(tmp_path, loss):
    flags = [*SMALL_MODEL, f"--loss-function={loss}", "--learning-rate=1e30", "--test-freq=10"]
    every_step = train(*flags)
    first = max(line[0] for line in every_step.losses) + 1
    result = train(*flags, "--print-freq=10", f"--save-model={tmp_path}/m.pth")
    for run in (every_step, result):
        assert run.status == 2 and run.err.count("\n") == 1
        assert f"the loss became nan at it {first} of epoch 0" in run.err
    assert not result.losses and os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 bytes. GPU 0 has ..."),
    ],
)
def test_memory_that_a_step_lacks_is_one_line(monkeypatch, error):
    def train_step(self, batch, it):
        raise error

    monkeypatch.setattr(dlrm.Trainer, "train_step", train_step)
    result = train(*SMALL_MODEL)
    assert result.status == 2 and result.err.count("\n") == 1
    assert "error: out of memory on cpu (asked for 9 bytes): a smaller --mini-batch" in result.err


def test_predictions_that_are_nan_are_one_line():
    """The loss of the first step is that of weights that were finite before it."""
    result = train(*SMALL_MODEL, "--learning-rate=1e38", "--test-freq=1")
    assert len(result.losses) == 1 and result.status == 2 and result.err.count("\n") == 1
    assert "predictions are nan" in result.err


def test_half_a_launch_environment_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = train()
    assert result.status == 2 and result.err.count("\n") == 1
    assert "RANK, MASTER_ADDR, MASTER_PORT not set" in result.err


def test_dry_run_checks_model_and_data_and_stops(kaggle):
    flags = [*CRITEO_MODEL, f"--data_path={kaggle}", "--dry-run"]
    good = train(*flags)
    assert good.status == 0 and good.losses == []
    result = train(*flags, "--arch-sparse-feature-size=15")
    assert result.status == 2 and "embedding dimension" in result.err
