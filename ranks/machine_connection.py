"""What the machines of a run tell one another, and the connections on which they do."""

import contextlib
import json
import os
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import Any

from common.errors import TerminatedError

SECONDS_TO_CONNECT = 5.0
SECONDS_OF_SILENCE = 60  # after which a machine without power or network counts as gone
# what machines tell one another, as {"stage": ...}
WAIT, PREPARE, READY, START, END = "wait", "prepare", "ready", "start", "end"
_PAUSE = 0.2
_LONGEST_LINE = 1 << 16

Message = dict[str, Any]


@dataclass(frozen=True)
class Machine:
    """What a machine tells of itself.

    Attributes:
        node_rank: its number, from 0.
        host: its name.
        options: those that have to be the same on all machines, by their names.
    """

    node_rank: int
    host: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, told: Message) -> "Machine":
        """The machine that has told this.

        Raises:
            ValueError: no machine of a run has.
        """
        number, host, options = (told.get(name) for name in ("node_rank", "host", "options"))
        if type(number) is not int or not isinstance(host, str) or not isinstance(options, dict):
            raise ValueError("not a machine of a run")
        return cls(number, host, {name: str(value) for name, value in options.items()})

    def __str__(self) -> str:
        return f"the machine with --node_rank={self.node_rank} ({self.host})"


class Connection:
    """To another machine; it carries JSON, an object a line, and never waits.

    Args:
        with_other: it is connected; this object closes it.
    """

    def __init__(self, with_other: socket.socket) -> None:
        self._socket, self._found = with_other, b""
        self.deadline = time.monotonic() + SECONDS_TO_CONNECT  # by when to tell who it is
        with_other.setblocking(False)
        with_other.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        tcp = (  # three questions without an answer; data that nobody confirms
            (socket.TCP_KEEPIDLE, SECONDS_OF_SILENCE // 2),
            (socket.TCP_KEEPINTVL, SECONDS_OF_SILENCE // 6),
            (socket.TCP_KEEPCNT, 3),
            (socket.TCP_USER_TIMEOUT, 1000 * SECONDS_OF_SILENCE),
        )
        for option, value in tcp:
            with_other.setsockopt(socket.IPPROTO_TCP, option, value)

    def fileno(self) -> int:
        """The number by which the system knows it."""
        return self._socket.fileno()

    def send(self, **message: object) -> None:
        """Tell the other machine something; if it has gone, `take` will say so."""
        with contextlib.suppress(OSError):
            self._socket.sendall(f"{json.dumps(message)}\n".encode())

    def take(self) -> list[Message]:
        """What the other machine has told since; one read.

        Raises:
            EOFError: it has gone.
            ValueError: what came is no message, so it is no machine of a run.
        """
        try:
            piece = self._socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError as error:
            raise EOFError(error.strerror or str(error)) from error
        if not piece:
            raise EOFError("it has ended")
        *lines, self._found = (self._found + piece).split(b"\n")
        if len(self._found) > _LONGEST_LINE or self._found[:1] not in (b"", b"{"):
            raise ValueError("not a message")
        return [_parsed(line) for line in lines]

    def close(self) -> None:
        """Close it, which tells the other machine that this one has gone."""
        self._socket.close()


def _parsed(line: bytes) -> Message:
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("not a message") from error
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


class Events:
    """Which sockets have something to say.

    Args:
        parent: the process that has started this one.
    """

    def __init__(self, parent: int) -> None:
        self._selector, self._parent = selectors.DefaultSelector(), parent

    def add(self, one: Connection | socket.socket) -> None:
        """Listen to one."""
        self._selector.register(one, selectors.EVENT_READ)

    def close(self, one: Connection | socket.socket) -> None:
        """Close one."""
        self._selector.unregister(one)
        one.close()

    def wait(self) -> list[Any]:
        """Those that have something to say within a moment.

        Raises:
            TerminatedError: the parent has ended, as a script that is killed does.
        """
        ready = [key.fileobj for key, _ in self._selector.select(_PAUSE)]
        if os.getppid() != self._parent:
            raise TerminatedError
        return ready
