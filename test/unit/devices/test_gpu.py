"""On an NVIDIA GPU the program computes the CPU's numbers, and no step waits for the GPU."""

import re
import sys

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL, assert_same_losses, losses_of, metrics_of, shell, train, trained

from bench.gpu_cases import TABLES, TARGETS, Setting, make_rows
from engine.model_file import full_state_dict
from engine.score_meter import ScoreMeter
from optim.row_optimizers import TABLE_OPTIMIZERS
from ranks.process import Process

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")

FLAGS = (
    "--mini-batch-size=500 --test-mini-batch-size=330 --test-freq=1000 --print-freq=1 --nepochs=2"
    " --memory-map --mlperf-events=false"
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
DEVICE = "cuda"
# Adagrad divides gradients by their own size, and in its first step leaves but their sign. Where a
# gradient's terms cancel to less than their rounding, that sign is rounding's, and moves a weight
# by the learning rate either way. Losses then part: on the CPU, if every gradient is changed by
# 6e-8 of its tensor's largest, by at most 3e-4 of the loss in the first 9 steps and 0.05 in 26.
FIRST_STEPS, FIRST_RELATIVE, LATER_RELATIVE, AUC_APART = 5, 1e-3, 0.2, 0.05
OPERATORS = ("--triton=false",)
ONLY_A_GPUS = ("--cuda-graphs", *OPERATORS)


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
    if optimizer != "sgd":
        assert_losses_near(got.losses, want.losses)
        assert got.tests[-1]["auc"] == pytest.approx(want.tests[-1]["auc"], abs=AUC_APART)
        return
    assert_same_losses(got.losses, want.losses)
    for one, other in zip(metrics_of(got.out), metrics_of(want.out), strict=True):
        assert one == pytest.approx(other, abs=5e-4)


def assert_losses_near(got, want):
    assert got[0][3] == pytest.approx(want[0][3], rel=1e-5), "no update has come before it"
    assert [line[:3] for line in got] == [line[:3] for line in want]
    for step, (one, other) in enumerate(zip(got, want, strict=True)):
        relative = FIRST_RELATIVE if step < FIRST_STEPS else LATER_RELATIVE
        assert one[3] == pytest.approx(other[3], rel=relative), step


@pytest.mark.parametrize("optimizer", ["adagrad", "rwsadagrad"])
def test_adagrads_updates_of_rows_are_the_cpus(optimizer):
    """Where sums of gradients are larger than their rounding: their sign is known."""
    random = torch.Generator().manual_seed(1)
    weight, lr, dim = torch.randn(300, 64, generator=random), 0.01, 64
    steps = [torch.randint(300, (2000,), generator=random) for _ in range(3)]
    gradients = [torch.randn(2000, dim, generator=random) for _ in steps]
    found = []
    for device in (DEVICE, "cpu"):
        rule = TABLE_OPTIMIZERS[optimizer](weight.clone().to(device))
        for rows, own in zip(steps, gradients, strict=True):
            rule.apply(rows.to(device), own.to(device), lr)
        found.append([rule.weight.cpu(), *(state.cpu() for state in rule.state.values())])
    sums = [
        torch.zeros(300, dim, dtype=torch.float64).index_add_(0, rows, own.double())
        for rows, own in zip(steps, gradients, strict=True)
    ]
    known = torch.stack(sums).abs().amin(0) > 1e-3
    assert known.double().mean() > 0.99
    for one, other in zip(*found, strict=True):
        is_known = known if one.shape == known.shape else slice(None)
        torch.testing.assert_close(one[is_known], other[is_known], rtol=1e-5, atol=1e-6)
    assert (found[0][0] - found[1][0]).abs().max() < 2.1 * lr * len(steps)


@pytest.fixture(scope="module")
def criteo_rows(tmp_path_factory):
    """Rows for two full batches of the published model, of tables with at most 100,000 rows."""
    folder, target = tmp_path_factory.mktemp("rows"), TARGETS[0]
    tables = [min(rows, 100_000) for rows in TABLES]
    make_rows(Setting("cpu", folder, None, tables, 2 * target.case.batch, 1))
    return folder, target.case


def parameters_after_a_step(criteo_rows, *flags):
    folder, case = criteo_rows
    trainer, _ = trained(
        f"--data_path={folder}",
        "--memory-map",
        "--loss-function=bce",
        f"--arch-sparse-feature-size={case.dim}",
        f"--arch-mlp-bot={case.bottom}",
        f"--arch-mlp-top={case.top}",
        f"--mini-batch-size={case.batch}",
        "--num-batches=1",
        "--test-freq=-1",
        *(["--use-gpu"] if DEVICE == "cuda" else []),
        *flags,
    )
    return {name: value.double() for name, value in full_state_dict(trainer.state).items()}


# how far updates are apart, as a share of them: float32's and bfloat16's rounding of sums
@pytest.mark.parametrize("flags, share", [("", 1e-4), ("--amp=bf16", 3e-2)])
def test_the_kernels_update_a_full_batch_as_the_operators_do(flags, share, criteo_rows):
    """One step from the same values, whose rate makes an update of a rare row 1e-4 and more."""
    still = parameters_after_a_step(criteo_rows, "--learning-rate=1e-30")
    step = (*flags.split(), "--learning-rate=100")
    got = parameters_after_a_step(criteo_rows, *step)
    want = parameters_after_a_step(criteo_rows, *step, *OPERATORS)
    assert got.keys() == want.keys() == still.keys()
    for name, before in still.items():
        update, expected = got[name] - before, want[name] - before
        assert expected.norm() > 0, name
        assert (update - expected).norm() <= share * expected.norm(), name
        if name.startswith("emb_l") and not flags:
            torch.testing.assert_close(update, expected, rtol=1e-3, atol=2e-6)


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
