"""Rows of random and synthetic data cost no more memory and time than they are worth."""

import time

import numpy as np
import pytest

from common.bag_kernels import Normal, Size, start_stream
from common.errors import UserError
from common.random_bags import GaussianBags, UniformBags, draw_rows


def test_only_rows_that_are_kept_take_memory():
    """A rank of many, and a run that skips batches, draw all rows."""
    sources = [UniformBags(1000, Size(50, True)), UniformBags(30, Size(50, True))]
    whole = draw_rows(start_stream(1), sources, 40, 3, (0, 40), True)
    part = draw_rows(start_stream(1), sources, 40, 3, (10, 13), True)
    none = draw_rows(start_stream(1), sources, 40, 3, (0, 0), True)
    assert len(part.bags.ids) == 3 * (50 + 30) and len(none.bags.ids) == 0
    for rows in (part, none):
        np.testing.assert_array_equal(rows.bags.lengths, whole.bags.lengths)
    np.testing.assert_array_equal(part.dense, whole.dense[10:13])
    np.testing.assert_array_equal(part.targets, whole.targets[10:13])
    begin = whole.bags.lengths[0, :10].sum()
    in_first_table = part.bags.ids[: part.bags.ends[1]]
    np.testing.assert_array_equal(in_first_table, whole.bags.ids[begin:][: len(in_first_table)])
    assert len(none.block()) == 0


@pytest.mark.parametrize(
    "minimum, maximum, got",
    [(0, 20, "20"), (0, 20.7, "20"), (-1, 5, "-1"), (-7.9, 99, "-7"), (0, 1e300, "1e+300")],
)
def test_a_number_outside_the_table_is_named_as_an_id(minimum, maximum, got):
    """Drawn with so wide a distribution that every number is cut."""
    normal = Normal(1.0, float("inf"), float(minimum), float(maximum))
    sources = [UniformBags(3, Size(2, True)), GaussianBags(20, Size(40, True), normal)]
    with pytest.raises(UserError) as caught:
        draw_rows(start_stream(3), sources, 5, 1, (0, 5), False)
    assert str(caught.value).startswith(f"gaussian data drew id {got} for table 1 of 20 rows: let ")


def test_limits_outside_the_table_are_no_error_while_all_ids_are_inside():
    """Also in bags of fewer draws than others; numbers above -1 are id 0."""
    source = GaussianBags(20, Size(40, False), Normal(0.0, 0.1, -9.0, 99.0))
    bags = draw_rows(start_stream(1), [source], 50, 1, (0, 50), False).bags
    assert not bags.ids[: bags.ends[-1]].any()


@pytest.mark.parametrize("make", [UniformBags, GaussianBags])
def test_a_batch_takes_far_less_time_than_a_step_on_it(make):
    """About 2 ms, and a call of numpy a bag 1.3 s; a step takes 70 ms."""
    normal = [Normal(5000.0, 1000.0, 0.0, 9999.0)] if make is GaussianBags else []
    sources = [make(10_000, Size(1, True), *normal)] * 26
    stream, seconds = start_stream(1), []
    for _ in range(4):
        begin = time.thread_time()
        draw_rows(stream, sources, 2048, 13, (0, 2048), True).block()
        seconds.append(time.thread_time() - begin)
    assert min(seconds) < 0.03
