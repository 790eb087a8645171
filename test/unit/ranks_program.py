"""Runs cases of the program in one process group, so that one launch serves all of them.

    torchrun --nproc_per_node=3 ranks_program.py cases.json results.json [backend]

cases: {name: argv}; results: {name: {"out", "table_rows", "rows_read", "rows_computed", "alike":
what all ranks have alike}}, lists by rank. FIRST_SCALE in the environment: of --amp=fp16.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch._dynamo  # before the group, as extend_distributed explains  # noqa: F401
import torch.distributed as dist

import dlrm_s_pytorch as dlrm
from optim import loss_scale


class Watched(dlrm.Trainer):
    """A trainer that counts the rows it computes and stays reachable."""

    latest = None

    def __init__(self, *args):
        super().__init__(*args)
        self.rows_computed = 0
        Watched.latest = self

    def train_step(self, batch, it):
        self.rows_computed += batch.decode().label.shape[0]
        return super().train_step(batch, it)


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
    cases, results = Path(sys.argv[1]), Path(sys.argv[2])
    if len(sys.argv) > 3:  # that of the emulated npu device
        importlib.import_module("torch_npu")
    dist.init_process_group(*(sys.argv[3:] or ["gloo"]))
    dlrm.Trainer = Watched
    if dist.get_world_size() > 1:  # several ranks' steps in pieces equal one rank's whole ones
        dlrm.CPU_PIECE_ROWS = 30
    loss_scale.FIRST_SCALE = float(os.environ.get("FIRST_SCALE", loss_scale.FIRST_SCALE))
    found = {}
    for name, argv in json.loads(cases.read_text()).items():
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert dlrm.main(argv) == 0
        trainer = Watched.latest
        facts = [None] * dist.get_world_size()
        mine = (
            len(trainer.model.emb_l.matrix.weight),
            trainer.data.train.num_rows_read,
            trainer.rows_computed,
            (
                sum(
                    float(p.detach().cpu().double().sum()) for p in trainer.model.dense_parameters()
                ),
                *trainer.scale.state(),
            ),
        )
        dist.all_gather_object(facts, mine)
        columns = dict(
            zip(
                ("table_rows", "rows_read", "rows_computed", "alike"),
                zip(*facts, strict=True),
                strict=True,
            )
        )
        found[name] = {"out": out.getvalue(), **columns}
    if dist.get_rank() == 0:
        results.write_text(json.dumps(found))
    dist.destroy_process_group()
    assert_gloo_has_ended()


if __name__ == "__main__":
    main()
