"""The Python face: what the network computes, whatever its tables are, for lines and arrays."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL, SMALL_MODEL, train, trained, write_days

from common.errors import UserError
from engine.scorer import Scorer

KINDS = {
    "plain": [],
    "mult": ["--qr-flag", "--qr-threshold=5"],
    "add": ["--qr-flag", "--qr-threshold=5", "--qr-operation=add"],
    "concat": ["--qr-flag", "--qr-threshold=5", "--qr-operation=concat", "--arch-mlp-bot=13-8-32"],
    "mixed": ["--md-flag", "--md-threshold=5"],
    "learned": ["--weighted-pooling=learned", "--optimizer=adagrad"],
    "cat": ["--arch-interaction-op=cat"],
    "itself": ["--arch-interaction-itself"],
    "clamped": ["--loss-threshold=0.4"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder with three days, the rows of the last one)."""
    folder = tmp_path_factory.mktemp("scorer") / "data"
    return folder, write_days(folder, 3, 100)[-1]


def saved(data, path, *flags):
    """Train a model and save it at path."""
    argv = [*CRITEO_MODEL, f"--data_path={data[0]}", "--memory-map", f"--save-model={path}"]
    result = train(*argv, *flags)
    assert result.status == 0, result.err
    return str(path)


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    return saved(data, tmp_path_factory.mktemp("model") / "m.pth")


def lines_of(rows):
    return ["\t".join(row) for row in rows]


def arrays_of(rows):
    """(integers (n, 13), categories (n, 26)) of rows of text."""
    dense = [[int(word or 0) for word in row[1:14]] for row in rows]
    return np.array(dense), np.array([[int(word or "0", 16) for word in row[14:]] for row in rows])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_scores_as_the_program_does(kind, data, tmp_path):
    path = saved(data, tmp_path / "m.pth", *KINDS[kind])
    (tmp_path / "in").write_text("\n".join(lines_of(data[1])))
    flags = [f"--predict-file={tmp_path / 'in'}", f"--scores-file={tmp_path / 's.npy'}"]
    assert train(f"--load-model={path}", *flags).status == 0
    expected = np.load(tmp_path / "s.npy")
    np.testing.assert_allclose(Scorer(path).score(lines_of(data[1])), expected, rtol=2e-6)


def test_lines_and_arrays_in_all_forms(model, data):
    rows, scorer = data[1], Scorer(model)
    expected = scorer.score(lines_of(rows))
    assert expected.dtype == np.float32 and expected.shape == (100,)
    bare = ["\t".join(row[1:]) for row in rows]
    dense, sparse = arrays_of(rows)
    signed = sparse.astype(np.uint32).view(np.int32)
    for form in (
        bare,
        "\n".join(bare),
        "\n".join(bare).encode() + b"\n",
        [line.encode() + b"\n" for line in bare],
        tuple(bare),
        (dense, sparse),
        (dense.astype(np.float64), signed),
        (dense.tolist(), sparse.tolist()),
        (np.where(dense == 0, np.nan, dense), np.where(sparse == 0, np.nan, sparse)),
    ):
        np.testing.assert_array_equal(scorer.score(form), expected)
    assert scorer.score([]).shape == (0,) and scorer.score((dense[:0], sparse[:0])).shape == (0,)
    np.testing.assert_allclose(scorer.score(bare[0]), expected[:1], rtol=1e-6)
    many = scorer.score(bare * 50)  # more than are computed at a time
    np.testing.assert_allclose(many, np.tile(expected, 50), rtol=1e-6)


def test_a_modulo_is_taken_of_arrays_too(data, tmp_path):
    elsewhere = f"--processed-data-file={tmp_path / 'small'}"
    scorer = Scorer(saved(data, tmp_path / "m.pth", "--max-ind-range=7", elsewhere))
    dense, sparse = arrays_of(data[1])
    np.testing.assert_array_equal(
        scorer.score((dense, sparse.astype(np.uint32).view(np.int32))),
        scorer.score(lines_of(data[1])),
    )


def test_threads_share_a_scorer(model, data):
    scorer, lines = Scorer(model), lines_of(data[1])
    expected = [scorer.score(lines[k : k + 5]) for k in range(90)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: scorer.score(lines[k : k + 5]), range(90)))
    np.testing.assert_array_equal(found, expected)


def test_mistakes_are_one_line(model, data, tmp_path):
    scorer = Scorer(model)
    lines = lines_of(data[1][:2])
    dense, sparse = arrays_of(data[1])
    for rows, expected in (
        ([lines[0], "x" + lines[1]], "rows, line 2: column 1: got 'x"),
        ([lines[0], "", lines[1]], "rows, line 2: 1 tab-separated fields"),
        ([lines[0] + "\t1"], "rows, line 1: 41 tab-separated fields"),
        ((dense[:, :12], sparse), r"shape \(100, 12\) and \(100, 26\), expected \(rows, 13\)"),
        ((dense, sparse[:5]), r"\(5, 26\), expected"),
        ((dense, sparse.astype(str)), "sparse has the type <U"),
        (([[1], [1, 2]], sparse), "dense is no array"),
        ((1, 2), r"shape \(\) and \(\)"),
    ):
        with pytest.raises(UserError, match=expected):
            scorer.score(rows)
    with pytest.raises(UserError, match="cannot read it"):
        Scorer(str(tmp_path / "none.pth"))
    content = torch.load(model, weights_only=True)
    del content["serving"]
    torch.save(content, tmp_path / "old.pth")
    with pytest.raises(UserError, match="does not say how it was trained"):
        Scorer(str(tmp_path / "old.pth"))


def test_a_model_of_random_data_takes_its_ids(tmp_path):
    path = tmp_path / "m.pth"
    trainer, _ = trained(
        *SMALL_MODEL, "--num-indices-per-lookup=1", f"--save-model={path}", "--data-size=64"
    )
    batch = trainer.data.train[0]
    features = batch.decode()
    with torch.no_grad():
        expected = trainer.model(features, batch.rows_per_rank)[:, 0].numpy()
    scorer = Scorer(str(path))
    ids = features.bags.ids.view(64, 4).numpy()
    scores = scorer.score((features.dense.numpy(), ids))
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    with pytest.raises(UserError, match="outside its table's rows"):
        scorer.score((features.dense.numpy(), ids + 1000))
    with pytest.raises(UserError, match="trained with random data"):
        scorer.score("1\t2")
    result = train(f"--load-model={path}", f"--predict-file={path}", "--scores-file=s")
    assert "was trained with random data" in result.err


def test_parameters_stay_in_the_file(model):
    """Nothing is copied: the tables' numbers lie in pages that are mapped from the file."""
    scorer = Scorer(model)
    address = scorer.network.get_buffer("emb_l_0_weight").data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(word, 16) for word in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.endswith(model)
            return
    raise AssertionError("the address is mapped nowhere")
