"""The ONNX file is valid, names its weights, and onnxruntime predicts with it what we predict."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import (
    CRITEO_MODEL,
    ROOT,
    break_package,
    largest_file,
    shell,
    train,
    trained,
    write_package,
)

import dlrm_s_pytorch as dlrm
from common import versions
from common.errors import RankError
from engine import onnx_export
from engine.served_model import ServedModel
from model.batch import Bags, Features

NUM_ROWS = 1000
RANDOM = (
    "--arch-sparse-feature-size=8 --arch-embedding-size=300-20-400-90 --arch-mlp-bot=5-16-8 "
    "--arch-mlp-top=16-1 --data-size=1000 --mini-batch-size=100 --num-indices-per-lookup=6 "
    "--optimizer=adagrad --learning-rate=0.1 --loss-function=bce --round-targets=true "
    "--numpy-rand-seed=7 --print-freq=100"
).split()
QR = ["--qr-flag", "--qr-threshold=50", "--qr-collisions=7"]
MD = ["--md-flag", "--md-threshold=50", "--md-temperature=0.4"]
CONCAT = ["--qr-operation=concat", "--arch-mlp-bot=5-16-16"]
BAGS = {
    "plain": [],
    "itself": ["--arch-interaction-itself"],
    "cat": ["--arch-interaction-op=cat"],
    "learned": ["--weighted-pooling=learned"],
    "fixed": ["--weighted-pooling=fixed"],
    "clamped": ["--loss-threshold=0.48", "--optimizer=sgd", "--learning-rate=1"],
    "mult": [*QR, "--qr-operation=mult"],
    "add": [*QR, "--qr-operation=add", "--arch-interaction-op=cat"],
    "concat": [*QR, *CONCAT],
    "dimensions": MD,
}
ONE_ID = {
    "one id": ["--num-indices-per-lookup=1"],
    "one id, learned": ["--num-indices-per-lookup=1", "--weighted-pooling=learned"],
    "one id, concat": ["--num-indices-per-lookup=1", *QR, *CONCAT],
    "one id, dimensions": ["--num-indices-per-lookup=1", *MD],
}
KINDS = BAGS | ONE_ID
CRITEO = {
    "plain": [],
    "mult": ["--qr-flag", "--qr-threshold=20"],
    "dimensions": ["--md-flag", "--md-threshold=20"],
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """kind -> (trainer, its ONNX file); each kind is trained once."""
    made = {}

    def export(kind):
        if kind not in made:
            path = tmp_path_factory.mktemp("onnx") / "model.onnx"
            flags = [*RANDOM, *KINDS[kind], "--save-onnx", f"--onnx-file={path}"]
            trainer, result = trained(*flags)
            assert f"ONNX model: {path}\n" in result.out
            made[kind] = trainer, path
        return made[kind]

    return export


def run_onnx(path, dense, sparse, batch_size):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = []
    for begin in range(0, len(dense), batch_size):
        part = slice(begin, begin + batch_size)
        found += session.run(["pred"], {"dense": dense[part], "sparse": sparse[part]})
    return np.concatenate(found)


@torch.no_grad()
def predictions(model, dense, sparse):
    """Those of our model for ids (B, T) or (B, T, L), where -1 is none."""
    ids = torch.from_numpy(sparse.reshape(*sparse.shape[:2], -1))
    lengths = (ids >= 0).sum(2)
    bags = Bags(ids[ids >= 0], lengths, lengths.sum(0, keepdim=True).numpy())
    return model(Features(torch.from_numpy(dense), bags, None), (len(dense),)).numpy()


def padded(bags, num_more=0):
    """Bags as ids (B, T, L), with `num_more` columns of padding more than the longest bag needs."""
    most = int(bags.lengths.max()) + num_more
    ids = torch.full((*bags.lengths.shape, most), -1, dtype=torch.int64)
    ids[torch.arange(most) < bags.lengths.unsqueeze(2)] = bags.ids.long()
    return ids.numpy()


def rows_of(trainer):
    """(dense, ids (B, T, L)) of all training rows."""
    batches = [trainer.data.train[k].decode() for k in range(len(trainer.data.train))]
    dense = np.concatenate([batch.dense.numpy() for batch in batches])
    longest = max(int(batch.bags.lengths.max()) for batch in batches)
    ids = [padded(batch.bags, longest - int(batch.bags.lengths.max())) for batch in batches]
    return dense, np.concatenate(ids)


@pytest.mark.parametrize("kind", BAGS)
def test_bags_of_several_ids(exported, kind):
    trainer, path = exported(kind)
    onnx.checker.check_model(path, full_check=True)
    dense, sparse = rows_of(trainer)
    assert sparse.shape == (NUM_ROWS, 4, 6)
    want = predictions(trainer.model, dense, sparse)
    assert want.std() > 0.01, "the predictions are too much alike to tell models apart"
    if kind == "clamped":
        share = (np.isclose(want, 0.48) | np.isclose(want, 0.52)).mean()
        assert 0.1 < share < 0.9, share
    for batch_size in (1, 300, NUM_ROWS):
        found = run_onnx(path, dense, sparse, batch_size)
        assert found.shape == (NUM_ROWS, 1) and found.dtype == np.float32
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", BAGS)
def test_padding_counts_nothing_wherever_it_is(exported, kind):
    """In front of a bag's ids, between them, behind them, and in a bag that has none."""
    trainer, path = exported(kind)
    dense, sparse = rows_of(trainer)
    longer = np.full((NUM_ROWS, 4, 15), -1, np.int64)
    longer[:, :, 1:13:2] = sparse
    longer[:, :, 0] = -1000  # any number below 0 does, whatever the table's rows
    longer[::3, 2] = -1
    longer[7] = -1
    want = predictions(trainer.model, dense, longer)
    found = run_onnx(path, dense, longer, NUM_ROWS)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    none_at_all = run_onnx(path, dense[7:8], np.zeros((1, 4, 0), np.int64), 1)
    np.testing.assert_allclose(none_at_all, want[7:8], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ONE_ID)
def test_bags_of_one_id(exported, kind):
    """Ids are (B, T) there; -1 is an id that the model does not know, which finds zeros."""
    trainer, path = exported(kind)
    onnx.checker.check_model(path, full_check=True)
    dense, sparse = rows_of(trainer)
    sparse = sparse[:, :, 0].copy()
    sparse[::5, 2] = -1
    want = predictions(trainer.model, dense, sparse)
    for batch_size in (1, NUM_ROWS):
        found = run_onnx(path, dense, sparse, batch_size)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", CRITEO)
def test_criteos_integers_go_in_as_they_are_in_the_text(tmp_path, kaggle, kind):
    """The logarithm is inside; integers below 0 are 0, as everywhere."""
    path = tmp_path / "model.onnx"
    flags = [*CRITEO_MODEL, f"--data_path={kaggle}", *CRITEO[kind], "--data-randomize=none"]
    trainer, _ = trained(*flags, "--print-freq=1000", "--save-onnx", f"--onnx-file={path}")
    onnx.checker.check_model(path, full_check=True)
    with open(kaggle / "train.txt") as file:
        lines = [next(file).rstrip("\n").split("\t") for _ in range(NUM_ROWS)]
    dense = np.array([[float(text or 0) for text in line[1:14]] for line in lines], np.float32)
    assert dense.min() < 0, "these rows have no integer below 0"
    batches = [trainer.data.train[k].decode() for k in range(-(-NUM_ROWS // 128))]
    sparse = torch.cat([batch.bags.ids.view(-1, 26) for batch in batches])[:NUM_ROWS].long().numpy()
    logarithms = torch.cat([batch.dense for batch in batches])[:NUM_ROWS].numpy()
    want = predictions(trainer.model, logarithms, sparse)
    for batch_size in (1, 300, NUM_ROWS):
        found = run_onnx(path, dense, sparse, batch_size)
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    props = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert props["dense_logarithm"] == "inside the graph" and "log(max(x, 0) + 1)" in props["dense"]
    tables = trainer.model.architecture.tables
    assert props["table_rows"] == "-".join(str(table.num_rows) for table in tables)


def test_shapes_and_meanings_are_in_the_file(exported):
    def shape(value):
        return [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]

    for kind, sparse in (("plain", ["batch", 4, "bag"]), ("one id", ["batch", 4])):
        model = onnx.load(exported(kind)[1])
        values = [*model.graph.input, *model.graph.output]
        assert {value.name: shape(value) for value in values} == {
            "dense": ["batch", 5], "sparse": sparse, "pred": ["batch", 1],
        }  # fmt: skip
        props = {prop.key: prop.value for prop in model.metadata_props}
        assert props["dense_logarithm"] == "none" and props["table_rows"] == "300-20-400-90"
        assert all(value.doc_string == props[value.name] for value in values)


@pytest.mark.parametrize("kind", ["learned", "concat", "dimensions"])
def test_weights_have_the_keys_of_the_model_file_and_everything_has_a_name(exported, kind):
    trainer, path = exported(kind)
    graph = onnx.load(path).graph
    weights = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    state = dlrm.full_state_dict(trainer.state)
    assert set(weights) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(weights[name], value.numpy())
    names = [node.name for node in graph.node]
    assert all(re.fullmatch(r"[\w./]+", name) for name in names) and len(set(names)) == len(names)


@pytest.mark.parametrize("kind", KINDS)
def test_operators_are_those_that_every_runtime_has(exported, kind):
    """None for bags, and none that belongs to one runtime."""
    model = onnx.load(exported(kind)[1])
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert model.ir_version == 8
    assert {node.domain for node in model.graph.node} == {""}
    assert {node.op_type for node in model.graph.node} <= {
        "Add", "Cast", "Clip", "Concat", "Div", "Flatten", "Gather", "Gemm", "GreaterOrEqual",
        "MatMul", "Mod", "Mul", "ReduceSum", "Relu", "Sigmoid", "Transpose", "Unsqueeze", "Where",
    }  # fmt: skip


def test_three_ranks_and_an_evaluation_write_what_one_rank_wrote_after_training(tmp_path):
    """Byte by byte, from the model file that the training saved."""
    cases = {}
    for kind in ("learned", "mult", "dimensions"):
        flags = [*RANDOM, *KINDS[kind], "--tensor-board-filename=", "--save-onnx"]
        model, alone = tmp_path / f"{kind}.pth", tmp_path / f"{kind}_1.onnx"
        result = train(*flags, f"--save-model={model}", f"--onnx-file={alone}")
        assert result.status == 0, result.err
        together = [f"--load-model={model}", "--inference-only"]
        cases[kind] = [*flags, *together, f"--onnx-file={tmp_path}/{kind}_3.onnx"]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    program = ROOT / "test" / "unit" / "ranks_program.py"
    files = [tmp_path / "cases.json", tmp_path / "results.json"]
    finished = shell(sys.executable, program, 3, *files)
    assert finished.returncode == 0, finished.stderr[-3000:]
    for kind in cases:
        alone, together = tmp_path / f"{kind}_1.onnx", tmp_path / f"{kind}_3.onnx"
        assert together.read_bytes() == alone.read_bytes(), kind


@pytest.fixture
def small_served(exported, tmp_path):
    """A function that writes a small model; its argument is the most bytes in one file."""
    trainer, _ = exported("dimensions")
    path = tmp_path / "m.onnx"
    shape = vars(trainer.model.architecture)
    served = ServedModel(**shape, takes_integers=False, one_id=False)

    def write(most, target=path):
        return onnx_export.save_onnx(str(target), trainer.state, served, most)

    return trainer, path, write


def test_weights_that_are_too_many_for_one_file_are_in_a_second_one(small_served):
    trainer, path, write = small_served
    data = path.with_name("m.onnx.data")
    size = len((write(None), path.read_bytes())[1])
    assert write(size) == [path] and not data.exists()
    whole = onnx.load(path)
    assert write(size - 1) == [path, data]
    onnx.checker.check_model(path, full_check=True)
    assert sorted(os.listdir(path.parent)) == ["m.onnx", "m.onnx.data"]
    shell_only = onnx.load(path, load_external_data=False)
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in shell_only.graph.initializer
        if tensor.external_data
    ]
    assert len(places) == len(dlrm.full_state_dict(trainer.state))
    assert {place["location"] for place in places} == {"m.onnx.data"}
    assert all(int(place["offset"]) % 65536 == 0 for place in places)
    again = onnx.load(path)
    for one, other in zip(whole.graph.initializer, again.graph.initializer, strict=True):
        np.testing.assert_array_equal(*map(onnx.numpy_helper.to_array, (one, other)))
    dense, sparse = rows_of(trainer)
    want = predictions(trainer.model, dense, sparse)
    np.testing.assert_allclose(run_onnx(path, dense, sparse, NUM_ROWS), want, rtol=0, atol=1e-5)


def test_a_link_stays_a_link(small_served, tmp_path):
    _, path, write = small_served
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    assert write(None, link) == [link]
    assert link.is_symlink() and not path.is_symlink() and onnx.load(link).graph.node


def test_a_full_disk_is_one_line_and_keeps_the_model_that_was_there(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_text("earlier")
    with largest_file(5000):
        result = train(*RANDOM, "--save-onnx", f"--onnx-file={path}")
    assert result.status == 2 and result.err.count("\n") == 1
    assert f"--onnx-file={path}: cannot write it (File too large)" in result.err
    assert os.listdir(tmp_path) == ["m.onnx"] and path.read_text() == "earlier"


def test_a_full_disk_keeps_both_files_that_were_there(small_served):
    """The weights do not fit, or they do and the model does not."""
    _, path, write = small_served
    write(1)
    before = {name: (path.parent / name).read_bytes() for name in os.listdir(path.parent)}
    assert len(before) == 2
    for failing in (1, 2):
        files = []

        def sync(number, failing=failing, files=files):
            files.append(number)
            if len(files) == failing:
                raise OSError(28, "No space left on device")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            with pytest.raises(RankError, match="No space left on device"):
                write(1)
        now = {name: (path.parent / name).read_bytes() for name in os.listdir(path.parent)}
        assert now == before


def make_folder(path):
    path.mkdir()
    return path.name


MISTAKES = {
    "no folder": (lambda folder: "no/m.onnx", "its folder does not exist"),
    "folder": (lambda folder: make_folder(folder / "m.onnx"), "is a folder: name another file"),
    "empty": (lambda folder: "", "--onnx-file= is empty: name a file"),
    "no file for the weights": (
        lambda folder: make_folder(folder / "m.onnx.data").removesuffix(".data"),
        "m.onnx.data (for weights above 2 GB) is a folder: name another file",
    ),
    "the model file": (lambda folder: "m.pth", "--save-model=m.pth: expected two files"),
    "name without room": (lambda folder: "m" * 255, "File name too long"),
    "no room for the weights' name": (
        lambda folder: "m" * (255 - len(".partial")),
        ".data (for weights above 2 GB): File name too long: name another file",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_path_that_cannot_be_written_is_an_error_before_training(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make, message = MISTAKES[kind]
    name = make(tmp_path)
    before = os.listdir(tmp_path)
    result = train(*RANDOM, "--save-onnx", f"--onnx-file={name}", "--save-model=m.pth")
    assert result.status == 2 and result.out == "" and result.err.count("\n") == 1
    assert result.err.startswith(f"error: --onnx-file={name}") and message in result.err
    assert os.listdir(tmp_path) == before


def error_of_package(kaggle_copy):
    """The error of a run that is to train on data which is not prepared yet, and does not begin."""
    before = os.listdir(kaggle_copy)
    result = train(*CRITEO_MODEL, f"--data_path={kaggle_copy}", "--save-onnx")
    assert result.status == 2 and result.out == "" and result.err.count("\n") == 1
    assert os.listdir(kaggle_copy) == before
    assert result.err.startswith("error: --save-onnx: onnx "), result.err
    install, named = re.search(r"(\S+ -m pip install) -r (\S+)\n", result.err).groups()
    assert install == f"{sys.executable} -m pip install", "another Python's packages would change"
    assert Path(named) == ROOT / "requirements-onnx.txt"
    return result.err


def test_a_missing_package_is_an_error_before_data_is_prepared(kaggle_copy, monkeypatch):
    def hide(module, name, answer):
        ask = getattr(module, name)
        monkeypatch.setattr(module, name, lambda which: answer if which == "onnx" else ask(which))

    hide(versions, "installed_version", "")
    hide(importlib.util, "find_spec", None)
    assert "onnx is not installed: expected 1.17 or newer: " in error_of_package(kaggle_copy)


def test_a_package_that_is_too_old_is_an_error_before_data_is_prepared(
    kaggle_copy, tmp_path, monkeypatch
):
    write_package(tmp_path, "onnx", "1.16.2")
    monkeypatch.syspath_prepend(tmp_path)
    message = "onnx 1.16.2 is too old: expected 1.17 or newer: "
    assert message in error_of_package(kaggle_copy)


BROKEN = {
    "protobuf's": "TypeError('Descriptors cannot be created directly.\\nIf this ...')",
    "a name that is gone": "AttributeError('module has no attribute mapping')",
    "a missing file": "ImportError('libprotobuf.so: cannot open shared object file')",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_package_that_cannot_be_imported_is_an_error_before_data_is_prepared(
    kaggle_copy, tmp_path, monkeypatch, kind
):
    users = ("engine.onnx_file", "engine.onnx_graph")
    break_package(tmp_path / "packages", monkeypatch, "onnx", BROKEN[kind], *users)
    name, words = re.match(r"(\w+)\('(.{10})", BROKEN[kind]).groups()
    error = error_of_package(kaggle_copy)
    assert f"cannot be imported ({name}: {words}" in error and "pip uninstall -y onnx && " in error


def test_the_requirements_are_those_of_the_tests():
    text = (ROOT / "requirements-onnx.txt").read_text()
    lines = {line for line in text.splitlines() if not line.startswith("#")}
    assert {line.partition(">")[0] for line in lines} == {"onnx", "onnxruntime"}
    assert lines <= set((ROOT / "requirements-test.txt").read_text().splitlines())


def test_the_pages_example_runs_without_torch(tmp_path, kaggle):
    """The text of docs/onnx.md, in a folder where a Criteo model was written."""
    page = (ROOT / "docs" / "onnx.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.S)
    flags = [*CRITEO_MODEL, f"--data_path={kaggle}", "--num-batches=2"]
    path = tmp_path / "dlrm_s_pytorch.onnx"
    assert train(*flags, "--save-onnx", f"--onnx-file={path}").status == 0
    code = f"{example}\nimport sys; assert 'torch' not in sys.modules and 'onnx' not in sys.modules"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    (probability,) = re.findall(r"0\.\d+", finished.stdout)
    assert 0 < float(probability) < 1
