"""Compiled loops that draw bags of ids from numpy's legacy generator, number for number.

The contract's stream is that of numpy.random.RandomState, of which a call a bag would cost
microseconds. Compiled loops call numpy's MT19937 itself through a numpy.random.Generator: its
`random` yields RandomState's doubles. Its normals are other ones, so the polar method is here.

All of it is one file because numba's cache looks at the file of the called function alone: a loop
that is cached would not see a change to another file.
"""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from common.compiled import compiled

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

LAST = np.iinfo(np.int64).max  # fills the row of a bag of fewer draws: it is sorted to the end


class Stream(NamedTuple):
    """Where random numbers come from.

    Attributes:
        random: yields the doubles of numpy.random.RandomState.
        normal: (2,) whether a normal is left of the last pair, and that normal.
    """

    random: np.random.Generator
    normal: Doubles


class Size(NamedTuple):
    """How many draws make a bag: exactly `most`, or a random share of it, at least 1."""

    most: int
    is_fixed: bool


class Bags(NamedTuple):
    """The bags of one batch of B rows and T tables.

    Attributes:
        lengths: (T, B) int32 ids of each bag.
        ids: those of the rows that are kept, table by table and, within a table, row by row.
        ends: (T + 1,) where the ids of each table end, after a 0.
        kept: (2,) the first row whose ids are kept, and the one after the last.
    """

    lengths: Ids
    ids: Ids
    ends: Ints
    kept: Ints


class Normal(NamedTuple):
    """A normal distribution, cut at both ends."""

    mu: float
    sigma: float
    minimum: float
    maximum: float


class Profile(NamedTuple):
    """A trace's stack distances.

    Attributes:
        ids: (n,) by first use.
        recent: (at least n + the draws of a bag,) begins with `ids`; room for the list of a bag.
        distances: ascending, from 0 to n.
        probabilities: the cumulative probability of each distance.
        ascends: whether the probabilities never fall, not even by a rounding error, from 0 on.
        padding: leave new ids out of the draw once all distances can be drawn.
    """

    ids: Ints
    recent: Ints
    distances: Ints
    probabilities: Doubles
    ascends: bool
    padding: bool


# ---------------------------------------------------------------- numbers


def start_stream(seed: int) -> Stream:
    """The stream of numpy.random.RandomState(seed)."""
    bits = np.random.MT19937()
    np.random.RandomState(bits).seed(seed)
    return Stream(np.random.Generator(bits), np.zeros(2))


@compiled
def draw_size(stream: Stream, size: Size) -> int:
    """The number of draws of the next bag."""
    if size.is_fixed:
        return size.most
    return max(1, int(np.rint(stream.random.random() * size.most)))


@compiled
def _draw_normal(stream: Stream) -> float:
    """Marsaglia's polar method, which yields two numbers at a time."""
    random, normal = stream.random, stream.normal
    if normal[0]:
        normal[0] = 0
        return normal[1]
    while True:
        x, y = 2.0 * random.random() - 1.0, 2.0 * random.random() - 1.0
        square = x * x + y * y
        if 0.0 < square < 1.0:
            factor = math.sqrt(-2.0 * math.log(square) / square)
            normal[0], normal[1] = 1, factor * x
            return factor * y


# ---------------------------------------------------------------- bags of a table
# The loops that draw fill a row of `values` (R, size.most) for each bag and write to `lengths` (R,)
# how many draws the bag has. The rest of a row is filled with numbers that sort last.


@compiled
def draw_uniform(stream: Stream, size: Size, num_rows: int, values: Ints, lengths: Ids) -> None:
    """Draw ids of a table in which all rows are equally likely."""
    largest = float(num_rows - 1)
    for row in range(len(values)):
        lengths[row] = count = draw_size(stream, size)
        for k in range(count):
            values[row, k] = int(np.rint(stream.random.random() * largest))
        values[row, count:] = LAST


@compiled
def draw_gaussian(
    stream: Stream, size: Size, normal: Normal, values: Doubles, lengths: Ids
) -> None:
    """Draw normal numbers; distinct ones may be cut to the same id."""
    for row in range(len(values)):
        lengths[row] = count = draw_size(stream, size)
        for k in range(count):
            drawn = normal.mu + normal.sigma * _draw_normal(stream)
            values[row, k] = min(normal.maximum, max(normal.minimum, drawn))  # nan: the minimum
        values[row, count:] = np.inf


@compiled
def draw_traced(stream: Stream, size: Size, profile: Profile, values: Ints, lengths: Ids) -> int:
    """Draw ids by stack distance; returns the largest one."""
    numbers, largest = np.empty(size.most), 0
    for row in range(len(values)):
        lengths[row] = count = draw_size(stream, size)
        for k in range(count):
            numbers[k] = stream.random.random()
        draw_trace(profile, numbers[:count], values[row])
        for k in range(count):
            largest = max(largest, values[row, k])
        values[row, count:] = LAST
    return largest


@compiled
def keep_distinct(
    values: Ints | Doubles, lengths: Ids, kept: tuple[int, int], num_rows: int, ids: Ids
) -> int:
    """Drop the repeated numbers of bags; write the others, cut and modulo the table, as ids.

    Args:
        values: (R, size.most) the numbers of each bag in ascending order; overwritten.
        lengths: (R,) the draws of each bag; written: its distinct numbers.
        kept: the first row whose ids are written, and the one after the last.
        num_rows: of the table.
        ids: written one behind the other.

    Returns:
        How many ids are written.
    """
    written = 0
    for row in range(len(values)):
        bag, count = values[row], 0
        for k in range(lengths[row]):
            if k == 0 or bag[k] != bag[k - 1]:
                bag[count] = bag[k]
                count += 1
        lengths[row] = count
        if kept[0] <= row < kept[1]:
            for k in range(count):
                number = int(bag[k])
                ids[written + k] = number if 0 <= number < num_rows else number % num_rows
            written += count
    return written


# ---------------------------------------------------------------- traces


@compiled
def draw_trace(profile: Profile, numbers: Doubles, drawn: Ints) -> None:
    """Draw an id for each random number, beginning with the ids in the file's order.

    The list of ids, which the contract has read anew for each bag, is recent[first:end]: a bag
    leaves it as it was, at the cost of its own draws.

    Args:
        profile: the trace's; `recent` has room for as many draws.
        numbers: (n,) in [0, 1).
        drawn: (at least n,) written: ids, which may repeat.
    """
    recent, num_ids = profile.recent, len(profile.ids)
    first, end, changed = 0, num_ids, num_ids
    reachable = 0
    for k in range(len(numbers)):
        reachable = _reachable(profile.distances, first, reachable)
        distance = _distance(profile, first, reachable, numbers[k])
        if distance == 0:
            drawn[k] = recent[first]
            first, end = first + 1, end + 1
        else:
            drawn[k] = recent[end - distance]
            changed = min(changed, end - distance)
            for place in range(end - distance, end - 1):
                recent[place] = recent[place + 1]
        recent[end - 1] = drawn[k]
    for place in range(changed, num_ids):
        recent[place] = profile.ids[place]


@compiled
def _reachable(distances: Ints, num_new: int, known: int) -> int:
    """The number of the last distance <= num_new, 0 if there is none; it is at least `known`."""
    while known + 1 < len(distances) and distances[known + 1] <= num_new:
        known += 1
    return known


@compiled
def _distance(profile: Profile, num_new: int, reachable: int, number: float) -> int:
    """The stack distance of a random number in [0, 1), after `num_new` new ids in the bag."""
    probabilities, num_searched = profile.probabilities, len(profile.probabilities)
    if num_new < profile.distances[-1]:
        number *= probabilities[reachable]
        if profile.ascends:  # the first that is as large is then not behind that one
            num_searched = reachable + 1
    elif profile.padding:
        number = (1 - probabilities[0]) * number + probabilities[0]
    low, high = 0, num_searched
    while low < high:
        middle = (low + high) // 2
        if probabilities[middle] < number:
            low = middle + 1
        else:
            high = middle
    return int(profile.distances[min(low, len(probabilities) - 1)])


# ---------------------------------------------------------------- a batch's ids


@compiled
def place_by_row(bags: Bags, ids: Ids) -> None:
    """Write the ids that are kept in the order of a batch: by row and, within a row, by table."""
    begins, end = bags.ends[:-1].copy(), 0
    for row in range(bags.kept[0], bags.kept[1]):
        for table in range(len(begins)):
            begin, count = begins[table], bags.lengths[table, row]
            for k in range(count):
                ids[end + k] = bags.ids[begin + k]
            begins[table] = begin + count
            end += count
