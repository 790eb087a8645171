"""A better model that stands where a model is to be saved is kept under another name."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import RankError
from engine.previous_file import keep_better

NAN = float("nan")


def model_file(path, **values):
    content = {"state_dict": {}, "test_auc": 0.7681, "test_acc": 0.75}
    torch.save(content | values, path)
    return path.read_bytes()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path("m.pth")


def test_a_better_model_gets_a_second_name_and_a_sentence(path):
    content = model_file(path)
    assert keep_better(path, 0.643, by_auc=True) == (
        "m.pth held a better model (AUC 0.7681, this one 0.6430): moved to m.pth.1"
    )
    assert Path("m.pth.1").read_bytes() == content
    assert path.read_bytes() == content, "until the new model replaces it, none is lost"


def test_without_mlperfs_metrics_the_accuracy_decides(path):
    model_file(path)
    assert keep_better(path, 0.76, by_auc=False) == ""
    assert keep_better(path, 0.74, by_auc=False) == (
        "m.pth held a better model (accuracy 75.000 %, this one 74.000 %): moved to m.pth.1"
    )


def test_of_a_model_that_is_not_evaluated_nobody_knows_whether_it_is_better(path):
    model_file(path)
    assert keep_better(path, NAN, by_auc=True) == (
        "m.pth held a model with AUC 0.7681, this one is not evaluated: moved to m.pth.1"
    )


def write_text(path):
    path.write_text("hello")


OVERWRITTEN = {
    "none there": lambda path: None,
    "worse": lambda path: model_file(path, test_auc=0.6),
    "as good": lambda path: model_file(path, test_auc=0.65),
    "not evaluated": lambda path: model_file(path, test_auc=NAN),
    "without a metric": lambda path: torch.save({"state_dict": {}}, path),
    "a metric in words": lambda path: model_file(path, test_auc="0.9"),
    "a metric that is none": lambda path: model_file(path, test_auc=76.8),
    "no model file": lambda path: torch.save({"test_auc": 0.9}, path),
    "not readable": write_text,
    "a tensor": lambda path: torch.save(torch.ones(3), path),
}


@pytest.mark.parametrize("kind", OVERWRITTEN)
def test_what_is_not_better_is_left_where_it_is(path, kind):
    OVERWRITTEN[kind](path)
    before = names(Path())
    assert keep_better(path, 0.65, by_auc=True) == "" and names(Path()) == before


@pytest.mark.parametrize("number", [np.float64(0.9), np.float32(0.9), 1])
def test_files_of_the_original_count_too(path, number):
    for old_format in (False, True):
        content = {"state_dict": {"a": torch.ones(2)}, "test_auc": number}
        torch.save(content, path, _use_new_zipfile_serialization=not old_format)
        assert f"AUC {number:.4f}, this one 0.6500" in keep_better(path, 0.65, by_auc=True)


def test_nothing_that_is_there_is_overwritten(path):
    for name in ("m.pth.1", "m.pth.2"):
        Path(name).write_text(name)
    Path("m.pth.3").symlink_to("nothing")
    content = model_file(path)
    assert keep_better(path, 0.6, by_auc=True).endswith("moved to m.pth.4")
    assert Path("m.pth.1").read_text() == "m.pth.1" and Path("m.pth.2").read_text() == "m.pth.2"
    assert Path("m.pth.4").read_bytes() == content and Path("m.pth.3").is_symlink()


def test_a_run_that_was_killed_before_it_wrote_its_file_is_no_reason_for_another_name(path):
    model_file(path)
    for _ in range(2):
        assert keep_better(path, 0.6, by_auc=True).endswith("moved to m.pth.1")
    assert names(Path()) == ["m.pth", "m.pth.1"]


def test_the_target_of_a_link_gets_the_name_beside_itself(path):
    Path("models").mkdir()
    content = model_file(Path("models/best.pth"))
    path.symlink_to("models/best.pth")
    sentence = keep_better(path, 0.6, by_auc=True)
    assert sentence.startswith("m.pth held") and sentence.endswith("models/best.pth.1")
    assert names(Path()) == ["m.pth", "models"] and path.is_symlink()
    assert Path("models/best.pth.1").read_bytes() == content


def refuse(*_):
    raise PermissionError(1, "Operation not permitted")


def test_where_a_file_has_one_name_only_it_is_renamed(path, monkeypatch):
    """Such are FAT, and folders of other systems; another program's name is taken by nobody."""
    Path("m.pth.1").write_text("another program's")
    content = model_file(path)
    monkeypatch.setattr(os, "link", refuse)
    assert keep_better(path, 0.6, by_auc=True).endswith("moved to m.pth.2")
    assert names(Path()) == ["m.pth.1", "m.pth.2"] and Path("m.pth.2").read_bytes() == content
    assert Path("m.pth.1").read_text() == "another program's"


def test_a_model_that_cannot_be_kept_ends_the_run_before_it_is_overwritten(path, monkeypatch):
    content = model_file(path)
    for name in ("link", "replace"):
        monkeypatch.setattr(os, name, refuse)
    with pytest.raises(RankError) as caught:
        keep_better(path, 0.6, by_auc=True)
    assert str(caught.value).startswith("--save-model=m.pth: it holds a better model (AUC 0.7681)")
    assert "m.pth.1 (Operation not permitted): move it" in str(caught.value)
    assert names(Path()) == ["m.pth"] and path.read_bytes() == content
