"""On an NVIDIA GPU the program computes the CPU's numbers, and no step waits for the GPU."""

import re
import sys

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL, assert_same_losses, losses_of, metrics_of, shell, train, trained

from engine.score_meter import ScoreMeter
from ranks.process import Process

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")

FLAGS = (
    "--mini-batch-size=500 --test-mini-batch-size=330 --test-freq=1000 --print-freq=1 --nepochs=2"
    " --memory-map"
).split()
OPTIMIZERS = {
    "sgd": "",
    "adagrad": "--optimizer=adagrad --learning-rate=0.01",
    "rwsadagrad": "--optimizer=rwsadagrad --learning-rate=0.01",
}
AS_ON_THE_CPU = {
    "plain": "",
    "operators": "--triton=false",
    "graphs": "--cuda-graphs",
    "itself": "--cuda-graphs --arch-interaction-itself",
    "cat": "--arch-interaction-op=cat",
    "qr": "--cuda-graphs --qr-flag",
    "qr concat": "--qr-flag --qr-operation=concat --arch-mlp-bot=13-64-32",
    "md": "--cuda-graphs --md-flag",
    "md, operators": "--triton=false --md-flag --md-round-dims",
    "no copy stream": "--copy-stream=false --pin-memory=false --fused-optimizer=false",
    "not filled": "--cuda-graphs --static-shapes=false",
}
ONLY_A_GPUS = ("--cuda-graphs", "--triton=false")


def runs(data, flags):
    """The results of a run on the GPU and of the same run on the CPU."""
    argv = [*CRITEO_MODEL, *FLAGS, f"--data_path={data}", *flags.split()]
    plain = [word for word in argv if word not in ONLY_A_GPUS]
    return train(*argv, "--use-gpu"), train(*plain)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", AS_ON_THE_CPU)
def test_losses_and_metrics_are_the_cpus(name, optimizer, kaggle):
    got, want = runs(kaggle, f"{AS_ON_THE_CPU[name]} {OPTIMIZERS[optimizer]}")
    assert got.status == want.status == 0, got.err
    assert_same_losses(got.losses, want.losses)
    for one, other in zip(metrics_of(got.out), metrics_of(want.out), strict=True):
        assert one == pytest.approx(other, abs=5e-4)


@pytest.mark.parametrize("flags", ["--tf32", "--amp=bf16", "--amp=fp16"])
@pytest.mark.parametrize("graphs", ["", "--cuda-graphs"])
def test_lower_precision_comes_near_float32(flags, graphs, kaggle):
    argv = [*CRITEO_MODEL, *FLAGS, f"--data_path={kaggle}", "--use-gpu"]
    got, want = train(*argv, flags, *graphs.split()), train(*argv)
    assert got.status == 0, got.err
    for one, other in zip(got.losses, want.losses, strict=True):
        assert one == pytest.approx(other, rel=5e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "flags",
    ["", "--amp=fp16", "--cuda-graphs --amp=bf16", "--triton=false", "--qr-flag", "--md-flag"],
)
def test_nothing_waits_inside_a_step(flags, optimizer, kaggle):
    seldom = ["--print-freq=1000", "--test-freq=-1", "--nepochs=1", "--num-batches=6"]
    words = f"{flags} {OPTIMIZERS[optimizer]}".split()
    trainer, _ = trained(
        *CRITEO_MODEL, *FLAGS, f"--data_path={kaggle}", "--use-gpu", *seldom, *words
    )
    batches = [trainer.data.train[number].pin_memory() for number in range(4)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for it, batch in enumerate(batches, 1):
            trainer.train_step(batch, it)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_model_goes_from_the_gpu_to_the_cpu_and_a_run_with_graphs_is_resumed(kaggle, tmp_path):
    model = tmp_path / "model.pth"
    argv = [*CRITEO_MODEL, *FLAGS, f"--data_path={kaggle}"]
    gpu = [*argv, "--use-gpu", "--cuda-graphs"]
    whole = train(*gpu)
    saved = train(*gpu, "--nepochs=1", f"--save-model={model}")
    resumed = train(*gpu, f"--load-model={model}")
    assert_same_losses(resumed.losses, whole.losses[13:])
    on_cpu = train(*argv, f"--load-model={model}", "--inference-only")
    assert metrics_of(on_cpu.out)[-1]["auc"] == pytest.approx(
        metrics_of(saved.out)[-1]["auc"], abs=2e-4
    )


def test_metrics_of_scores_on_the_gpu_are_the_cpus():
    random = torch.Generator().manual_seed(1)
    scores = torch.rand(100_000, 1, generator=random)
    labels = (torch.rand(100_000, 1, generator=random) < scores).float()
    found = []
    for device in ("cuda", "cpu"):
        process = Process(0, 1, 0, torch.device(device), "gloo")
        meter = ScoreMeter(process)
        meter.add(scores.to(device), labels.to(device))
        found.append(meter.metrics().numbers())
    assert np.allclose(*found, rtol=1e-9, atol=0)


def test_the_profile_has_the_cards_time(kaggle, tmp_path):
    words = [*CRITEO_MODEL, *FLAGS, f"--data_path={kaggle}", "--use-gpu", "--enable-profiling"]
    program = re.sub(r"test/unit/.*", "dlrm_s_pytorch.py", __file__)
    done = shell(sys.executable, program, *words, "--tensor-board-filename=", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(losses_of(done.stdout)) == 26
    assert "_dot_forward" in next(tmp_path.glob("*.json")).read_text()
