"""What a step of several ranks sends, when, and in which type; each rank is a thread here."""

import threading

import numpy as np
import pytest
import torch
from conftest import at
from placements import held
from thread_ranks import ThreadRanks

import dlrm_s_pytorch as dlrm
from criteo.row_layout import FLAT
from dlrm_data_pytorch import RunData
from model.batch import CriteoBatch
from model.embedding_matrix import EmbeddingMatrix
from reporting.reporter import Reporter

NUM_ROWS = (40, 3) * 13
BATCH = 20
DRAWING = threading.Lock()  # MLPs are drawn from numpy's one generator


def make_trainer(process, flags):
    """A trainer of a small network, with the same numbers on any number of ranks."""
    options = dlrm.parse_options([
        "--arch-sparse-feature-size=4", "--arch-mlp-bot=13-8-4", "--arch-mlp-top=8-1",
        "--loss-function=bce", "--learning-rate=0.5", "--initial-values=seeded", *flags.split(),
    ])  # fmt: skip
    unused = range(1000)
    with DRAWING:
        np.random.seed(5)
        return dlrm.Trainer(options, process, RunData(unused, unused, NUM_ROWS, 13), Reporter())


def batch_of(process, seed):
    """This rank's rows of a batch of 20."""
    draw = np.random.default_rng(seed)
    columns = [draw.integers(0, 2, BATCH)]
    columns += [draw.integers(0, rows, BATCH) for rows in (9,) * 13 + NUM_ROWS]
    own_rows = BATCH // process.world_size
    own = np.array(columns, np.int32).T[own_rows * process.rank :][:own_rows]
    block = torch.from_numpy(own.copy().view(np.uint8))
    return CriteoBatch(block, own_rows, (own_rows,) * process.world_size, FLAT)


def events_of_a_step(flags):
    """(what, the tensor that is sent) of rank 0 in a step on 2 ranks, in order."""
    ranks, by_thread = ThreadRanks(2), threading.local()

    def note(what):
        ranks.events.append((by_thread.rank, what, None))

    def update_rows(*args, update=EmbeddingMatrix.update_rows):
        note("tables' backward")
        update(*args)

    def noted_bottom(_module, _inputs, outputs):
        note("bottom MLP")
        outputs.register_hook(lambda _: note("bottom MLP's backward"))

    def work(process):
        by_thread.rank = process.rank
        trainer = make_trainer(process, flags)
        trainer.model.bot_l.register_forward_hook(noted_bottom)
        trainer.model.top_l.register_forward_hook(lambda *_: note("top MLP"))
        trainer.train_step(batch_of(process, 0), 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddingMatrix, "update_rows", update_rows)
        ranks.run(work)
    return [(what, sent) for rank, what, sent in ranks.events if rank == 0]


ROUND_TRIP = ["begin all_to_all", "wait all_to_all"]
STEP = [
    *ROUND_TRIP,  # ids
    "begin all_to_all", "bottom MLP", "wait all_to_all", "top MLP",  # vectors
    "begin all_to_all", "bottom MLP's backward",  # gradients
    "begin all_reduce", "wait all_to_all", "tables' backward", "wait all_reduce",
]  # fmt: skip
WIRES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("sharding", ["table", "row"])
def test_what_ranks_send_is_on_its_way_while_they_work(sharding, wire):
    """Vectors during the bottom MLP, gradients during its backward pass, dense ones during the
    tables'; ranks that route ids tell one another before how many there will be.
    """
    events = events_of_a_step(f"--sharding={sharding} --exchange-type={wire}")
    told = ROUND_TRIP if sharding == "row" else []
    assert [what for what, _ in events] == [*told, *STEP]
    sent = [one.dtype for what, one in events if what.startswith("begin")]
    of_ids = [torch.int64, torch.int32] if told else [torch.int32]
    assert sent == [*of_ids, WIRES[wire], WIRES[wire], torch.float32]


def test_where_every_rank_has_all_tables_their_gradients_are_summed_with_the_mlps():
    events = events_of_a_step("--sharding=auto --mini-batch-size=100000")  # it pays then
    assert [what for what, _ in events] == [
        "bottom MLP", "top MLP", "bottom MLP's backward", "tables' backward",
        "begin all_reduce", "wait all_reduce",
    ]  # fmt: skip


def test_float16_carries_gradients_times_a_power_of_two_near_the_rows_of_their_mean():
    """16 of 20 rows: undivided gradients are not too small for it."""
    exact, rounded = (
        [one for what, one in events_of_a_step(f"--sharding=row {flags}") if what[:5] == "begin"][
            -2
        ]
        for flags in ("", "--exchange-type=fp16")
    )
    assert exact.abs().max() < 0.2, "a factor shows"
    torch.testing.assert_close(rounded.float(), 16 * exact, rtol=2**-7, atol=2**-10)


@pytest.mark.parametrize("sharding", ["table", "row"])
def test_a_lower_precision_on_two_ranks_is_that_of_one(sharding):
    """Up to the rounding of bfloat16, whose products and sums are cut differently."""

    def work(process):
        trainer = make_trainer(process, f"--amp=bf16 --sharding={sharding} --learning-rate=0.1")
        losses = [trainer.train_step(batch_of(process, it), it) for it in range(1, 4)]
        dense = [parameter.detach() for parameter in trainer.model.dense_parameters()]
        return torch.stack(losses), dense, held(trainer.model.emb_l)

    (alone,), together = ThreadRanks(1).run(work), ThreadRanks(2).run(work)
    losses, dense, rows = zip(*together, strict=True)
    torch.testing.assert_close(sum(losses), alone[0], rtol=5e-4, atol=0)
    for found, other, wanted in zip(*dense, alone[1], strict=True):
        assert torch.equal(found, other), "ranks differ"
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    for (key, name, begin), found in (rows[0] | rows[1]).items():
        wanted = alone[2][key, name, 0][begin : begin + len(found)]
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4, msg=at(key))
