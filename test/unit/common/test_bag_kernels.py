"""The compiled loops draw what numpy's legacy generator draws, and what a naive list gives."""

import numpy as np
import pytest
from naive_random_data import naive_trace

from common import bag_kernels
from common.bag_kernels import Normal, Size, draw_size, draw_trace, draw_uniform, start_stream
from common.random_bags import ROOM, GaussianBags, TracedBags, UniformBags, draw_rows
from common.stack_distances import StackDistances

SEEDS = (0, 1, 123, 2**32 - 1)


def profile_of(folder, ids, distances, probabilities, padding=False, most=500):
    lines = (",".join(map(repr, list(line))) for line in (ids, distances, probabilities))
    (folder / "trace").write_text("\n".join(lines))
    return StackDistances(folder / "trace", padding).profile(most)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("most", [1, 3, 9, 60, 700, ROOM + 1])
def test_numbers_are_those_of_numpys_legacy_generator(seed, most):
    """The ids of a bag are sorted and distinct, whatever its size."""
    random, stream = np.random.RandomState(seed), start_stream(seed)
    for num_rows in (1, 7, 1000, 10**9):
        source = UniformBags(num_rows, Size(most, True))
        rows = draw_rows(stream, [source], 3, 2, (0, 3), False)
        np.testing.assert_array_equal(rows.dense, random.rand(3, 2).astype(np.float32))
        bags = [np.unique(np.round(random.random_sample(most) * (num_rows - 1))) for _ in range(3)]
        assert rows.bags.lengths.tolist() == [[len(bag) for bag in bags]]
        np.testing.assert_array_equal(rows.bags.ids[: rows.bags.ends[-1]], np.concatenate(bags))
        np.testing.assert_array_equal(rows.targets, random.rand(3).astype(np.float32))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [Size(1, True), Size(7, True), Size(40, False), Size(3000, True)])
@pytest.mark.parametrize(
    "normal",
    [
        Normal(400.0, 100.0, 0.0, 999.0),
        Normal(0.5, 1.0, 0.0, 1.0),  # most numbers are cut, and there are only two ids
        Normal(7.0, 0.0, 0.0, 9.0),
        Normal(7.0, -0.0, 0.0, 9.0),
        Normal(500.0, 2.0**-43, 0.0, 999.0),  # some numbers are equal by rounding
        Normal(3.0, float("inf"), -0.5, 9.5),  # all are cut, and -0.5 is id 0
        Normal(1e300, 5.0, 2.0, 3.0),
    ],
)
def test_normal_numbers_are_those_of_numpys_legacy_generator(seed, size, normal):
    """Distinct numbers of one id stay apart; a normal that is left serves the next bag."""
    random, stream = np.random.RandomState(seed), start_stream(seed)
    for _ in range(3):
        rows = draw_rows(stream, [GaussianBags(1000, size, normal)] * 2, 5, 0, (0, 5), False)
        bags = []
        for _ in range(10):
            count = size.most
            if not size.is_fixed:
                count = max(1, int(np.round(random.random_sample(1)[0] * count)))
            drawn = random.normal(normal.mu, abs(normal.sigma), count)
            numbers = np.unique(np.clip(drawn, normal.minimum, normal.maximum))
            bags.append(numbers.astype(np.int64))
        random.rand(5)
        assert rows.bags.lengths.reshape(-1).tolist() == [len(bag) for bag in bags]
        np.testing.assert_array_equal(rows.bags.ids[: rows.bags.ends[-1]], np.concatenate(bags))


PROFILES = {
    "one id": ([5], [0], [1.0]),
    "one id, again and again": ([5], [0, 1], [0.5, 1.0]),
    "few": ([2, 0, 3, 1], [0, 1, 2, 4], [0.4, 0.6, 0.85, 1.0]),
    "ids that repeat": ([2, 2, 3, 2], [0, 1, 2, 4], [0.4, 0.6, 0.85, 1.0]),
    "no new ids": (list(range(50)), [1, 5, 50], [0.5, 0.8, 1.0]),
    "far distances only": (list(range(90, 0, -1)), [70, 71, 90], [0.3, 0.8, 1.0]),
    "distances that repeat": (list(range(9)), [0, 0, 3, 3, 9], [0.2, 0.3, 0.4, 0.4, 1.0]),
    "probabilities that end early": (list(range(30)), [0, 2, 9], [0.3, 0.5, 0.9]),
    "probabilities that fall by rounding": (
        list(range(30)),
        [0, 1, 2, 3],
        [0.3, 0.6, 0.6 - 5e-7, 1.0],
    ),
    "probabilities below 0": (list(range(30)), [0, 1, 2], [-5e-7, 0.6, 1.0]),
    "long": (list(range(2000)), list(range(301)), np.linspace(0.3, 1, 301).tolist()),
}


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("case", PROFILES)
def test_trace_ids_are_those_of_a_list_that_is_popped(tmp_path, case, padding):
    """Every bag begins with the list as the file has it, whatever the bag before did to it."""
    profile = profile_of(tmp_path, *PROFILES[case], padding)
    random = np.random.default_rng(0)
    for _ in range(20):
        numbers = random.random(int(random.integers(1, 400)))
        numbers[random.random(len(numbers)) < 0.3] = 1 - 2.0**-53
        numbers[random.random(len(numbers)) < 0.1] = 0
        drawn = np.empty(len(numbers), np.int64)
        draw_trace(profile, numbers, drawn)
        assert drawn.tolist() == naive_trace((*PROFILES[case], padding), numbers)


@pytest.mark.parametrize("padding, last", [(True, 1), (False, 2)])
def test_padding_draws_no_new_ids_once_all_distances_can_be_drawn(tmp_path, padding, last):
    """Distance 0 is a new id, the first of the list; distance 1 is the id drawn before."""
    profile = profile_of(tmp_path, [3, 1, 2], [0, 1, 2], [0.5, 0.75, 1.0], padding)
    drawn = np.empty(3, np.int64)
    draw_trace(profile, np.array([0.99, 0.0, 0.01]), drawn)
    assert drawn.tolist() == [3, 1, last], "before an id is used, only distance 0 can be drawn"


def test_halves_are_rounded_to_even():
    """Sizes and ids: of multiples of 2^-53 times 2^52 every second one is a half."""
    random, stream = np.random.RandomState(1), start_stream(1)
    sizes = [draw_size(stream, Size(2**52, False)) for _ in range(50)]
    assert sizes == np.round(random.random_sample(50) * 2**52).tolist()
    ids, lengths = np.empty((50, 1), np.int64), np.empty(50, np.int32)
    draw_uniform(stream, Size(1, True), 2**52 + 1, ids, lengths)
    np.testing.assert_array_equal(ids[:, 0], np.round(random.random_sample(50) * 2**52))


@pytest.mark.filterwarnings("ignore:the trace of table")
def test_ids_of_64_bits_are_told_apart_and_then_taken_modulo(tmp_path):
    """Doubles would not hold them; the largest also fills the rows of bags of fewer draws."""
    ids = [2**63 - 1, 2**63 - 2, 2**53 + 1, 2**53, -1]
    profile_of(tmp_path, ids, [0, 1], [0.9, 1.0])
    source = TracedBags(10, Size(5, False), StackDistances(tmp_path / "trace", padding=False))
    random, bags = np.random.RandomState(1), []
    for _ in range(50):
        numbers = random.random_sample(max(1, round(random.random_sample() * 5)))
        drawn = set(naive_trace((ids, [0, 1], np.array([0.9, 1.0]), False), numbers))
        bags.append([id % 10 for id in sorted(drawn)])
    random.rand(50)
    rows = draw_rows(start_stream(1), [source], 50, 0, (0, 50), False)
    assert rows.bags.lengths.tolist() == [[len(bag) for bag in bags]]
    assert rows.bags.ids[: rows.bags.ends[-1]].tolist() == sum(bags, [])


def test_each_loop_is_compiled_once(tmp_path):
    """A second specialisation would cost a first run half a second."""
    profile_of(tmp_path, [1], [0], [1.0])
    trace = StackDistances(tmp_path / "trace", padding=False)
    for size, num_rows in ((Size(1, True), 5), (Size(9, False), 10**9)):
        sources = [
            UniformBags(num_rows, size),
            GaussianBags(num_rows, size, Normal(1.0, 1.0, 0.0, 2.0)),
            TracedBags(num_rows, size, trace),
        ]
        draw_rows(start_stream(1), sources, 4, 2, (0, 4), False).block()
    for name in ("draw_uniform", "draw_gaussian", "draw_traced", "place_by_row"):
        assert len(getattr(bag_kernels, name).signatures) == 1, name
    assert len(bag_kernels.keep_distinct.signatures) == 2, "of whole numbers and of doubles"
