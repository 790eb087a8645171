"""What a run remembers: where it is resumed, its best evaluations, what its last line says."""

import json
from dataclasses import asdict

import pytest

from engine.progress import Progress
from reporting.metrics import Metrics


def evaluated(progress, epoch, it, auc, accuracy):
    progress.epoch, progress.iter = epoch, it
    progress.note_evaluation(Metrics(accuracy=accuracy, auc=auc))


def test_the_steps_of_the_best_evaluations_are_remembered():
    progress = Progress()
    assert progress.best_step(True) == progress.best_step(False) == (0, 0)
    for step, auc, accuracy in (
        ((0, 10), 0.6, 0.7), ((1, 5), 0.8, 0.6), ((1, 10), 0.7, 0.75), ((2, 5), 0.8, 0.75),
    ):  # fmt: skip
        evaluated(progress, *step, auc, accuracy)
    assert progress.best_step(by_auc=True) == (1, 5)
    assert progress.best_step(by_auc=False) == (1, 10), "the first of two that are alike"
    again = Progress(**json.loads(json.dumps(asdict(progress))))
    assert again.best_step(by_auc=True) == (1, 5), "its values are plain numbers"


def test_the_last_line_says_where_the_best_model_is():
    progress = Progress()
    evaluated(progress, 0, 10240, 0.8151, 0.78123)
    best = "best AUC 0.8151 at it 10240 of epoch 0"
    assert progress.last_line(True, "") == f"{best}, not saved (no --save-model)"
    progress.note_saved()
    assert progress.last_line(True, "m.pth") == f"{best}, saved in m.pth"
    evaluated(progress, 0, 20480, 0.7, 0.7)
    assert progress.last_line(True, "m.pth") == f"{best}, saved in m.pth"
    assert progress.last_line(False, "m.pth") == (
        "best accuracy 78.123 % at it 10240 of epoch 0, saved in m.pth"
    )


def test_a_run_that_continues_and_finds_nothing_better_has_saved_nothing():
    progress = Progress(0, 10, best_auc=0.8, best_accuracy=0.7)
    evaluated(progress, 1, 10, 0.7, 0.6)
    assert progress.last_line(True, "m.pth") == (
        "best AUC 0.8000 before this run, nothing better to save in m.pth"
    )
    assert progress.last_line(True, "") == ""
    evaluated(progress, 1, 20, 0.9, 0.6)
    progress.note_saved()
    assert progress.last_line(True, "m.pth") == (
        "best AUC 0.9000 at it 20 of epoch 1, saved in m.pth"
    )


def test_a_model_that_no_evaluation_has_chosen_is_told_too():
    for best in (float("nan"), 0.8):  # that of a file from which the run continues
        progress = Progress(0, 640, best_auc=best)
        assert progress.last_line(True, "") == ""
        progress.note_saved()
        assert progress.last_line(True, "m.pth") == "model of it 640 of epoch 0 saved in m.pth"


@pytest.mark.parametrize("updated", [True, False])
def test_a_run_is_resumed_after_the_batch_at_which_a_step_was_due(updated):
    progress = Progress()
    for it in (1, 2, 3, 4):
        if it == 3:
            progress.note_due(it, updated)
        progress.note_batch(0, it)
    assert (progress.epoch, progress.iter, progress.resume_iter) == (0, 4, 3)
    assert progress.num_steps == updated


@pytest.mark.parametrize("is_due", [True, False])
def test_an_epoch_without_a_step_so_far_is_resumed_at_its_beginning(is_due):
    """Its progress does not remember the epoch before."""
    progress = Progress(epoch=0, iter=10, num_steps=4, resume_iter=10)
    if is_due:
        progress.note_due(1, True)
    progress.note_batch(1, 1)
    assert progress == Progress(epoch=1, iter=1, num_steps=4 + is_due, resume_iter=int(is_due))


def test_evaluations_since_the_best_are_counted_for_each_metric():
    progress = Progress()
    for auc, accuracy, since in (
        (0.6, 0.7, (0, 0)), (0.5, 0.8, (1, 0)), (0.6, 0.7, (2, 1)), (0.7, 0.7, (0, 2)),
    ):  # fmt: skip
        evaluated(progress, 0, 10, auc, accuracy)
        assert (progress.since_best_auc, progress.since_best_accuracy) == since
    assert not progress.patience_over(0, by_auc=False), "0 is for ever"
    assert not progress.patience_over(3, by_auc=False)
    assert progress.patience_over(2, by_auc=False) and not progress.patience_over(2, by_auc=True)


def test_labels_that_are_all_the_same_have_no_auc_and_end_nothing():
    progress = Progress()
    for _ in range(5):
        evaluated(progress, 0, 10, float("nan"), 0.9)
    assert progress.since_best_auc == 0 and progress.since_best_accuracy == 4
