"""--cuda-graphs: replayed steps are the steps; what cannot be recorded is one line.

No GPU is needed: graphs are emulated (graph_program.py) on the emulated npu device.
"""

import contextlib
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    CRITEO_MODEL,
    GOLDEN,
    ROOT,
    assert_same_losses,
    losses_of,
    metrics_of,
    shell,
    train,
)
from torch.utils import backend_registration

import dlrm_s_pytorch as dlrm

# isort: split
from common.errors import UserError
from engine import step_graph
from engine.step_graph import StepGraph, check_graphs
from model.batch import Batch
from ranks.process import Process

emulated = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices made in Python",
)
WARM_UP = "--lr-num-warmup-steps=5 --lr-decay-start-step=7 --lr-num-decay-steps=5"
# 7 batches of 1000 an epoch, the last one of 3 rows
CASES = {
    "sgd": "",
    "schedule": WARM_UP,
    "adagrad": "--optimizer=adagrad --learning-rate=0.01",
    "rwsadagrad": f"--optimizer=rwsadagrad --learning-rate=0.01 {WARM_UP}",
    "bf16": "--amp=bf16",
    "fp16": "--amp=fp16",
    "itself": "--arch-interaction-itself --loss-threshold=0.01 --loss-function=wbce"
    " --loss-weights=0.5-2",
    "cat": "--arch-interaction-op=cat --loss-function=mse",
    "learned": "--weighted-pooling=learned --optimizer=rwsadagrad --learning-rate=0.01",
    "quotient-remainder": "--qr-flag",
    "mixed dimensions": "--md-flag --optimizer=rwsadagrad --learning-rate=0.01",
    "mixed dimensions, fp16": "--md-flag --amp=fp16",
    "not filled": "--static-shapes=false",
}
STEPS = 2 * 7
SELDOM = (
    "bf16", "itself", "cat", "quotient-remainder", "mixed dimensions", "schedule", "learned",
    "not filled",
)  # fmt: skip
EACH = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SELDOM)) for name in CASES],
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    names = [name for name in CASES if name not in SELDOM]
    return results_of(names, tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def seldom(tmp_path_factory):
    return results_of(SELDOM, tmp_path_factory.mktemp("graphs"))


@pytest.fixture
def found_of(name, request):
    """The results that have the case of that name."""
    return request.getfixturevalue("seldom" if name in SELDOM else "found")


def results_of(names, folder):
    """What graph_program.py has found: of these cases with graphs and without, and of a resumed."""
    shutil.copytree(GOLDEN / "data" / "kaggle", folder / "data")
    cases = {}
    no_npu_kernel = "--fused-optimizer=false"  # that kernel reads the rate on the host
    sizes = ["--mini-batch-size=1000", "--test-mini-batch-size=330", "--test-freq=1000"]
    for name in names:
        argv = [*CRITEO_MODEL, *sizes, "--print-freq=1", "--nepochs=2", "--use-npu", no_npu_kernel,
                "--memory-map", f"--data_path={folder / 'data'}", *CASES[name].split()]  # fmt: skip
        cases[name], cases[f"{name} eager"] = [*argv, "--cuda-graphs"], argv
    if "rwsadagrad" in names:
        saves = [f"--save-model={folder / 'model.pth'}", "--test-freq=-1"]
        cases["saved"] = [*cases["rwsadagrad"], *saves, "--nepochs=1"]
        cases["resumed"] = [*cases["rwsadagrad"], f"--load-model={folder / 'model.pth'}"]
    (folder / "cases.json").write_text(json.dumps(cases))
    program = ROOT / "test" / "unit" / "graph_program.py"
    emulated = {"PYTHONPATH": str(ROOT / "test" / "emulated_npu")}
    files = ["cases.json", "results.json"]
    done = shell(sys.executable, program, *files, cwd=folder, env=emulated, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text())


@emulated
@EACH
def test_replayed_steps_are_the_steps(name, found_of):
    got, want = found_of[name], found_of[f"{name} eager"]
    assert got["status"] == want["status"] == 0, got["err"]
    assert want["recorded"] == 0
    assert len(losses_of(got["out"])) == STEPS
    if name == "fp16":  # a replay may round another way
        pairs = zip(losses_of(got["out"]), losses_of(want["out"]), strict=True)
        assert all(one == pytest.approx(other, rel=1e-4) for one, other in pairs)
    else:
        assert_same_losses(losses_of(got["out"]), losses_of(want["out"]))
    for one, other in zip(metrics_of(got["out"]), metrics_of(want["out"]), strict=True):
        assert one == pytest.approx(other, abs=2.1e-4)  # four digits are printed


@emulated
@EACH
def test_one_shape_is_recorded_once(name, found_of):
    """Three steps warm up; the short batches at the ends of both epochs are not replayed."""
    assert found_of[name]["recorded"] == 1
    assert found_of[name]["replays"] == STEPS - 3 - 2


@emulated
@EACH
def test_a_graph_is_given_up_before_the_ranks_part(name, found_of):
    """NCCL's communicators wait for the graphs that hold their collectives."""
    assert found_of[name]["resets"] == [1]


@emulated
def test_all_of_a_step_is_recorded(found):
    operators = set(found["sgd"]["operators"])
    wanted = {"aten.embedding.default", "aten.index_add_.default", "aten._foreach_add_.List"}
    assert wanted <= operators


@emulated
def test_a_run_with_graphs_is_resumed(found):
    assert found["saved"]["status"] == found["resumed"]["status"] == 0, found["resumed"]["err"]
    whole = losses_of(found["rwsadagrad"]["out"])
    assert_same_losses(losses_of(found["resumed"]["out"]), whole[7:])


MISTAKES = {
    "--cuda-graphs --data_path={data}": ["--cuda-graphs", "needs --use-gpu", "is cpu"],
    "--tf32": ["--tf32", "NVIDIA GPUs", "is cpu"],
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_what_only_a_gpu_does_is_refused_in_one_line(flags, tmp_path):
    result = train(*flags.format(data=tmp_path).split())
    assert result.status == 2 and result.err.count("\n") == 1 and result.out == ""
    for words in MISTAKES[flags]:
        assert words in result.err


def test_graphs_want_equal_shares_of_all_ranks():
    """A rank with a shorter share would fill up each batch, and filled batches are not replayed."""
    options = dlrm.parse_options(["--use-gpu", "--cuda-graphs", "--data_path=d"])
    process = Process(0, 3, 0, torch.device("cuda"), "nccl")
    options.mini_batch_size = 129
    check_graphs(options, process)
    options.mini_batch_size = 128
    with pytest.raises(UserError, match="--mini-batch-size that 3 ranks share evenly: got 128"):
        check_graphs(options, process)
    options.mini_batch_size, options.on_nan = 129, "skip"
    with pytest.raises(UserError, match="--cuda-graphs does not go with --on-nan=skip: a recorded"):
        check_graphs(options, process)


def test_recorded_steps_can_be_replayed_by_themselves(monkeypatch):
    replayed, block = [], torch.zeros(4, dtype=torch.uint8)
    graph = SimpleNamespace(replay=lambda: replayed.append(1), reset=lambda: None)
    monkeypatch.setattr(step_graph, "capture", lambda work: (graph, work()))
    monkeypatch.setattr(step_graph, "on_side_stream", contextlib.nullcontext)
    monkeypatch.setattr(step_graph, "synchronize", lambda device: None)
    steps = StepGraph(torch.device("cpu"), lambda batch, num_rows: torch.zeros(()))
    for _ in range(3):
        steps.run(Batch(block, 4, (4,)), 4)
    assert steps.replays == [], "the fourth step is the one that is recorded"
    steps.run(Batch(block, 4, (4,)), 4)
    (replay,) = steps.replays
    replay()
    assert len(replayed) == 2
    steps.close()
    assert steps.replays == []
