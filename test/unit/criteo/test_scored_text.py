"""Lines of text become batches of rows, however the text is cut into blocks."""

import gzip

import numpy as np
import pytest

from criteo.scored_text import ParsedLines, about_num_lines, in_batches


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
