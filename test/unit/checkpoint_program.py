"""Ranks that save a checkpoint of 300 MB and read it back; see saving_program.py.

    python checkpoint_program.py num_ranks FOLDER whole|cut

Each rank prints by how many MB its memory has grown at the most, first by the save, then by
reading.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import saving_program as saving

# isort: split
from forked_ranks import run_ranks

from checkpoints.folder import CheckpointFolder
from checkpoints.index import Index
from checkpoints.matrices import held_rows
from checkpoints.run_state import Place, RunState
from checkpoints.saver import Saver
from engine.loss_meter import LossMeter
from engine.progress import Progress
from ranks.process import joined, this_process


def sums_of(held):
    return {name: float(tensor.sum()) for name, tensor in held.tensors.items()}


def work():
    process = this_process("cpu", -1, "")
    folder = CheckpointFolder(Path(sys.argv[2]))
    with joined(process):
        state = saving.make_state(process)
        data = SimpleNamespace(seek=lambda state: None)
        run = RunState(state, Progress(iter=10), LossMeter(process), data, Place())
        before = saving.most_memory()
        Saver(folder, process, ({}, {}), lambda line: None).save(run, may_go_on=False)
        saved = saving.most_memory()
        rows = [(held, sums_of(held)) for held in held_rows(state)]
        for held, _ in rows:
            for tensor in held.tensors.values():
                tensor.zero_()
        path = folder.checkpoints()[0].path
        run.restore(path, Index.read(path))
        for held, sums in rows:
            assert sums_of(held) == sums
    print(f"{saved - before:.1f} {saving.most_memory() - saved:.1f}\n", end="", flush=True)


if __name__ == "__main__":
    run_ranks(int(sys.argv[1]), work)
