"""Where a resumed run begins: after the last batch at which an optimiser step was due."""

import pytest

from engine.progress import Progress


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
