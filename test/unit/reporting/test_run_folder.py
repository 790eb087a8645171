"""A run folder has what the run printed, its flags and its versions; it is checked first."""

import json
import os
import subprocess
import sys
from argparse import Namespace

import pytest
from conftest import RELEASE, ROOT, SMALL_MODEL, largest_file, shell, train

import dlrm_s_pytorch as dlrm
from common.errors import UserError
from common.flags import ArgumentParser
from reporting.run_folder import use_run_folder
from reporting.run_log import copied_to_log
from reporting.run_versions import commit_of

FLAGS = [*SMALL_MODEL, "--test-freq=5", "--print-freq=5"]


def run(folder, *flags):
    """A run whose TensorBoard's folder is not given."""
    return train(*FLAGS, f"--run-dir={folder}", *flags, program=lambda words: dlrm.main(words))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(the folder of a run that ends at half of its epochs, its result)"""
    folder = tmp_path_factory.mktemp("run") / "new" / "run"
    checkpoints = f"--checkpoint-dir={folder.parent}/saved"
    return folder, run(folder, checkpoints)


def test_it_holds_log_flags_versions_and_tensor_board(first):
    folder, result = first
    assert result.status == 0, result.err
    assert {path.name for path in folder.iterdir()} == {
        "train_0.log", "flags.json", "versions.json", "tensorboard", "metrics.jsonl", "report.html",
    }  # fmt: skip
    assert result.out and (folder / "train_0.log").read_text() == result.out
    found = json.loads((folder / "versions.json").read_text())
    assert found["packages"]["torch"].partition("+")[0] == RELEASE
    assert {"numpy", "numba", "safetensors"} <= set(found["packages"])
    assert found["python"] == ".".join(map(str, sys.version_info[:3])) and found["ranks"] == 1
    assert found["device"]["device"] == "cpu (CPU)" and found["platform"] and found["time"]


def test_its_flags_make_the_same_run_in_another_folder(first, tmp_path):
    folder, result = first
    options = dlrm.parse_options([f"--flags-file={folder}/flags.json"])
    assert options.run_dir == "" and options.tensor_board_filename == "run_kaggle_pt"
    assert options.checkpoint_dir == f"{folder.parent}/saved" and options.mini_batch_size == 64
    flags = [f"--flags-file={folder}/flags.json", f"--run-dir={tmp_path}/b", "--checkpoint-dir="]
    again = train(*flags, program=lambda words: dlrm.main(words))
    assert again.losses == result.losses and any((tmp_path / "b" / "tensorboard").iterdir())


def test_a_resumed_run_goes_on_in_the_same_files(first, tmp_path):
    folder, result = first
    more = [f"--checkpoint-dir={folder.parent}/saved", "--resume", "--nepochs=2"]
    resumed = run(folder, *more)
    assert resumed.status == 0 and "resumed from " in resumed.out, resumed.err
    assert (folder / "train_0.log").read_text() == result.out + resumed.out
    flags = json.loads((folder / "flags.json").read_text())["flags"]
    assert flags["--resume"] is True and flags["--nepochs"] == 2, "those of the run that goes on"
    (folder / "train_0.log").write_text(result.out)  # for the other tests


def test_files_whose_flags_are_given_stay_where_they_are():
    """Those of flags that are still at their defaults go into the folder; "" is none."""
    parser = ArgumentParser(prog="program.py")
    for name in ("--run-dir", "--metrics-file", "--report"):
        parser.add_argument(name, default="", help="path")
    parser.add_argument("--tensor-board-filename", default="run_kaggle_pt", help="folder")
    options = parser.parse_args(["--run-dir=a/b", "--report=mine.html", "--tensor-board-filename="])
    use_run_folder(options, parser)
    assert vars(options) == {
        "run_dir": "a/b", "metrics_file": "a/b/metrics.jsonl", "report": "mine.html",
        "tensor_board_filename": "",
    }  # fmt: skip
    assert not os.path.exists("a"), "nothing is made yet"
    options = Namespace(run_dir="", tensor_board_filename="run_kaggle_pt")
    use_run_folder(options, parser)
    assert options.tensor_board_filename == "run_kaggle_pt"


@pytest.mark.parametrize("where", ["file", "file/inside", "taken", "log", "loop", "x" * 300])
def test_a_folder_that_cannot_be_used_is_one_line_before_data_is_prepared(tmp_path, where):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / "flags.json").mkdir(parents=True)
    (tmp_path / "log" / "train_0.log").mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    result = run(tmp_path / where, f"--data_path={tmp_path}/no")
    assert result.status == 2 and result.err.startswith(f"error: --run-dir={tmp_path / where}: ")
    assert result.err.count("\n") == 1 and "name another folder" in result.err
    assert sorted(tmp_path.rglob("*")) == before and not result.out


def test_a_folder_that_may_not_be_written_is_told(tmp_path, monkeypatch):
    """root may write anywhere, so the system's answer is given."""
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    result = run(tmp_path / "new" / "run")
    assert result.status == 2 and f"{tmp_path} is not writable" in result.err


def test_a_full_disk_at_the_start_ends_the_run_and_leaves_nothing_half_written(tmp_path):
    with largest_file(100):
        result = run(tmp_path / "run")
    assert result.status == 2 and "cannot write it (File too large)" in result.err
    assert list((tmp_path / "run").iterdir()) == [] and not result.losses


def test_a_dry_run_and_a_mistake_in_another_flag_make_nothing(tmp_path):
    assert run(tmp_path / "run", "--dry-run").status == 0
    assert run(tmp_path / "run", "--loss-threshold=3").status == 2
    assert list(tmp_path.iterdir()) == []


def test_the_log_has_the_error_that_ended_the_run(tmp_path):
    result = run(tmp_path / "run", "--load-model=/dev/null/x")
    assert result.status == 2 and not (tmp_path / "run").exists(), "it was seen at once"
    (tmp_path / "bad.pth").write_text("no model")
    result = run(tmp_path / "run", f"--load-model={tmp_path}/bad.pth")
    log = (tmp_path / "run" / "train_0.log").read_text()
    assert result.status == 2 and log == result.out + result.err


def test_the_log_has_a_traceback_if_it_is_a_bug(tmp_path):
    with pytest.raises(ZeroDivisionError), copied_to_log(tmp_path / "log.txt"):
        print(1)
        raise ZeroDivisionError("a bug")
    text = (tmp_path / "log.txt").read_text()
    assert text.startswith("1\nTraceback") and text.endswith("ZeroDivisionError: a bug\n")


def test_a_log_that_cannot_be_written_any_more_is_told_and_ends_nothing(tmp_path, capsys):
    """The disk is full after some lines."""
    with largest_file(10), copied_to_log(tmp_path / "log.txt"):
        for word in ("one", "two", "three", "four"):
            print(word)
    out = capsys.readouterr().out
    assert out.count("warning: the log ends here (File too large)\n") == 1
    assert out.endswith("four\n") and "one\ntwo\n" in out


def test_stdout_that_a_launcher_has_sent_into_the_folder_is_the_log(tmp_path):
    """Under its name or another one; a file elsewhere is none of it."""
    code = (
        "import pathlib, sys; from reporting.run_log import copied_to_log\n"
        "with copied_to_log(pathlib.Path(sys.argv[1])): print('once')"
    )
    for name in ("train_0.log", "eval_0.log", "../out.txt"):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        with open(folder / name, "w") as out:
            command = [sys.executable, "-c", code, folder / "train_0.log"]
            subprocess.run(command, cwd=ROOT, stdout=out, check=True)
        found = {path.name: path.read_text() for path in folder.iterdir()}
        assert (folder / name).read_text() == "once\n"
        expected = {"../out.txt": {"train_0.log": "once\n"}}.get(name, {name: "once\n"})
        assert found == expected
        for path in folder.iterdir():
            path.unlink()


def test_the_commit_is_that_of_the_folders_own_checkout(tmp_path):
    assert commit_of(tmp_path) is None, "no checkout"

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return shell("git", "-C", tmp_path, *who, *words).stdout.strip()

    git("init", "-q")
    assert commit_of(tmp_path) is None, "no commit"
    (tmp_path / "a.txt").write_text("1")
    (tmp_path / "inside").mkdir()
    git("add", "a.txt")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert commit_of(tmp_path) == {"commit": commit, "is_dirty": False}
    assert commit_of(tmp_path / "inside") is None, "it is another one's checkout"
    (tmp_path / "a.txt").write_text("2")
    assert commit_of(tmp_path) == {"commit": commit, "is_dirty": True}


def test_without_git_there_is_no_commit_and_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit_of(ROOT) is None


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="unknown flag"):
        dlrm.parse_options(["--rundir=x"])
    assert train(*FLAGS).status == 0 and list(tmp_path.iterdir()) == []
