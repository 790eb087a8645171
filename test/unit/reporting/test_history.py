"""Series of numbers by step: what is done again counts once, pictures take few points."""

import math

from reporting.history import MOST_POINTS, History, thinned

NAN = math.nan


def test_steps_that_are_done_again_count_once():
    history = History()
    for step, loss in ((10, 1), (20, 2), (30, 3), (20, 4)):
        history.training.add(step, {"loss": loss, "lr": None})
    assert list(history.training.steps) == [10, 20]
    assert list(history.training.columns["loss"]) == [1, 4]
    assert math.isnan(history.training.columns["lr"][0])


def test_only_lines_up_to_the_step_and_with_numbers_are_taken():
    history, line = History(), {"kind": "train", "loss": 1.5, "lr": 0.1, "rows_per_second": None}
    odd = [line | {"step": "x"}, line | {"step": 3, "lr": "a"}, line | {"step": 4, "loss": True}]
    odd += [line | {"step": 5, "kind": ["train"]}, line | {"step": 6, "kind": "end"}]
    later = [line | {"step": 9}]
    test = {"kind": "evaluation", "step": 2, "auc": 0.7}
    history.add_lines([line | {"step": 2}, *odd, test, *later], last_step=8)
    assert list(history.training.steps) == [2] == list(history.evaluations.steps)
    assert list(history.evaluations.columns["auc"]) == [0.7]


def test_a_short_curve_stays_and_loses_what_is_not_finite():
    assert thinned([1, 2, 3], [5, NAN, math.inf]) == ([1], [5])
    assert thinned([], []) == ([], [])


def test_a_long_curve_keeps_its_ends_and_its_extremes():
    steps = list(range(100_000))
    values = [math.sin(step / 9000) for step in steps]
    values[12_345], values[77_777], values[500] = 9.0, -9.0, NAN
    kept_steps, kept = thinned(steps, values)
    assert len(kept) <= MOST_POINTS and kept_steps == sorted(set(kept_steps))
    assert (kept_steps[0], kept_steps[-1]) == (0, 99_999)
    assert (12_345, 9.0) in zip(kept_steps, kept, strict=True) and min(kept) == -9
    assert all(values[step] == value for step, value in zip(kept_steps, kept, strict=True))
