"""Model files: the original's keys, the best model, resumed equals uninterrupted, wrong files."""

import os
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL, ROOT, SMALL_MODEL, largest_file, shell, train
from placements import MOVES, PLACEMENTS, fill, held, state_on
from thread_ranks import ThreadRanks

import dlrm_s_pytorch as dlrm
from engine.model_file import load_model_file, save_model_file
from engine.progress import Progress
from model.compression import compression_from_options
from ranks.process import Process

CONTRACT_KEYS = {
    "epoch", "iter", "nepochs", "nbatches", "nbatches_test", "state_dict", "train_loss",
    "total_loss", "test_acc", "test_auc", "opt_state_dict",
}  # fmt: skip
OPTIMIZERS = ["sgd", "adagrad", "rwsadagrad"]


def load(path):
    return torch.load(path, weights_only=True)


def assert_same_model(one, other):
    one, other = load(one), load(other)
    assert set(one["state_dict"]) == set(other["state_dict"])
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    states = one["opt_state_dict"]["state"], other["opt_state_dict"]["state"]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][number][name]))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_keys_and_optimiser_state_are_torchs(tmp_path, optimizer):
    path = tmp_path / "model.pth"
    flags = [f"--optimizer={optimizer}", "--weighted-pooling=learned", f"--save-model={path}"]
    assert train(*SMALL_MODEL, *flags).status == 0
    content = load(path)
    assert CONTRACT_KEYS <= set(content)
    assert (content["epoch"], content["iter"], content["nepochs"], content["nbatches"]) == (
        0,
        10,
        1,
        10,
    )
    state = content["state_dict"]
    shapes = [state[f"emb_l.{t}.weight"].shape for t in range(4)] + [
        state[f"v_W_l.{t}"].shape for t in range(4)
    ]
    dense = [state[f"{mlp}.{layer}.{kind}"].shape
             for mlp, layers in (("bot_l", (0, 2)), ("top_l", (0, 2, 4)))
             for layer in layers for kind in ("weight", "bias")]  # fmt: skip
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in [*shapes, *dense]]
    assert len(state) == len(parameters)
    saved = content["opt_state_dict"]
    assert saved["param_groups"][0]["params"] == list(range(len(parameters)))
    if optimizer == "sgd":
        assert saved["state"] == {}
        torch.optim.SGD(parameters, lr=1).load_state_dict(saved)
        return
    assert all(float(entry["step"]) == 10 for entry in saved["state"].values())
    name = "sum" if optimizer == "adagrad" else "momentum"
    for number, parameter in enumerate(parameters):
        entry = saved["state"][number]
        key = name if number < 4 else "sum"
        rowwise = optimizer == "rwsadagrad" and number < 4
        assert entry[key].shape == (parameter.shape[:1] if rowwise else parameter.shape)
    if optimizer == "adagrad":
        torch.optim.Adagrad(parameters, lr=1).load_state_dict(saved)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_file_is_as_torch_writes_it(tmp_path, optimizer):
    """Its checksums are right, and torch.save makes the same bytes of what it holds."""
    path = tmp_path / "model.pth"
    flags = [f"--optimizer={optimizer}", "--qr-flag", f"--save-model={path}"]
    assert train(*SMALL_MODEL, *flags).status == 0
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    with open(tmp_path / "again.pth", "wb") as file:
        torch.save(load(path), file)
    assert path.read_bytes() == (tmp_path / "again.pth").read_bytes()


@pytest.mark.parametrize(
    "num_ranks, placement",
    [(1, "whole"), pytest.param(2, "whole", marks=pytest.mark.slow), (3, "cut")],
)
def test_saving_needs_memory_for_a_block_of_rows(tmp_path, num_ranks, placement):
    """Each rank's memory grows by less than 100 MB, while the tables have 300."""
    path = tmp_path / "model.pth"
    program = ROOT / "test" / "unit" / "saving_program.py"
    done = shell(sys.executable, program, num_ranks, path, placement)
    assert done.returncode == 0, done.stderr
    assert path.stat().st_size > 290e6
    path.unlink()
    grown = [float(line) for line in done.stdout.split()]
    assert len(grown) == num_ranks and max(grown) < 100, grown


@pytest.mark.parametrize("one, other", MOVES, ids=map("-".join, MOVES))
@pytest.mark.parametrize("kind", ["", "--weighted-pooling=learned", "--qr-flag", "--md-flag"])
def test_a_file_is_the_same_for_every_placement_and_loads_into_every_other(
    tmp_path, kind, one, other
):
    """Three ranks write it, two read it; one rank alone would have written the same bytes."""
    options = dlrm.parse_options([*SMALL_MODEL, *kind.split(), "--qr-threshold=9"])
    tables = compression_from_options(options).make_tables((300, 7, 30, 2))

    def state(process, place):
        learned = options.weighted_pooling == "learned"
        return state_on(process, PLACEMENTS[place], tables, "rwsadagrad", learned)

    def save(process, place, path):
        filled = state(process, place)
        fill(filled.tables)
        save_model_file(path, filled, Progress(iter=10, num_steps=10))

    def loaded(process):
        empty = state(process, other)
        load_model_file(str(path), empty, 1)
        found = held(empty.tables)
        fill(empty.tables)
        return found, held(empty.tables)

    path, alone = tmp_path / "m.pth", tmp_path / "alone.pth"
    ThreadRanks(3).run(lambda process: save(process, one, str(path)))
    save(Process(0, 1, 0, torch.device("cpu"), "gloo"), "whole", str(alone))
    assert_same_model(path, alone)
    for found, wanted in ThreadRanks(2).run(loaded):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(found[key], value), key


def test_a_rank_that_has_gone_is_not_told_as_a_fault_of_the_file(tmp_path):
    program = ROOT / "test" / "unit" / "saving_program.py"
    done = shell(sys.executable, program, 2, tmp_path / "model.pth", "whole", 1)
    assert "RankGoneError: rank 1 has ended" in done.stderr
    assert "cannot write" not in done.stderr and os.listdir(tmp_path) == []


COMPRESSED = {
    "--qr-flag --qr-threshold=150": {0: ["weight"], 1: ["weight_q", "weight_r"]},
    "--md-flag --md-threshold=150": {0: ["weight"], 1: ["embs.weight", "proj.weight"]},
}


@pytest.mark.parametrize("flags", COMPRESSED)
def test_parts_of_compressed_tables_are_numbered_as_torchs_optimiser_does(tmp_path, flags):
    """Table by table, and in a table as they are drawn; then the MLPs."""
    path = tmp_path / "model.pth"
    argv = [*SMALL_MODEL, *flags.split(), "--optimizer=adagrad", f"--save-model={path}"]
    assert train(*argv).status == 0
    content = load(path)
    state, parts = content["state_dict"], COMPRESSED[flags]
    of_table = [parts[0], parts[1], parts[1], parts[0]]  # of 100, 200, 300 and 40 rows
    keys = [f"emb_l.{table}.{part}" for table, names in enumerate(of_table) for part in names]
    assert [key for key in state if key.startswith("emb_l.")] == keys
    parameters = [torch.nn.Parameter(state[key].clone()) for key in state]
    torch.optim.Adagrad(parameters, lr=1).load_state_dict(content["opt_state_dict"])
    for number, parameter in enumerate(parameters):
        entry = content["opt_state_dict"]["state"][number]
        assert entry["sum"].shape == parameter.shape and entry["sum"].abs().sum() > 0


def test_a_file_holds_the_current_rate_wherever_the_step_is_taken(tmp_path):
    """On one CPU sgd steps inside the backward pass; with accumulation it steps after it."""
    warm_up = ["--lr-num-warmup-steps=100", f"--save-model={tmp_path}/m.pth"]
    for accumulate in (1, 2):
        flags = [*SMALL_MODEL, *warm_up, f"--mlperf-grad-accum-iter={accumulate}"]
        assert train(*flags).status == 0
        saved = load(tmp_path / "m.pth")["opt_state_dict"]["param_groups"][0]["lr"]
        steps = 10 // accumulate
        assert saved == pytest.approx(0.1 * steps / 100)


RESUMED = {
    "sgd": [
        "--learning-rate=0.1", "--lr-num-warmup-steps=9", "--lr-decay-start-step=15",
        "--lr-num-decay-steps=30",
    ],
    "adagrad": ["--optimizer=adagrad", "--weighted-pooling=learned"],
    "rwsadagrad": ["--optimizer=rwsadagrad"],
    "accumulation": ["--mlperf-grad-accum-iter=4", "--optimizer=adagrad"],
    "quotient-remainder": ["--qr-flag", "--qr-threshold=50", "--optimizer=rwsadagrad"],
    "mixed dimensions": ["--md-flag", "--md-threshold=150", "--optimizer=rwsadagrad"],
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("stop", [("1", "10"), ("2", "5")])
def test_resumed_equals_uninterrupted(tmp_path, name, stop):
    """Lines and parameters are the same, whether it stopped at an epoch's end or in the middle."""
    nepochs, test_freq = stop
    flags = [*SMALL_MODEL, *RESUMED[name], f"--test-freq={test_freq}"]
    whole = train(*flags, "--nepochs=3", f"--save-model={tmp_path}/end.pth", "--test-freq=-1")
    part = tmp_path / "part.pth"
    save_at(part, at=(int(nepochs) - 1, int(test_freq)), argv=[*flags, f"--nepochs={nepochs}"])
    resumed = train(
        *flags,
        "--nepochs=3",
        f"--load-model={part}",
        f"--save-model={tmp_path}/resumed.pth",
        "--test-freq=-1",
    )
    assert resumed.status == 0, resumed.err
    stopped = (int(nepochs) - 1, int(test_freq))
    assert resumed.losses == [line for line in whole.losses if (line[2], line[0]) > stopped]
    assert_same_model(tmp_path / "end.pth", tmp_path / "resumed.pth")


def save_at(path, at, argv):
    """Save at that (epoch, it), whatever the evaluation there says."""
    original = dlrm.Trainer.evaluate_and_save

    def save_here(self):
        if (self.progress.epoch, self.progress.iter) == at:
            save_model_file(str(path), self.state, self.progress)

    dlrm.Trainer.evaluate_and_save = save_here
    try:
        assert train(*argv).status == 0
    finally:
        dlrm.Trainer.evaluate_and_save = original


def test_resuming_a_finished_run_ends_and_more_epochs_continue(tmp_path):
    path = tmp_path / "model.pth"
    train(*SMALL_MODEL, f"--save-model={path}")
    done = train(*SMALL_MODEL, f"--load-model={path}")
    assert done.status == 0 and "nothing left to train" in done.out and not done.losses
    more = train(*SMALL_MODEL, f"--load-model={path}", "--nepochs=2")
    assert [line[2] for line in more.losses] == [1] * 10


def test_generators_and_best_metrics_are_restored(tmp_path):
    path = tmp_path / "model.pth"
    train(*SMALL_MODEL, "--test-freq=5", f"--save-model={path}", "--mlperf-logging")
    content = load(path)
    assert content["progress"]["best_auc"] == content["test_auc"]
    content["generators"]["torch"] = torch.manual_seed(7).get_state()
    torch.save(content, path)
    train(*SMALL_MODEL, f"--load-model={path}", "--nepochs=2", "--num-batches=10")
    keys = content["generators"]["numpy"][1].numpy()
    np.testing.assert_array_equal(np.random.get_state()[1], keys.astype(np.uint32))
    assert torch.equal(torch.get_rng_state(), content["generators"]["torch"])


def test_only_an_evaluation_that_is_the_best_so_far_saves(tmp_path, kaggle, monkeypatch):
    path, stored = tmp_path / "m.pth", []

    class Watched(dlrm.Trainer):
        def evaluate_and_save(self):
            super().evaluate_and_save()
            stored.append(load(path)["test_auc"])

    monkeypatch.setattr(dlrm, "Trainer", Watched)
    flags = [*CRITEO_MODEL, f"--data_path={kaggle}", f"--save-model={path}", "--print-freq=1000"]
    result = train(*flags, "--learning-rate=1.5", "--nepochs=3", "--test-freq=6")
    aucs = [test["auc"] for test in result.tests]
    best_so_far = [max(aucs[: k + 1]) for k in range(len(aucs))]
    assert len(set(best_so_far)) < len(aucs), "all evaluations were the best so far"
    np.testing.assert_allclose(stored, best_so_far, atol=6e-5)  # of four printed decimals
    assert [test["best_auc"] for test in result.tests] == best_so_far


def test_inference_only_repeats_the_evaluation_of_the_saved_model(tmp_path, kaggle):
    data = [*CRITEO_MODEL, f"--data_path={kaggle}"]
    trained = train(*data, "--test-freq=47", f"--save-model={tmp_path}/m.pth")
    found = train(*data, f"--load-model={tmp_path}/m.pth", "--inference-only")
    assert found.status == 0 and found.tests == trained.tests[-1:] and not found.losses
    assert found.out.startswith("Testing at - 47/47 of epoch 0,\n")
    other = train(*data, f"--load-model={tmp_path}/m.pth", "--inference-only", "--eval-split=val")
    assert other.status == 0 and other.tests != found.tests


def test_a_file_of_the_original_loads(tmp_path):
    """Its metrics are numpy scalars, it has no progress, and it may be in torch's old format."""
    path = tmp_path / "model.pth"
    train(*SMALL_MODEL, f"--save-model={path}", "--optimizer=adagrad")
    content = load(path)
    for key in ("progress", "generators"):
        del content[key]
    content |= {
        "test_acc": np.float64(0.5),
        "train_loss": np.float32(0.1),
        "total_loss": np.int64(0),
        "iter": 4,
    }
    for old_format in (False, True):
        torch.save(content, path, _use_new_zipfile_serialization=not old_format)
        result = train(*SMALL_MODEL, f"--load-model={path}", "--optimizer=adagrad")
        assert result.status == 0, result.err
        assert [line[0] for line in result.losses] == [5, 6, 7, 8, 9, 10]


def test_a_file_that_does_not_fit_names_the_table_or_layer_and_both_shapes(tmp_path):
    path = tmp_path / "model.pth"
    train(*SMALL_MODEL, f"--save-model={path}")

    def message(*flags):
        result = train(*SMALL_MODEL, f"--load-model={path}", "--nepochs=2", *flags)
        assert result.status == 2 and result.err.count("\n") == 1, result.err
        return result.err

    shapes = message("--arch-embedding-size=100-200-301-40")
    assert "emb_l.2.weight has shape (300, 16) there, (301, 16) in this model" in shapes
    assert "top_l.0.weight has shape (64, 26) there, (60, 26)" in message("--arch-mlp-top=60-32-1")
    assert "has no v_W_l.0" in message("--weighted-pooling=learned")
    assert "was not trained with --optimizer=adagrad" in message("--optimizer=adagrad")
    assert "10 batches an epoch, this run has 20" in message("--mini-batch-size=32")


def test_a_resumed_run_keeps_a_better_model(tmp_path):
    """Nothing better was found after the best model was loaded: the file stays as it was."""
    path = tmp_path / "m.pth"
    flags = ["--round-targets=true", "--data-size=40", "--mini-batch-size=4", "--test-freq=5"]
    flags += ["--learning-rate=0.001", f"--save-model={path}"]
    assert train(*flags).status == 0
    before = path.read_bytes()
    assert train(*flags, f"--load-model={path}", "--nepochs=2").status == 0
    assert path.read_bytes() == before


EVALUATED = [*SMALL_MODEL, "--test-freq=10", "--mlperf-logging"]


def put_auc(path, auc):
    content = load(path)
    content["test_auc"] = content["progress"]["best_auc"] = auc
    torch.save(content, path)
    return path.read_bytes()


def test_a_fresh_run_moves_a_better_model_once(tmp_path):
    path = tmp_path / "m.pth"
    flags = [*EVALUATED, "--test-freq=1", "--nepochs=2", f"--save-model={path}"]
    assert train(*flags).status == 0 and os.listdir(tmp_path) == ["m.pth"]
    aucs = [test["auc"] for test in train(*flags[:-1]).tests]
    assert sum(auc > max(aucs[:k], default=0) for k, auc in enumerate(aucs)) > 1, "saved once"
    better = put_auc(path, 0.9)
    done = train(*flags)
    assert done.status == 0 and done.out.count(f"{path} held a better model (AUC 0.9000,") == 1
    assert f"this one {aucs[0]:.4f}): moved to {path}.1\n" in done.out
    assert sorted(os.listdir(tmp_path)) == ["m.pth", "m.pth.1"]
    assert (tmp_path / "m.pth.1").read_bytes() == better
    assert load(path)["test_auc"] == pytest.approx(max(aucs), abs=6e-5)


def test_a_run_that_continues_overwrites_the_file_as_before(tmp_path):
    first, path = tmp_path / "first.pth", tmp_path / "m.pth"
    for name in (first, path):
        assert train(*EVALUATED, f"--save-model={name}").status == 0
    put_auc(path, 0.9)
    flags = [*EVALUATED, "--test-freq=-1", "--nepochs=2"]
    done = train(*flags, f"--load-model={first}", f"--save-model={path}")
    assert done.status == 0 and "held" not in done.out and load(path)["epoch"] == 1
    assert sorted(os.listdir(tmp_path)) == ["first.pth", "m.pth"]


def test_the_last_line_says_what_is_in_the_file(tmp_path):
    path = tmp_path / "m.pth"

    def last_line(*flags):
        done = train(*flags)
        assert done.status == 0
        return done.out.splitlines()[-1]

    evaluated = last_line(*EVALUATED, f"--save-model={path}")
    auc = load(path)["test_auc"]
    assert evaluated == f"best AUC {auc:.4f} at it 10 of epoch 0, saved in {path}"
    assert last_line(*EVALUATED) == (
        f"best AUC {auc:.4f} at it 10 of epoch 0, not saved (no --save-model)"
    )
    assert last_line(*SMALL_MODEL, f"--save-model={tmp_path}/new.pth") == (
        f"model of it 10 of epoch 0 saved in {tmp_path}/new.pth"
    )
    put_auc(path, 0.9)
    more = [f"--load-model={path}", "--nepochs=2", f"--save-model={path}"]
    assert last_line(*EVALUATED, *more) == (
        f"best AUC 0.9000 before this run, nothing better to save in {path}"
    )
    assert last_line(*SMALL_MODEL).startswith("Finished training it 10/10")


def test_a_resumed_run_without_evaluations_saves_its_last_model(tmp_path):
    """The loaded file's best metrics are not those of a model that this run has made."""
    flags = [*SMALL_MODEL, "--test-freq=10"]
    assert train(*flags, f"--save-model={tmp_path}/first.pth").status == 0
    resumed = [*SMALL_MODEL, f"--load-model={tmp_path}/first.pth", f"--save-model={tmp_path}/m.pth"]
    for nepochs, more in ((2, []), (3, ["--performance", "--test-freq=10"])):
        assert train(*resumed, f"--nepochs={nepochs}", *more).status == 0
        assert load(tmp_path / "m.pth")["epoch"] >= 1
        (tmp_path / "m.pth").unlink()


def test_a_file_of_a_later_epoch_than_the_runs_leaves_nothing_to_train(tmp_path):
    path = tmp_path / "first.pth"
    train(*SMALL_MODEL, "--nepochs=2", f"--save-model={path}")
    content = load(path)
    content["iter"] = content["progress"]["iter"] = content["progress"]["resume_iter"] = 5
    content["progress"]["num_steps"] = 15
    torch.save(content, path)
    done = train(*SMALL_MODEL, f"--load-model={path}", f"--save-model={tmp_path}/m.pth")
    assert done.status == 0 and "nothing left to train" in done.out
    assert os.listdir(tmp_path) == ["first.pth"]


def test_a_link_stays_a_link_and_its_target_is_written(tmp_path):
    (tmp_path / "models").mkdir()
    link, target = tmp_path / "m.pth", tmp_path / "models" / "first.pth"
    link.symlink_to(target)
    for _ in ("the target does not exist yet", "it does"):
        assert train(*SMALL_MODEL, f"--save-model={link}").status == 0
        assert link.is_symlink() and not target.is_symlink() and load(target)["iter"] == 10
        assert os.listdir(tmp_path / "models") == ["first.pth"]


def name_of_bytes(folder, length):
    return folder / ("m" * length)


def make_fifo(folder):
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def make_link(folder, target):
    (folder / "link").symlink_to(target)
    return folder / "link"


def make_folder_beside(folder):
    (folder / "m.partial").mkdir()
    return folder / "m"


NO_PLACES = {
    "device": (lambda folder: "/dev/null", "is a device, pipe or socket"),
    "link to a device": (lambda folder: make_link(folder, "/dev/null"), "is a device, pipe or"),
    "pipe": (make_fifo, "is a device, pipe or socket"),
    "link to a folder": (lambda folder: make_link(folder, folder), "is a folder: name a"),
    "link into no folder": (lambda folder: make_link(folder, "no/m.pth"), "its folder does not"),
    "link to itself": (lambda folder: make_link(folder, "link"), "link"),
    "long name": (lambda folder: name_of_bytes(folder, 255), "File name too long"),
    "a folder where it is written first": (make_folder_beside, "m.partial is not a regular file"),
}


@pytest.mark.parametrize("kind", NO_PLACES)
def test_a_path_that_cannot_be_saved_to_is_an_error_at_the_start(tmp_path, kind, monkeypatch):
    make, message = NO_PLACES[kind]
    if kind.endswith("device"):  # root could replace it
        monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("the device is replaced"))
    path = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = train(*SMALL_MODEL, f"--save-model={path}")
    assert result.status == 2 and result.err.count("\n") == 1 and not result.losses, result.err
    assert result.err.startswith(f"error: --save-model={path}") and message in result.err
    assert sorted(tmp_path.iterdir()) == before


def test_the_longest_name_that_leaves_room_is_saved_to(tmp_path):
    path = name_of_bytes(tmp_path, 255 - len(".partial"))
    assert train(*SMALL_MODEL, f"--save-model={path}").status == 0
    assert sorted(tmp_path.iterdir()) == [path]


def test_a_threshold_that_the_loaded_model_has_reached_trains_nothing(tmp_path, kaggle):
    flags = [*CRITEO_MODEL, f"--data_path={kaggle}", "--test-freq=10", "--mlperf-auc-threshold=0.4"]
    flags += ["--nepochs=2", f"--save-model={tmp_path}/m.pth"]
    assert len(train(*flags).tests) == 1
    again = train(*flags, f"--load-model={tmp_path}/m.pth")
    assert again.status == 0 and not again.losses and "has reached the threshold" in again.out


@pytest.mark.parametrize("kind", ["text", "empty", "truncated", "foreign", "pickle", "folder"])
def test_a_corrupt_or_foreign_file_is_one_line(tmp_path, kind):
    path = tmp_path / "model.pth"
    if kind == "text":
        path.write_text("hello")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        train(*SMALL_MODEL, f"--save-model={path}")
        path.write_bytes(path.read_bytes()[:20000])
    elif kind == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "folder":
        path.mkdir()
    else:
        torch.save({"state_dict": {}, "evil": os.system}, path)
    result = train(*SMALL_MODEL, f"--load-model={path}")
    assert (
        result.status == 2
        and result.err.startswith("error: --load-model=")
        and result.err.count("\n") == 1
    )


def test_a_failing_save_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    train(*SMALL_MODEL, f"--save-model={path}")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = train(*SMALL_MODEL, f"--save-model={path}", "--learning-rate=0.5")
    assert (
        result.status == 2
        and "No space left on device" in result.err
        and result.err.count("\n") == 1
    )
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.pth"]


def test_a_save_that_the_disk_refuses_while_it_is_written(tmp_path):
    """torch.save itself runs out of space: a file size limit stands for a full disk."""
    with largest_file(5000):
        result = train(*SMALL_MODEL, f"--save-model={tmp_path}/model.pth")
    assert result.status == 2 and result.err.count("\n") == 1
    assert "cannot write it (File too large)" in result.err, "the system's words"
    assert os.listdir(tmp_path) == []
