"""Scores of rows of text: those of an evaluation, in order, complete or absent."""

import gc
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import (
    CRITEO_MODEL,
    GOLDEN,
    ROOT,
    golden,
    largest_file,
    metrics_of,
    shell,
    train,
    write_days,
)

from dlrm_s_pytorch import main

MODULO = 1000
UNKNOWN = re.compile(r"^unknown categories: (\d+) of (\d+) ", re.M)
SHARED = ("recall", "precision", "f1", "ap", "auc", "accuracy")  # the others are the best so far
LOG_LOSS = re.compile(r"^log loss .*$", re.M)


def as_text(rows):
    return "".join("\t".join(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory):
    """(folder with data, m.pth and m.vocabulary; the rows of its last day; the training's output).

    Category C1 is never missing.
    """
    folder = tmp_path_factory.mktemp("prediction")
    days = write_days(folder / "data", 3, 300)
    for number, day in enumerate(days):
        for row in day:
            row[14] = row[14].strip("0") and row[14] or "00000007"
        (folder / "data" / f"day_{number}").write_text(as_text(day))
    flags = [*CRITEO_MODEL, "--test-freq=100", f"--save-model={folder / 'm.pth'}"]
    result = train(*flags, *data_flags(folder))
    assert result.status == 0, result.err
    return folder, days[-1], result.out


def data_flags(folder):
    return [f"--data_path={folder / 'data'}", f"--max-ind-range={MODULO}", "--memory-map"]


@pytest.fixture
def predict(trained_on, tmp_path):
    """Scores rows of text in tmp_path/in with the model; returns (Result, the scores' text)."""

    def call(rows, *flags, name="in", out="out"):
        text = rows if isinstance(rows, str) else as_text(rows)
        if name is not None:
            (tmp_path / name).write_text(text)
        result = train(
            f"--load-model={trained_on[0] / 'm.pth'}",
            f"--predict-file={tmp_path / (name or 'in')}",
            f"--scores-file={tmp_path / out}",
            *flags,
        )
        path = tmp_path / out
        return result, path.read_text() if path.is_file() and path.suffix == "" else None

    return call


def error_of(result):
    """The one line of a run that has failed as a user's mistake makes it fail."""
    assert result.status == 2 and result.err.startswith("error: "), (result.status, result.err)
    assert result.err.count("\n") == 1
    return result.err


def scores_of(text):
    return np.array(text.split(), np.float32)


def plain_torch(content, rows, vocabulary):
    """Scores by a few lines of plain torch, with dictionaries in the place of the vocabulary."""
    state = content["state_dict"]
    integers = [[max(int(word or 0), 0) for word in row[1:14]] for row in rows]
    vectors = [np.log(np.array(integers, np.float32) + 1)]
    hidden = torch.from_numpy(vectors[0])
    for k in (0, 2):
        hidden = (hidden @ state[f"bot_l.{k}.weight"].T + state[f"bot_l.{k}.bias"]).relu()
    looked_up = [hidden]
    for table in range(26):
        ids = [vocabulary[table][int(row[14 + table] or "0", 16) % MODULO] for row in rows]
        looked_up.append(state[f"emb_l.{table}.weight"][ids])
    stacked = torch.stack(looked_up, 1)
    products = stacked @ stacked.transpose(1, 2)
    row, column = torch.tril_indices(27, 27, -1)
    top = torch.cat([hidden, products[:, row, column]], 1)
    top = (top @ state["top_l.0.weight"].T + state["top_l.0.bias"]).relu()
    return (top @ state["top_l.2.weight"].T + state["top_l.2.bias"]).sigmoid()[:, 0].numpy()


def dictionaries_of(folder):
    """{value: id} of each table, read from the vocabulary's file as docs/preparation.md says."""
    counts = torch.load(folder / "m.pth", weights_only=True)["serving"]["num_rows"]
    values = np.fromfile(folder / "m.vocabulary", "<i4")
    parts = np.split(values, np.cumsum(counts)[:-1])
    return [{int(value): k for k, value in enumerate(part)} for part in parts]


def test_scores_are_those_of_an_evaluation(trained_on, predict):
    """The test rows are the first half of the last day: metrics are those that training printed."""
    folder, rows, out = trained_on
    result, text = predict(rows[:150], "--test-mini-batch-size=512")
    assert result.status == 0 and result.err == ""
    (found,), trained = result.tests, metrics_of(out)[-1]
    assert {k: found[k] for k in SHARED} == {k: trained[k] for k in SHARED}
    assert LOG_LOSS.search(result.out)[0] == LOG_LOSS.search(out)[0]
    content = torch.load(folder / "m.pth", weights_only=True)
    expected = plain_torch(content, rows[:150], dictionaries_of(folder))
    np.testing.assert_allclose(scores_of(text), expected, rtol=1e-5)
    assert UNKNOWN.search(result.out).groups() == ("0", str(150 * 26))


def test_any_batch_size_and_block_gives_the_same_order(trained_on, predict, monkeypatch):
    _, rows, _ = trained_on
    _, whole = predict(rows)
    monkeypatch.setattr("criteo.scored_text.BLOCK_BYTES", 1000)
    _, small = predict(rows, "--test-mini-batch-size=7")
    np.testing.assert_allclose(scores_of(small), scores_of(whole), rtol=1e-6)
    monkeypatch.setattr("engine.prediction_options.BATCH_SIZE", 7)  # -1 is no size of a batch
    assert predict(rows, "--test-mini-batch-size=-1")[1] == small
    assert len(scores_of(whole)) == 300


def test_text_without_labels_gzip_and_stdin(trained_on, predict, tmp_path, monkeypatch, capfd):
    _, rows, _ = trained_on
    _, expected = predict(rows)
    bare = [row[1:] for row in rows]
    result, text = predict(bare)
    assert text == expected and result.tests == [] and "log loss" not in result.out
    (tmp_path / "in.gz").write_bytes(gzip.compress(as_text(rows).encode()))
    model, packed = f"--load-model={trained_on[0] / 'm.pth'}", tmp_path / "in.gz"
    assert train(model, f"--predict-file={packed}", f"--scores-file={tmp_path / 'z'}").status == 0
    assert (tmp_path / "z").read_text() == expected
    # standard streams: scores alone on stdout, all else on stderr; a last line without its newline
    stdin = io.TextIOWrapper(io.BytesIO(as_text(bare).rstrip("\n").encode()))
    stdout = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert main([model, "--predict-file=-", "--scores-file=-"]) == 0
    assert stdout.buffer.getvalue().decode() == expected
    assert "scored 300 rows" in capfd.readouterr().err


def test_arrays_and_tables_hold_the_same_scores(trained_on, predict, tmp_path):
    _, rows, _ = trained_on
    _, text = predict(rows)
    assert predict(rows, out="s.npy")[0].status == 0
    array = np.load(tmp_path / "s.npy")
    assert array.dtype == np.float32 and (array == scores_of(text)).all()
    parquet = pytest.importorskip("pyarrow.parquet")
    assert predict(rows, out="s.parquet")[0].status == 0
    column = parquet.read_table(tmp_path / "s.parquet")["score"].to_numpy()
    assert column.dtype == np.float32 and (column == array).all()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_bad_line_leaves_no_table_and_says_nothing_else(trained_on, predict, tmp_path):
    pytest.importorskip("pyarrow.parquet")
    assert "line 4: " in error_of(predict([*trained_on[1][:3], ["x"]], out="s.parquet")[0])
    with largest_file(100):
        text = trained_on[0] / "data" / "day_2"
        full = train(*given(trained_on[0] / "m.pth", text, tmp_path / "s.parquet"))
    gc.collect()
    assert "File too large" in error_of(full) and os.listdir(tmp_path) == ["in"]


def test_an_unknown_category_is_scored_as_a_missing_one(trained_on, predict):
    folder, rows, _ = trained_on
    row = rows[0]
    unknown, missing = [*row], [*row]
    unknown[20], missing[20] = "00000123", ""
    result, text = predict([unknown, missing, row])
    one, other, itself = scores_of(text)
    assert one == pytest.approx(other, rel=1e-6) and abs(one - itself) > 1e-4
    assert UNKNOWN.search(result.out).groups() == ("1", str(3 * 26))
    # C1 is never missing, so it is the value that came up last
    last = max(dictionaries_of(folder)[0].items(), key=lambda item: item[1])[0]
    unknown, instead = [*row], [*row]
    unknown[14], instead[14] = "00000123", f"{last:08x}"
    _, text = predict([unknown, instead])
    np.testing.assert_allclose(*scores_of(text), rtol=1e-6)


def test_a_bad_line_is_an_error_or_scores_nan(trained_on, predict, tmp_path):
    _, rows, _ = trained_on
    bad = [*rows[:9], ["x"], *rows[9:20], [*rows[0], "7"], *rows[20:30], ["2", *rows[0][1:]]]
    (tmp_path / "out").write_text("kept")
    message = error_of(predict(bad)[0])
    assert "in, line 10: 1 tab-separated fields, expected 40" in message
    assert "--max-bad-lines=N" in message
    assert (tmp_path / "out").read_text() == "kept"
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert "line 33: column 1: got '2', expected the label" in error_of(
        predict(bad, "--max-bad-lines=2")[0]
    )
    result, text = predict(bad, "--max-bad-lines=3", "--test-mini-batch-size=4")
    found = scores_of(text)
    assert len(found) == 33 and np.flatnonzero(np.isnan(found)).tolist() == [9, 21, 32]
    assert "bad lines skipped, whose score is nan: 3; the first: " in result.out
    _, good = predict(rows[:30])
    np.testing.assert_allclose(found[~np.isnan(found)], scores_of(good), rtol=1e-6)
    bare = [row[1:] for row in rows[:3]]
    bare[1][0] = "1.5"
    assert "line 2: column 1: got '1.5', expected a whole number" in error_of(predict(bare)[0])


def test_an_empty_text_has_no_scores(predict):
    result, text = predict("")
    assert result.status == 0 and text == "" and "scored 0 rows" in result.out


@pytest.mark.parametrize("content", ["a\tb\n", "1" + "\t0" * 40 + "\n"], ids=["two", "41"])
def test_a_text_of_another_form_is_refused(predict, content):
    message = error_of(predict(content)[0])
    assert "tab-separated fields, expected 40 (label, 13 integers, 26 hex strings) or" in message


def test_flags_may_repeat_the_model_file_and_not_contradict_it(trained_on, predict):
    _, rows, _ = trained_on
    _, expected = predict(rows)
    same = [word for word in CRITEO_MODEL if word.startswith("--arch")]
    result, text = predict(rows, *same, f"--max-ind-range={MODULO}")
    assert result.status == 0 and text == expected
    for flag, was in (
        ("--arch-mlp-top=32-1", "with --arch-mlp-top=64-1"),
        ("--max-ind-range=99", f"with --max-ind-range={MODULO}"),
        ("--qr-flag", "with --qr-flag=false"),
        ("--weighted-pooling=fixed", "without it"),
    ):
        message = error_of(predict(rows, flag)[0])
        assert f"was trained {was}: leave the flag out" in message


def test_what_cannot_be_read_or_written_is_one_line(trained_on, tmp_path):
    folder, rows, _ = trained_on
    model, text = folder / "m.pth", tmp_path / "in"
    text.write_text(as_text(rows))
    (tmp_path / "fixed").mkdir()
    (tmp_path / "read-only").write_text("kept")
    (tmp_path / "read-only").chmod(0o444)
    out = tmp_path / "out"
    for flags, expected in (
        ([f"--predict-file={text}", f"--scores-file={out}"], "give --load-model=PATH too"),
        ([f"--load-model={model}", f"--predict-file={text}"], "give --scores-file=PATH too"),
        ([f"--scores-file={out}"], "give it too, the rows to score"),
        ([f"--vocabulary-file={out}"], "give it too, the rows to score"),
        (given(model, tmp_path / "none", out), "none: no such file"),
        (given(model, tmp_path, out), "a folder, expected a file"),
        (given(model, text, tmp_path / "nowhere" / "out"), "its folder does not exist"),
        (given(model, text, tmp_path / "fixed"), "is a folder"),
        (given(model, text, tmp_path / "read-only"), "the file there is not writable"),
        (given(model, text, text), "would replace a file that is read: name another file"),
        (given(model, text, folder / "m.vocabulary"), "would replace a file that is read"),
        (given(model, text, out, "--save-model=x"), "leave --save-model out"),
        (given(model, text, out, "--dry-run"), "leave --dry-run out"),
        (given(model, text, out, f"--vocabulary-file={tmp_path}"), "is no file: copy it"),
        (given(model, text, out, f"--vocabulary-file={text}"), "in is damaged or another one"),
        (given(tmp_path / "none", text, out), "no such file"),
        (given(text, text, out), "is not a readable model file"),
    ):
        assert expected in error_of(train(*flags)), flags
    assert sorted(os.listdir(tmp_path)) == ["fixed", "in", "read-only"]
    assert (tmp_path / "read-only").read_text() == "kept"


def test_a_text_named_as_the_unfinished_scores_is_kept(trained_on, predict, tmp_path):
    rows = trained_on[1][:3]
    result, _ = predict(rows, name="out.partial")
    assert "would replace a file that is read" in error_of(result)
    assert (tmp_path / "out.partial").read_text() == as_text(rows)


def given(model, text, out, *flags):
    return [f"--load-model={model}", f"--predict-file={text}", f"--scores-file={out}", *flags]


def test_a_full_disk_leaves_nothing(trained_on, tmp_path):
    folder, _, _ = trained_on
    with largest_file(100):
        result = train(*given(folder / "m.pth", folder / "data" / "day_2", tmp_path / "out"))
    assert "cannot write it (File too large)" in error_of(result)
    assert os.listdir(tmp_path) == []


def test_stdin_is_for_one_rank(trained_on, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = train(*given(trained_on[0] / "m.pth", "-", tmp_path / "out"))
    assert "only one rank can read stdin, 2 ranks read a file" in error_of(result)


RANKS = """
import sys
sys.path[:0] = [{root!r}, {unit!r}]
import dlrm_s_pytorch
from forked_ranks import run_ranks
def work():
    assert dlrm_s_pytorch.main({flags!r}) == 0
run_ranks({num_ranks}, work)
"""


def test_ranks_score_what_one_rank_scores(trained_on, predict, tmp_path):
    """Three ranks, whose last batch has fewer rows than ranks; the lines are printed once."""
    _, rows, _ = trained_on
    bad = [*rows[:9], ["x"], *rows[9:100]]
    flags = ["--max-bad-lines=1", "--test-mini-batch-size=33", "--quantize-emb-with-bit=8"]
    result, expected = predict(bad, *flags)
    argv = [*given(trained_on[0] / "m.pth", tmp_path / "in", tmp_path / "ranks"), *flags]
    code = RANKS.format(root=str(ROOT), unit=str(ROOT / "test/unit"), flags=argv, num_ranks=3)
    ranks = shell(sys.executable, "-c", code)
    assert ranks.returncode == 0, ranks.stderr
    found = scores_of((tmp_path / "ranks").read_text())
    np.testing.assert_allclose(found, scores_of(expected), rtol=1e-5)
    assert ranks.stdout.count("scored 100 rows") == ranks.stderr.count("with 8 bits") == 1
    assert UNKNOWN.search(ranks.stdout)[0] == UNKNOWN.search(result.out)[0]
    assert LOG_LOSS.search(ranks.stdout)[0] == LOG_LOSS.search(result.out)[0]


def test_sigterm_in_the_middle_leaves_what_was_there(trained_on, tmp_path):
    """The text comes through a pipe that never ends."""
    folder, rows, _ = trained_on
    (tmp_path / "out").write_text("kept")
    flags = [*given(folder / "m.pth", "-", tmp_path / "out"), "--test-mini-batch-size=64"]
    run = subprocess.Popen(
        [sys.executable, ROOT / "dlrm_s_pytorch.py", *map(str, flags)],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    text = as_text(rows).encode() * 40
    run.stdin.write(text)
    run.stdin.flush()
    partial = tmp_path / "out.partial"
    for _ in range(3000):
        if partial.exists():
            break
        assert run.poll() is None
        signal.sigtimedwait([], 0.01)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143
    run.stdin.close()
    run.stderr.close()
    assert (tmp_path / "out").read_text() == "kept"
    assert os.listdir(tmp_path) == ["out"]


# ---------------------------------------------------------------- files of other versions


@pytest.fixture
def old_model(trained_on, tmp_path):
    """The model file as an earlier version would have written it."""
    content = torch.load(trained_on[0] / "m.pth", weights_only=True)
    del content["serving"]
    torch.save(content, tmp_path / "old.pth")
    return tmp_path / "old.pth"


def test_a_file_of_an_earlier_version_wants_its_flags(trained_on, predict, old_model, tmp_path):
    folder, rows, _ = trained_on
    _, expected = predict(rows)
    flags = given(old_model, tmp_path / "in", tmp_path / "old")
    message = error_of(train(*flags))
    for flag in ("--arch-sparse-feature-size", "--arch-mlp-bot", "--arch-mlp-top", "--data_path"):
        assert flag in message
    flags += [word for word in CRITEO_MODEL if word.startswith("--arch")]
    message = error_of(train(*flags))
    assert "--arch" not in message and "--data_path" in message
    assert train(*flags, *data_flags(folder)).status == 0
    assert (tmp_path / "old").read_text() == expected
    elsewhere = data_flags(folder)[1:] + [f"--processed-data-file={tmp_path / 'none'}"]
    assert "none.prepared there is none" in error_of(train(*flags, *elsewhere))


def test_the_originals_model_file(tmp_path, kaggle_copy):
    """Its own rows, scored with its own file and flags, have its own metrics."""
    case = golden("quantization.json")
    argv = case["argv"].replace("DATA", str(kaggle_copy))
    argv = argv.replace("MODEL", str(GOLDEN / case["model"])).split()
    evaluated = train(*argv)
    assert evaluated.status == 0, evaluated.err
    lines = (kaggle_copy / "train.txt").read_text().splitlines(keepends=True)
    seventh = len(lines) // 7
    last = lines[-seventh:]
    text = tmp_path / "in"
    text.write_text("".join(last[: (seventh + 1) // 2]))
    flags = [word for word in argv if word != "--inference-only"]
    scored = train(*flags, f"--predict-file={text}", f"--scores-file={tmp_path / 'out'}")
    assert scored.status == 0, scored.err
    assert scored.tests[0]["auc"] == evaluated.tests[0]["auc"]


def test_a_vocabulary_of_another_model_is_refused(trained_on, tmp_path):
    folder, rows, _ = trained_on
    (tmp_path / "in").write_text(as_text(rows))
    os.link(folder / "m.pth", tmp_path / "m.pth")
    flags = given(tmp_path / "m.pth", tmp_path / "in", tmp_path / "out")
    assert "m.vocabulary is missing" in error_of(train(*flags))
    content = bytearray((folder / "m.vocabulary").read_bytes())
    content[100] ^= 1
    (tmp_path / "m.vocabulary").write_bytes(content)
    assert "expected the digest" in error_of(train(*flags))
    named = f"--vocabulary-file={folder / 'm.vocabulary'}"
    assert train(*flags, named).status == 0


def test_wrong_facts_in_the_file_are_one_line(trained_on, tmp_path):
    folder, rows, _ = trained_on
    (tmp_path / "in").write_text(as_text(rows))
    content = torch.load(folder / "m.pth", weights_only=True)
    flags = given(tmp_path / "m.pth", tmp_path / "in", tmp_path / "out")
    for name, value in (
        ("num_rows", [1, 2]), ("num_rows", "x"), ("num_rows", [2**40] * 26), ("num_dense", 12),
        ("flags", ["--arch-mlp-bot=13-5"]), ("flags", ["--none=1"]), ("flags", [1]),
        ("max_ind_range", -2), ("vocabulary", 3), ("is_criteo", 1), ("flags", None),
    ):  # fmt: skip
        torch.save({**content, "serving": {**content["serving"], name: value}}, tmp_path / "m.pth")
        assert "scoring rows is wrong" in error_of(train(*flags)), (name, value)
    torch.save({**content, "serving": 7}, tmp_path / "m.pth")
    assert "expected a dict" in error_of(train(*flags))


def test_quantized_models_score_nearly_the_same(trained_on, predict):
    _, rows, _ = trained_on
    _, expected = predict(rows)
    result, text = predict(rows, "--quantize-emb-with-bit=8", "--quantize-mlp-with-bit=8")
    assert result.status == 0, result.err
    difference = np.abs(scores_of(text) - scores_of(expected))
    assert 0 < difference.max() < 0.05


def test_data_without_a_vocabulary_trains_and_says_what_it_lacks(tmp_path):
    write_days(tmp_path / "data", 2, 40)
    flags = data_flags(tmp_path)
    assert train(*CRITEO_MODEL, *flags, "--dry-run").status == 0
    (folder,) = (tmp_path / "data").glob("*.prepared")
    meta = json.loads((folder / "meta.json").read_text())
    del meta["vocabulary"]
    (folder / "meta.json").write_text(json.dumps({**meta, "format": 2}))
    (folder / "vocabulary.bin").unlink()
    result = train(*CRITEO_MODEL, *flags, f"--save-model={tmp_path / 'm.pth'}")
    assert result.status == 0, result.err
    assert "m.pth will not score rows of text" in result.out
    assert not (tmp_path / "m.vocabulary").exists()
    flags = given(tmp_path / "m.pth", tmp_path / "data" / "day_0", tmp_path / "out")
    assert "was trained with data without a vocabulary" in error_of(train(*flags))


def test_a_link_to_a_model_finds_the_vocabulary_beside_its_target(trained_on, tmp_path):
    folder, rows, _ = trained_on
    (tmp_path / "in").write_text(as_text(rows[:3]))
    (tmp_path / "link.pth").symlink_to(folder / "m.pth")
    flags = given(tmp_path / "link.pth", tmp_path / "in", tmp_path / "out")
    assert train(*flags).status == 0
    (tmp_path / "link.vocabulary").write_text("another one")
    assert "link.vocabulary is damaged or another one" in error_of(train(*flags))


@pytest.mark.parametrize("name", ["stdin", "stdout"])
def test_a_closed_stream_is_one_line(name, trained_on, monkeypatch, capfd):
    text = "-" if name == "stdin" else trained_on[0] / "data" / "day_2"
    monkeypatch.setattr(sys, name, None)
    assert main([str(word) for word in given(trained_on[0] / "m.pth", text, "-")]) == 2
    assert f"=-: {name} is closed: " in capfd.readouterr().err


def test_a_model_that_cannot_be_saved_leaves_the_vocabulary_of_the_one_before(trained_on, tmp_path):
    folder, rows, _ = trained_on
    (tmp_path / "in").write_text(as_text(rows[:3]))
    for name in ("m.pth", "m.vocabulary"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    other = [f"--data_path={folder / 'data'}", f"--processed-data-file={tmp_path / 'p'}"]
    assert train(*CRITEO_MODEL, *other, "--memory-map", "--dry-run").status == 0
    with largest_file(100_000):
        flags = [*other, "--memory-map", f"--save-model={tmp_path / 'm.pth'}"]
        assert "cannot write it (File too large)" in error_of(train(*CRITEO_MODEL, *flags))
    assert train(*given(tmp_path / "m.pth", tmp_path / "in", tmp_path / "out")).status == 0
