"""Two hosts on one machine: namespaces of network, names and processes, joined by a cable."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ip", "nsenter", "ps", "ss", "unshare")
# Its shell is process 1 in there: if it ends, as it does when the test ends, all processes end.
HOST = 'hostname "$1" && ip link set lo up && echo ready && read -r _'
INTERFACE = "veth0"


@dataclass(frozen=True)
class Host:
    """A host; `init` is its first process, by its number outside."""

    name: str
    address: str
    init: int

    def command(self, *command, cwd):
        """The words that run a command on the host, from outside."""
        enter = ["nsenter", f"--target={self.init}", "--net", "--uts", "--pid", "--mount"]
        inside = ["bash", "-c", 'cd "$0" && exec "$@"', cwd, *command]
        return [str(word) for word in (*enter, *inside)]

    def listening(self):
        """The addresses and ports at which something listens on the host, as `address:port`."""
        done = subprocess.run(
            ["nsenter", f"--target={self.init}", "--net", "ss", "-ltnH"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return [line.split()[3] for line in done.stdout.splitlines()]

    def ip(self, *words):
        enter = ["nsenter", f"--target={self.init}", "--net", "ip", *words]
        subprocess.run(enter, check=True, capture_output=True)

    def pull_the_cable(self):
        self.ip("link", "set", INTERFACE, "down")

    def kill(self):
        """End all processes of the host at once, with SIGKILL; its network stays."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)


def why_no_hosts():
    """Why no such hosts can be made here; empty if they can."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    if missing:
        return f"no {', '.join(missing)}"
    words = "unshare --net --uts --pid --fork --mount-proc true".split()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return f"namespaces may not be made: {done.stderr.strip()}" if done.returncode else ""


@contextlib.contextmanager
def two_hosts():
    """Host 0 and host 1 during the block; nothing is left of them."""
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(_host(k)) for k in range(2)]
        first, second = hosts
        cable = ["ip", "link", "add", INTERFACE, "netns", str(first.init), "type", "veth"]
        cable += ["peer", "name", INTERFACE, "netns", str(second.init)]
        subprocess.run(cable, check=True)
        for host in hosts:
            host.ip("address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.ip("link", "set", INTERFACE, "up")
        yield hosts


@contextlib.contextmanager
def _host(number):
    name = f"host{number}"
    words = "unshare --net --uts --pid --fork --kill-child --mount-proc bash -c".split()
    with subprocess.Popen(
        [*words, HOST, "host", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "ready\n"
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        init = int(found.stdout)
        network = os.open(f"/proc/{init}/ns/net", os.O_RDONLY)  # an end of a cable takes the other
        try:
            yield Host(name, f"10.77.0.{number + 1}", init)
        finally:
            os.close(network)
            process.stdin.close()
            deadline = time.monotonic() + 20
            while Path(f"/proc/{init}").exists() and time.monotonic() < deadline:
                time.sleep(0.02)
            process.kill()
