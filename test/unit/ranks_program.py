"""Runs cases of the program in one process group, so that one launch serves all of them.

    python ranks_program.py num_ranks cases.json results.json [backend]

cases: {name: argv}; results: what `run_cases` returns. The variable FIRST_SCALE is the first loss
scale of --amp=fp16. With --on-nan=skip the last rank's rows of some batches are spoilt.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import dlrm_s_pytorch as dlrm

# isort: split
import torch.distributed as dist
from forked_ranks import run_ranks
from spoilt import spoilt

from engine import step
from optim import loss_scale
from ranks.process import end_group

SPOILT = (4, 7, 8)  # batches of the first epoch, from 1


class Watched(dlrm.Trainer):
    """A trainer that counts the rows it computes, spoils batches and stays reachable."""

    latest = None

    def __init__(self, *args):
        super().__init__(*args)
        self.rows_computed = 0
        Watched.latest = self

    def train_step(self, batch, it):
        self.rows_computed += batch.decode().label.shape[0]
        is_last_rank = self.process.rank == self.process.world_size - 1
        if self.options.on_nan == "skip" and it in SPOILT and is_last_rank:
            batch = spoilt(batch)
        return super().train_step(batch, it)


def facts_of(trainer):
    """What a rank has done; `alike` is to be the same on all ranks.

    `operators`: of this case and those before it, if the device is the emulated npu.
    """
    parameters = trainer.model.dense_parameters()
    record = getattr(sys.modules.get("torch_npu"), "record", None)
    return {
        "operators": sorted(record.operators) if record else [],
        "table_rows": sum(len(matrix.weight) for matrix in trainer.model.emb_l.lookups),
        "rows_read": trainer.data.train.num_rows_read,
        "rows_computed": trainer.rows_computed,
        "alike": (
            sum(float(p.detach().cpu().double().sum()) for p in parameters),
            *trainer.state.scale.state(),
        ),
    }


def gathered(facts):
    if not dist.is_initialized():
        return [facts]
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, facts)
    return found


@mock.patch.object(dlrm, "Trainer", Watched)
def run_cases(cases):
    """{name: {"out": what was printed, and each of `facts_of` as a list by rank}}."""
    found = {}
    for name, argv in cases.items():
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert dlrm.main(argv) == 0
        ranks = gathered(facts_of(Watched.latest))
        found[name] = {key: [facts[key] for facts in ranks] for key in ranks[0]}
        found[name]["out"] = out.getvalue()
    return found


def assert_gloo_has_ended():
    """A thread of gloo's that outlives its group can abort the process when Python shuts down."""
    names = []
    for _ in range(50):
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        if not any("gloo" in name for name in names):
            return
        time.sleep(0.1)
    raise AssertionError(names)


def main():
    num_ranks, cases, results, *backend = sys.argv[1:]
    if backend:  # that of the emulated npu device
        importlib.import_module("torch_npu")
        importlib.import_module("torch._dynamo")  # before the group, as ranks/process.py explains
    step.CPU_CHUNK_ROWS = 30  # ranks' steps in chunks equal one rank's whole ones
    loss_scale.FIRST_SCALE = float(os.environ.get("FIRST_SCALE", loss_scale.FIRST_SCALE))

    def work():
        dist.init_process_group(*(backend or ["gloo"]))
        found = run_cases(json.loads(Path(cases).read_text()))
        if dist.get_rank() == 0:
            Path(results).write_text(json.dumps(found))
        end_group()
        assert_gloo_has_ended()

    run_ranks(int(num_ranks), work)


if __name__ == "__main__":
    main()
