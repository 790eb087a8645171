"""Ranks that save a model of 300 MB, nearly all of it two tables, which are whole or cut by rows.

    python saving_program.py num_ranks PATH whole|cut [rank that ends instead]

Each rank prints by how many MB its memory has grown at the most while the file was written.
"""

import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common.compiled  # noqa: F401  (before torch: both use the same threads)

# isort: split
import torch
from forked_ranks import run_ranks
from placements import PLACEMENTS, state_on

from engine.model_file import full_state_dict, save_model_file
from engine.progress import Progress
from model.compression import NoCompression
from ranks.process import joined, this_process

NUM_ROWS, DIM = (600_000, 580_000), 64  # 154 and 148 MB; a block has 64


def make_state(process):
    tables = NoCompression(DIM).make_tables(NUM_ROWS)
    state = state_on(process, PLACEMENTS[sys.argv[3]], tables, "rwsadagrad")
    for part, view in state.tables.held_parts("weight"):
        rows = torch.arange(float(part.begin), float(part.end))
        view.copy_(rows[:, None]).add_(torch.arange(DIM) / DIM)
        state.tables.part_view(part, "momentum").copy_(rows).add_(part.matrix.table)
    return state


def most_memory():
    """The most that this process has had so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def work():
    process = this_process("cpu", -1, "")
    with joined(process):
        state = make_state(process)
        if sys.argv[4:] == [str(process.rank)]:
            os._exit(1)
        before = most_memory()
        save_model_file(sys.argv[2], state, Progress(iter=10, num_steps=10))
        print(f"{most_memory() - before:.1f}\n", end="", flush=True)
        parameters = full_state_dict(state)
    if process.is_first:
        check_file(parameters)


def check_file(parameters):
    content = torch.load(sys.argv[2], weights_only=True, mmap=True)
    assert set(content["state_dict"]) == set(parameters)
    for key, value in parameters.items():
        assert torch.equal(content["state_dict"][key], value), key
    states = content["opt_state_dict"]["state"]
    for number, num_rows in enumerate(NUM_ROWS):
        assert states[number]["momentum"].shape == (num_rows,)
        assert torch.equal(states[number]["momentum"], torch.arange(float(num_rows)) + number)


if __name__ == "__main__":
    run_ranks(int(sys.argv[1]), work)
