"""N ranks train what one rank trains, and each does its share of the work."""

import json
import sys

import pytest
from conftest import (
    CRITEO_MODEL,
    ROOT,
    SMALL_MODEL,
    assert_same_losses,
    losses_of,
    metrics_of,
    shell,
)
from ranks_program import run_cases

RANDOM = [*SMALL_MODEL, "--num-batches=100", "--tensor-board-filename="]
RANDOM_SHORT = [*SMALL_MODEL, "--num-batches=12", "--tensor-board-filename="]

RANDOM_CASES = {
    "sgd_100_steps": [*RANDOM, "--print-freq=10"],
    "learned_sgd": [*RANDOM_SHORT, "--weighted-pooling=learned"],
    "fixed_pooling": [*RANDOM_SHORT, "--weighted-pooling=fixed"],
    "adagrad": [*RANDOM_SHORT, "--optimizer=adagrad", "--learning-rate=0.01"],
    "rwsadagrad": [*RANDOM_SHORT, "--optimizer=rwsadagrad", "--learning-rate=0.01"],
    "learned_adagrad": [
        *RANDOM_SHORT, "--optimizer=adagrad", "--weighted-pooling=learned", "--learning-rate=0.01",
    ],
    "learned_rwsadagrad": [
        *RANDOM_SHORT, "--optimizer=rwsadagrad", "--weighted-pooling=learned",
        "--learning-rate=0.01",
    ],
    "cat": [*RANDOM_SHORT, "--arch-interaction-op=cat"],
    "one_id_a_bag": [
        *RANDOM_SHORT, "--num-indices-per-lookup=1", "--num-indices-per-lookup-fixed=true",
    ],
    "qr": [*RANDOM_SHORT, "--qr-flag", "--qr-threshold=50"],
    "qr_concat": [
        *RANDOM_SHORT, "--qr-flag", "--qr-threshold=150", "--qr-operation=concat",
        "--arch-mlp-bot=13-64-32", "--optimizer=rwsadagrad", "--learning-rate=0.001",
    ],
    "md": [*RANDOM_SHORT, "--md-flag", "--md-threshold=50", "--mlperf-grad-accum-iter=5"],
    "md_rwsadagrad": [
        *RANDOM_SHORT, "--md-flag", "--md-threshold=50", "--optimizer=rwsadagrad",
        "--learning-rate=0.01",
    ],
    "accumulation": [*RANDOM_SHORT, "--mlperf-grad-accum-iter=5", "--optimizer=adagrad"],
    "skipped": [*RANDOM_SHORT, "--on-nan=skip", "--print-freq=3"],
    "skipped_in_accumulation": [
        *RANDOM_SHORT, "--on-nan=skip", "--print-freq=3", "--mlperf-grad-accum-iter=2",
        "--optimizer=adagrad", "--learning-rate=0.01",
    ],
    "does_not_divide": [
        *RANDOM_SHORT, "--mini-batch-size=50", "--num-batches=0", "--data-size=333",
    ],
    "last_batch_smaller_than_ranks": [
        *RANDOM_SHORT, "--mini-batch-size=16", "--num-batches=0", "--data-size=50", "--nepochs=2",
    ],
    "batch_of_one": [*RANDOM_SHORT, "--mini-batch-size=1", "--num-batches=5"],
    "fewer_tables_than_ranks": [
        "--mini-batch-size=9", "--data-size=40", "--tensor-board-filename=",
    ],
}  # fmt: skip

# these run with tables whole, cut and shared as it balances ranks too; all run with them all cut
BALANCED = ("sgd_100_steps", "learned_adagrad", "qr", "md_rwsadagrad", "criteo_in_memory")
WHOLE = ("adagrad", "qr_concat", "criteo_adagrad")

# where shares are small or empty, and where rows are read
ON_8_RANKS = (
    "rwsadagrad", "md_rwsadagrad", "qr_concat", "last_batch_smaller_than_ranks", "batch_of_one",
    "fewer_tables_than_ranks", "criteo_in_memory", "criteo_skipped",
)  # fmt: skip


def criteo_cases(folder):
    data = [*CRITEO_MODEL, f"--data_path={folder}", "--tensor-board-filename=", "--print-freq=10"]
    return {
        "criteo_in_memory": [
            *data,
            "--mini-batch-size=121",
            "--test-freq=30",
            "--test-mini-batch-size=99",
        ],
        "criteo_mapped": [*data, "--memory-map", "--data-randomize=none", "--test-freq=30"],
        "criteo_adagrad": [
            *data,
            "--optimizer=rwsadagrad",
            "--learning-rate=0.02",
            "--test-freq=47",
        ],
        "criteo_qr": [*data, "--qr-flag", "--qr-operation=add", "--num-batches=20"],
        "criteo_md": [*data, "--md-flag", "--md-round-dims", "--num-batches=20"],
        "criteo_rate_1": [*data, "--learning-rate=1", "--nepochs=2", "--test-freq=47"],
        "criteo_skipped": [
            *data, "--on-nan=skip", "--num-batches=10", "--optimizer=rwsadagrad",
            "--learning-rate=0.02",
        ],
        "criteo_workers": [*data, "--num-workers=2", "--num-batches=10"],
        "criteo_patience": [*data, "--learning-rate=0", "--test-freq=5", "--patience=2"],
    }  # fmt: skip


def launch(num_ranks, cases, folder):
    """The results of ranks_program.py on that many CPU ranks."""
    (folder / "cases.json").write_text(json.dumps(cases))
    program = ROOT / "test" / "unit" / "ranks_program.py"
    files = [folder / "cases.json", folder / "results.json"]
    finished = shell(sys.executable, program, num_ranks, *files, timeout=400)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(files[1].read_text())


@pytest.fixture(scope="module")
def cases(kaggle):
    return RANDOM_CASES | criteo_cases(kaggle)


@pytest.fixture(scope="module")
def one_rank(cases):
    return run_cases(cases)


@pytest.fixture(scope="module", params=[3, pytest.param(8, marks=pytest.mark.slow)])
def many_ranks(request, cases, tmp_path_factory):
    """(how many ranks, their results)."""
    folder = tmp_path_factory.mktemp(f"ranks_{request.param}")
    if request.param == 3:
        chosen = {name: [*argv, "--sharding=row"] for name, argv in cases.items()}
        chosen |= {f"{name} auto": cases[name] for name in BALANCED}
        chosen |= {f"{name} table": [*cases[name], "--sharding=table"] for name in WHOLE}
    else:
        chosen = {name: cases[name] for name in ON_8_RANKS}
    return request.param, launch(request.param, chosen, folder)


def alone_of(one_rank, name):
    """The results of the case on one rank, however its tables were spread over several."""
    return one_rank[name.partition(" ")[0]]


def test_losses_and_auc_are_those_of_one_rank(one_rank, many_ranks):
    for name, together in many_ranks[1].items():
        alone = alone_of(one_rank, name)
        if name == "criteo_rate_1":  # such a rate magnifies rounding: only the AUC is comparable
            tolerance = 5e-4
        else:
            tolerance = 1e-4
            assert_same_losses(losses_of(together["out"]), losses_of(alone["out"]))
        tests, wanted = metrics_of(together["out"]), metrics_of(alone["out"])
        assert len(tests) == len(wanted)
        for test, want in zip(tests, wanted, strict=True):
            assert abs(test["auc"] - want["auc"]) <= tolerance + 1e-9, name


def test_the_work_is_split(one_rank, many_ranks):
    num_ranks, together = many_ranks
    for name, found in together.items():
        alone = alone_of(one_rank, name)
        assert sum(found["rows_computed"]) == alone["rows_computed"][0], name
        if num_ranks == 3 and not name.endswith(" auto"):  # else tiny ones are on every rank
            assert sum(found["table_rows"]) == alone["table_rows"][0], name
    for name in together.keys() & {"sgd_100_steps", "criteo_in_memory", "criteo_mapped"}:
        for what in ("rows_read", "rows_computed"):
            share = one_rank[name][what][0] / num_ranks
            num_steps = 100
            assert max(together[name][what]) <= share + num_steps, (name, what)
    tables = together["criteo_in_memory"]["table_rows"]
    assert max(tables) < one_rank["criteo_in_memory"]["table_rows"][0]


def test_ranks_skip_the_same_batches(one_rank, many_ranks):
    """The loss of one rank is nan: batches 4, 7 and 8 are skipped, and no parameter differs."""
    for name in many_ranks[1].keys() & {"skipped", "skipped_in_accumulation", "criteo_skipped"}:
        found, want = many_ranks[1][name], one_rank[name]
        warnings = [
            [line for line in text.splitlines() if line.startswith("warning: the loss of ")]
            for text in (found["out"], want["out"])
        ]
        assert warnings[0] == warnings[1] and warnings[0], name
        assert len({tuple(alike) for alike in found["alike"]}) == 1, name


def test_ranks_stop_together_when_evaluations_find_nothing_better(many_ranks):
    """Each would wait for the others for ever if one went on."""
    if found := many_ranks[1].get("criteo_patience"):
        assert "in the last 2 evaluations: training stops (--patience)" in found["out"]
        assert len(metrics_of(found["out"])) == 3


def test_some_lines_were_compared(one_rank):
    assert len(losses_of(one_rank["sgd_100_steps"]["out"])) == 10
    assert len(metrics_of(one_rank["criteo_in_memory"]["out"])) == 2


KINDS = {
    "plain": "--optimizer=adagrad",
    "qr": "--optimizer=rwsadagrad --qr-flag --qr-threshold=50",
    "md": "--optimizer=rwsadagrad --md-flag --md-threshold=50",
}


def test_a_model_file_continues_on_another_number_of_ranks(tmp_path):
    """From one rank to three, and from three to one, the next epoch is the uninterrupted one's."""
    runs = {
        name: [*SMALL_MODEL, "--tensor-board-filename=", "--learning-rate=0.001", *flags.split()]
        for name, flags in KINDS.items()
    }
    on_one = {name: [*argv, f"--save-model={tmp_path}/1{name}"] for name, argv in runs.items()}
    whole = {f"whole {name}": [*argv, "--nepochs=2"] for name, argv in runs.items()}
    alone = run_cases(on_one | whole)
    on_three = {name: [*argv, f"--save-model={tmp_path}/3{name}"] for name, argv in runs.items()}

    def continued(ranks):
        return {
            f"continued {name}": [*argv, "--nepochs=2", f"--load-model={tmp_path}/{ranks}{name}"]
            for name, argv in runs.items()
        }

    together = launch(3, on_three | continued(1), tmp_path)
    back = run_cases(continued(3))
    for name in runs:
        want = losses_of(alone[f"whole {name}"]["out"])
        assert [line[2] for line in want] == [0] * 10 + [1] * 10
        for found in (together, back):
            assert_same_losses(losses_of(found[f"continued {name}"]["out"]), want[10:])
