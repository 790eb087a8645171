"""Compiled loops that draw bags of ids from numpy's legacy generator, number for number.

The contract's stream is that of numpy.random.RandomState: doubles of MT19937, normals by the polar
method. A call of numpy a bag costs microseconds, so the loops draw the doubles themselves.

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
Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

NUM_WORDS, TWIST_AHEAD = 624, 397  # of MT19937's state; a double takes two words
BLOCK = NUM_WORDS // 2  # doubles of one turn of the state
ROOM = 8 * BLOCK  # doubles drawn at a time: they stay in the first cache
# distances of Shell's sort, by Tokuda's formula; 45 of them exceed any array
GAPS = np.ceil((9 * 2.25 ** np.arange(45) - 4) / 5).astype(np.int64)
MOST_TO_INSERT = 24  # numbers that plain insertion sorts faster
U32 = np.uint32


class Stream(NamedTuple):
    """A generator in arrays, which the loops change.

    Attributes:
        words: (624,) the state of MT19937.
        doubles: those drawn ahead; all from `next` on are still to be used.
        next: (1,) the first of them.
        normal: (2,) whether a normal is left of the last pair, and that normal.
    """

    words: Words
    doubles: Doubles
    next: Ints
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
        values: (at least the draws of a bag,) room for the bag that is drawn.
    """

    lengths: Ids
    ids: Ids
    ends: Ints
    kept: Ints
    values: Doubles


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


def start_stream(seed: int, most: int) -> Stream:
    """The stream of numpy.random.RandomState(seed).

    Args:
        seed: as numpy takes it.
        most: the most doubles that a loop wants at once.
    """
    _, words, place, *_ = np.random.RandomState(seed).get_state(legacy=True)
    assert place == NUM_WORDS  # nothing of this state is drawn
    room = -(-(most + ROOM) // BLOCK) * BLOCK
    return Stream(np.array(words, U32), np.empty(room), np.array([room]), np.zeros(2))


@compiled
def draw_floats(stream: Stream, numbers: Floats) -> None:
    """Fill `numbers` (n,) with what `rand` draws, rounded to float32."""
    words, doubles, at = stream.words, stream.doubles, stream.next[0]
    for i in range(len(numbers)):
        if at == len(doubles):
            at = _draw_ahead(words, doubles, at)
        numbers[i] = doubles[at]
        at += 1
    stream.next[0] = at


@compiled
def _draw_ahead(words: Words, doubles: Doubles, at: int) -> int:
    """Move the doubles that are left, draw as many behind them as fit; returns where they begin."""
    begin = at % BLOCK  # whole blocks fit behind what is left
    for k in range(len(doubles) - at):
        doubles[begin + k] = doubles[at + k]
    for block in range(begin + len(doubles) - at, len(doubles), BLOCK):
        _turn(words)
        for k in range(BLOCK):
            high, low = _temper(words[2 * k]) >> U32(5), _temper(words[2 * k + 1]) >> U32(6)
            doubles[block + k] = (high * 67108864.0 + low) / 9007199254740992.0  # 2^26, 2^53
    return begin


@compiled
def _turn(words: Words) -> None:
    """The next state of MT19937; three loops without a modulo, which the compiler vectorises."""
    ahead, behind = TWIST_AHEAD, NUM_WORDS - TWIST_AHEAD
    for i in range(behind):
        words[i] = _twist(words[i], words[i + 1], words[i + ahead])
    for i in range(behind, NUM_WORDS - 1):
        words[i] = _twist(words[i], words[i + 1], words[i - behind])
    words[NUM_WORDS - 1] = _twist(words[NUM_WORDS - 1], words[0], words[ahead - 1])


@compiled
def _twist(word: np.uint32, following: np.uint32, other: np.uint32) -> np.uint32:
    mixed = (word & U32(0x80000000)) | (following & U32(0x7FFFFFFF))
    odd = U32(0) - (following & U32(1))  # all bits or none
    return U32(other ^ (mixed >> U32(1)) ^ (odd & U32(0x9908B0DF)))


@compiled
def _temper(word: np.uint32) -> np.uint32:
    word = U32(word ^ (word >> U32(11)))
    word = U32(word ^ ((word << U32(7)) & U32(0x9D2C5680)))
    word = U32(word ^ ((word << U32(15)) & U32(0xEFC60000)))
    return U32(word ^ (word >> U32(18)))


@compiled
def _draw_normals(words: Words, doubles: Doubles, at: int) -> tuple[int, float, float]:
    """(place behind the doubles used, a normal, another one): Marsaglia's polar method."""
    while True:
        if at + 2 > len(doubles):
            at = _draw_ahead(words, doubles, at)
        x, y = 2.0 * doubles[at] - 1.0, 2.0 * doubles[at + 1] - 1.0
        at += 2
        square = x * x + y * y
        if 0.0 < square < 1.0:
            factor = math.sqrt(-2.0 * math.log(square) / square)
            return at, factor * y, factor * x


# ---------------------------------------------------------------- bags of a table


@compiled
def draw_uniform(stream: Stream, bags: Bags, table: int, size: Size, num_rows: int) -> None:
    """Draw a table's bags of ids, all rows equally likely; the ids of a bag are distinct."""
    words, doubles, at = stream.words, stream.doubles, stream.next[0]
    lengths, ids, end = bags.lengths[table], bags.ids, bags.ends[table]
    (begin_row, end_row), values = bags.kept, bags.values.view(np.int64)
    largest = float(num_rows - 1)
    for row in range(len(lengths)):
        if at + size.most >= len(doubles):
            at = _draw_ahead(words, doubles, at)
        at, count = _bag_size(doubles, at, size)
        for k in range(count):
            values[k] = int(np.rint(doubles[at + k] * largest))
        at += count
        lengths[row] = count = _distinct(values, count)
        if begin_row <= row < end_row:
            end = _keep(values, count, ids, end)
    stream.next[0], bags.ends[table + 1] = at, end


@compiled
def draw_gaussian(
    stream: Stream, bags: Bags, table: int, size: Size, normal: Normal, num_rows: int
) -> float:
    """Draw a table's bags of normal numbers; distinct ones may be cut to the same id.

    Returns:
        0 if all ids lie inside the table; else a number that does not, where drawing stopped.
    """
    words, doubles, at = stream.words, stream.doubles, stream.next[0]
    is_left, left = stream.normal[0] > 0, stream.normal[1]
    lengths, ids, end = bags.lengths[table], bags.ids, bags.ends[table]
    (begin_row, end_row), values = bags.kept, bags.values
    for row in range(len(lengths)):
        if at == len(doubles):
            at = _draw_ahead(words, doubles, at)
        at, count = _bag_size(doubles, at, size)
        for k in range(count):
            drawn = left
            if not is_left:
                at, drawn, left = _draw_normals(words, doubles, at)
            is_left = not is_left
            drawn = normal.mu + normal.sigma * drawn
            values[k] = min(normal.maximum, max(normal.minimum, drawn))  # nan becomes minimum
        lengths[row] = count = _distinct(values, count)
        if values[0] <= -1.0 or values[count - 1] >= num_rows:
            return values[0] if values[0] <= -1.0 else values[count - 1]
        if begin_row <= row < end_row:
            end = _keep(values, count, ids, end)
    stream.next[0], bags.ends[table + 1] = at, end
    stream.normal[0], stream.normal[1] = is_left, left
    return 0.0


@compiled
def draw_traced(
    stream: Stream, bags: Bags, table: int, size: Size, profile: Profile, num_rows: int
) -> bool:
    """Draw a table's bags by stack distance; a bag's distinct ids are taken modulo the table.

    Returns:
        Whether an id of the trace lies beyond the table.
    """
    words, doubles, at = stream.words, stream.doubles, stream.next[0]
    lengths, ids, end = bags.lengths[table], bags.ids, bags.ends[table]
    (begin_row, end_row), values = bags.kept, bags.values.view(np.int64)
    is_beyond = False
    for row in range(len(lengths)):
        if at + size.most >= len(doubles):
            at = _draw_ahead(words, doubles, at)
        at, count = _bag_size(doubles, at, size)
        draw_trace(profile, doubles[at : at + count], values)
        at += count
        lengths[row] = count = _distinct(values, count)
        lowest, highest = values[0], values[count - 1]
        if lowest < 0 or highest >= num_rows:
            is_beyond |= highest >= num_rows
            for k in range(count):
                values[k] %= num_rows
        if begin_row <= row < end_row:
            end = _keep(values, count, ids, end)
    stream.next[0], bags.ends[table + 1] = at, end
    return is_beyond


@compiled
def _bag_size(doubles: Doubles, at: int, size: Size) -> tuple[int, int]:
    """(place behind the doubles used, number of draws of a bag)."""
    if size.is_fixed:
        return at, size.most
    return at + 1, max(1, int(np.rint(doubles[at] * size.most)))


@compiled
def _keep(values: Ints | Doubles, count: int, ids: Ids, end: int) -> int:
    """Write a bag's ids behind those before `end`; returns the new end."""
    for k in range(count):
        ids[end + k] = int(values[k])
    return end + count


@compiled
def _distinct(values: Ints | Doubles, count: int) -> int:
    """Sort the first `count` values and drop repeated ones; returns how many are left."""
    gap = 0
    while count > MOST_TO_INSERT and 3 * GAPS[gap + 1] < count:
        gap += 1
    while gap >= 0:
        _sort_by_insertion(values, count, GAPS[gap])
        gap -= 1
    num_distinct = min(count, 1)
    for k in range(1, count):
        if values[k] != values[num_distinct - 1]:
            values[num_distinct] = values[k]
            num_distinct += 1
    return num_distinct


@compiled
def _sort_by_insertion(values: Ints | Doubles, count: int, gap: int) -> None:
    """Sort each of the sequences that take every `gap`-th value."""
    for k in range(gap, count):
        value, hole = values[k], k
        while hole >= gap and values[hole - gap] > value:
            values[hole] = values[hole - gap]
            hole -= gap
        values[hole] = value


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
