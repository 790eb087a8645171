"""Flags of checkpoints that contradict one another are one line, before any work."""

import argparse
from pathlib import Path

import pytest
from conftest import break_package

from checkpoints.options import CheckpointOptions, add_checkpoint_options
from common.errors import UserError
from common.flags import ArgumentParser


def options_of(*words, load_model="", inference_only=False):
    parser = ArgumentParser(prog="dlrm")
    add_checkpoint_options(parser)
    other = argparse.Namespace(load_model=load_model, inference_only=inference_only)
    return CheckpointOptions.from_options(parser.parse_args(list(words), other))


def test_without_flags_there_are_no_checkpoints():
    assert options_of() == CheckpointOptions(None, 0, 0.0, 2, False, None)


def test_flags_become_a_record():
    words = "--checkpoint-dir=all --save-every=100 --save-minutes=0.5 --keep=3 --resume".split()
    assert options_of(*words) == CheckpointOptions(Path("all"), 100, 0.5, 3, True, None)
    one = CheckpointOptions(None, 0, 0.0, 2, True, Path("all/000001-step-5"))
    assert options_of("--resume=all/000001-step-5") == one
    assert options_of("--resume", "all/000001-step-5") == one
    both = options_of("--resume=there", "--checkpoint-dir=here")
    assert (both.folder, both.resume_from) == (Path("here"), Path("there"))


@pytest.mark.parametrize(
    "words, more, told",
    [
        (["--save-every=5"], {}, "--save-every=5: give --checkpoint-dir too"),
        (["--save-minutes=1.5"], {}, "--save-minutes=1.5: give --checkpoint-dir too"),
        (["--resume"], {}, "--resume: give --checkpoint-dir too, or the checkpoint as --resume="),
        (["--resume=a"], {"load_model": "b.pt"}, "--resume=a and --load-model=b.pt: give one of"),
        (
            ["--resume", "--checkpoint-dir=a"],
            {"load_model": "b.pt"},
            "--resume and --load-model=b.pt: give one of them",
        ),
        (["--resume=a"], {"inference_only": True}, "--inference-only trains nothing"),
        (["--checkpoint-dir=a"], {"inference_only": True}, "--inference-only trains nothing"),
    ],
)
def test_flags_that_contradict_one_another_are_an_error(words, more, told):
    with pytest.raises(UserError) as error:
        options_of(*words, **more)
    assert str(error.value).startswith(told)


@pytest.mark.parametrize(
    "word",
    ["--save-every=-1", "--save-every=1.5", "--save-minutes=-1", "--save-minutes=x", "--keep=0",
     "--save-minutes=nan", "--keep=x"],
)  # fmt: skip
def test_numbers_that_cannot_be_are_an_error(word):
    with pytest.raises(UserError, match=f"{word.partition('=')[0]}.*{word.partition('=')[2]}"):
        options_of("--checkpoint-dir=a", word)


def test_the_folder_alone_and_a_model_file_go_together():
    """Training begins with the file's weights, and has checkpoints from there on."""
    assert options_of("--checkpoint-dir=a", load_model="b.pt").folder == Path("a")


def test_a_missing_library_is_told_if_it_is_needed(tmp_path, monkeypatch):
    break_package(tmp_path, monkeypatch, "safetensors", "ImportError('no such file')")
    assert options_of().folder is None
    for word in ("--checkpoint-dir=a", "--resume=a"):
        with pytest.raises(UserError, match="^--checkpoint-dir and --resume: .*safetensors"):
            options_of(word)
