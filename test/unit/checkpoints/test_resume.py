"""A run that goes on from a checkpoint does what it would have done if nobody had stopped it."""

import errno
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import CRITEO_MODEL, SMALL_MODEL, train
from written import checkpoints_in, flip

import dlrm_data_pytorch
from checkpoints import checkpoints as checkpoints_module
from checkpoints import saver as saver_module

NEVER_IN_BACKGROUND, ALWAYS_IN_BACKGROUND = 1e9, 0.0  # for saver.MOST_OF_RUN
RANDOM = [*SMALL_MODEL, "--num-indices-per-lookup=4", "--test-freq=4", "--nepochs=2"]
CRITEO = [*CRITEO_MODEL, "--test-freq=9", "--num-batches=20", "--mlperf-events=false"]
CASES = {
    "sgd in memory": [*CRITEO, "--optimizer=sgd", "--nepochs=2"],
    "adagrad mapped, accumulated": [
        *CRITEO, "--optimizer=adagrad", "--memory-map", "--mlperf-grad-accum-iter=3",
        "--processed-data-file={}/mapped", "--lr-num-warmup-steps=4", "--lr-decay-start-step=5",
        "--lr-num-decay-steps=3",
    ],
    "rwsadagrad flat, shuffled, workers": [
        *CRITEO, "--optimizer=rwsadagrad", "--mlperf-bin-loader", "--mlperf-bin-shuffle",
        "--num-workers=2", "--nepochs=2", "--processed-data-file={}/flat",
    ],
    "random, adagrad, accumulated, workers": [
        *RANDOM, "--optimizer=adagrad", "--mlperf-grad-accum-iter=3", "--num-workers=1",
    ],
    "gaussian, learned pooling": [
        *RANDOM, "--rand-data-dist=gaussian", "--rand-data-max=39", "--weighted-pooling=learned",
        "--optimizer=rwsadagrad", "--mlperf-grad-accum-iter=4",
    ],
    "float16": [*RANDOM, "--amp=fp16"],
    "quotient and remainder": [*RANDOM, "--qr-flag", "--qr-threshold=50", "--optimizer=adagrad"],
    "mixed dimensions": [*RANDOM, "--md-flag", "--md-threshold=50", "--optimizer=adagrad"],
}  # fmt: skip


def lines(text):
    """What a run prints, without what its checkpoints cost."""
    of_saves = r"(checkpoint |resumed from |--checkpoint-dir|warning: the checkpoint|Prepared )"
    return [line for line in text.splitlines() if not re.match(of_saves, line)]


def step_of(path):
    return int(path.name.rpartition("-")[2])


@pytest.fixture(scope="module")
def shared(tmp_path_factory, kaggle):
    """A folder for prepared data, and the flags that name the text."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(kaggle, folder / "text")
    return folder


def run(case, shared, *flags):
    """Run a case; its data is where `shared` is."""
    words = [word.format(shared) for word in CASES[case]]
    if "--mlperf-logging" in words:
        words.append(f"--data_path={shared}/text")
    return train(*words, *flags)


@pytest.mark.parametrize("case", CASES)
def test_it_prints_the_same_lines_and_ends_with_the_same_model(case, shared, tmp_path):
    saved, model = tmp_path / "saved", tmp_path / "model.pth"
    plain = run(case, shared, f"--save-model={model}")
    assert plain.status == 0, plain.err
    model.unlink()
    whole = run(case, shared, f"--save-model={model}", f"--checkpoint-dir={saved}",
                "--save-every=3", "--keep=99")  # fmt: skip
    assert lines(whole.out) == lines(plain.out), "checkpoints change nothing"
    content = model.read_bytes()
    found = checkpoints_in(saved)
    assert [step_of(path) for path in found[:3]] == [3, 6, 9]
    for path in (found[0], found[len(found) // 2], found[-2]):
        alone = tmp_path / "alone"
        shutil.rmtree(alone, ignore_errors=True)
        shutil.copytree(path, alone / path.name)
        model.write_bytes(b"left by the run that was killed")
        resumed = run(case, shared, f"--save-model={model}", f"--checkpoint-dir={alone}",
                      "--save-every=3", "--resume")  # fmt: skip
        assert resumed.status == 0, resumed.err
        assert f"resumed from {alone / path.name}" in resumed.out
        tail = lines(resumed.out)
        assert tail and tail == lines(whole.out)[-len(tail) :]
        if not model.read_bytes().startswith(b"left"):  # else the best evaluation came before
            assert model.read_bytes() == content


def test_it_draws_nothing_that_was_trained(shared, tmp_path, monkeypatch):
    """Random data goes to its place: at most the rows between two states are drawn again."""
    flags = [*SMALL_MODEL, "--data-size=12800", f"--checkpoint-dir={tmp_path}", "--save-every=190"]
    assert train(*flags, "--num-batches=195").status == 0
    drawn = []
    draw_rows = dlrm_data_pytorch.draw_rows

    def counted(stream, sources, size, *rest):
        drawn.append(size)
        return draw_rows(stream, sources, size, *rest)

    monkeypatch.setattr(dlrm_data_pytorch, "draw_rows", counted)
    newest = checkpoints_in(tmp_path)[-2]
    assert train(*flags[:-2], "--num-batches=195", f"--resume={newest}").status == 0
    assert sum(drawn) <= dlrm_data_pytorch.ROWS_PER_STATE + 5 * 64


@pytest.mark.parametrize("share", [NEVER_IN_BACKGROUND, ALWAYS_IN_BACKGROUND])
def test_a_checkpoint_has_the_run_between_two_steps(share, shared, tmp_path, monkeypatch):
    """Its thread writes when the next step is done: that does not leak into it."""
    monkeypatch.setattr(saver_module, "MOST_OF_RUN", share)
    write = os.write

    def write_after_the_next_step(file, block):
        beside = threading.current_thread() is not threading.main_thread()
        while beside and "it 7/10" not in sys.stdout.getvalue():
            time.sleep(0.001)
        return write(file, block)

    flags = [*SMALL_MODEL, "--optimizer=adagrad", "--keep=99", "--print-freq=1", "--save-every=6"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_after_the_next_step)
        done = train(*flags, f"--checkpoint-dir={tmp_path}/some")
    assert done.status == 0
    went_on = done.out.index("it 7/10") < done.out.index("checkpoint 000001-step-6")
    assert went_on == (share == ALWAYS_IN_BACKGROUND)
    monkeypatch.setattr(saver_module, "MOST_OF_RUN", NEVER_IN_BACKGROUND)
    train(*flags, f"--checkpoint-dir={tmp_path}/other")
    for name in ("000001-step-6/rank-000-0000.safetensors", "000001-step-6/index.json"):
        assert (tmp_path / "some" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_without_room_for_a_copy_it_is_saved_between_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(saver_module, "MOST_OF_RUN", ALWAYS_IN_BACKGROUND)
    monkeypatch.setattr(saver_module, "free_memory", lambda: 1000)
    done = train(*SMALL_MODEL, f"--checkpoint-dir={tmp_path}", "--save-every=2")
    assert done.out.count("has no room in memory") == 1
    assert "while training went on" not in done.out and done.out.count("\ncheckpoint 0") == 5


def test_it_goes_on_with_other_flags_that_change_nothing_that_is_trained(tmp_path):
    folder = f"--checkpoint-dir={tmp_path}"
    first = train(*SMALL_MODEL, folder, "--save-every=7")
    again = train(*SMALL_MODEL, folder, "--resume", "--nepochs=2", "--print-freq=5", "--keep=1",
                  "--save-every=9", "--num-workers=1", "--test-freq=5")  # fmt: skip
    assert again.status == 0, again.err
    assert [line[:3] for line in again.losses] == [(5, 10, 1), (10, 10, 1)]
    whole = train(*SMALL_MODEL, "--nepochs=2", "--print-freq=5")
    assert again.losses == whole.losses[2:] and first.status == 0
    assert len(checkpoints_in(tmp_path)) == 1


def test_flags_that_change_what_is_trained_are_named(tmp_path):
    folder = f"--checkpoint-dir={tmp_path}"
    assert train(*SMALL_MODEL, folder).status == 0
    wrong = train(*SMALL_MODEL, folder, "--resume", "--learning-rate=0.2", "--loss-function=mse")
    assert wrong.status == 2 and wrong.err.count("\n") == 1
    assert "--learning-rate was 0.1, is 0.2" in wrong.err
    assert "--loss-function was bce, is mse" in wrong.err


def test_other_data_of_the_same_shape_is_not_taken(kaggle_copy, tmp_path):
    flags = [*CRITEO, f"--data_path={kaggle_copy}", f"--checkpoint-dir={tmp_path}/c"]
    assert train(*flags).status == 0
    text = (kaggle_copy / "train.txt").read_text().splitlines(keepends=True)
    first = text[0].split("\t")
    first[0] = "1" if first[0] == "0" else "0"
    (kaggle_copy / "train.txt").write_text("".join(["\t".join(first), *text[1:]]))
    shutil.rmtree(next(kaggle_copy.glob("*.prepared")))
    wrong = train(*flags, "--resume")
    assert wrong.status == 2 and "other training data" in wrong.err


def test_a_run_begins_anew_in_an_empty_folder_and_never_beside_other_checkpoints(tmp_path):
    folder = f"--checkpoint-dir={tmp_path}/new"
    first = train(*SMALL_MODEL, folder, "--resume")
    assert first.status == 0 and "has no checkpoint yet: the run starts anew" in first.out
    refused = train(*SMALL_MODEL, folder)
    assert refused.status == 2 and "--resume goes on from it" in refused.err
    assert "already has checkpoints" in refused.err


def test_a_run_that_is_done_says_so_and_saves_nothing_twice(tmp_path):
    folder = f"--checkpoint-dir={tmp_path}"
    train(*SMALL_MODEL, folder)
    again = train(*SMALL_MODEL, folder, "--resume")
    assert again.status == 0 and "nothing left to train" in again.out
    assert [path.name for path in checkpoints_in(tmp_path)] == ["000001-step-10"]


def test_a_run_that_was_killed_before_its_model_file_writes_it_when_it_goes_on(tmp_path):
    """Its last checkpoint is older than the file, which is saved at the end without evaluations."""
    flags = [*SMALL_MODEL, f"--save-model={tmp_path}/m.pth"]
    train(*flags)
    content = (tmp_path / "m.pth").read_bytes()
    (tmp_path / "m.pth").unlink()
    train(*SMALL_MODEL, f"--checkpoint-dir={tmp_path}/c")  # as it is just before the file
    resumed = train(*flags, f"--checkpoint-dir={tmp_path}/c", "--resume")
    assert resumed.status == 0 and "nothing left to train" in resumed.out
    assert (tmp_path / "m.pth").read_bytes() == content


@pytest.mark.parametrize("name", ["rank-000-0000.safetensors", "index.json"])
@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_of_a_damaged_checkpoint_the_one_before_is_used(name, how, tmp_path):
    flags = [*SMALL_MODEL, f"--checkpoint-dir={tmp_path}", "--save-every=4", "--print-freq=1"]
    whole = train(*flags)
    older, newest = checkpoints_in(tmp_path)  # of steps 8 and 10
    file = newest / name
    if how == "flipped":
        flip(file, file.stat().st_size // 2)
    elif how == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        file.unlink()
    resumed = train(*flags, "--resume")
    assert resumed.status == 0, resumed.err
    assert re.search(rf"^warning: {re.escape(str(file))}.*the checkpoint before it is used$",
                     resumed.out, re.M)  # fmt: skip
    assert f"set aside as damaged: {newest.name}.damaged\nresumed from {older}" in resumed.out
    assert resumed.losses == whole.losses[-2:]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"lock", older.name, newest.name + ".damaged", "000003-step-10"}


def test_a_checkpoint_that_cannot_be_read_now_keeps_its_name(tmp_path, monkeypatch):
    """A disk's fault, or a folder that one machine does not see, says nothing of it."""
    flags = [*SMALL_MODEL, f"--checkpoint-dir={tmp_path}/c", "--save-every=4"]
    train(*flags)
    kept, read = checkpoints_in(tmp_path / "c"), Path.open

    def failing(self, *args, **named):
        if self.suffix == ".safetensors":
            raise OSError(errno.EIO, "Input/output error")
        return read(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        refused = train(*flags, "--resume")
    assert refused.status == 2 and "cannot read it (Input/output error)" in refused.err
    assert checkpoints_in(tmp_path / "c") == kept
    assert "nothing left" in train(*flags, "--resume").out


def test_if_no_checkpoint_is_whole_nothing_is_trained(tmp_path):
    flags = [*SMALL_MODEL, f"--checkpoint-dir={tmp_path}/c", "--save-every=4"]
    train(*flags)
    for path in checkpoints_in(tmp_path / "c"):
        flip(path / "rank-000-0000.safetensors", 900)
    for _ in range(2):  # a script calls it again, and it must not start anew then
        resumed = train(*flags, "--resume")
        assert resumed.status == 2 and "no checkpoint is whole" in resumed.err
        assert "Finished" not in resumed.out
    by_path = train(*SMALL_MODEL, f"--resume={tmp_path}/nowhere")
    assert by_path.status == 2 and "is no folder" in by_path.err


def test_a_checkpoint_that_is_named_is_the_one_that_is_used(tmp_path):
    flags = [*SMALL_MODEL, "--print-freq=1", "--save-every=4", "--keep=9"]
    whole = train(*flags, f"--checkpoint-dir={tmp_path}/c")
    first = checkpoints_in(tmp_path / "c")[0]
    resumed = train(*SMALL_MODEL, "--print-freq=1", f"--resume={first}")
    assert resumed.losses == whole.losses[4:]
    of_folder = train(*SMALL_MODEL, "--print-freq=1", f"--resume={tmp_path}/c", "--nepochs=2")
    assert [line[:3] for line in of_folder.losses][0] == (1, 10, 1)
    in_folder = train(*flags, f"--checkpoint-dir={tmp_path}/c", f"--resume={first}", "--keep=1")
    assert in_folder.losses == whole.losses[4:]
    newest = checkpoints_in(tmp_path / "c")
    assert [path.name for path in newest] == ["000005-step-10"], "the newest save, not the farthest"


def test_a_full_disk_does_not_end_training(tmp_path, monkeypatch):
    """It is told once; the next save that finds room is told too."""
    monkeypatch.setattr(saver_module, "MOST_OF_RUN", NEVER_IN_BACKGROUND)
    write, is_full = os.write, SimpleNamespace(calls=0)

    def write_if_room(file, block):
        is_full.calls += 1
        if 3 <= is_full.calls < 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, block)

    monkeypatch.setattr(os, "write", write_if_room)
    done = train(*SMALL_MODEL, f"--checkpoint-dir={tmp_path}", "--save-every=2", "--print-freq=1")
    assert done.status == 0 and len(done.losses) == 10
    assert done.out.count("could not be saved") == 1 and "No space left on device" in done.out
    assert done.out.count("checkpoints can be saved again") == 1
    assert [step_of(path) for path in checkpoints_in(tmp_path)] == [8, 10]
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("every", ["--save-every=0", "--save-every=4", "--save-every=5"])
def test_if_the_last_checkpoint_cannot_be_saved_the_end_says_so(every, tmp_path, monkeypatch):
    """However often it was told before; at the end the run tries once more."""
    monkeypatch.setattr(saver_module, "MOST_OF_RUN", NEVER_IN_BACKGROUND)

    def write(file, block):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    done = train(*SMALL_MODEL, f"--checkpoint-dir={tmp_path}", every, "--print-freq=1")
    assert done.status == 0
    last = done.out.splitlines()[-1]
    assert "checkpoint of step 10 could not be saved" in last and "training goes on" not in last


def test_a_named_checkpoint_replaces_none_of_another_run(tmp_path):
    train(*SMALL_MODEL, f"--checkpoint-dir={tmp_path}/a")
    train(*SMALL_MODEL, f"--checkpoint-dir={tmp_path}/b", "--learning-rate=0.2")
    kept = checkpoints_in(tmp_path / "b")
    flags = [*SMALL_MODEL, f"--resume={tmp_path}/a", "--nepochs=4", "--save-every=4"]
    refused = train(*flags, f"--checkpoint-dir={tmp_path}/b")
    assert refused.status == 2 and "has checkpoints" in refused.err
    assert len(refused.err.splitlines()) == 1 and checkpoints_in(tmp_path / "b") == kept
    assert train(*flags, f"--checkpoint-dir={tmp_path}/new").status == 0


def test_too_small_a_disk_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    done = train(*SMALL_MODEL, f"--checkpoint-dir={tmp_path}/c")
    assert done.status == 2 and "the disk has 1e-06 GB" in done.err and "Finished" not in done.out


def test_a_signal_after_a_loss_that_is_nan_says_why_nothing_was_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints_module, "is_asked", lambda: True)
    words = ["--loss-function=mse", "--learning-rate=1e30", "--print-freq=99"]
    monkeypatch.setattr(checkpoints_module.Checkpoints, "after_step", lambda self, run: (
        self.save_and_end(run) if run.step == 8 else None
    ))  # fmt: skip
    done = train(*SMALL_MODEL, *words, f"--checkpoint-dir={tmp_path}")
    assert done.status == 143 and "could not be saved: the loss became" in done.out
    assert checkpoints_in(tmp_path) == []


@pytest.mark.parametrize("flags, words", [
    (["--save-every=5"], "--save-every=5: give --checkpoint-dir"),
    (["--save-minutes=5"], "--save-minutes=5: give --checkpoint-dir"),
    (["--resume"], "--resume: give --checkpoint-dir"),
    (["--resume=x", "--load-model=y"], "give one of them"),
    (["--checkpoint-dir={}/file/c"], "cannot write there"),
    (["--resume={}/file"], "is no"),
    (["--export-checkpoint={}"], "give --save-model"),
    (["--export-checkpoint={}", "--save-model=x"], "is no checkpoint, and has none in it"),
    (["--checkpoint-dir=x", "--inference-only", "--load-model={}/file"], "trains nothing"),
])  # fmt: skip
def test_mistakes_are_one_line(flags, words, tmp_path):
    (tmp_path / "file").write_text("")
    done = train(*SMALL_MODEL, *[flag.format(tmp_path) for flag in flags])
    assert done.status == 2 and words in done.err, done.err
    assert done.err.count("\n") == 1 and "Finished" not in done.out


def test_a_signal_in_an_evaluation_leaves_it_and_the_resumed_run_does_it_again(
    tmp_path, monkeypatch
):
    flags = [*SMALL_MODEL, "--test-freq=5", "--print-freq=1", f"--save-model={tmp_path}/m.pth"]
    plain = train(*flags)
    content = (tmp_path / "m.pth").read_bytes()
    (tmp_path / "m.pth").unlink()
    asked = []
    is_asked = checkpoints_module.Checkpoints.is_asked_in_evaluation

    def asked_later(self):
        asked.append(1)
        return len(asked) == 3 or is_asked(self)

    monkeypatch.setattr(checkpoints_module.Checkpoints, "is_asked_in_evaluation", asked_later)
    folder = f"--checkpoint-dir={tmp_path}/c"
    ended = train(*flags, folder)
    assert ended.status == 143 and "Testing" not in ended.out
    resumed = train(*flags, folder, "--resume")
    assert resumed.status == 0
    assert lines(ended.out)[:-1] + lines(resumed.out) == lines(plain.out)
    assert (tmp_path / "m.pth").read_bytes() == content


def test_ranks_meet_early_in_an_evaluation_and_after_it(tmp_path, monkeypatch):
    """As its batches may take far longer than the steps before it, a signal would wait for long."""
    begun = []

    class Noted(checkpoints_module.Meetings):
        def begin_other_work(self):
            begun.append(1)
            super().begin_other_work()

    monkeypatch.setattr(checkpoints_module, "Meetings", Noted)
    train(*SMALL_MODEL, "--test-freq=5", f"--checkpoint-dir={tmp_path}")
    assert len(begun) == 4  # two evaluations


def test_a_best_model_that_is_missing_is_told_and_never_said_to_be_there(tmp_path):
    """A checkpoint that was moved to another machine, and the model file was not."""
    flags = [*SMALL_MODEL, "--test-freq=5", "--mlperf-logging", "--mlperf-events=false"]
    folder, model = tmp_path / "c", tmp_path / "m.pth"
    whole = train(*flags, f"--checkpoint-dir={folder}", f"--save-model={model}")
    assert f"saved in {model}" in whole.out.splitlines()[-1]
    again = train(*flags, f"--resume={folder}", f"--save-model={model}")
    assert again.out.splitlines()[-1] == whole.out.splitlines()[-1] and "missing" not in again.out
    for there in (f"--checkpoint-dir={folder}", f"--save-model={model}2"):
        model.unlink(missing_ok=True)
        words = [f"--resume={folder}", f"--save-model={model}", there]
        resumed = train(*flags, *words)
        assert resumed.status == 0, resumed.err
        assert re.search(r"^warning: --save-model=.* is missing, where .* no checkpoint has it:",
                         resumed.out, re.M)  # fmt: skip
        assert "nothing better to save in" in resumed.out.splitlines()[-1]
