"""Ranks for tests: forked from one process, so that torch is imported once and not by each rank.

test_scripts.py starts ranks as a user does, with torchrun.
"""

import os
import socket
import sys
import traceback


def run_ranks(num_ranks, work, first=0, **environment):
    """Run `work` on that many ranks, with the environment that torchrun gives them, and exit.

    The status is 0 if `work` has returned on all ranks. No thread may have been started before. If
    other machines have ranks too, `first` is this one's first, and `environment` says where all of
    them meet.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    os.environ |= environment
    for rank in range(num_ranks):
        if os.fork() == 0:
            os.environ |= {"RANK": str(first + rank), "LOCAL_RANK": str(rank)}
            _work_and_end(work)
    sys.exit(any([os.wait()[1] for _ in range(num_ranks)]))


def _work_and_end(work):
    """End without Python's clean-up: a fork's takes a second, as it copies the parent's memory."""
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)
