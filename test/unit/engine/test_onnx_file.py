"""Writing an ONNX file needs memory for two tables at a time, however many there are."""

import tracemalloc

import pytest
from conftest import trained
from torch.multiprocessing.reductions import StorageWeakRef

from engine import onnx_export, onnx_graph  # noqa: F401  (here, so that its memory is not counted)
from engine.model_file import gathered_state
from engine.served_model import ServedModel

NUM_TABLES, NUM_ROWS, DIM = 60, 500, 64
TABLE_BYTES = 4 * NUM_ROWS * DIM
MODEL = [
    f"--arch-embedding-size={'-'.join([str(NUM_ROWS)] * NUM_TABLES)}",
    f"--arch-sparse-feature-size={DIM}",
    f"--arch-mlp-bot=4-{DIM}",
    "--arch-mlp-top=4-1",
    "--num-indices-per-lookup=1",
    "--data-size=1",
    "--mini-batch-size=1",
]


@pytest.mark.parametrize("most_in_one_file", [None, 1])
def test_no_more_than_two_tables_are_alive_beside_the_model(
    tmp_path, monkeypatch, most_in_one_file
):
    """In one file and in two. Weights are counted as tensors, and as what Python and numpy hold.

    protobuf's own memory is not counted, but what it gives to a file are bytes of Python.
    """
    trainer, _ = trained(*MODEL)
    served = ServedModel(**vars(trainer.model.architecture), takes_integers=False, one_id=True)
    given, alive = [], []

    def watched(model_state):
        for name, weight in gathered_state(model_state):
            given.append((StorageWeakRef(weight.untyped_storage()), weight.nbytes))
            alive.append(sum(size for storage, size in given if not storage.expired()))
            yield name, weight

    monkeypatch.setattr(onnx_export, "gathered_state", watched)
    path = tmp_path / "m.onnx"
    tracemalloc.start()
    try:
        files = onnx_export.save_onnx(str(path), trainer.state, served, most_in_one_file)
        _, most_of_python = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(files) == (1 if most_in_one_file is None else 2)
    assert sum(file.stat().st_size for file in files) > NUM_TABLES * TABLE_BYTES
    assert max(alive) <= 2 * TABLE_BYTES, f"{max(alive) / TABLE_BYTES:.1f} tables"
    assert most_of_python < NUM_TABLES * TABLE_BYTES / 4, f"{most_of_python / TABLE_BYTES:.1f}"
