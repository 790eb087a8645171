"""A thread that sees what the main thread cannot see while it waits for other ranks.

It notes when a rank of its machine ends, gives signs of life, and says which rank all wait for.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import torch.distributed as dist

from common.errors import PassingError, RankGoneError, TerminatedError, report_now
from common.termination import acts_last, held_back, when_asked
from ranks.attendance import Attendance, Sign
from ranks.board import Board, Gone
from ranks.lateness import Hearing, Late
from ranks.neighbours import Neighbours

SECONDS_BETWEEN_SIGNS = 2.0
SIGNS_MISSED = 3  # a rank that has missed so many does not answer
SECONDS_OF_A_SLOW_RANK = 60.0
SECONDS_TO_FIND_WHO_HAS_GONE = 3.0
# A run that waits for a rank that has gone is ended, whoever has started it. Loaders keep that
# rank's connections open for five seconds, and NCCL and HCCL do not notice at all.
SECONDS_WITHOUT_A_RANK = 10.0

RANK_GONE = "another rank has ended: its own log says why"

_SIGNS_OF_A_TIMEOUT = 10  # signs come more often if the group's timeout is short
_NEARLY = 0.9  # of the timeout: backends count it from a moment of their own
_PAUSE = 0.05
_SECONDS_TO_END = 1.0


class Watch:
    """Watches a rank and those that it waits for, in a thread.

    Args:
        board: of this rank, which has entered; the thread uses it alone.
        attendance: of this rank.
        rank: this rank's number.
        timeout: of the process group, in seconds.
        runs_ahead: a collective ends on the host before it has ended on the device.
    """

    def __init__(
        self, board: Board, attendance: Attendance, rank: int, timeout: float, runs_ahead: bool
    ) -> None:
        self._board, self._attendance, self._rank = board, attendance, rank
        self._timeout, self._runs_ahead = timeout, runs_ahead
        self._members = board.members()
        self._pause = min(SECONDS_BETWEEN_SIGNS, timeout / _SIGNS_OF_A_TIMEOUT)
        self._hearing, self._num_signs = Hearing(), 0
        self._gone: Gone | None = None
        self._gone_at = 0.0  # when this rank came to know it
        self._found = threading.Event()
        self._told: tuple[Late, float] | None = None  # in the log; with the wait's beginning
        self._has_reported = self._is_over = False
        self._asked_at = 0.0  # when the main thread asked who has gone; 0: it has not
        self._reaches_store = True
        self._in_store_since = math.inf  # the thread, if it is; requests to a lost machine hang
        own = self._members[rank]
        self._elsewhere = {k for k, one in enumerate(self._members) if not one.is_beside(own)}
        self._elsewhere -= {rank}
        self._is_beside_first = 0 not in self._elsewhere
        beside = set(range(len(self._members))) - self._elsewhere - {rank}
        self._neighbours = Neighbours({k: self._members[k] for k in beside})
        self._thread = threading.Thread(target=self._run, daemon=True, name="ranks")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """End the thread, unless it hangs in the store: then it ends with the process."""
        if self._is_over:
            return
        self._is_over = True
        self._neighbours.wake()
        self._thread.join(_SECONDS_TO_END)
        if not self._thread.is_alive():
            self._neighbours.close()

    def leave(self) -> None:
        """End the thread and tell the other ranks that this one's end is no accident."""
        self.end()
        if not self._thread.is_alive():
            with self._store() as reaches_it:
                if reaches_it:
                    self._board.leave()

    # ------------------------------------------------------------ the main thread asks

    def explain(self, error: RuntimeError) -> PassingError | None:
        """The error to report in place of a collective's own; None: it is not about other ranks."""
        self._note_lost_machine()
        if self._attendance.is_inside and self._gone:
            return RankGoneError(self._gone_sentence())
        waited = time.monotonic() - self._attendance.changed
        if self._attendance.is_inside and waited >= _NEARLY * self._timeout:
            return PassingError(self._late().hang_sentence(self._timeout))
        return RankGoneError(self._who_has_gone()) if says_that_a_rank_has_gone(error) else None

    def report_gone(self, error: BaseException) -> None:
        """Report that a rank has gone, if that was seen before the signal that ends this one."""
        self._note_lost_machine()
        if self._gone and self._gone_at < when_asked():
            self.report(RankGoneError(self._gone_sentence()))

    def report(self, error: PassingError) -> None:
        """Report an error now, as a signal may take its place; only the first one counts."""
        if not self._has_reported:
            self._has_reported = True
            report_now(error)

    def _who_has_gone(self) -> str:
        """Wait until it is known which rank has gone; returns the sentence that says it."""
        self._asked_at = time.monotonic()
        self._neighbours.wake()
        for_signs = self._pause * (SIGNS_MISSED + 1) if self._elsewhere else 0.0
        self._found.wait(SECONDS_TO_FIND_WHO_HAS_GONE + for_signs)
        return self._gone_sentence()

    def _gone_sentence(self) -> str:
        if self._gone is None:
            return RANK_GONE
        is_elsewhere = self._gone.rank in self._elsewhere
        return self._gone.sentence(self._members[self._gone.rank], is_elsewhere)

    def _late(self) -> Late:
        late = self._hearing.late(self._pause * SIGNS_MISSED, self._runs_ahead)
        hosts = {self._members[rank].host for rank in self._elsewhere & set(late.ranks)}
        return replace(late, hosts=sorted(hosts))

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        while not self._is_over:
            self._note_ended()
            with self._store() as reaches_it:
                # a rank that has gone may have kept the store, and its end is seen in a moment
                if reaches_it and (self._elsewhere or not self._asked_at):
                    self._look_around()
            self._note_lost_machine()
            self._end_if_stuck()
            self._neighbours.wait(_PAUSE if self._asked_at else self._pause)

    @contextlib.contextmanager
    def _store(self) -> Iterator[bool]:
        """Whether the store is reached; once it is not, torch would complain each time."""
        self._in_store_since = time.monotonic()
        try:
            yield self._reaches_store
        except RuntimeError:
            self._reaches_store = False
        finally:
            self._in_store_since = math.inf

    def _look_around(self) -> None:
        self._board.give(Sign.of(self._attendance, self._num_signs))
        self._num_signs += 1
        with contextlib.suppress(OSError):  # the log cannot be written
            self._look_for_late()
        if self._asked_at:
            self._ask_others()
        elif self._elsewhere and (gone := self._board.first_gone()):
            self._note_gone(gone, time.monotonic())

    def _note_ended(self) -> None:
        """Note which ranks of this machine have ended before their work was done."""
        now = time.monotonic()
        for rank in self._neighbours.take_ended():
            self._reaches_store &= rank != self._board.keeper
            gone = Gone(rank, is_seen=True)
            with self._store() as reaches_it:
                if reaches_it and self._board.has_left(rank):
                    continue
                if reaches_it:
                    gone = self._board.note_gone(gone)
            self._note_gone(gone, now)

    def _note_lost_machine(self) -> None:
        """Note that rank 0 has gone if its machine, where the store is, does not answer."""
        may_wait = self._attendance.is_inside or self._asked_at
        hangs = time.monotonic() - self._in_store_since > self._pause * SIGNS_MISSED
        if may_wait and not self._is_beside_first and (hangs or not self._reaches_store):
            self._note_gone(Gone(0, is_seen=False), min(self._in_store_since, time.monotonic()))

    def _note_gone(self, gone: Gone, when: float) -> None:
        if self._gone is None:
            self._gone_at, self._gone = when, gone
            self._found.set()

    def _ask_others(self) -> None:
        """Look for what ranks of other machines know, and whether they give signs of life."""
        now = time.monotonic()
        gone = self._board.first_gone()
        self._hearing.hear(self._board.signs())
        silent = self._elsewhere & set(self._hearing.silent(self._pause * SIGNS_MISSED))
        if gone is None and silent and now - self._asked_at > SECONDS_TO_FIND_WHO_HAS_GONE:
            gone = self._board.note_gone(Gone(min(silent), is_seen=False))
        if gone is not None:
            self._note_gone(gone, now)

    def _waited(self) -> float:
        """For how many seconds the main thread may have waited for other ranks."""
        # without the store it is not known whether a rank that has ended had done its work
        may_wait = self._attendance.is_inside or (self._runs_ahead and self._reaches_store)
        return time.monotonic() - self._attendance.changed if may_wait else 0.0

    def _look_for_late(self) -> None:
        """Say in the log which rank others wait for, and when they no longer do."""
        begin, waited = self._attendance.changed, self._waited()
        if self._told and self._told[1] != begin:
            late, began = self._told
            self._told = None
            print(late.no_longer_sentence(begin - began), flush=True)
        if waited < min(SECONDS_OF_A_SLOW_RANK, self._timeout) / 2:
            return
        self._hearing.hear(self._board.signs())
        if waited < SECONDS_OF_A_SLOW_RANK or self._told:
            return
        late = self._late()
        if late.ranks and self._rank == min(late.waiting):
            self._told = late, begin
            print(late.slow_sentence(waited), flush=True)

    def _end_if_stuck(self) -> None:
        """End this process as SIGTERM does if it waits in vain for a rank that has gone."""
        since = max(self._gone_at, self._attendance.changed)
        is_stuck = time.monotonic() - since > SECONDS_WITHOUT_A_RANK and self._waited() > 0
        if self._gone and is_stuck and when_asked() == float("inf"):
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Watch the ranks in the block, and raise an error of other ranks for a collective's own.

    Args:
        watch: not started.

    Raises:
        PassingError: another rank hangs.
        RankGoneError: another rank has ended.
    """
    watch.start()
    try:
        with acts_last(watch.report_gone):
            yield
        watch.leave()
    except TerminatedError as error:
        watch.report_gone(error)
        raise
    except RuntimeError as error:
        with held_back():
            known = watch.explain(error)
            if known is None:
                raise
            watch.report(known)
        raise known from error
    finally:
        watch.end()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Raise a RankGoneError for a collective's own error, where it cannot be told who has gone."""
    try:
        yield
    except RuntimeError as error:
        if says_that_a_rank_has_gone(error):
            raise RankGoneError(RANK_GONE) from error
        raise


def says_that_a_rank_has_gone(error: BaseException) -> bool:
    """Whether a collective raised the error because another rank has ended."""
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
