"""Runs cases of the program in one process, on the emulated npu device if they have --use-npu.

    PYTHONPATH=test/emulated_npu python npu_program.py cases.json results.json

cases: {name: {"argv": [...], "environment": {...}, "fault": name in FAULTS or "",
"first_scale": of --amp=fp16}}
results: {name: {"status", "out", "err", "settings", "steps": what the steps from the second to the
last but one asked of the device, "last": what has a shape in the last step that none had before,
"whole": operators of the whole run}}
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import dlrm_s_pytorch as dlrm  # noqa: E402  (before torch: common/compiled.py says why)

# isort: split
import torch
import torch_npu
from torch import nn

from optim import loss_scale

record = torch_npu.record


def _embedding_bag(trainer, features):
    """The original's lookup, whose backward pass an NPU runs in the host's memory."""
    bags = nn.EmbeddingBag(10, 4, mode="sum").to("npu")
    ids = torch.zeros(8, dtype=torch.int64, device="npu")
    bags(ids, torch.arange(0, 8, 2, device="npu")).sum().backward()


def _race(trainer, features):
    with torch.npu.stream(torch.npu.Stream()):
        return features.label * 2


FAULTS = {
    "race": _race,
    "embedding_bag": _embedding_bag,
    "item": lambda trainer, features: features.label.sum().item(),
    "cpu": lambda trainer, features: features.bags.ids.cpu(),
    "table": lambda trainer, features: trainer.model.emb_l.matrices[0].weight.cpu(),
    "nonzero": lambda trainer, features: features.label.nonzero(),
    "unique": lambda trainer, features: features.bags.ids.unique(),
    "synchronize": lambda trainer, features: torch.npu.synchronize(),
    "mixed": lambda trainer, features: features.label + torch.ones(len(features.label), 1),
    "double": lambda trainer, features: features.label.double(),
    "host_tensor": lambda trainer, features: torch.tensor([0.5], device="npu"),
}


class Watched(dlrm.Trainer):
    """A trainer that clears the record at the second step, and keeps it before the last one."""

    fault = ""
    steps = last = None
    early = frozenset()

    def train_step(self, batch, it):
        if it == 2:
            Watched.early = set(record.operators)
            record.clear()
        if it == self.num_batches:
            Watched.steps, before = what_was_asked(), set(record.shapes)
        if it == 3 and self.fault:
            FAULTS[self.fault](self, batch.to(self.process.device).decode())
        loss = super().train_step(batch, it)
        if it == self.num_batches:
            Watched.last = sorted({name for name, _ in record.shapes - before})
        return loss


def what_was_asked():
    return {
        "operators": dict(record.operators),
        "waits": dict(record.waits),
        "host_copies": list(record.host_copies),
        "dtypes": [str(dtype) for dtype in record.dtypes],
    }


def run(argv, environment=None, fault="", first_scale=loss_scale.FIRST_SCALE):
    for name in [name for name in os.environ if name.startswith("EMULATED_NPU_")]:
        del os.environ[name]
    os.environ.update(environment or {})
    torch_npu.npu._settings["jit_compile"] = None
    loss_scale.FIRST_SCALE = first_scale
    Watched.early = frozenset()
    record.clear()
    Watched.fault, Watched.steps, Watched.last = fault, None, None
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = dlrm.main([*argv, "--tensor-board-filename="])
    return {
        "status": status,
        "out": out.getvalue(),
        "err": err.getvalue(),
        "steps": Watched.steps,
        "last": Watched.last,
        "whole": sorted({*Watched.early, *record.operators}),
        "settings": dict(torch_npu.npu._settings),
    }


def main():
    dlrm.Trainer = Watched
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    for name, case in cases.items():
        try:
            found[name] = run(**case)
        except RuntimeError as error:
            found[name] = {"status": None, "out": "", "err": f"RuntimeError: {error}"}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
