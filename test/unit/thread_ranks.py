"""Ranks for tests that are threads of one process: they start at once and need no port.

forked_ranks.py and test_ranks.py have real processes.
"""

import collections
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from ranks.process import Process

SECONDS = 60  # that a rank waits for the others


class OthersFailedError(Exception):
    """Another rank has raised an error, or has not come."""


class ThreadRanks:
    """torch.distributed's asynchronous collectives, sends and receives between threads.

    What is received is nan until it is waited for, and what is sent must not change before that.

    Args:
        world_size: number of ranks.

    Attributes:
        events: (rank, what, the tensor that is sent) as collectives begin and are waited for.
        bytes_sent: {rank: bytes to other ranks}; a sum over ranks counts as on a ring.
    """

    def __init__(self, world_size):
        self._world_size, self._own = world_size, threading.local()
        self._calls, self._changed = {}, threading.Condition()
        self._has_failed, self.events, self.bytes_sent = False, [], collections.Counter()
        self._letters = collections.defaultdict(queue.Queue)

    def run(self, work):
        """What `work(process)` returns on each rank, each of them a thread."""

        def on_rank(rank):
            self._own.rank, self._own.count = rank, 0
            try:
                return work(Process(rank, self._world_size, rank, torch.device("cpu"), "gloo"))
            except BaseException:
                with self._changed:
                    self._has_failed = True
                    self._changed.notify_all()
                raise

        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_to_all_single", "all_reduce", "send", "recv"):
                patch.setattr(dist, name, getattr(self, name))
            with ThreadPoolExecutor(self._world_size) as pool:
                done = [pool.submit(on_rank, rank) for rank in range(self._world_size)]
        for error in filter(None, (one.exception() for one in done)):
            if not isinstance(error, OthersFailedError):
                raise error
        return [one.result() for one in done]

    def all_to_all_single(self, output, values, receive, send, async_op):
        """Begin to exchange shares of flat tensors."""
        assert async_op and values.is_contiguous()
        assert len(values) == sum(send) and len(output) == sum(receive)
        output.fill_(torch.nan if output.is_floating_point() else -(1 << 30))
        rank = self._own.rank
        self.bytes_sent[rank] += (sum(send) - send[rank]) * values.element_size()

        def finish(sent):
            shares = [sent[other].split(sizes)[rank] for other, sizes in enumerate(all_sizes)]
            assert [len(share) for share in shares] == receive
            output.copy_(torch.cat(shares))

        call = self._post("all_to_all", values, send)
        all_sizes = call.sizes
        return Handle(call, rank, values, finish)

    def all_reduce(self, values, async_op):
        """Begin to sum flat tensors over ranks."""
        assert async_op
        others = self._world_size - 1
        self.bytes_sent[self._own.rank] += 2 * others * values.nbytes / self._world_size

        def finish(sent):
            values.copy_(sum(sent[1:], sent[0]))

        return Handle(self._post("all_reduce", values, None), self._own.rank, values, finish)

    def send(self, values, to):
        """Send a tensor to a rank."""
        self._letters[self._own.rank, to].put(values.clone())

    def recv(self, output, sender):
        """Receive a rank's tensor."""
        output.copy_(self._letters[sender, self._own.rank].get(timeout=SECONDS))

    def _post(self, what, values, sizes):
        """Give what this rank sends to the collective that is its next one."""
        rank, number = self._own.rank, self._own.count
        self._own.count += 1
        with self._changed:
            call = self._calls.setdefault(number, Call(self, what, self._world_size))
            assert call.what == what, "ranks call different collectives"
            call.sent[rank], call.sizes[rank] = values.clone(), sizes
            self.events.append((rank, f"begin {what}", call.sent[rank]))
            self._changed.notify_all()
        return call

    def wait_for(self, call):
        """Wait until all ranks have begun the call."""
        with self._changed:
            is_there = self._changed.wait_for(
                lambda: self._has_failed or all(one is not None for one in call.sent), SECONDS
            )
        if not is_there or self._has_failed:
            raise OthersFailedError


class Call:
    """A collective: what each rank has sent."""

    def __init__(self, ranks, what, world_size):
        self.ranks, self.what = ranks, what
        self.sent, self.sizes = [None] * world_size, [None] * world_size


class Handle:
    """What an asynchronous collective returns."""

    def __init__(self, call, rank, values, finish):
        self._call, self._rank, self._values, self._finish = call, rank, values, finish

    def wait(self):
        ranks, own = self._call.ranks, self._call.sent[self._rank]
        ranks.wait_for(self._call)
        assert torch.equal(self._values.nan_to_num(), own.nan_to_num()), "it has changed"
        ranks.events.append((self._rank, f"wait {self._call.what}", own))
        self._finish(self._call.sent)
