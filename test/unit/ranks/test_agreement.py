"""Texts of all ranks reach all of them, and what the first one finds out holds for all."""

import json
import os
import sys

import pytest
import torch
from conftest import ROOT, shell

from common.errors import UserError
from ranks.collectives import agreed, texts_of_all
from ranks.process import Process

ALONE = Process(0, 1, 0, torch.device("cpu"), "gloo")
TEXTS = {
    "short": ["a", "b", "c", "d"],
    "of all lengths": ["", "x" * 70_000, "yy", ""],
    "all empty": [""] * 4,
    "with spaces": [" a ", "  ", "b\n", "\0 "],
    "of other letters": ["ä", "数据", "\ud800", os.fsdecode(b"\xff.pt")],
}

PROGRAM = """
import json, sys
from common.errors import UserError
from forked_ranks import run_ranks
from ranks import process as ranks
from ranks.collectives import agreed, texts_of_all

def asked(process, act):
    try:
        return agreed(process, act)
    except UserError as error:
        return f"error: {error}"

def work():
    process, acts = ranks.this_process("cpu"), []

    def answer():
        acts.append(process.rank)
        return f"rank {process.rank} says \\ud800 and ''"

    def fail():
        acts.append(process.rank)
        raise UserError("the folder is in use")

    with ranks.joined(process):
        with open("texts.json") as file:
            texts = json.load(file)
        found = {name: texts_of_all(process, texts[name][process.rank]) for name in texts}
        found["answer"] = asked(process, answer)
        found["fail"] = asked(process, fail)
        found["empty"] = asked(process, str)
        found["after"] = texts_of_all(process, "still together")
    found["acts"] = acts
    with open(f"{process.rank}.json", "w") as file:
        json.dump(found, file)

run_ranks(4, work)
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of four ranks has found."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "texts.json").write_text(json.dumps(TEXTS))
    settings = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'test' / 'unit'}"}
    done = shell(sys.executable, "-c", PROGRAM, cwd=folder, env=settings, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("name", TEXTS)
def test_every_rank_gets_all_texts_in_the_ranks_order(ranks, name):
    for of_rank in ranks:
        assert of_rank[name] == TEXTS[name]


def test_the_first_rank_acts_and_all_get_its_answer(ranks):
    for rank, found in enumerate(ranks):
        assert found["answer"] == "rank 0 says \ud800 and ''" and found["empty"] == ""
        assert found["acts"] == ([0, 0] if rank == 0 else [])


def test_an_error_of_the_first_rank_is_raised_on_all(ranks):
    for found in ranks:
        assert found["fail"] == "error: the folder is in use"
        assert found["after"] == ["still together"] * 4


def test_a_rank_alone_needs_no_other():
    def fail():
        raise UserError("no")

    assert texts_of_all(ALONE, " a") == [" a"]
    assert agreed(ALONE, lambda: "b") == "b"
    with pytest.raises(UserError, match="^no$"):
        agreed(ALONE, fail)
