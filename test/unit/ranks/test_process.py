"""A process group ends, whatever gloo's threads still hold."""

import sys

from conftest import ROOT, shell

PROGRAM = """
import dlrm_s_pytorch, sys, torch
import torch.distributed as dist
from ranks.process import end_group

for k in range(10):
    file = f"file://{sys.argv[1]}/{k}"
    dist.init_process_group("gloo", init_method=file, rank=0, world_size=1)
    for _ in range(20):
        dist.all_reduce(torch.ones(1000))  # nothing but gloo's thread holds the tensor in the end
    end_group()
"""


def test_the_end_of_a_group_does_not_wait_for_a_thread_that_waits_for_python(tmp_path):
    """With torch 2.6 and 2.7, destroy_process_group alone hangs after a few groups."""
    command = [sys.executable, "-c", PROGRAM, tmp_path]
    assert shell(*command, env={"PYTHONPATH": str(ROOT)}, timeout=60).returncode == 0
