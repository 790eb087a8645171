"""--cuda-graphs: replayed steps are the steps; what cannot be recorded is one line.

No GPU is needed: graphs are emulated (graph_program.py) on the emulated npu device.
"""

import contextlib
import importlib
import json
import shutil
import sys
import sysconfig
import types

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
from devices import card
from devices.gpu import has_triton, set_product_precision
from engine.step_graph import check_graphs
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
    "not filled": "--static-shapes=false",
}
STEPS = 2 * 7


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")
    shutil.copytree(GOLDEN / "data" / "kaggle", folder / "data")
    cases = {}
    sizes = ["--mini-batch-size=1000", "--test-mini-batch-size=330", "--test-freq=1000"]
    for name, flags in CASES.items():
        argv = [*CRITEO_MODEL, *sizes, "--print-freq=1", "--nepochs=2", "--use-npu", "--memory-map",
                f"--data_path={folder / 'data'}", *flags.split()]  # fmt: skip
        cases[name], cases[f"{name} eager"] = [*argv, "--cuda-graphs"], argv
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
@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_are_the_steps(name, found):
    got, want = found[name], found[f"{name} eager"]
    assert got["status"] == want["status"] == 0, got["err"]
    assert want["recorded"] == 0
    assert len(losses_of(got["out"])) == STEPS
    if name == "fp16":  # rounds as often, but not always the same way
        pairs = zip(losses_of(got["out"]), losses_of(want["out"]), strict=True)
        assert all(one == pytest.approx(other, rel=1e-4) for one, other in pairs)
    else:
        assert_same_losses(losses_of(got["out"]), losses_of(want["out"]))
    for one, other in zip(metrics_of(got["out"]), metrics_of(want["out"]), strict=True):
        assert one == pytest.approx(other, abs=2e-4)


@emulated
@pytest.mark.parametrize("name", CASES)
def test_one_shape_is_recorded_once(name, found):
    """Three steps warm up; the short batches at the ends of both epochs are not replayed."""
    assert found[name]["recorded"] == 1
    assert found[name]["replays"] == STEPS - 3 - 2


@emulated
@pytest.mark.parametrize("name", CASES)
def test_a_graph_is_given_up_before_the_ranks_part(name, found):
    """NCCL's communicators wait for the graphs that hold their collectives."""
    assert found[name]["resets"] == [1]


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


def test_steps_that_warm_up_wait_for_the_stream_before_them_and_are_waited_for(monkeypatch):
    calls = []

    class Stream:
        def wait_stream(self, other):
            calls.append(("side" if self is side else "main", "waits"))

    main, side = Stream(), Stream()

    @contextlib.contextmanager
    def stream(used):
        assert used is side
        yield

    module = types.SimpleNamespace(current_stream=lambda: main, stream=stream)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    monkeypatch.setattr(card, "side_stream", lambda device: side)
    with card.apart(torch.device("cpu")):
        calls.append("step")
    assert calls == [("side", "waits"), "step", ("main", "waits")]


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
    """Else those whose share is shorter fill up each batch, and none is replayed."""
    options = dlrm.parse_options(["--use-gpu", "--cuda-graphs", "--data_path=d"])
    process = Process(0, 3, 0, torch.device("cuda"), "nccl")
    options.mini_batch_size = 129
    check_graphs(options, process)
    options.mini_batch_size = 128
    with pytest.raises(UserError, match="--mini-batch-size that 3 ranks share evenly: got 128"):
        check_graphs(options, process)


@pytest.mark.parametrize("before", ["high", "highest"])
def test_products_are_float32s_unless_it_is_said_otherwise(before):
    """Also where a run in the same process had --tf32; sums of 16 bits' products too."""
    torch.set_float32_matmul_precision(before)
    settings = torch.backends.cuda.matmul
    settings.allow_bf16_reduced_precision_reduction = True
    settings.allow_fp16_reduced_precision_reduction = True
    set_product_precision(torch.device("cpu"), tf32=False)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not settings.allow_bf16_reduced_precision_reduction
    assert not settings.allow_fp16_reduced_precision_reduction


def test_triton_wants_a_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    (tmp_path / "Python.h").touch()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not has_triton(cpu, None)
    with pytest.raises(UserError, match="no C compiler found.*--triton=false"):
        has_triton(gpu, None)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/gcc" if name == "gcc" else None)
    assert has_triton(gpu, None)
    monkeypatch.setenv("CC", "no-cc")
    with pytest.raises(UserError, match="no C compiler found .looked for CC=no-cc"):
        has_triton(gpu, None)
    monkeypatch.delenv("CC")
    (tmp_path / "Python.h").unlink()
    with pytest.raises(UserError, match="no .*Python.h found .*--triton=false"):
        has_triton(gpu, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not has_triton(gpu, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert has_triton(cpu, None) and not has_triton(cpu, torch.bfloat16)
