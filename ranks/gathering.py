"""Machines of a run come together, work, and go on together once all have ended their work well.

Machine 0 listens and the others connect to it. Connections stay open until all go on, so that all
know at once when a machine has ended; a machine without power or network is missed in a minute.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field

from common.errors import UserError
from ranks.machine_connection import (
    END,
    PREPARE,
    READY,
    SECONDS_TO_CONNECT,
    START,
    WAIT,
    Connection,
    Events,
    Machine,
    Message,
)

SECONDS_BEFORE_A_LINE = 5.0
SECONDS_TO_END = 3.0
START_ALL_AGAIN = "start the same command on all machines"

Say = Callable[[str], object]


@dataclass(frozen=True)
class Meeting:
    """Where and for how long machines meet.

    Attributes:
        num_machines: how many.
        host: name or address of the one with number 0.
        port: where it listens.
        give_up: until when to wait for the others to come, by time.monotonic().
        say: prints a line for the user.
        parent: the process that has started this one; if it ends, so does this one.
    """

    num_machines: int
    host: str
    port: int
    give_up: float
    say: Say
    parent: int = field(default_factory=os.getppid)

    @property
    def place(self) -> str:
        """Where it is, for a message."""
        return f"{self.host}:{self.port}"


class Work:
    """The command that a machine runs once all are here; it ends with the block.

    Args:
        command: its words; none: there is nothing to do.
        folder: where it runs.
    """

    def __init__(self, command: Sequence[str], folder: str) -> None:
        self._command, self._folder = command, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._is_started = False

    def __enter__(self) -> "Work":
        return self

    def start(self) -> None:
        """Start the command."""
        self._is_started = True
        if self._command:  # in a session of its own, to end it with all that it has started
            self._process = subprocess.Popen(
                self._command, cwd=self._folder, start_new_session=True
            )

    def status(self) -> int | None:
        """The command's exit status; None: it is not started, or has not ended."""
        if self._process is None:
            return 0 if self._is_started else None
        return self._process.poll()

    def __exit__(self, *error: object) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Waiting:
    """Says after a while for whom a machine waits, and ends the wait when it is too long.

    Args:
        say: prints a line for the user.
        give_up: until when to wait, by time.monotonic().
    """

    def __init__(self, say: Say, give_up: float = float("inf")) -> None:
        self._say, self._give_up, self._told = say, give_up, ""
        self._begin = time.monotonic()

    def wait(self, whom: str) -> None:
        """Note that `whom` has not come yet.

        Raises:
            UserError: it is too late for that.
        """
        now = time.monotonic()
        if now > self._give_up:
            raise UserError(
                f"no machine with {whom} in {now - self._begin:.0f} s: start the same command"
                " there, and let the machines reach one another at this port and the one before"
            )
        if whom != self._told and now - self._begin > SECONDS_BEFORE_A_LINE:
            self._say(f"Waiting for the machine with {whom}")
            self._told = whom


class First:
    """Machine 0, to which the others come.

    Args:
        meeting: where all meet.
        own: this machine.
        work: what to do once all are here.
        listening: a socket that listens at that place; this object closes it.
    """

    def __init__(
        self, meeting: Meeting, own: Machine, work: Work, listening: socket.socket
    ) -> None:
        self._meeting, self._own, self._work = meeting, own, work
        self._listening, self._events = listening, Events(meeting.parent)
        self._strangers: set[Connection] = set()  # they have not told who they are
        self._guests: dict[Connection, Machine] = {}
        self._ready: set[Connection] = set()  # guests that have done their work
        self._told = ""  # for whom all wait
        self._events.add(listening)

    def run(self) -> int:
        """Wait for all, let all work, and end when all have; returns the work's exit status.

        Raises:
            UserError: some have not come in time, disagree, or have ended; all have been told.
        """
        try:
            self._gather()
            for guest in self._guests:
                guest.send(stage=PREPARE)
            status = self._do_work()
        except UserError as error:
            self._part(stage=END, why=str(error))
            raise
        if status:
            self._part(stage=END, why=_has_ended(self._own))
        else:
            self._part(stage=START)
        return status

    def _gather(self) -> None:
        """Wait until all have come. A machine that has gone again does not count."""
        waiting = Waiting(self._meeting.say, self._meeting.give_up)
        while True:
            machines = [self._own, *self._guests.values()]
            if problem := _problem(machines):
                raise UserError(problem)
            here = {one.node_rank for one in machines}
            missing = [k for k in range(self._meeting.num_machines) if k not in here]
            if not missing:
                return
            self._tell(f"{_numbers(missing)} at {self._meeting.place}", self._guests)
            waiting.wait(self._told)
            self._hear()

    def _do_work(self) -> int:
        here = dict(self._guests)
        self._work.start()
        waiting = None
        while True:
            self._check_company(here)
            status = self._work.status()
            late = [one.node_rank for guest, one in here.items() if guest not in self._ready]
            if status or (status == 0 and not late):
                return status
            numbers = late if status == 0 else [self._own.node_rank, *late]
            self._tell(f"{_numbers(numbers)}, still at work", self._ready)
            if status == 0:
                waiting = waiting or Waiting(self._meeting.say)
                waiting.wait(self._told)
            self._hear()

    def _check_company(self, here: dict[Connection, Machine]) -> None:
        """Raise a UserError unless the guests are those that were here when all had come."""
        for guest, machine in here.items():
            if guest not in self._guests:
                raise UserError(_has_ended(machine))
        for guest, machine in self._guests.items():
            if guest not in here:
                raise UserError(
                    f"{machine} has started again while the others prepared: {START_ALL_AGAIN}"
                )

    def _tell(self, whom: str, guests: Collection[Connection]) -> None:
        """Tell guests for whom all wait, if that has changed."""
        if whom != self._told:
            self._told = whom
            for guest in guests:
                guest.send(stage=WAIT, whom=whom)

    def _hear(self) -> None:
        """Take what comes within a moment; nobody who is slow keeps the others waiting."""
        for one in self._events.wait():
            if one is self._listening:
                with contextlib.suppress(OSError):  # it has gone already
                    stranger = Connection(self._listening.accept()[0])
                    self._strangers.add(stranger)
                    self._events.add(stranger)
                continue
            try:
                self._take(one)
            except (EOFError, ValueError):
                self._drop(one)
        for stranger in [one for one in self._strangers if time.monotonic() > one.deadline]:
            self._drop(stranger)

    def _take(self, one: Connection) -> None:
        for message in one.take():
            if one in self._strangers:
                self._guests[one] = Machine.parse(message)
                self._strangers.remove(one)
                one.send(stage=WAIT, whom=self._told)
            elif message == {"stage": READY}:
                self._ready.add(one)
                one.send(stage=WAIT, whom=self._told)

    def _drop(self, one: Connection) -> None:
        self._events.close(one)
        self._strangers.discard(one)
        self._guests.pop(one, None)

    def _part(self, **message: str) -> None:
        """Tell all guests the last thing, and wait until they have read it and gone."""
        self._events.close(self._listening)
        for guest in self._guests:
            guest.send(**message)
        deadline = time.monotonic() + SECONDS_TO_CONNECT
        while self._guests and time.monotonic() < deadline:
            for one in self._events.wait():
                try:
                    one.take()
                except (EOFError, ValueError):
                    self._drop(one)


class Guest:
    """Another machine, which goes to machine 0.

    Args:
        meeting: where all meet.
        own: this machine.
        work: what to do once all are there.
    """

    def __init__(self, meeting: Meeting, own: Machine, work: Work) -> None:
        self._meeting, self._own, self._work = meeting, own, work
        self._events = Events(meeting.parent)
        self._waiting = Waiting(meeting.say, meeting.give_up)
        self._whom = ""
        self._is_admitted = self._is_ready = self._may_start = False

    def run(self) -> int:
        """Wait for all, work, and end when all have worked; returns the work's exit status.

        Raises:
            UserError: machine 0 does not answer in time, says why all end, or has gone.
        """
        while True:
            try:
                return self._visit()
            except (EOFError, OSError) as error:
                reason = getattr(error, "strerror", None) or str(error)
            except ValueError as error:
                raise UserError(
                    f"something else answers at {self._meeting.place}: give all machines a"
                    " --master_port that is free, as the one after it, where --node_rank=0 is"
                ) from error
            if self._is_admitted:
                raise UserError(_has_ended(Machine(0, self._meeting.host)))
            self._waiting.wait(f"--node_rank=0 at {self._meeting.place} ({reason})")
            self._events.wait()

    def _visit(self) -> int:
        """Do what machine 0 says.

        Raises:
            EOFError: it has gone.
            OSError: it cannot be reached.
            ValueError: it is somebody else.
        """
        place = (self._meeting.host, self._meeting.port)
        first = Connection(socket.create_connection(place, SECONDS_TO_CONNECT))
        self._events.add(first)
        try:
            first.send(**asdict(self._own))
            self._whom = f"--node_rank=0 at {self._meeting.place} (it says nothing)"
            while True:
                for message in first.take():
                    self._obey(message)
                status = self._work.status()
                if status or self._may_start:
                    return status or 0
                self._wait(first, status == 0)
        finally:
            self._events.close(first)

    def _obey(self, message: Message) -> None:
        stage = message.get("stage")
        if stage == END:
            raise UserError(str(message.get("why")))
        if stage == WAIT:
            self._whom = str(message.get("whom"))
        elif stage == PREPARE and not self._is_admitted:
            self._is_admitted = True
            self._work.start()
        elif stage == START and self._is_ready:
            self._may_start = True
        else:
            raise ValueError("not what machine 0 says")

    def _wait(self, first: Connection, has_worked: bool) -> None:
        if has_worked and not self._is_ready:
            self._is_ready = True
            first.send(stage=READY)
            self._waiting = Waiting(self._meeting.say)
        if self._is_ready or not self._is_admitted:
            self._waiting.wait(self._whom)
        self._events.wait()


def _has_ended(machine: Machine) -> str:
    return f"{machine} has ended before all were ready: its script says why; {START_ALL_AGAIN}"


def _numbers(node_ranks: Iterable[int]) -> str:
    return ", ".join(f"--node_rank={number}" for number in node_ranks)


def _problem(machines: Sequence[Machine]) -> str:
    """What keeps these machines from working together; empty if nothing does."""
    first, known = machines[0], dict[int, Machine]()
    for machine in machines:
        for name, value in first.options.items():
            got = machine.options.get(name, "")
            if got != value:
                return f"{name}={got} on {machine}, {name}={value} on {first}: give both the same"
        if other := known.get(machine.node_rank):
            both = f"{other.host} and {machine.host}"
            return f"--node_rank={machine.node_rank} on {both}: give each machine its own number"
        known[machine.node_rank] = machine
    return ""
