"""Ranks that have other flags or other data end before they train, with a line that names them."""

import dlrm_s_pytorch as dlrm

# isort: split
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CRITEO_MODEL, ROOT, SMALL_MODEL, shell, write_days

from checkpoints.agreement import OF_A_RANK, PATHS, data_told, disagreement, flags_told


def told(*line):
    return flags_told(dlrm.parse_options(line))


def test_what_may_differ_is_known_and_everything_else_is_compared():
    names = {action.dest for action in dlrm.make_parser()._actions} - {"help"}
    assert OF_A_RANK <= names and PATHS <= names and not OF_A_RANK & PATHS
    assert set(told()) == {*names, *vars(dlrm.parse_options([]))} - OF_A_RANK
    others = "--local_rank=3 --num-workers=2 --test-num-workers=1".split()
    assert told(*others) == told()


def test_each_flag_of_a_path_is_known_as_one():
    """By what stands for its value in the help, or by its own name."""
    words, ends = {"PATH", "DIR", "FILE", "FILE.html", "IN", "OUT"}, ("_file", "_filename", "_dir")
    paths = {
        action.dest
        for action in dlrm.make_parser()._actions
        if action.metavar in words or action.dest.endswith(ends)
    }
    assert paths - OF_A_RANK == PATHS


@pytest.mark.parametrize("name", sorted(PATHS))
def test_a_path_may_differ_but_not_whether_it_is_given(name):
    here, there = (SimpleNamespace(**{name: path}) for path in ("/here/x", "/there/y"))
    assert flags_told(here) == flags_told(there) != flags_told(SimpleNamespace(**{name: ""}))


FLAGS = {"learning_rate": 0.1, "nepochs": 1, "save_model": "a path"}


@pytest.mark.parametrize(
    "ranks, line",
    [
        (
            [{}, {}, {}, {"learning_rate": 0.2}],
            "rank 3 has --learning-rate=0.2, rank 0 has --learning-rate=0.1",
        ),
        (
            [{}, {}, {"nepochs": 2}, {"nepochs": 2}],
            "ranks 2 to 3 have --nepochs=2, rank 0 has --nepochs=1",
        ),
        (
            [{}, {"save_model": "", "learning_rate": 1.0}, {"nepochs": 9}, {"save_model": ""}],
            "rank 1 has --learning-rate=1.0, no --save-model,"
            " rank 0 has --learning-rate=0.1, --save-model=a path",
        ),
        (
            [{"nepochs": 7}, {}, {"nepochs": 7}, {}],
            "ranks 1, 3 have --nepochs=1, rank 0 has --nepochs=7",
        ),
    ],
)
def test_the_line_names_the_first_ranks_that_differ_and_their_flags(ranks, line):
    found = disagreement([(FLAGS | changed, {"rows of table 0": rank}) for rank, changed in
                          enumerate(ranks)])  # fmt: skip
    assert found == f"{line}: give all ranks the same flags", "flags come before data"


def test_of_data_the_tables_are_named_and_no_line_is_endless():
    one = SimpleNamespace(
        rows=lambda split: np.zeros((9, 4), np.int32), rows_per_part=(9, 3, 3), counts=range(5, 31),
        layout=SimpleNamespace(unpack=np.asarray),
    )  # fmt: skip
    other = SimpleNamespace(**vars(one) | {"counts": [5, 6, 8, *range(108, 131)]})
    found = disagreement([({}, data_told(one)), ({}, data_told(other))])
    assert found == (
        "rank 1 has rows of table 2 = 8, rows of table 3 = 108, rows of table 4 = 109,"
        " rank 0 has rows of table 2 = 7, rows of table 3 = 8, rows of table 4 = 9"
        " (and 21 more differ): give all machines the same prepared data"
    )
    assert data_told(None) == {}, "other data follows from flags"


PROGRAM = """
import json, os, sys
import dlrm_s_pytorch as dlrm
from forked_ranks import run_ranks

lines = json.loads(sys.argv[1])


def work():
    line = lines[int(os.environ["RANK"])]
    status = dlrm.main([*line, "--tensor-board-filename="])
    print(f"status {status}\\n", end="", flush=True)


run_ranks(len(lines), work)
"""


def run_ranks(lines, folder):
    settings = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'test' / 'unit'}"}
    text = json.dumps([[str(word) for word in line] for line in lines])
    done = shell(sys.executable, "-c", PROGRAM, text, cwd=folder, env=settings, timeout=120)
    assert "Traceback" not in done.stderr
    return done


def test_a_rank_with_another_flag_ends_all_ranks_before_they_train(tmp_path):
    lines = [[*SMALL_MODEL, "--num-workers=0"], [*SMALL_MODEL], [*SMALL_MODEL]]
    lines[2] += ["--learning-rate=0.2"]
    done = run_ranks(lines, tmp_path)
    assert done.stdout == "status 2\n" * 3
    assert done.stderr == (
        "error: rank 2 has --learning-rate=0.2, rank 0 has --learning-rate=0.1:"
        " give all ranks the same flags\n"
    )


def test_copies_of_the_data_that_differ_are_found_and_equal_ones_are_not(tmp_path):
    """Each rank prepares its own copy here, as a machine does that shares no folder."""
    copies = [tmp_path / name for name in ("one", "same", "other")]
    for copy, seed in zip(copies, (1, 1, 2), strict=True):
        write_days(copy, 2, 200, seed=seed)
    flags = [*CRITEO_MODEL, "--max-ind-range=100", "--mlperf-events=false"]
    one, same, other = ([*flags, f"--data_path={copy}"] for copy in copies)
    done = run_ranks([one, same], tmp_path)
    assert done.stdout.count("status 0\n") == 2, done.stderr
    done = run_ranks([one, other], tmp_path)
    assert done.stdout.count("status 2\n") == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: rank 1 has ") and ", rank 0 has " in done.stderr
    assert done.stderr.endswith(": give all machines the same prepared data\n")
