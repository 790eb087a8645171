"""Another process for a test: a fork, so everything is imported and compiled already."""

import contextlib
import os
import select
import signal
import time


@contextlib.contextmanager
def process(action):
    """A fork that runs `action(ready)` and is killed at the end of the block.

    `ready()` starts the block and never returns.
    """
    read, say = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            action(lambda: (os.write(say, b"."), time.sleep(60)))
        finally:
            os._exit(1)
    try:
        assert select.select([read], [], [], 30)[0], "the other process was never ready"
        os.read(read, 1)
        yield child
    finally:
        os.close(read), os.close(say)
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
