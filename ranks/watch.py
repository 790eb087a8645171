"""A thread that sees what the main thread cannot see while it waits for other ranks.

It notes when a rank of its machine ends, gives signs of life, and says which rank all wait for.
"""

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from common.errors import PassingError, RankGoneError, TerminatedError, report_now
from common.termination import acts_last, held_back, when_asked
from ranks.attendance import Attendance, Sign
from ranks.board import Board
from ranks.lateness import Hearing, Late

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
        self._gone, self._gone_at = -1, 0.0  # the first rank that has ended, and when it was seen
        self._found = threading.Event()
        self._told: tuple[Late, float] | None = None  # in the log; with the wait's beginning
        self._has_reported = self._is_over = self._hurries = False
        self._reaches_store = True
        self._our_end, self._their_end = os.pipe()
        self._poll = select.poll()
        self._poll.register(self._our_end, select.POLLIN)
        self._beside = self._open_beside()
        self._thread = threading.Thread(target=self._run, daemon=True, name="ranks")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def end(self) -> None:
        """End the thread, unless it hangs in the store: then it ends with the process."""
        if self._is_over:
            return
        self._is_over = True
        self._wake()
        self._thread.join(_SECONDS_TO_END)
        if not self._thread.is_alive():
            for file in (self._our_end, self._their_end, *self._beside.values()):
                if file >= 0:
                    os.close(file)

    def leave(self) -> None:
        """End the thread and tell the other ranks that this one's end is no accident."""
        self.end()
        if not self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._board.leave()

    # ------------------------------------------------------------ the main thread asks

    def explain(self, error: RuntimeError) -> PassingError | None:
        """The error to report in place of a collective's own; None: it is not about other ranks."""
        if self._attendance.is_inside and self._gone >= 0:
            return RankGoneError(self._gone_sentence(self._gone))
        waited = time.monotonic() - self._attendance.changed
        if self._attendance.is_inside and waited >= _NEARLY * self._timeout:
            return PassingError(self._late().hang_sentence(self._timeout))
        return RankGoneError(self._who_has_gone()) if says_that_a_rank_has_gone(error) else None

    def report_gone(self, error: BaseException) -> None:
        """Report that a rank has gone, if that was seen before the signal that ends this one."""
        if self._gone >= 0 and self._gone_at < when_asked():
            self.report(RankGoneError(self._gone_sentence(self._gone)))

    def report(self, error: PassingError) -> None:
        """Report an error now, as a signal may take its place; only the first one counts."""
        if not self._has_reported:
            self._has_reported = True
            report_now(error)

    def _who_has_gone(self) -> str:
        """Wait until it is known which rank has gone; returns the sentence that says it."""
        self._hurries = True
        self._wake()
        if self._found.wait(SECONDS_TO_FIND_WHO_HAS_GONE):
            return self._gone_sentence(self._gone)
        own = self._members[self._rank]
        elsewhere = {rank for rank, one in enumerate(self._members) if not one.is_beside(own)}
        elsewhere -= {self._rank}
        if elsewhere and self._found.wait(self._pause * (SIGNS_MISSED + 1)):
            return self._gone_sentence(self._gone)
        silent = elsewhere & set(self._hearing.silent(self._pause * SIGNS_MISSED))
        return self._gone_sentence(min(silent), "gives no sign of life") if silent else RANK_GONE

    def _gone_sentence(self, rank: int, what: str = "has ended") -> str:
        member = self._members[rank]
        where = "" if member.is_beside(self._members[self._rank]) else f" on {member.host}"
        return f"rank {rank} {what} (process {member.pid}{where}): its own log says why"

    def _late(self) -> Late:
        return self._hearing.late(self._pause * SIGNS_MISSED, self._runs_ahead)

    def _wake(self) -> None:
        os.write(self._their_end, b"x")

    # ------------------------------------------------------------ the thread

    def _open_beside(self) -> dict[int, int]:
        """{other rank of this machine: a file that can be read when it ends; -1: there is none}."""
        own = self._members[self._rank]
        found = {}
        for rank, member in enumerate(self._members):
            if rank == self._rank or not member.is_beside(own):
                continue
            found[rank] = -1
            with contextlib.suppress(OSError, AttributeError):  # Linux before 5.3 has none
                found[rank] = os.pidfd_open(member.pid)
                self._poll.register(found[rank], select.POLLIN)
        return found

    def _run(self) -> None:
        while not self._is_over:
            self._note_ended()
            try:
                self._look_around()
            except RuntimeError:
                self._reaches_store = False
            self._end_if_stuck()
            self._poll.poll(1000 * (_PAUSE if self._hurries else self._pause))
            if select.select([self._our_end], [], [], 0)[0]:
                os.read(self._our_end, 1)

    def _look_around(self) -> None:
        self._board.give(Sign.of(self._attendance, self._num_signs))
        self._num_signs += 1
        with contextlib.suppress(OSError):  # the log cannot be written
            self._look_for_late()
        if self._hurries:
            self._ask_others()

    def _note_ended(self) -> None:
        """Note which ranks of this machine have ended before their work was done."""
        now = time.monotonic()
        for rank in [rank for rank in self._beside if self._members[rank].has_ended()]:
            file = self._beside.pop(rank)
            if file >= 0:
                self._poll.unregister(file)
                os.close(file)
            with contextlib.suppress(RuntimeError):
                if self._board.has_left(rank):
                    continue
                rank = self._board.note_gone(rank)
            self._note_gone(rank, now)

    def _note_gone(self, rank: int, when: float) -> None:
        if self._gone < 0:
            self._gone_at, self._gone = when, rank
            self._found.set()

    def _ask_others(self) -> None:
        """Look for what ranks of other machines know, and whether they give signs of life."""
        rank = self._board.first_gone()
        if rank is not None:
            self._note_gone(rank, time.monotonic())
        self._hearing.hear(self._board.signs())

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
        if self._gone >= 0 and is_stuck and when_asked() == float("inf"):
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
