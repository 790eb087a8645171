"""Machines that come together: what others may say or send to them, in one process."""

import contextlib
import socket
import threading
import time

import pytest

from common.errors import UserError
from ranks.addresses import LOOPBACK
from ranks.gathering import First, Guest, Meeting, Work
from ranks.machine_connection import (
    SECONDS_OF_SILENCE,
    SECONDS_TO_CONNECT,
    Connection,
    Machine,
)


def meeting_at(port, say=print):
    return Meeting(2, LOOPBACK, port, time.monotonic() + 60, say)


@pytest.mark.parametrize("slow", [0, 1])
def test_all_wait_until_the_slowest_has_done_its_work(slow, monkeypatch, tmp_path):
    monkeypatch.setattr("ranks.gathering.SECONDS_BEFORE_A_LINE", 0.1)
    listening, said, found = socket.create_server((LOOPBACK, 0)), ([], []), {}
    port = listening.getsockname()[1]
    meetings = [meeting_at(port, lines.append) for lines in said]
    with (
        Work(["sh", "-c", "sleep 1; touch done"], str(tmp_path)) as slow_work,
        Work(["true"], ".") as fast_work,
    ):
        works = (slow_work, fast_work)[:: 1 if slow == 0 else -1]
        machines = (
            First(meetings[0], Machine(0, "here"), works[0], listening),
            Guest(meetings[1], Machine(1, "there"), works[1]),
        )

        def run(number):
            found[number] = machines[number].run(), (tmp_path / "done").exists()

        run_all(run, 2)
    assert found == {0: (0, True), 1: (0, True)}
    assert said[1 - slow][-1] == f"Waiting for the machine with --node_rank={slow}, still at work"


def run_all(run, count):
    """Run it with each number in a thread of its own, and wait for all."""
    threads = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-x\r\n", b"no line", b"null\n", b'{"a": 1}\n',
     b"[" * 60_000 + b"\n", b'{"a":' * 60_000 + b"\n", b"\xff\xfe\n"],
)  # fmt: skip
def test_another_service_where_machine_0_should_be_is_one_line(answer):
    with socket.create_server((LOOPBACK, 0)) as server:
        port = server.getsockname()[1]

        def serve():
            with server.accept()[0] as caller, contextlib.suppress(OSError):
                caller.sendall(answer)
                caller.recv(1 << 16)
                caller.recv(1)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(UserError, match=rf"^something else answers at {LOOPBACK}:{port}: "):
            Guest(meeting_at(port), Machine(1, "here"), Work([], ".")).run()
        thread.join()


STRANGERS = [
    b'{"node_rank": Infinity, "host": "x", "options": {}}\n', b'{"node_rank": true}\n',
    b'{"node_rank": 1, "host": "x", "options": []}\n', b"[" * 60_000 + b"\n",
    b'{"a":' * 60_000 + b"\n", b"{" * 70_000, b"{", b"",
]  # fmt: skip


def test_strangers_neither_count_nor_keep_the_others_waiting():
    """They are there all the time, and some have begun a line that they never end."""
    listening = socket.create_server((LOOPBACK, 0))
    port, ends = listening.getsockname()[1], {}
    with contextlib.ExitStack() as stack:
        for told in STRANGERS:
            stranger = stack.enter_context(socket.create_connection((LOOPBACK, port)))
            stranger.sendall(told)
        begin = time.monotonic()
        machines = (
            First(meeting_at(port), Machine(0, "here"), Work([], "."), listening),
            Guest(meeting_at(port), Machine(1, "there"), Work([], ".")),
        )

        def run(number):
            ends[number] = machines[number].run()

        run_all(run, 2)
        assert ends == {0: 0, 1: 0}
        assert time.monotonic() - begin < SECONDS_TO_CONNECT


def test_a_stranger_that_drips_bytes_is_shown_the_door(monkeypatch):
    monkeypatch.setattr("ranks.machine_connection.SECONDS_TO_CONNECT", 0.5)
    listening = socket.create_server((LOOPBACK, 0))
    port = listening.getsockname()[1]
    first = First(meeting_at(port), Machine(0, "here"), Work([], "."), listening)
    thread = threading.Thread(target=first.run, daemon=True)
    thread.start()
    with socket.create_connection((LOOPBACK, port)) as stranger, pytest.raises(OSError):
        for _ in range(300):
            stranger.sendall(b"{")
            time.sleep(0.1)
    assert Guest(meeting_at(port), Machine(1, "there"), Work([], ".")).run() == 0
    thread.join(60)


def test_connections_without_an_answer_are_missed_in_a_minute():
    with socket.create_server((LOOPBACK, 0)) as server:
        with_other = socket.create_connection(server.getsockname())
        connection = Connection(with_other)
        tcp = [with_other.getsockopt(socket.IPPROTO_TCP, option) for option in
               (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)]  # fmt: skip
        assert with_other.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert tcp[0] + tcp[1] * tcp[2] == SECONDS_OF_SILENCE == 60
        connection.close()
