"""Steps with flat parameters in 16 bits, which only GPUs have; here operators make them."""

import pytest
import torch
from conftest import CRITEO_MODEL, trained

from devices.execution import Execution
from engine.step import StepParts, TrainingStep
from model.lower_mlp import flatten

LOWER = torch.bfloat16


def steps_of(trainer, *changes, skips=False):
    """A step as on a GPU of a trainer's model, whose flags are changed to these."""
    options, model, process = trainer.options, trainer.model, trainer.process
    for name, value in changes:
        setattr(options, name, value)
    model.flat_parameters = flatten([model.bot_l, model.top_l], LOWER, triton=False)
    execution = Execution(lower=LOWER)
    parts = StepParts.from_options(options, model, process.device, execution)
    return TrainingStep(parts, process, execution, trainer.step._chunking, skips)


@pytest.fixture
def trainer(kaggle):
    words = [f"--data_path={kaggle}", "--amp=bf16", "--num-batches=3"]
    return trained(*CRITEO_MODEL, *words)[0]


def losses(trainer, step, numbers, num_sharing=1):
    found = []
    for number in numbers:
        batch = trainer.data.train[number]
        share, _ = step.run(batch, 0.1, num_sharing, (number + 1) % num_sharing == 0)
        found.append(float(share))
    return found


@pytest.mark.parametrize("num_sharing", [1, 2])
@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_steps_are_those_of_the_cpus_way(loss, num_sharing, trainer, kaggle):
    """Only the first loss is that of equal weights to all digits."""
    words = [f"--data_path={kaggle}", "--amp=bf16", "--num-batches=3"]
    other, _ = trained(*CRITEO_MODEL, *words)
    other.options.loss_function = loss
    execution = Execution(lower=LOWER)
    parts = StepParts.from_options(other.options, other.model, other.process.device, execution)
    arguments = other.process, execution, other.step._chunking
    want = losses(other, TrainingStep(parts, *arguments), range(6), num_sharing)
    step = steps_of(trainer, ("loss_function", loss))
    got = losses(trainer, step, range(6), num_sharing)
    assert got == pytest.approx(want, rel=2e-3)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, other.model.state_dict()[name], rtol=0.02, atol=2e-3)


def test_a_step_that_makes_a_parameter_nan_shows_it_in_its_loss(trainer, monkeypatch):
    """The ReLUs of a GPU's products may turn nan into 0."""

    def hiding(bias, inputs, weight):
        return torch.addmm(bias, inputs, weight).nan_to_num(0.0).relu_()

    monkeypatch.setattr(torch, "_addmm_activation", hiding)
    step = steps_of(trainer)
    (first,) = losses(trainer, step, [3])
    with torch.no_grad():
        trainer.model.emb_l.matrices[0].weight[7] = float("nan")
    batch = trainer.data.train[4]
    (second,) = losses(trainer, step, [4])
    assert batch.num_rows and first == first and second != second


def test_a_batch_with_nan_is_skipped_and_leaves_nothing_behind(trainer):
    step = steps_of(trainer, skips=True)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with torch.no_grad():
        trainer.model.emb_l.matrices[0].weight.mul_(float("nan"))
    (loss,) = losses(trainer, step, [3])
    assert loss != loss
    assert not trainer.model.flat_parameters.gradients.any()
    for name, value in trainer.model.state_dict().items():
        assert name.startswith("emb_l") or torch.equal(value, before[name])
