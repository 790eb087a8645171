"""A model file of an earlier run that holds a better model than the one to be saved is kept."""

import contextlib
import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import RankError
from common.whole_files import target_of
from engine.model_file import ModelState, save_model_file, vocabulary_of
from engine.progress import Progress
from engine.saved_content import read_content, reason_of
from engine.value_checks import is_number
from reporting.log_lines import metric_text

_METRICS = {True: "test_auc", False: "test_acc"}  # of the model in the file, as the original has it


def keep_better(path: Path, metric: float, by_auc: bool) -> str:
    """Give a better model at the path a second name, `PATH.1` or the first one that is free.

    What comes to the path then replaces it only there. Until then it has both names, so a run that
    is killed in between has lost nothing. If the path is a link, its target gets the name, beside
    itself. A file that cannot be read, or is no model file with such a metric, is left as it is.

    Args:
        path: where a model is to be saved.
        metric: its AUC or accuracy; nan: it was not evaluated, so nobody knows which is better.
        by_auc: the better model has the higher AUC, else the higher accuracy.

    Returns:
        A sentence about it; empty if nothing was done.

    Raises:
        RankError: the file there is better and cannot get another name.
    """
    target = target_of(path)
    there = _metric_of(target, by_auc)
    if math.isnan(there) or there <= metric:
        return ""
    try:
        kept = _with_another_name(target)
    except OSError as error:
        raise RankError(
            f"--save-model={path}: it holds a better model ({metric_text(there, by_auc)}),"
            f" which cannot be moved to {target}.1 ({reason_of(error)}): move it, or save elsewhere"
        ) from error
    _keep_vocabulary(target, kept)
    name = kept if path.is_symlink() else path.with_name(kept.name)
    held = metric_text(there, by_auc)
    if math.isnan(metric):
        return f"{path} held a model with {held}, this one is not evaluated: moved to {name}"
    own = metric_text(metric, by_auc).partition(" ")[2]
    return f"{path} held a better model ({held}, this one {own}): moved to {name}"


def _metric_of(path: Path, by_auc: bool) -> float:
    """The metric of the model in a file, a fraction; nan if there is none."""
    try:
        content = read_content(str(path))
    except Exception:  # no file, or none that torch can read
        return math.nan
    if not isinstance(content, dict) or "state_dict" not in content:
        return math.nan
    value: Any = content.get(_METRICS[by_auc])
    if isinstance(value, np.generic):  # the original's metrics
        value = value.item()
    return float(value) if is_number(value) and 0 <= value <= 1 else math.nan


def _with_another_name(path: Path) -> Path:
    """Give the file a second name that was free; where files cannot have two, its only one."""
    for number in itertools.count(1):
        other = path.with_name(f"{path.name}.{number}")
        try:
            _link_or_rename(path, other)
        except FileExistsError:
            # a run that was killed before it wrote its own file has given it this name
            if not (other.exists() and other.samefile(path)):
                continue
        return other
    raise AssertionError("numbers do not end")


def _keep_vocabulary(path: Path, kept: Path) -> None:
    """Give the vocabulary of the kept model a second name, too; without it the model is kept."""
    with contextlib.suppress(OSError):
        _link_or_rename(vocabulary_of(path), vocabulary_of(kept))


def _link_or_rename(path: Path, other: Path) -> None:
    """Raise FileExistsError if the other name is taken, even if that happens just now."""
    try:
        os.link(path, other)
        return
    except FileExistsError:
        raise
    except OSError:  # not on every file system can a file have two names
        os.close(os.open(other, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.replace(path, other)  # the empty file of that name is ours
    except OSError:
        with contextlib.suppress(OSError):
            other.unlink()
        raise


def save_model(
    path: str, model_state: ModelState, progress: Progress, by_auc: bool, continues: bool
) -> str:
    """Save the model. All ranks call it.

    The first time, a fresh run moves a better model out of its way.

    Args:
        path: of --save-model.
        model_state: the model.
        progress: how far training is; it notes the file.
        by_auc: a better model has a higher AUC, else a higher accuracy.
        continues: the run has gone on from a model, so that what the file holds is no other run's.

    Returns:
        A line about the better model, on the first rank; empty if there is none.

    Raises:
        RankError: the file cannot be written; the one that was there before is kept.
    """
    text = ""
    if model_state.process.is_first and not (continues or progress.saved):
        text = keep_better(Path(path), progress.best(by_auc), by_auc)
    save_model_file(path, model_state, progress)
    progress.note_saved()
    return text
