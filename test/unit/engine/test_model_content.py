"""A model file can be made without a model, of values that JSON can hold."""

import json
from dataclasses import asdict

import numpy as np
import torch
from conftest import SMALL_MODEL, train

from common.whole_files import write_whole
from engine.model_content import RunFacts, make_content, packed_generators, state_of_rows
from engine.progress import Progress
from engine.streamed_file import StreamedTensor, write_streamed

# the version before took files with these values of their progress, and with no others
NAMES = {
    "epoch", "iter", "num_steps", "resume_iter", "train_loss", "best_accuracy", "best_auc",
    "accuracy", "auc",
}  # fmt: skip


def streamed(tensor):
    return StreamedTensor(tuple(tensor.shape), tensor.split(7))


def assert_alike(one, other):
    """Both are alike, down to the order of keys and the types of values."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        for of_one, of_other in zip(one, other, strict=True):
            assert_alike(of_one, of_other)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other) and one.dtype == other.dtype
    else:
        assert one == other or (one != one and other != other)


def test_plain_values_and_rows_make_the_file_that_a_run_writes(tmp_path):
    path = tmp_path / "m.pth"
    flags = [*SMALL_MODEL, "--optimizer=rwsadagrad", "--weighted-pooling=learned"]
    assert train(*flags, "--test-freq=5", f"--save-model={path}").status == 0
    content = torch.load(path, weights_only=True)
    (group,) = content["opt_state_dict"]["param_groups"]
    name, key, pos, has_gauss, gauss = content["generators"]["numpy"]
    words = {
        "numpy": {
            "bit_generator": name, "state": {"key": key.tolist(), "pos": pos},
            "has_gauss": has_gauss, "gauss": gauss,
        },
        "torch": content["generators"]["torch"].tolist(), "progress": content["progress"],
        "settings": {name: value for name, value in group.items() if name != "params"},
    }  # fmt: skip
    words = json.loads(json.dumps(words))
    progress = Progress(**words["progress"])
    generators = packed_generators(words["numpy"], torch.tensor(words["torch"], dtype=torch.uint8))
    facts = RunFacts(
        progress=progress,
        num_epochs=content["nepochs"],
        num_batches=content["nbatches"],
        num_test_batches=content["nbatches_test"],
        settings=words["settings"],
        generators=generators,
        loss_scale=[],
        joins=content["joins"],
        serving=content["serving"],
    )
    parameters = {
        key: streamed(value) if key[:3] in ("emb", "v_W") else value
        for key, value in content["state_dict"].items()
    }
    saved = content["opt_state_dict"]["state"]
    states = [
        state_of_rows(progress, {key: streamed(v) for key, v in saved[k].items() if key != "step"})
        if k < 8
        else saved[k]
        for k in range(len(parameters))
    ]
    made = make_content(facts, parameters, states)
    write_whole([(tmp_path / "made.pth", lambda file: write_streamed(file, made))])
    assert_alike(torch.load(tmp_path / "made.pth", weights_only=True), content)
    more = [*flags, "--nepochs=2"]
    resumed = [train(*more, f"--load-model={tmp_path}/{name}.pth") for name in ("m", "made")]
    assert resumed[0].losses == resumed[1].losses and len(resumed[1].losses) >= 10


def test_the_version_before_takes_a_files_progress(tmp_path):
    progress = Progress(iter=3, num_steps=3, best_auc=0.75, best_auc_iter=3)
    progress.note_saved()
    facts = RunFacts(
        progress=progress,
        num_epochs=1,
        num_batches=10,
        num_test_batches=0,
        settings={"lr": 0.1},
        generators=packed_generators(np.random.get_state(legacy=False), torch.get_rng_state()),
        loss_scale=[],
        joins=["plain"],
    )
    saved = make_content(facts, {}, [])["progress"]
    assert set(saved) == NAMES and saved == {name: asdict(progress)[name] for name in NAMES}


def test_a_parameter_whose_optimiser_has_no_state_has_no_entry():
    assert state_of_rows(Progress(num_steps=3), {}) == {}
    assert state_of_rows(Progress(num_steps=3), {"sum": torch.ones(2)})["step"] == 3.0
