"""Where the ranks meet is checked, and a process group ends, whatever gloo's threads still hold."""

import socket
import sys

import pytest
from conftest import ROOT, shell, train

from ranks import store

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


def rank_0_of_2(monkeypatch, address, port):
    values = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "SECONDS_FOR_ADDRESS", 0.1)
    result = train()
    assert result.status == 2 and result.out == "" and result.err.count("\n") == 1
    return result.err


@pytest.mark.parametrize("port", ["abc", "-1", "65536", "", "29500.0", "9" * 400])
def test_a_port_that_is_none_is_one_line(port, monkeypatch):
    line = rank_0_of_2(monkeypatch, "localhost", port)
    assert line.startswith(f"error: MASTER_PORT={port!r} in the environment: expected a port, 1 to")


@pytest.mark.parametrize("address", ["no such host", "", "nowhere.invalid", "::1::", "a" * 300])
def test_an_address_that_does_not_exist_is_one_line(address, monkeypatch):
    line = rank_0_of_2(monkeypatch, address, "29500")
    assert line.startswith(f"error: MASTER_ADDR={address!r} in the environment: ")
    assert "expected the name or number of rank 0's machine" in line


def test_a_port_that_is_taken_is_one_line(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        line = rank_0_of_2(monkeypatch, "127.0.0.1", str(port))
    where = f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port}"
    assert line.startswith(f"error: the ranks cannot meet at {where}: ")
