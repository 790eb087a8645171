"""Who does the work: this process's threads, among the processes that share a work folder."""

import os
from dataclasses import dataclass, replace

from common.launch import Launch

WORK_MEMORY = 1 << 30  # bytes for the work of all threads and processes of a machine


@dataclass(frozen=True)
class Crew:
    """This process among all that share the work.

    Attributes:
        threads: number of threads of this process.
        rank: number of this process, from 0.
        num_processes: number of processes that share the work, on all machines.
        num_local_processes: how many of them run on this machine.
    """

    threads: int = 1
    rank: int = 0
    num_processes: int = 1
    num_local_processes: int = 1

    def within_memory(self, thread_bytes: int) -> "Crew":
        """The crew with no more threads than WORK_MEMORY allows, but at least one.

        Args:
            thread_bytes: memory that a thread takes for the work.
        """
        most = WORK_MEMORY // max(thread_bytes, 1) // self.num_local_processes
        return replace(self, threads=min(self.threads, max(most, 1)))


def crew_of_this_launch(parallel: bool) -> Crew:
    """This process among the ranks of its launch.

    Args:
        parallel: use this process's share of the machine's cores, not just one.
    """
    launch = Launch.from_environment()
    cores = len(os.sched_getaffinity(0)) // launch.local_world_size if parallel else 1
    return Crew(max(cores, 1), launch.rank, launch.world_size, launch.local_world_size)
