"""--amp: the loss scale beside torch's GradScaler, and what stays float32."""

import numpy as np
import pytest
import torch
from conftest import SMALL_MODEL, train, trained
from torch import nn

from optim import loss_scale
from optim.loss_scale import (
    BACKOFF,
    FIRST_SCALE,
    GROWTH,
    HIGHEST_SCALE,
    LOWEST_SCALE,
    LossScale,
    NoScale,
    make_loss_scale,
)

CPU = torch.device("cpu")


def grad_scaler():
    return torch.amp.GradScaler(
        "cpu",
        init_scale=FIRST_SCALE,
        growth_factor=GROWTH,
        backoff_factor=BACKOFF,
        growth_interval=loss_scale.GROWTH_INTERVAL,
    )


@pytest.mark.parametrize("interval", [3, 2000])
def test_the_scale_and_the_skipped_steps_are_grad_scalers(interval, monkeypatch):
    """Overflows at random steps. torch's own is not used as it makes the host wait."""
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", interval)
    ours, theirs = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    scale, scaler = LossScale(CPU), grad_scaler()
    sgd = [torch.optim.SGD([one], lr=0.1) for one in (ours, theirs)]
    random = np.random.default_rng(0)
    for _ in range(40):
        wanted = torch.tensor(random.random(4), dtype=torch.float32)
        if random.random() < 0.2:
            wanted[random.integers(4)] = [float("inf"), float("nan"), -float("inf")][
                random.integers(3)
            ]
        ours.grad = scale.scale_gradient(wanted.clone())
        scale.unscale_([ours.grad])
        scale.zero_if_overflown([ours.grad])
        sgd[0].step()
        scale.end_step()
        scaler.scale(torch.ones(()))
        theirs.grad = wanted * scaler.get_scale()
        scaler.step(sgd[1])
        scaler.update()
        torch.testing.assert_close(ours, theirs)
        assert float(scale.scale) == scaler.get_scale()
    assert float(scale.scale) != FIRST_SCALE


def test_an_overflow_anywhere_spares_all_and_is_forgotten_at_the_end():
    scale = LossScale(CPU)
    scale.unscale_([torch.tensor([float("inf")])])
    scale.unscale_([torch.ones(3)])
    kept = torch.ones(2)
    scale.zero_if_overflown([kept])
    assert kept.tolist() == [0, 0] and float(scale.overflow_counts()[0]) > 0
    scale.end_step()
    kept = torch.ones(2)
    scale.zero_if_overflown([kept])
    assert kept.tolist() == [1, 1]


def test_only_float16_is_scaled():
    assert make_loss_scale(torch.float16, CPU).is_on
    for dtype in (None, torch.bfloat16):
        scale = make_loss_scale(dtype, CPU)
        assert type(scale) is NoScale and scale.state() == [] and scale.overflow_counts() == []
        ones = torch.ones(2)
        assert scale.scale_gradient(ones) is ones


def test_the_scale_goes_on_in_a_resumed_run(tmp_path, monkeypatch):
    path = tmp_path / "m.pth"
    flags = [*SMALL_MODEL, "--amp=fp16", "--num-batches=12"]
    monkeypatch.setattr(loss_scale, "GROWTH_INTERVAL", 5)
    whole, result = trained(*flags, "--nepochs=2")
    first, _ = trained(*flags, f"--save-model={path}")
    saved = torch.load(path, weights_only=True)["loss_scale"]
    assert saved == first.state.scale.state() and saved[0] > FIRST_SCALE and saved[1] > 0
    resumed, rest = trained(*flags, "--nepochs=2", f"--load-model={path}")
    assert resumed.state.scale.state() == whole.state.scale.state()
    assert rest.losses == result.losses[12:]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--optimizer=adagrad --learning-rate=0.01",
        "--weighted-pooling=learned --mlperf-grad-accum-iter=2",
        "--arch-interaction-op=cat --arch-interaction-itself",
    ],
)
def test_tables_and_their_state_stay_float32(amp, flags):
    full, result = trained(*SMALL_MODEL, *flags.split())
    trainer, lower = trained(*SMALL_MODEL, *flags.split(), f"--amp={amp}")
    (matrix,), (other_matrix,) = trainer.model.emb_l.matrices, full.model.emb_l.matrices
    for name, tensor in matrix.row_tensors().items():
        assert tensor.dtype == torch.float32
        other = other_matrix.row_tensors()[name]
        if "adagrad" not in flags:  # it steps as far where a small gradient has turned around
            assert (tensor - other).norm() < 0.03 * other.norm()
    assert lower.losses != result.losses
    for step, (one, other) in enumerate(zip(lower.losses, result.losses, strict=True)):
        near = 2e-2 if "adagrad" in flags and step > 2 else 5e-3
        assert one[3] == pytest.approx(other[3], rel=near)


def test_the_scale_stays_a_number_that_can_be_undone():
    """However many steps overflow, the first that does not changes something again."""
    scale = LossScale(CPU)
    for _ in range(200):
        scale.unscale_([torch.tensor([float("inf")])])
        scale.end_step()
    assert scale.take_skipped() == (200, 200, LOWEST_SCALE) and scale.take_skipped()[:2] == (0, 0)
    gradient = scale.scale_gradient(torch.ones(1))
    scale.unscale_([gradient])
    scale.zero_if_overflown([gradient])
    assert gradient.tolist() == [1.0]
    scale.restore([HIGHEST_SCALE, loss_scale.GROWTH_INTERVAL - 1])
    scale.end_step()
    assert float(scale.scale) == HIGHEST_SCALE


def test_a_batch_that_is_dropped_leaves_the_overflows_of_the_others():
    """The chip's flag may be set in its forward pass; batches before it share the step."""
    scale = LossScale(CPU)
    scale.begin_batch()
    scale.overflows.add_(1)
    scale.drop_batch()
    kept = torch.ones(2)
    scale.zero_if_overflown([kept])
    assert kept.tolist() == [1, 1]
    scale.unscale_([torch.tensor([float("inf")])])
    scale.begin_batch()
    scale.overflows.add_(1)
    scale.drop_batch()
    scale.zero_if_overflown([kept])
    assert kept.tolist() == [0, 0]


def test_a_scale_goes_on_with_what_its_next_line_tells():
    scale, other = LossScale(CPU), LossScale(CPU)
    for gradient in (float("inf"), float("inf"), 1.0):
        scale.unscale_([torch.tensor([gradient])])
        scale.end_step()
    state = scale.exact_state()
    other.restore_exact(state)
    assert other.exact_state() == state == [FIRST_SCALE / 4, 1.0, 2.0, 3.0]
    assert "2 of 3 steps overflowed in float16" in other.take_warning()
    assert other.state() == state[:2] and other.take_warning() == ""
    ones = scale.scale_gradient(torch.ones(1))
    other.unscale_([ones])
    assert ones.tolist() == [1.0]


def test_steps_that_change_nothing_are_told(monkeypatch):
    monkeypatch.setattr(loss_scale, "FIRST_SCALE", 2.0**50)
    result = train(*SMALL_MODEL, "--amp=fp16", "--print-freq=5")
    assert "warning: 5 of 5 steps overflowed in float16 and changed nothing" in result.out
    monkeypatch.undo()
    assert "overflowed" not in train(*SMALL_MODEL, "--amp=fp16", "--print-freq=5").out


@pytest.mark.parametrize("first, then", [("off", "fp16"), ("fp16", "bf16"), ("bf16", "off")])
def test_a_run_goes_on_in_another_precision(first, then, tmp_path):
    flags = [*SMALL_MODEL, "--num-batches=6"]
    train(*flags, f"--amp={first}", f"--save-model={tmp_path / 'm.pth'}")
    go_on = [f"--load-model={tmp_path / 'm.pth'}", "--nepochs=2"]
    resumed = train(*flags, f"--amp={then}", *go_on)
    assert resumed.status == 0 and len(resumed.losses) == 6
