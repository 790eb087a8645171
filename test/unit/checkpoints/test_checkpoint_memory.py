"""Saving and reading need a file's memory beside the rank's own part."""

import sys

import pytest
from conftest import ROOT, shell

MOST_MB = {"saving": 100, "reading": 200}  # one file of 64 MB; its bytes and its tensors


@pytest.mark.parametrize(
    "num_ranks, placement",
    [(1, "whole"), pytest.param(2, "whole", marks=pytest.mark.slow), (3, "cut")],
)
def test_a_checkpoint_of_300_mb_takes_a_third_of_it_at_the_most(num_ranks, placement, tmp_path):
    """Between two steps; a copy to write from takes as much as the rank's part."""
    program = ROOT / "test" / "unit" / "checkpoint_program.py"
    (tmp_path / "checkpoints").mkdir()
    done = shell(sys.executable, program, num_ranks, tmp_path / "checkpoints", placement)
    assert done.returncode == 0, done.stderr
    grown = [[float(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(grown) == num_ranks
    assert max(of_save for of_save, _ in grown) < MOST_MB["saving"], grown
    assert max(of_read for _, of_read in grown) < MOST_MB["reading"], grown
