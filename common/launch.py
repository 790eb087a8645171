"""Which process of a launch this one is, by torchrun's variables in the environment."""

import os
from dataclasses import dataclass

from common.errors import RankError


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together; a single process is rank 0 of 1.

    Attributes:
        rank: number of this process among all, from 0.
        world_size: number of processes on all machines.
        local_rank: number of this process among those of its machine, from 0.
        local_world_size: number of processes on this machine.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Launch":
        """The launch that RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE describe.

        Raises:
            RankError: one of them is not a whole number, or RANK is not in [0, WORLD_SIZE).
        """
        rank, world_size = _environment_int("RANK", 0), _environment_int("WORLD_SIZE", 1)
        if not 0 <= rank < world_size:
            expected = f"expected 0 to {world_size - 1}"
            raise RankError(f"RANK={rank} with WORLD_SIZE={world_size}: {expected}")
        local_world_size = max(_environment_int("LOCAL_WORLD_SIZE", 1), 1)
        return cls(rank, world_size, _environment_int("LOCAL_RANK", 0), local_world_size)


def _environment_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise RankError(f"{name}={text!r} in the environment: expected a whole number") from None
