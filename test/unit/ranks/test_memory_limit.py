"""A table larger than the memory of any rank trains when the ranks together hold it."""

import re
import sys
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, losses_of, shell

MODEL = (
    "--arch-sparse-feature-size=64 --arch-mlp-bot=4-64 --arch-mlp-top=8-1 --mini-batch-size=256"
    " --num-batches=5 --initial-values=seeded --tensor-board-filename="
).split()


@dataclass(frozen=True)
class Limits:
    """How large the table is, and the data that a rank may have, in bytes."""

    num_rows: int
    most_bytes: int

    def launch(self, *flags, num_ranks=4):
        """Ranks with that limit, four unless it is said."""
        limited = f'ulimit -d {self.most_bytes // 1024}; exec "$@"'
        table = f"--arch-embedding-size={self.num_rows}"
        program = [sys.executable, "-u", ROOT / "dlrm_s_pytorch.py", table, *MODEL, *flags]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
        command = [*launcher, "--no-python", "bash", "-c", limited, "rank", *program]
        return shell(sys.executable, *command, timeout=500)


# a torch that is built with CUDA has so many bytes more to begin with, whatever it computes on
OF_CUDA = 600_000_000 if torch.version.cuda else 0


SMALL = Limits(4_000_000 + OF_CUDA // 256, 900_000_000 + OF_CUDA)
LARGE = Limits(23_437_500, 3_000_000_000)


@pytest.mark.parametrize(
    "limits, goes_on",
    [
        pytest.param(SMALL, False, id="1 GB", marks=pytest.mark.slow),
        pytest.param(SMALL, True, id="1 GB, resumed", marks=pytest.mark.slow),
        pytest.param(LARGE, True, id="6 GB, resumed", marks=pytest.mark.slow),
    ],
)
def test_four_ranks_train_save_and_go_on(limits, goes_on, tmp_path):
    """A rank that holds all rows has no memory; four of them need no more than their shares."""
    assert 4 * 64 * limits.num_rows > limits.most_bytes
    whole = limits.launch("--sharding=table", num_ranks=2)
    assert whole.returncode != 0
    assert re.search(r"error: no memory for \d+ rows of 64 numbers", whole.stdout + whole.stderr)
    kept = [f"--checkpoint-dir={tmp_path}/checkpoints", f"--save-model={tmp_path}/model.pth"]
    found = limits.launch(*kept)
    assert found.returncode == 0, found.stderr
    assert [line[2] for line in losses_of(found.stdout)] == [0] * 5
    if goes_on:
        further = limits.launch(*kept, "--nepochs=2", "--resume")
        assert further.returncode == 0, further.stderr
        assert [line[2] for line in losses_of(further.stdout)] == [1] * 5
    content = torch.load(tmp_path / "model.pth", weights_only=True, mmap=True)
    assert content["state_dict"]["emb_l.0.weight"].shape == (limits.num_rows, 64)
    assert content["initial_values"] == "seeded"
