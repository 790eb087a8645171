"""A run that SIGTERM or Ctrl-C ends unwinds like one with an error, or ends in a few seconds.

SIGTERM is what `kill`, batch schedulers and torchrun send; without this, it ends Python at once,
in the middle of a file. Python calls a signal's handler when the main thread is back in Python, and
a rank that waits for another one in a collective (gloo, NCCL, HCCL) is not. So a thread watches
too, and ends the process if the main thread has not unwound in time.
"""

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from common.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, TerminatedError

SECONDS_TO_UNWIND = 5.0  # torchrun sends SIGKILL 30 s after SIGTERM
# One request may be several signals: schedulers send theirs to torchrun and to its ranks, and
# torchrun sends its own; a terminal does the same.
SECONDS_OF_A_REQUEST = 1.0
SECONDS_FOR_LAST_ACTS = 1.0  # a last act may block, as the main thread does
SECONDS_BETWEEN_SIGNS = 20.0  # of a block that finishes first

_EXIT_STATUS = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_IS_OVER = b"\0"  # no signal has this number

Act = Callable[[BaseException], object]


@contextlib.contextmanager
def ends_on_signals(last_act: Act) -> Iterator[None]:
    """Make SIGTERM and SIGINT raise an error in the block, and end the process if that hangs.

    The error is raised in the main thread, once. A signal that comes later than a second after the
    first one ends the process at once. Processes that are forked inside the block die of the
    signals as if there was no such block. In another thread than the main one, inside another such
    block, and for signals that somebody else handles or ignores, nothing happens.

    Args:
        last_act: called with the error when the block has unwound, or by a thread if it hangs.

    Raises:
        TerminatedError: SIGTERM came, whatever error it has caused in the block.
        KeyboardInterrupt: SIGINT came first.
    """
    signals = _signals_to_take()
    if not signals:
        yield
        return
    watch = _Watch(last_act, signals)
    _RUNNING.append(watch)
    watch.start()
    try:
        yield
    finally:
        if watch in _RUNNING:  # a forked child has forgotten it
            watch.end()
            _RUNNING.remove(watch)
            watch.raise_if_asked()


@contextlib.contextmanager
def acts_last(act: Act) -> Iterator[None]:
    """Call the act if the process is ended while the block hangs; a thread calls it.

    The block does the same by itself, in a `finally`, if it unwinds.
    """
    _LAST_ACTS.append(act)
    try:
        yield
    finally:
        _LAST_ACTS.remove(act)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Do the block whole: the error of a signal that comes meanwhile is raised after it."""
    if not _RUNNING or threading.current_thread() is not threading.main_thread():
        yield
        return
    with _RUNNING[0].held_back():
        yield


@contextlib.contextmanager
def finishes_first() -> Iterator[None]:
    """Let the block finish what it does when a signal comes, and end the run itself.

    It asks `is_asked` where it can end, and calls `end_as_asked` there. It calls `show_life` every
    now and then: the process is ended if nothing is heard of the block for SECONDS_BETWEEN_SIGNS
    after a signal, or if the user asks again. After the block the run has SECONDS_TO_UNWIND.
    """
    with held_back():
        if not _RUNNING:
            yield
            return
        watch = _RUNNING[0]
        watch.note_life(SECONDS_BETWEEN_SIGNS)
        watch.is_patient = True
        try:
            yield
        finally:
            watch.note_life(SECONDS_TO_UNWIND)
            watch.is_patient = False


def show_life() -> None:
    """Note that a block that finishes first is still at work."""
    if _RUNNING and _RUNNING[0].is_patient:
        _RUNNING[0].note_life(SECONDS_BETWEEN_SIGNS)


@contextlib.contextmanager
def waits_for_others() -> Iterator[None]:
    """Let a block that finishes first wait for other ranks, which are at work for longer.

    It shows no life meanwhile, as the main thread may be inside a collective. A second request ends
    it as ever, and the collective fails if another rank has gone.
    """
    if not _RUNNING or not _RUNNING[0].is_patient:
        yield
        return
    watch = _RUNNING[0]
    watch.note_life(math.inf)
    try:
        yield
    finally:
        watch.note_life(SECONDS_BETWEEN_SIGNS)


def is_asked() -> bool:
    """Whether a signal has come that the block finishes first for."""
    return bool(_RUNNING) and _RUNNING[0].is_asked


def end_as_asked() -> None:
    """Raise the error of the signal that has come, here or at another rank of this run.

    Raises:
        TerminatedError: SIGTERM came, or no signal here.
        KeyboardInterrupt: SIGINT came first.
    """
    if _RUNNING:
        _RUNNING[0].raise_if_asked()
    raise TerminatedError


def when_asked() -> float:
    """When the first signal came, by time.monotonic(), even if the main thread hangs.

    Infinity if none has come, or if nobody takes them.
    """
    return _RUNNING[0].came_at if _RUNNING else float("inf")


def skip_clean_up_if_ended(status: int) -> None:
    """End the process now if a signal has ended the run; `status` is that of its main.

    Python's own clean-up may wait for threads of a process group that wait for other ranks.
    """
    if status in _EXIT_STATUS.values():
        os._exit(status)


class _Watch:
    """What a signal does, in the main thread and in a thread that counts seconds.

    Args:
        last_act: called with the error, when the run unwinds or if it hangs.
        signals: the signals to take.
    """

    def __init__(self, last_act: Act, signals: Sequence[signal.Signals]) -> None:
        self._last_act = last_act
        self._asked: signal.Signals | None = None  # the first signal
        self._is_held, self._has_raised = False, False
        self.is_patient, self._wait_until = False, -math.inf
        self.came_at = float("inf")  # when the first signal came, by time.monotonic()
        self._others = {number: signal.getsignal(number) for number in signals}
        self._their_end, self._our_end = socket.socketpair()
        self._their_end.setblocking(False)  # the system's handler must not wait
        self._file_of_others = -1
        self._thread = threading.Thread(target=self._watch, daemon=True, name="signals")

    @property
    def is_asked(self) -> bool:
        """Whether a signal has come."""
        return self._asked is not None

    def note_life(self, seconds: float) -> None:
        """Note that the main thread is at work: a first request does not end it for so long."""
        self._wait_until = time.monotonic() + seconds

    def start(self) -> None:
        """Take the signals."""
        self._thread.start()
        self._file_of_others = signal.set_wakeup_fd(
            self._their_end.fileno(), warn_on_full_buffer=False
        )
        for number in self._others:
            signal.signal(number, self._ask)

    def end(self) -> None:
        """Do the last act if a signal has come, and give the signals back."""
        self._is_held = True
        if self._asked is not None:
            with contextlib.suppress(Exception):
                self._last_act(_error_of(self._asked))
        self._give_back()
        self._their_end.setblocking(True)
        self._their_end.send(_IS_OVER)
        self._thread.join()
        self._close()

    def forget(self) -> None:
        """Give the signals back in a forked child, which has no such thread."""
        self._give_back()
        self._close()

    def raise_if_asked(self) -> None:
        """Raise the error of the signal that has come, if one has."""
        if self._asked is not None:
            self._has_raised = True
            raise _error_of(self._asked)

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Raise the error of a signal after the block, not in it."""
        was_held, self._is_held = self._is_held, True
        try:
            yield
        finally:
            self._is_held = was_held
        if not was_held and not self._has_raised:
            self.raise_if_asked()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        """The handler, which the main thread calls between two of its operations."""
        if self._asked is not None:
            return
        self._asked = signal.Signals(number)
        self.came_at = min(self.came_at, time.monotonic())
        # torchrun sends its signal to the loader processes too, and torch's handler raises an error
        # when they die. It is not put back, because they are joined when their iterator is deleted.
        if callable(signal.getsignal(signal.SIGCHLD)):
            signal.signal(signal.SIGCHLD, _do_nothing)
        if not self._is_held:
            self.raise_if_asked()

    def _give_back(self) -> None:
        for number, other in self._others.items():
            signal.signal(number, other)
        signal.set_wakeup_fd(self._file_of_others)

    def _close(self) -> None:
        self._our_end.close()
        self._their_end.close()

    def _watch(self) -> None:
        """Read the signals' numbers, which the system writes even if the main thread hangs."""
        came: list[signal.Signals] = []
        first = deadline = 0.0
        is_repeated = False
        while True:
            self._our_end.settimeout(max(deadline - time.monotonic(), 0.001) if came else None)
            try:
                number = self._our_end.recv(1)
            except TimeoutError:
                now = time.monotonic()
                if not is_repeated and self._wait_until > now:
                    deadline = min(self._wait_until, now + SECONDS_TO_UNWIND)
                    continue
                break
            if number == _IS_OVER:
                return
            if number[0] not in self._others:  # somebody else handles it
                continue
            came.append(signal.Signals(number[0]))
            first = first or time.monotonic()
            is_repeated = time.monotonic() - first > SECONDS_OF_A_REQUEST
            self.came_at = min(self.came_at, first)
            deadline = first + (SECONDS_TO_UNWIND if len(came) == 1 else SECONDS_OF_A_REQUEST)
        acting = threading.Thread(target=self._act, args=(_error_of(came[0]),), daemon=True)
        acting.start()
        acting.join(SECONDS_FOR_LAST_ACTS)
        os._exit(_EXIT_STATUS[came[0]])

    def _act(self, error: BaseException) -> None:
        for act in (*reversed(_LAST_ACTS), self._last_act):
            with contextlib.suppress(Exception):
                act(error)


_RUNNING: list[_Watch] = []  # the one that has the signals, if there is one: they are the process's
_LAST_ACTS: list[Act] = []


def _signals_to_take() -> list[signal.Signals]:
    if _RUNNING or threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in _EXIT_STATUS if signal.getsignal(number) in _DEFAULTS]


def _error_of(number: signal.Signals) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else TerminatedError()


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """A handler of signals that may be under way; for those without one Python prints a line."""


# ---------------------------------------------------------------- forked children


def _hold_signals() -> None:
    """A signal between a fork and the child's start is the child's, not the parent's."""
    if _RUNNING:
        signal.pthread_sigmask(signal.SIG_BLOCK, _EXIT_STATUS)


def _let_signals_come() -> None:
    if _RUNNING:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _EXIT_STATUS)


def _forget_all() -> None:
    """Let a child have the signals, which a loader of a block that finishes first must not have.

    It gets those that its parent gets, and would die of them while the parent wants its batches. It
    ends with its parent. Torch's handlers are its own, so the signals stay blocked.
    """
    if _RUNNING:
        watch = _RUNNING.pop()
        watch.forget()
        if not watch.is_patient:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _EXIT_STATUS)


# they cannot be taken back, and do nothing while no run has the signals
os.register_at_fork(
    before=_hold_signals, after_in_parent=_let_signals_come, after_in_child=_forget_all
)
