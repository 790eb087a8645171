"""Other processes for a test: forks, so everything is imported and compiled already."""

import contextlib
import json
import os
import select
import signal
import time
import traceback


class Fork:
    """A fork that calls `action()`, which returns (exit status, anything that JSON takes)."""

    def __init__(self, action):
        self._read, write = os.pipe()
        self.pid, self._result = os.fork(), None
        if self.pid == 0:
            status, text = 70, ""
            try:
                status, text = action()
            except BaseException:
                text = traceback.format_exc()
            os.write(write, json.dumps(text).encode())
            os._exit(status)
        os.close(write)

    def result(self):
        """Wait for its end; returns (exit status, what it returned).

        A killed fork's status is minus the signal, and None is what it returned.
        """
        if self._result is None:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            with open(self._read, "rb") as file:
                self._result = status, json.loads(file.read() or "null")
        return self._result

    def kill(self):
        """Kill it if it has not been waited for."""
        if self._result is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.result()


@contextlib.contextmanager
def process(action):
    """A fork that runs `action(ready)` and is killed at the end of the block.

    `ready()` starts the block and never returns.
    """
    read, say = os.pipe()
    child = Fork(lambda: (1, action(lambda: (os.write(say, b"."), time.sleep(60)))))
    try:
        assert select.select([read], [], [], 30)[0], "the other process was never ready"
        yield child
    finally:
        os.close(read), os.close(say)
        child.kill()


def wait_for(condition, seconds=30):
    """Wait until `condition()` is true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)
