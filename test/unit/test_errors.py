"""A user's mistake is one clear line, exit status 2, and nothing left behind."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL, RELEASE, ROOT, SMALL_MODEL, shell, train

import dlrm_s_pytorch as dlrm

MISTAKES = {
    "--mini-batch-sise=3": "unknown flag --mini-batch-sise=3, did you mean --mini-batch-size?",
    "nonsense": "unexpected argument 'nonsense'",
    "--mini-batch-size=0": "'0' is not a whole number at least 1",
    "--mini-batch-size=x": "'x' is not a whole number",
    "--nepochs=0": "at least 1",
    "--data-sub-sample-rate=1.5": "'1.5' is not a number in [0, 1]",
    "--data-set=avazu": "choose from 'kaggle', 'terabyte'",
    "--optimizer=adam": "choose from 'sgd', 'adagrad', 'rwsadagrad'",
    "--activation-function=gelu": "choose from 'relu'",
    "--round-targets=maybe": "'maybe' is neither true nor false",
    "--arch-mlp-bot=4-a-2": "whole numbers joined by '-'",
    "--arch-mlp-bot=4-3": "--arch-mlp-bot=4-3 ends in 3, --arch-sparse-feature-size=2",
    "--arch-mlp-top=4-2": "--arch-mlp-top ends in 2: expected 1",
    "--arch-embedding-size=4-0": "a number below 1",
    "--loss-threshold=0.7": "expected 0, or a number in (0, 0.5)",
    "--loss-weights=1.0": "expected two numbers",
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
    "--md-flag": "--md-flag is not available yet",
    "--qr-flag": "--qr-flag is not available yet",
    "--quantize-mlp-with-bit=8": "--quantize-mlp-with-bit is not available yet",
    "--quantize-emb-with-bit=4": "--quantize-emb-with-bit is not available yet",
    "--save-onnx": "--save-onnx is not available yet",
    "--plot-compute-graph": "--plot-compute-graph is not available yet",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_on_the_command_line(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(*flags.split(), "--tensor-board-filename=board")
    assert result.status == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert MISTAKES[flags] in result.err
    assert os.listdir(tmp_path) == []


def test_all_mistakes_leave_no_traceback_when_run_from_a_shell(tmp_path):
    finished = shell(
        sys.executable, ROOT / "dlrm_s_pytorch.py", "--mini-batch-size=0", cwd=tmp_path
    )
    assert (
        finished.returncode == 2
        and finished.stderr.count("\n") == 1
        and "Traceback" not in finished.stderr
    )


def test_flags_take_dashes_or_underscores():
    dashed = train("--mini-batch-size=2", "--data-size=6")
    assert train("--mini_batch_size=2", "--data_size", "6").losses == dashed.losses
    options = dlrm.parse_options(["--local-rank=3", "--world-size=8", "--data-path=x"])
    assert (options.local_rank, options.world_size, options.data_path) == (3, 8, "x")


@pytest.mark.parametrize(
    "text,value", [("False", False), ("false", False), ("0", False), ("True", True)]
)
def test_false_is_false(text, value):
    assert dlrm.parse_options([f"--round-targets={text}"]).round_targets is value


def test_a_missing_gpu_or_npu_is_an_error_not_a_cpu_run():
    if not torch.cuda.is_available():
        result = train("--use-gpu")
        assert (
            result.status == 2
            and "no cuda device found" in result.err
            and torch.__version__ in result.err
        )
    npu = train("--use-npu")
    assert npu.status == 2 and "torch_npu" in npu.err and "requirements-npu.txt" in npu.err
    assert npu.err.count("\n") == 1


def test_torch_npu_is_not_loaded_by_a_cpu_run(tmp_path):
    """A broken torch_npu beside torch.

    Its autoload is off before torch is imported, so the CPU trains.
    """
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise ImportError('libhccl.so: cannot open shared object file')"
    )
    installed = tmp_path / f"torch_npu-{RELEASE}.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text(f"Name: torch_npu\nVersion: {RELEASE}\n")
    (installed / "entry_points.txt").write_text(
        "[torch.backends]\ntorch_npu = torch_npu:_autoload\n"
    )
    command = [sys.executable, ROOT / "dlrm_s_pytorch.py", "--tensor-board-filename="]
    environment = {"PYTHONPATH": str(tmp_path)}
    broken = shell(sys.executable, "-c", "import torch", env=environment)
    assert broken.returncode != 0, "the stand-in shall break a plain import of torch"
    assert shell(*command, env=environment).returncode == 0
    asked = shell(*command, "--use-npu", env=environment)
    assert asked.returncode == 2 and "libhccl.so" in asked.stderr and asked.stderr.count("\n") == 1


NOT_IMPORTED = {
    "libhccl.so: cannot open shared object file: No such file or directory": "does not find CANN",
    "ASCEND_RUNTIME_PATH : /x/runtime does not exist. Please": "source its set_env.sh",
    "/x/libtorch_npu.so: undefined symbol: MsprofSysCycleTime": "do not go together",
    "Two accelerators cannot be used at the same time": "cannot be imported (Two accelerators",
}


@pytest.mark.parametrize("reason", NOT_IMPORTED)
def test_why_torch_npu_cannot_be_imported_is_one_line(reason, tmp_path):
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise Exception({reason + chr(10) + 'more'!r})")
    command = [sys.executable, ROOT / "dlrm_s_pytorch.py", "--use-npu"]
    done = shell(*command, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert NOT_IMPORTED[reason] in done.stderr and reason in done.stderr


@pytest.mark.parametrize("version, goes", [("2.1.0", False), ("{0}.post3", True), ("{0}", True)])
def test_torch_npu_has_to_be_of_torchs_release(version, goes, tmp_path):
    version = version.format(RELEASE)
    information = tmp_path / f"torch_npu-{version}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Name: torch_npu\nVersion: {version}\n")
    (tmp_path / "torch_npu.py").write_text("raise ImportError('as far as this')")
    command = [sys.executable, ROOT / "dlrm_s_pytorch.py", "--use-npu"]
    done = shell(*command, env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and version in done.stderr
    assert ("as far as this" in done.stderr) == goes
    if not goes:
        assert torch.__version__ in done.stderr and "requirements-npu.txt" in done.stderr


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


def test_predictions_that_are_nan_are_one_line(tmp_path):
    path = tmp_path / "m.pth"
    train(*SMALL_MODEL, f"--save-model={path}")
    content = torch.load(path, weights_only=True)
    content["state_dict"]["top_l.0.weight"].fill_(float("nan"))
    torch.save(content, path)
    result = train(*SMALL_MODEL, f"--load-model={path}", "--inference-only")
    assert result.status == 2 and "predictions are nan" in result.err


def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(dlrm, "spec_from_options", refuse)
    result = train("--data-generation=dataset", "--raw-data-file=x")
    assert result.status == 2 and result.err == "error: /some/file: Permission denied\n"
    memory = train("--mini-batch-size=1000000000000", "--num-batches=1")
    assert memory.status == 2 and memory.err.startswith("error: out of memory")
    tables = train("--arch-embedding-size=100000000000000-3-2")
    assert tables.status == 2 and "GB of tables" in tables.err


def test_an_error_in_a_loader_worker_is_its_own_line(tmp_path, kaggle_copy):
    flags = [*CRITEO_MODEL, f"--data_path={kaggle_copy}", "--memory-map", "--data-randomize=none"]
    assert train(*flags, "--num-batches=1").status == 0
    folder = kaggle_copy / "kaggleAdDisplayChallenge_processed.prepared"
    meta = json.loads((folder / "meta.json").read_text())
    rows = np.memmap(folder / "train.bin", [tuple(column) for column in meta["columns"]], "r+")
    outside = np.iinfo(rows["C1"].dtype).max
    assert outside >= meta["counts"][0]
    rows["C1"][5] = outside
    rows.flush()
    alone, helped = train(*flags), train(*flags, "--num-workers=2")
    assert alone.status == helped.status == 2
    assert helped.err == alone.err and alone.err.startswith("error: row 5 of the epoch in")
    assert f"id {outside} of table 0 is outside" in alone.err


def test_eval_split_without_rows_is_an_error(tmp_path):
    rows = np.zeros((4, 40), np.int32)
    for split in ("train", "test", "val"):
        rows[: 0 if split == "val" else 4].tofile(tmp_path / f"x_{split}.bin")
    np.savez(tmp_path / "day_fea_count.npz", counts=np.ones(26))
    files = [
        f"--raw-data-file={tmp_path}/day",
        f"--processed-data-file={tmp_path}/x",
        "--mlperf-bin-loader",
    ]
    result = train(
        *CRITEO_MODEL, "--data-generation=dataset", *files, "--eval-split=val", "--test-freq=1"
    )
    assert result.status == 2 and "--eval-split=val has no rows" in result.err


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}, {"RANK": "3", "WORLD_SIZE": "1"}]
)
def test_half_a_launch_environment_is_an_error(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = train()
    assert result.status == 2 and result.err.count("\n") == 1


def test_dry_run_checks_model_and_data_and_stops(kaggle):
    assert train(*CRITEO_MODEL, f"--data_path={kaggle}", "--dry-run").losses == []
    result = train(
        *CRITEO_MODEL, f"--data_path={kaggle}", "--dry-run", "--arch-sparse-feature-size=15"
    )
    assert result.status == 2 and "embedding dimension" in result.err


def test_an_error_of_all_ranks_is_printed_by_the_first_only(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert train("--mini-batch-size=0").err == ""
    monkeypatch.setenv("RANK", "0")
    assert train("--mini-batch-size=0").err.count("\n") == 1
