"""The loader gives the batches that were asked for, in order and ahead, and cleans up behind it."""

import contextlib
import threading

import numpy as np
import pytest
import torch

from common.errors import RankError, UserError
from common.shares import share_of_rows
from criteo.prepared import Prepared
from criteo.row_layout import FLAT, Layout
from devices.card import side_stream
from devices.execution import Execution
from dlrm_data_pytorch import MAX_BATCHES_ON_DEVICE, READS_AHEAD, CriteoDataset, load_batches
from ranks.process import Process

CPU = torch.device("cpu")
BATCH, NUM_ROWS = 100, 20_050  # more than two reads, and a last batch of 50
NUM_BATCHES = 201
BAD_ROW = 8150  # of the second read
WAIT = 20  # seconds, for events that are nearly immediate
LAYOUT = Layout.holding([1, NUM_ROWS, *[50] * 38])  # 2 bytes for I1, 1 for the others


def rank_of(rank, world_size):
    return Process(rank, world_size, rank, CPU, "gloo")


def dataset(rank=0, world_size=1, bad_row=None):
    rows = np.random.default_rng(0).integers(0, 50, (NUM_ROWS, 40), dtype=np.int32)
    rows[:, 0] %= 2
    rows[:, 1] = np.arange(NUM_ROWS)  # an integer that tells which row it is
    if bad_row is not None:
        rows[bad_row, 20] = 50
    prepared = Prepared({}, (50,) * 26, (), LAYOUT)
    return CriteoDataset(prepared, LAYOUT.pack(rows.T), NUM_ROWS, BATCH, rank_of(rank, world_size))


ORDERS = {
    "neighbours": list(range(NUM_BATCHES)),
    "resumed": list(range(150, NUM_BATCHES)),
    "shuffled": np.random.default_rng(1).permutation(NUM_BATCHES).tolist(),
    "jumps": [0, 1, 2, 50, 51, 200, 0, 199, 200],
    "none": [],
}


@pytest.mark.parametrize("rank, world_size, num_readers", [(0, 1, 1), (2, 3, 2)])
@pytest.mark.parametrize("order", ORDERS)
def test_batches_come_in_the_order_asked_for(order, rank, world_size, num_readers):
    numbers = ORDERS[order]
    data, alone = dataset(rank, world_size), dataset(rank, world_size)
    data.num_readers = num_readers
    assert data.num_batches_per_read > 1 and 2 * data.num_batches_per_read < NUM_BATCHES
    got = list(load_batches(data, iter(numbers), 0, CPU))
    assert len(got) == len(numbers)
    for number, batch in zip(numbers, got, strict=True):
        want = alone[number]
        assert torch.equal(batch.block, want.block), number
        assert batch.num_rows == want.num_rows == len(batch.block)
        assert batch.rows_per_rank == want.rows_per_rank
        assert sum(batch.rows_per_rank) == (50 if number == 200 else 100)
    assert data.num_rows_read == sum(batch.num_rows for batch in got)


class Recorder:
    """A data set whose batches are their numbers; it records which reads began."""

    def __init__(self, num_reads, num_readers=1):
        self.num_batches_per_read, self.num_rows_read, self.num_readers = 2, 0, num_readers
        self.read_so_far = []
        self.begun = [threading.Event() for _ in range(num_reads)]

    def read(self, numbers, pin_memory=False):
        self.read_so_far.append(list(numbers))
        self.begun[len(self.read_so_far) - 1].set()
        return list(numbers)


def test_what_comes_next_is_read_before_it_is_asked_for():
    """No more than READS_AHEAD reads wait."""
    data = Recorder(num_reads=6)
    batches = load_batches(data, range(12), 0, CPU)
    assert next(batches) == 0
    assert data.begun[READS_AHEAD].wait(WAIT), "nothing is read ahead"
    assert data.read_so_far == [[0, 1], [2, 3], [4, 5]][: READS_AHEAD + 1]
    assert next(batches) == 1 and not data.begun[READS_AHEAD + 1].is_set()
    assert next(batches) == 2 and data.begun[READS_AHEAD + 1].wait(WAIT)
    assert list(batches) == list(range(3, 12))


def test_readers_read_at_the_same_time():
    """A card's steps may take less time than one thread needs for a batch."""
    together = threading.Barrier(2)

    class Slow(Recorder):
        def read(self, numbers, pin_memory=False):
            if numbers[0] < 4:
                together.wait(WAIT)
            return super().read(numbers, pin_memory)

    data = Slow(num_reads=6, num_readers=2)
    assert list(load_batches(data, range(12), 0, CPU)) == list(range(12))


@pytest.mark.parametrize("num_workers, num_readers", [(0, 1), (0, 2), (1, 1)])
def test_an_error_while_reading_reaches_who_asks(num_workers, num_readers):
    """As its own type and one line, from a loader process too, after all batches before it."""
    data, got = dataset(bad_row=BAD_ROW), []
    data.num_readers = num_readers
    with pytest.raises(RankError) as caught:
        for batch in load_batches(data, range(NUM_BATCHES), num_workers, CPU):
            got.append(int(LAYOUT.unpack(batch.block.numpy())[0, 1]))
    line = f"row {BAD_ROW} of the epoch: id 50 of table 6 is outside its 50 rows;"
    assert str(caught.value) == f"{line} delete the prepared data to have it made again"
    assert got == list(range(0, BAD_ROW - 50, BATCH))


@pytest.mark.parametrize("leave", ["close", "break", "end", "error"])
def test_no_thread_is_left(leave):
    before = set(threading.enumerate())
    batches = load_batches(
        dataset(bad_row=BAD_ROW if leave == "error" else None), range(NUM_BATCHES), 0, CPU
    )
    next(batches)
    assert set(threading.enumerate()) - before, "no thread reads"
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


@pytest.mark.parametrize("number", [0, 7, 200])
@pytest.mark.parametrize("column", [0, 20])
def test_an_error_names_the_row_of_the_epoch_whichever_rank_finds_it(number, column):
    """The second of two ranks has only its own rows, in memory."""
    shares = [share_of_rows(min(BATCH, NUM_ROWS - k * BATCH), 1, 2) for k in range(NUM_BATCHES)]
    row_of_epoch = np.concatenate([k * BATCH + np.arange(*share) for k, share in enumerate(shares)])
    rows = np.zeros((len(row_of_epoch), 40), np.int32)
    bad = int(np.flatnonzero(row_of_epoch // BATCH == number)[3])
    rows[bad, column] = 50
    prepared = Prepared({}, (50,) * 26, (), FLAT)
    packed = rows.view(np.uint8)
    data = CriteoDataset(prepared, packed, NUM_ROWS, BATCH, rank_of(1, 2), shares_only=True)
    first = number // 8 * 8
    for numbers in ([number], range(first, min(first + 8, NUM_BATCHES))):
        with pytest.raises(RankError, match=f"row {row_of_epoch[bad]} of the epoch"):
            data.read(list(numbers))


# ---------------------------------------------------------------- copies to a device


class Streams:
    """The module of a device whose work is done at once."""

    def __init__(self, log):
        class Event:
            def record(self, stream):
                self.stream, self.number = stream, sum(line.startswith("step") for line in log)

            def synchronize(self):
                log.append(f"wait for {self.number}")

        class Stream:
            def wait_event(self, event):
                assert isinstance(event.stream, Stream)

        self.Event, self.Stream = Event, Stream

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
def copied(monkeypatch):
    """A function of a number of batches: (log, these batches copied ahead; then comes an error)."""
    log = []
    streams = Streams(log)
    monkeypatch.setattr(torch, "get_device_module", lambda _: streams)
    side_stream.cache_clear()

    class Bad(Recorder):
        num_good = 0

        def read(self, numbers, pin_memory=False):
            if numbers[0] == self.num_good:
                raise UserError("the next one is bad")
            return [OnDevice(number, log) for number in numbers]

    def start(num_good):
        data = Bad(num_reads=0)
        data.num_batches_per_read, data.num_good = 1, num_good
        execution = Execution(copy_stream=True)
        return log, load_batches(data, range(num_good + 1), 0, CPU, execution)

    yield start
    side_stream.cache_clear()


def take_all(log, batches):
    with pytest.raises(UserError, match="the next one is bad"):
        for batch in batches:
            log.append(f"step {batch.number}")


def test_a_copy_begins_before_the_step_on_the_batch_before_it(copied):
    """An error while reading comes behind all batches before it."""
    log, batches = copied(3)
    take_all(log, batches)
    order = ["copy 0", "copy 1", "give 0", "step 0", "copy 2", "give 1", "step 1"]
    assert log == [*order, "give 2", "step 2"]


def test_the_host_waits_if_it_is_far_ahead_of_the_device(copied):
    """It waits for the step that many batches before, whose block's memory is then free."""
    log, batches = copied(MAX_BATCHES_ON_DEVICE + 3)
    take_all(log, batches)
    assert [line for line in log if "wait" in line] == [f"wait for {number}" for number in range(3)]
    assert log.index("wait for 0") == log.index(f"step {MAX_BATCHES_ON_DEVICE}") - 1


def test_readers_end_with_the_copies(copied):
    before = set(threading.enumerate())
    _, batches = copied(9)
    next(batches)
    assert set(threading.enumerate()) - before
    batches.close()
    assert not set(threading.enumerate()) - before
