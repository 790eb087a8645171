"""--print-plan, --card-memory and what else the flags of tables on several ranks do."""

import re
import sys

import pytest
import torch
from conftest import ROOT, SMALL_MODEL, shell, train

import dlrm_s_pytorch as dlrm
from engine.table_layout import TableLayout, workload_of
from ranks.process import Process

CRITEO = (
    "39884406-39043-17289-7420-20263-3-7120-1543-63-38532951-2953546-403346-10-2208-11938-155-4-976"
    "-14-39979771-25641295-39664984-585935-12972-108-36"
)
NUM_ROWS = sum(map(int, CRITEO.split("-")))
WIDE = ["--arch-sparse-feature-size=64", "--arch-mlp-bot=13-512-64", "--arch-mlp-top=64-1"]
CPU = torch.device("cpu")
PLAN = [f"--arch-embedding-size={CRITEO}", *WIDE, "--mini-batch-size=262144", "--use-gpu"]


def ranks_of_plan(text):
    """{rank: [parts, whole, cut, shared, GB, ...]} of what --print-plan has printed."""
    lines = re.findall(r"^(\d+) +((?:[\d,.e-]+ *)+)$", text, re.M)
    return {int(rank): [float(n.replace(",", "")) for n in rest.split()] for rank, rest in lines}


def last_line(*flags):
    return train(*PLAN, *flags).out.splitlines()[-1]


def test_a_plan_is_printed_without_card_and_data(tmp_path):
    """Also for a data folder that does not exist, if the counts are given."""
    for more in ([], [f"--data_path={tmp_path}/none"]):
        found = train(*PLAN, "--print-plan=8", *more)
        ranks = ranks_of_plan(found.out)
        assert found.status == 0 and list(ranks) == list(range(8))
        assert all(numbers[3] == 17 for numbers in ranks.values())
        gigabytes = [numbers[4] for numbers in ranks.values()]
        assert max(gigabytes) < 1.1 * sum(gigabytes) / 8
        assert sum(gigabytes) == pytest.approx(NUM_ROWS * 256e-9, rel=0.01)
    assert not list(tmp_path.iterdir())


def test_a_plan_says_whether_cards_are_large_enough():
    assert re.match(
        r"fits --card-memory=7 GB: tables", last_line("--print-plan=8", "--card-memory=7")
    )
    line = last_line("--print-plan=8", "--card-memory=5")
    (enough,) = re.findall(r"^does not fit --card-memory=5 GB: .*; (\d+) ranks would do$", line)
    assert last_line(f"--print-plan={enough}", "--card-memory=5").startswith("fits ")
    fewer = last_line(f"--print-plan={int(enough) - 1}", "--card-memory=5")
    assert fewer.startswith("does not fit ")


def test_a_plan_of_prepared_data_has_its_tables(kaggle):
    """Without a number it is for the ranks of the launch, the first of which prints it."""
    model = ["--arch-sparse-feature-size=16", "--arch-mlp-bot=13-16", f"--data_path={kaggle}"]
    assert re.search(
        "^plan: 1 rank on CPUs, 26 tables of ", train(*model, "--print-plan").out, re.M
    )
    first, second = (
        shell(
            sys.executable,
            ROOT / "dlrm_s_pytorch.py",
            *model,
            "--print-plan",
            env={"WORLD_SIZE": "3", "RANK": rank},
        )
        for rank in "01"
    )
    assert first.stdout.startswith("plan: 3 ranks on CPUs, 26 tables of ")
    assert second.stdout == "" and first.returncode == second.returncode == 0


@pytest.mark.parametrize("number", ["0", "x", "-1", "4097"])
def test_a_plan_is_for_a_number_of_ranks(number):
    found = train(*PLAN, f"--print-plan={number}")
    assert found.status == 2 and found.out == ""
    assert found.err.startswith(f"error: argument --print-plan: '{number}' is not a whole number")


def test_tables_that_do_not_fit_end_the_run_before_anything_is_made(tmp_path):
    found = train(*SMALL_MODEL, f"--save-model={tmp_path}/m.pth", "--card-memory=1e-5")
    assert found.status == 2
    assert re.fullmatch(
        r"error: tables need 4.096e-05 GB on rank 0, --card-memory=1e-05 GB: \d+ ranks would do\n",
        found.err,
    )
    assert not list(tmp_path.iterdir())


def test_tables_that_no_machine_holds_end_the_run_before_memory_is_asked_for(monkeypatch):
    monkeypatch.setattr("engine.table_layout.whole_memory", lambda: 30_000)
    found = train(*SMALL_MODEL)
    assert found.status == 2
    assert found.err.startswith(
        "error: tables need 4.096e-05 GB on this machine, which has 3e-05 GB: 2 ranks would do,"
        " 1 on each machine;"
    )


def test_ranks_of_a_machine_share_its_memory(monkeypatch):
    """Each of two ranks holds half, but both are on one machine."""
    options = dlrm.parse_options(SMALL_MODEL)
    shape = dlrm.make_architecture(options, None)
    second = Process(1, 2, 1, torch.device("cpu"), "gloo")
    monkeypatch.setattr("engine.table_layout.whole_memory", lambda: 30_000)  # of 40,960 bytes
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    TableLayout.from_options(options, shape, second)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(dlrm.UserError, match=r"has 3e-05 GB: \d ranks would do, 2 on each"):
        TableLayout.from_options(options, shape, second)


UNEVEN = ["--arch-embedding-size=1000000-950000", *WIDE, "--mini-batch-size=64"]  # 256, 243.2 MB


@pytest.mark.parametrize("sharding", ["auto", "table", "row"])
@pytest.mark.parametrize("gigabytes, ways", [(0.26, "atr"), (0.2525, "ar"), (0.24, "")])
def test_a_plan_fits_exactly_if_its_ranks_train(sharding, gigabytes, ways):
    """Also if tables have to be cut for it that would be whole on larger cards."""
    flags = [*UNEVEN, f"--sharding={sharding}", f"--card-memory={gigabytes}"]
    options = dlrm.parse_options(flags)
    shape, first = dlrm.make_architecture(options, None), Process(0, 2, 0, CPU, "gloo")
    line = train(*flags, "--print-plan=2").out.splitlines()[-1]
    if sharding[0] in ways:
        assert line.startswith("fits ")
        TableLayout.from_options(options, shape, first)
    else:
        with pytest.raises(dlrm.UserError) as caught:
            TableLayout.from_options(options, shape, first)
        assert line.startswith("does not fit ")
        assert line.rpartition("; ")[2] in str(caught.value)


def test_the_smallest_card_decides_what_is_cut(monkeypatch):
    """The plan is for the cards that the ranks have, the same one on all ranks."""
    options = dlrm.parse_options(UNEVEN)
    shape = dlrm.make_architecture(options, None)
    first = Process(0, 2, 0, torch.device("cuda"), "nccl")
    monkeypatch.setattr("engine.table_layout.card_memory", lambda device: 80e9)
    assert not TableLayout.from_options(options, shape, first).placement.is_cut
    monkeypatch.setattr("engine.table_layout.dist.is_initialized", lambda: True)
    monkeypatch.setattr("engine.table_layout.largest_numbers", lambda process, own: [-0.2525e9])
    assert TableLayout.from_options(options, shape, first).placement.is_cut


def test_tables_that_a_card_does_not_hold_end_the_run(monkeypatch):
    options = dlrm.parse_options([*UNEVEN, "--sharding=table"])
    shape = dlrm.make_architecture(options, None)
    monkeypatch.setattr("engine.table_layout.card_memory", lambda device: 0.25e9)
    second, first = (Process(k, 2, k, torch.device("cuda", k), "nccl") for k in (1, 0))
    TableLayout.from_options(options, shape, second)
    with pytest.raises(dlrm.UserError) as caught:
        TableLayout.from_options(options, shape, first)
    assert str(caught.value).startswith(
        "tables need 0.256 GB on cuda:0, which has 0.25 GB: no number of ranks up to 512 would do;"
        " with --sharding=auto 2 ranks would;"
    )


def test_counts_stand_for_data_that_is_not_here(tmp_path):
    """As Criteo's, with one id a bag, 13 dense features and --max-ind-range; nothing is read."""
    flags = ["--data-generation=dataset", f"--raw-data-file={tmp_path}/none", "--print-plan=2"]
    model = ["--arch-embedding-size=1000-50", "--arch-sparse-feature-size=4", "--arch-mlp-bot=9-4"]
    found = train(*flags, *model, "--max-ind-range=100")
    assert found.status == 0 and "2 tables of 150 rows" in found.out
    assert sum(numbers[5] for numbers in ranks_of_plan(found.out).values()) == 2
    assert not list(tmp_path.iterdir())


def test_scoring_keeps_no_optimisers_state():
    options = dlrm.parse_options([*SMALL_MODEL, "--optimizer=adagrad"])
    shape = dlrm.make_architecture(options, None)
    matrix = shape.tables[0].matrices[0]
    assert workload_of(options, shape).state_numbers(matrix) == matrix.dim
    options.predict_file = "rows.txt"
    assert workload_of(options, shape).state_numbers(matrix) == 0


@pytest.mark.parametrize(
    "flags, state, pooling, ids, wire",
    [
        ("", 0, 0, (5.5, 5.5, 5.5, 5.5), 4),
        ("--optimizer=adagrad", 16, 0, (5.5,) * 4, 4),
        ("--optimizer=rwsadagrad --weighted-pooling=learned", 1, 2, (5.5,) * 4, 4),
        ("--weighted-pooling=fixed --exchange-type=bf16", 0, 0, (5.5,) * 4, 2),
        ("--amp=fp16 --num-indices-per-lookup=3", 0, 0, (2.0,) * 4, 2),
        ("--num-indices-per-lookup=7 --num-indices-per-lookup-fixed=true", 0, 0, 7.0, 4),
    ],
)
def test_the_plan_knows_what_a_step_asks_of_tables(flags, state, pooling, ids, wire):
    options = dlrm.parse_options([*SMALL_MODEL, *flags.split()])
    shape = dlrm.make_architecture(options, None)
    workload = workload_of(options, shape)
    matrix = shape.tables[0].matrices[0]
    assert (workload.state_numbers(matrix), workload.pooling_numbers) == (state, pooling)
    assert (workload.ids_per_bag, workload.wire_bytes, workload.rows) == (ids, wire, 64)
    model = dlrm.DLRM_Net(shape, Process(0, 1, 0, torch.device("cpu"), "gloo"), options.optimizer)
    assert workload.num_dense == sum(one.numel() for one in model.dense_parameters())


def test_what_tables_began_with_is_kept_in_files(tmp_path):
    """Also by a run that continues from one, whose own flag draws nothing that is trained."""
    first, second = tmp_path / "first.pth", tmp_path / "second.pth"
    for kind in ("seeded", "original"):
        assert train(*SMALL_MODEL, f"--initial-values={kind}", f"--save-model={first}").status == 0
        assert torch.load(first, weights_only=True)["initial_values"] == kind
        flags = [f"--load-model={first}", "--nepochs=2", f"--save-model={second}"]
        assert train(*SMALL_MODEL, *flags).status == 0
        assert torch.load(second, weights_only=True)["initial_values"] == kind
    content = torch.load(first, weights_only=True) | {"initial_values": "drawn"}
    torch.save(content, first)
    found = train(*SMALL_MODEL, f"--load-model={first}")
    assert found.status == 2
    assert "initial_values is 'drawn', expected original or seeded" in found.err


def test_a_checkpoint_keeps_what_tables_began_with(tmp_path):
    flags = [f"--checkpoint-dir={tmp_path}/c", "--save-every=5", "--initial-values=seeded"]
    assert train(*SMALL_MODEL, *flags).status == 0
    export = [f"--export-checkpoint={tmp_path}/c", f"--save-model={tmp_path}/m.pth"]
    assert train(*export).status == 0
    assert torch.load(tmp_path / "m.pth", weights_only=True)["initial_values"] == "seeded"
    found = train(*SMALL_MODEL, *flags[:-1], "--resume")
    assert found.status == 2 and "--initial-values was seeded, is original" in found.err
