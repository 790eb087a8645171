"""What n ranks have saved, m ranks load: the next losses are the same."""

import itertools
import json
import sys

import pytest
from conftest import ROOT, assert_same_losses, losses_of, shell

FLAGS = (
    "--arch-sparse-feature-size=8 --arch-embedding-size=60-50-40-30-20-90-80-70-11"
    " --arch-mlp-bot=5-16-8 --arch-mlp-top=16-1 --mini-batch-size=40 --data-size=480"
    " --loss-function=bce --round-targets=true --learning-rate=0.05 --tensor-board-filename="
    " --num-indices-per-lookup=3 --print-freq=1"
).split()
KINDS = {
    "adagrad": ["--optimizer=adagrad", "--weighted-pooling=learned"],
    "rwsadagrad": ["--optimizer=rwsadagrad", "--mlperf-grad-accum-iter=2"],
    "mixed": ["--optimizer=rwsadagrad", "--md-flag", "--md-threshold=35"],
    "qr": ["--optimizer=adagrad", "--qr-flag", "--qr-threshold=35"],
}
STEP = 5


def launch(world_size, cases, folder):
    """Run cases on so many ranks; returns the losses of each."""
    (folder / "cases.json").write_text(json.dumps(cases))
    results = folder / "results.json"
    program = ROOT / "test" / "unit" / "ranks_program.py"
    done = shell(sys.executable, program, world_size, folder / "cases.json", results, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: losses_of(case["out"]) for name, case in json.loads(results.read_text()).items()}


def save(world_size, folder):
    cases = {
        kind: [*FLAGS, *flags, f"--checkpoint-dir={folder}/{world_size}-{kind}",
               f"--save-every={STEP}", "--keep=9"]
        for kind, flags in KINDS.items()
    }  # fmt: skip
    return launch(world_size, cases, folder)


def load(world_size, saved_by, folder):
    """Go on from what each number of ranks has saved; {(saved by, kind): losses}."""
    cases = {
        f"{other}-{kind}": [*FLAGS, *flags,
                            f"--resume={folder}/{other}-{kind}/000001-step-{STEP}"]
        for other in saved_by
        for kind, flags in KINDS.items()
    }  # fmt: skip
    return launch(world_size, cases, folder)


def check(pairs, folder):
    """Save and load in each pair (saved by, loaded by)."""
    wholes = {saver: save(saver, folder) for saver in {saver for saver, _ in pairs}}
    for loader, of_loader in itertools.groupby(sorted(pairs, key=lambda p: p[1]), lambda p: p[1]):
        found = load(loader, [saver for saver, _ in of_loader], folder)
        for name, losses in found.items():
            saver, _, kind = name.partition("-")
            assert len(losses) == 12 - STEP
            assert_same_losses(losses, wholes[int(saver)][kind][STEP:])
            if int(saver) == loader:
                assert losses == wholes[loader][kind][STEP:], "the same ranks: the same digits"


def test_one_rank_and_three_go_on_from_each_other(tmp_path):
    check([(1, 3), (3, 1)], tmp_path)


@pytest.mark.slow
def test_six_pairs_of_ranks(tmp_path):
    check([(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)], tmp_path)


@pytest.mark.slow
def test_all_64_pairs_of_1_to_8_ranks(tmp_path):
    check(list(itertools.product(range(1, 9), repeat=2)), tmp_path)
