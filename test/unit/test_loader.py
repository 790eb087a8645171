"""The loader gives the batches that were asked for, in order and ahead, and cleans up behind it."""

import contextlib
import threading

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL, train

from common.errors import UserError
from common.shares import share_of_rows
from criteo.prepared import Prepared
from criteo.row_layout import FLAT, Layout
from dlrm_data_pytorch import (
    GROUPS_AHEAD,
    MOST_AHEAD_OF_DEVICE,
    CriteoData,
    _copied_ahead,
    _side_stream,
    load_batches,
)
from ranks.process import Process

CPU = torch.device("cpu")
BATCH, NUM_ROWS = 100, 20_050  # more than two groups, and a last batch of 50
NUM_BATCHES = 201
WAIT = 20  # seconds, for what takes none
LAYOUT = Layout.holding([NUM_ROWS, *[50] * 39])  # 2 bytes for the label, 1 for the others


def rank_of(rank, world_size):
    return Process(rank, world_size, rank, CPU, "gloo")


def make(rank=0, world_size=1, bad_row=None):
    rows = np.random.default_rng(0).integers(0, 50, (NUM_ROWS, 40), dtype=np.int32)
    rows[:, 0] = np.arange(NUM_ROWS)  # a label that tells which row it is
    if bad_row is not None:
        rows[bad_row, 20] = 50
    prepared = Prepared({}, (50,) * 26, (), LAYOUT)
    process = rank_of(rank, world_size)
    return CriteoData(prepared, LAYOUT.pack(rows.T), NUM_ROWS, BATCH, process)


ORDERS = {
    "contiguous": list(range(NUM_BATCHES)),
    "resumed": list(range(150, NUM_BATCHES)),
    "shuffled": np.random.default_rng(1).permutation(NUM_BATCHES).tolist(),
    "jumps": [0, 1, 2, 50, 51, 200, 0, 199, 200],
    "one": [200],
    "none": [],
}


@pytest.mark.parametrize("rank, world_size, readers", [(0, 1, 1), (0, 3, 2), (2, 3, 2)])
@pytest.mark.parametrize("order", ORDERS)
def test_batches_come_in_the_order_asked_for(order, rank, world_size, readers):
    numbers = ORDERS[order]
    data, alone = make(rank, world_size), make(rank, world_size)
    data.readers = readers
    assert data.batches_at_a_time > 1 and 2 * data.batches_at_a_time < NUM_BATCHES
    got = list(load_batches(data, iter(numbers), 0, CPU))
    assert len(got) == len(numbers)
    for number, batch in zip(numbers, got, strict=True):
        want = alone[number]
        assert torch.equal(batch.block, want.block), number
        assert batch.num_rows == want.num_rows == len(batch.block)
        assert batch.rows_per_rank == want.rows_per_rank
        assert sum(batch.rows_per_rank) == (50 if number == 200 else 100)
    assert data.rows_read == sum(batch.num_rows for batch in got)


class Recorder:
    """Batches of a number each; tells which groups were begun."""

    def __init__(self, num_groups, readers=1):
        self.batches_at_a_time, self.rows_read, self.readers = 2, 0, readers
        self.read_so_far = []
        self.begun = [threading.Event() for _ in range(num_groups)]

    def read(self, numbers, pin_memory=False):
        self.read_so_far.append(list(numbers))
        self.begun[len(self.read_so_far) - 1].set()
        return list(numbers)


def test_what_comes_next_is_made_before_it_is_asked_for():
    """And no more than the groups that may lie ready."""
    data = Recorder(num_groups=6)
    batches = load_batches(data, range(12), 0, CPU)
    assert next(batches) == 0
    assert data.begun[GROUPS_AHEAD].wait(WAIT), "nothing is made ahead"
    assert data.read_so_far == [[0, 1], [2, 3], [4, 5]][: GROUPS_AHEAD + 1]
    assert next(batches) == 1 and not data.begun[GROUPS_AHEAD + 1].is_set()
    assert next(batches) == 2 and data.begun[GROUPS_AHEAD + 1].wait(WAIT)
    assert list(batches) == list(range(3, 12))


def test_readers_read_at_the_same_time():
    """As for a card, whose steps may take less time than one thread needs for a batch."""
    together = threading.Barrier(2)

    class Slow(Recorder):
        def read(self, numbers, pin_memory=False):
            if numbers[0] < 4:
                together.wait(WAIT)
            return super().read(numbers, pin_memory)

    assert list(load_batches(Slow(num_groups=6, readers=2), range(12), 0, CPU)) == list(range(12))


@pytest.mark.parametrize("readers", [1, 2])
def test_an_error_while_reading_reaches_who_asks(readers):
    """The batches of groups before it come first."""
    data, got = make(bad_row=8150), []
    data.readers = readers
    with pytest.raises(UserError, match="row 8150 of the epoch in .*: id 50 of table 6 is outside"):
        for batch in load_batches(data, range(NUM_BATCHES), 0, CPU):
            got.append(int(LAYOUT.unpack(batch.block.numpy())[0, 0]))
    assert got == list(range(0, BATCH * data.batches_at_a_time, BATCH))


@pytest.mark.parametrize("leave", ["close", "break", "end", "error"])
def test_no_thread_is_left(leave):
    before = set(threading.enumerate())
    bad_row = 8150 if leave == "error" else None
    batches = load_batches(make(bad_row=bad_row), range(NUM_BATCHES), 0, CPU)
    next(batches)
    assert set(threading.enumerate()) - before, "who made the batch?"
    if leave == "close":
        batches.close()
    elif leave == "end":
        assert len(list(batches)) == NUM_BATCHES - 1
    elif leave == "error":
        with pytest.raises(UserError):
            list(batches)
    else:
        for _ in batches:
            break
        del batches
    assert not set(threading.enumerate()) - before


def test_a_run_that_stops_early_leaves_no_thread(kaggle):
    flags = [*CRITEO_MODEL, f"--data_path={kaggle}", "--mini-batch-size=64", "--test-freq=3"]
    result = train(*flags, "--mlperf-acc-threshold=0.1")
    assert result.status == 0 and "training stops" in result.out
    makers = [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
    assert not makers, "of batches; others, as a progress bar's, may stay"


@pytest.mark.parametrize("number", [0, 7, 200])
def test_an_error_names_the_row_of_the_epoch_whoevers_share_it_is(number):
    """The second of two ranks, which has only its own rows, in memory."""
    process = rank_of(1, 2)
    shares = [share_of_rows(min(BATCH, NUM_ROWS - k * BATCH), 1, 2) for k in range(NUM_BATCHES)]
    number_of = np.concatenate(
        [k * BATCH + np.arange(*share) for k, share in enumerate(shares)]
    )  # of the rank's rows in the epoch
    rows = np.zeros((len(number_of), 40), np.int32)
    bad = int(np.flatnonzero(number_of // BATCH == number)[3])
    rows[bad, 20] = 50
    prepared = Prepared({}, (50,) * 26, (), FLAT)
    packed = rows.view(np.uint8)
    data = CriteoData(prepared, packed, NUM_ROWS, BATCH, process, shares_only=True)
    first = number // 8 * 8
    for numbers in ([number], range(first, min(first + 8, NUM_BATCHES))):
        with pytest.raises(UserError, match=f"row {number_of[bad]} of the epoch"):
            data.read(list(numbers))


class Streams:
    """A device's module whose work is done at once."""

    class Event:
        def record(self, stream):
            self.stream = stream

    class Stream:
        def wait_event(self, event):
            assert isinstance(event.stream, Streams.Stream)

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self):
        return self.Stream()


class OnDevice:
    def __init__(self, number, log):
        self.number, self.log, self.block = number, log, self

    def to(self, device):
        self.log.append(f"copy {self.number}")
        return self

    def record_stream(self, stream):
        self.log.append(f"give {self.number}")


@pytest.fixture
def streams(monkeypatch):
    """The device's module is Streams."""
    monkeypatch.setattr(torch, "get_device_module", lambda _: Streams())
    _side_stream.cache_clear()
    yield Streams
    _side_stream.cache_clear()


@pytest.fixture
def copied(streams):
    """(log, batches that are copied ahead, of a maker that fails behind the third)."""
    log = []

    def maker():
        try:
            for number in range(3):
                yield OnDevice(number, log)
            raise UserError("the fourth is bad")
        finally:
            log.append("closed")

    return log, _copied_ahead(maker(), CPU)


def test_a_copy_begins_before_the_step_on_the_batch_before_it(copied):
    """And an error while reading comes behind all batches before it."""
    log, batches = copied
    got = []
    with pytest.raises(UserError, match="the fourth is bad"):
        for batch in batches:
            log.append(f"step {batch.number}")
            got.append(batch.number)
    assert got == [0, 1, 2]
    order = ["copy 0", "copy 1", "give 0", "step 0", "copy 2", "give 1", "step 1"]
    assert log[:7] == order and log[-1] == "step 2"


def test_the_host_waits_where_it_is_far_ahead_of_the_device(streams, monkeypatch):
    """For the step that many batches before, whose block's memory is then free."""
    log, most = [], MOST_AHEAD_OF_DEVICE

    class Event(streams.Event):
        def record(self, stream):
            super().record(stream)
            self.number = sum(line.startswith("step") for line in log)

        def synchronize(self):
            log.append(f"wait for {self.number}")

    monkeypatch.setattr(streams, "Event", Event)
    for batch in _copied_ahead((OnDevice(number, log) for number in range(most + 3)), CPU):
        log.append(f"step {batch.number}")
    assert [line for line in log if "wait" in line] == [f"wait for {number}" for number in range(3)]
    assert log.index("wait for 0") == log.index(f"step {most}") - 1


def test_who_makes_batches_ends_with_who_copies_them(copied):
    log, batches = copied
    next(batches)
    batches.close()
    assert log[-1] == "closed"
