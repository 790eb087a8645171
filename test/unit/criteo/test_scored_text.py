"""Lines of text become batches of rows, however the text is cut into blocks."""

import gzip

import numpy as np
import pytest

from common.errors import UserError
from criteo.scored_text import (
    ParsedLines,
    ScoredText,
    about_num_lines,
    blocks_of_file,
    in_batches,
)


def blocks_of(is_row, sizes):
    """Blocks of these sizes of lines; row k has the label k."""
    number = np.cumsum(is_row) - 1
    begin = 0
    for size in sizes:
        kept = is_row[begin : begin + size]
        labels = number[begin : begin + size][kept]
        yield ParsedLines(np.tile(labels, (40, 1)).astype(np.int32), kept)
        begin += size


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0], ids=["good", "some bad", "all bad"])
def test_batches_hold_all_lines_in_order(batch_size, share):
    draw = np.random.default_rng(7)
    is_row = draw.random(41) >= share
    for sizes in ([41], [1] * 41, [20, 0, 1, 20], [3] * 13 + [2]):
        batches = list(in_batches(blocks_of(is_row, sizes), batch_size))
        rows = [batch.columns[0] for batch in batches]
        np.testing.assert_array_equal(np.concatenate(rows), np.arange(is_row.sum()))
        np.testing.assert_array_equal(np.concatenate([b.is_row for b in batches]), is_row)
        assert all(batch.is_row.sum() == batch.columns.shape[1] for batch in batches)
        assert all(len(of_batch) == batch_size for of_batch in rows[:-1])


def test_no_lines_make_no_batch():
    assert list(in_batches(iter([]), 5)) == []


@pytest.mark.parametrize("opened", [open, gzip.open], ids=["plain", "gzip"])
def test_lines_are_guessed_from_the_first_ones(opened, tmp_path, monkeypatch):
    monkeypatch.setattr("criteo.scored_text.SAMPLE_BYTES", 1000)
    path = tmp_path / ("text.gz" if opened is gzip.open else "text")
    with opened(path, "wb") as file:
        file.write(b"".join(b"%d\tsome fields\n" % (10**6 + k * 97 % 10**6) for k in range(50_000)))
    assert about_num_lines(str(path)) == pytest.approx(50_000, rel=0.2)
    path.write_bytes(b"")
    assert about_num_lines(str(path)) == 0 and about_num_lines("-") is None


@pytest.mark.parametrize("num_fields", [39, 40])
@pytest.mark.parametrize("at_a_time", [1, 5])
def test_first_lines_of_another_form_are_skipped_as_others_are(num_fields, at_a_time):
    """Whether there are labels is seen in the first line that can be a row."""
    lines = [b"a title\n", b"\n", *[b"1" + b"\t1" * (num_fields - 1) + b"\n"] * 3]
    blocks = [b"".join(lines[k : k + at_a_time]) for k in range(0, 5, at_a_time)]
    text = ScoredText("rows", -1, 2)
    parsed = [text.parse(block) for block in blocks]
    assert np.concatenate([p.is_row for p in parsed]).tolist() == [False, False, True, True, True]
    assert sum(p.columns.shape[1] for p in parsed) == 3
    assert text.has_labels == (num_fields == 40)
    with pytest.raises(UserError, match="tab-separated fields, expected 40"):
        text = ScoredText("rows", -1, 1)
        for block in blocks:
            text.parse(block)


def test_a_long_line_is_one_line_where_blocks_meet(tmp_path, monkeypatch):
    monkeypatch.setattr("criteo.scored_text.BLOCK_BYTES", 1000)
    (tmp_path / "in").write_bytes(b"a\n" + b"x" * 300_000 + b"\nb")
    text = b"".join(blocks_of_file(str(tmp_path / "in")))
    assert [len(line) for line in text.splitlines()] == [1, 300_000, 1]
