"""Raw files: each line is read once, whoever reads which bytes; which files there are."""

import gzip
import io
import os
import random
import re

import pytest

from common.errors import UserError
from criteo import raw_files
from criteo.raw_files import (
    BLOCK_BYTES,
    MAX_LINE_BYTES,
    Lines,
    RawFile,
    day_numbers,
    find_raw_files,
)


def random_text(draw, number, longest, last_newline=True):
    """Lines of random lengths, empty ones too; each byte but the newline tells its line."""
    lines = [bytes([97 + k % 26]) * draw.randint(0, longest) for k in range(number)]
    text = b"".join(line + b"\n" for line in lines)
    return text if last_newline or not text else text[:-1]


def whole(text):
    """The text as blocks give it: its last line, too, ends in a newline."""
    return text if text.endswith(b"\n") or not text else text + b"\n"


def by_first_byte(text, size):
    """Of each `size` bytes: the lines that begin there."""
    pieces = [b""] * max(-(-len(text) // size), 1)
    at = 0
    for line in io.BytesIO(text):
        pieces[at // size] += whole(line)
        at += len(line)
    return pieces


def of_range(file, begin, end):
    blocks = list(Lines(file, begin).blocks(end))
    assert all(block.endswith(b"\n") for block in blocks)
    return b"".join(blocks)


def in_ranges(text, size):
    """The lines of consecutive ranges, each read by itself from the text's beginning."""
    number = max(-(-len(text) // size), 1)
    return [of_range(io.BytesIO(text), k * size, (k + 1) * size) for k in range(number)]


def in_turn(file, size):
    """The lines of consecutive ranges, read one after the other until the text is at its end."""
    lines, pieces = Lines(file), []
    while not lines.is_at_end:
        pieces.append(b"".join(lines.blocks((len(pieces) + 1) * size)))
    return pieces


def message_of(action, *args):
    with pytest.raises(UserError) as caught:
        action(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- lines


@pytest.mark.parametrize("block_bytes", [1, 2, 7, 4 << 20])
@pytest.mark.parametrize("last_newline", [True, False])
def test_each_line_lies_in_the_range_of_its_first_byte(block_bytes, last_newline, monkeypatch):
    """All sizes of ranges of small texts: all lines, once, in order, in one range or in turn."""
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", block_bytes)
    draw = random.Random(block_bytes)
    for longest in (0, 1, 3, 12):
        text = random_text(draw, 9, longest, last_newline)
        for size in range(1, len(text) + 3):
            want = by_first_byte(text, size)
            assert in_ranges(text, size) == want
            assert b"".join(want) == whole(text)
            turns = in_turn(io.BytesIO(text), size)
            assert turns[: len(want)] == want and not b"".join(turns[len(want) :])


@pytest.mark.parametrize("seed", range(6))
def test_lines_of_large_texts(seed, monkeypatch):
    """Ranges and blocks of random sizes, smaller and larger than lines."""
    draw = random.Random(seed)
    text = random_text(draw, 400, draw.choice([5, 60, 500]), last_newline=seed % 2)
    for _ in range(10):
        monkeypatch.setattr(raw_files, "BLOCK_BYTES", draw.randint(1, 3000))
        size = draw.randint(len(text) // 200, 2 * len(text))
        assert in_ranges(text, size) == by_first_byte(text, size)


@pytest.mark.parametrize("text", [b"", b"\n", b"a", b"a\n", b"\n\n\n", b"a\n\nb", b"\r\n\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_tiny_texts(text, size):
    assert in_ranges(text, size) == by_first_byte(text, size)
    assert b"".join(in_turn(io.BytesIO(text), size)) == whole(text)


def test_blocks_are_bounded_and_end_with_a_line(monkeypatch):
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 100)
    text = random_text(random.Random(1), 200, 30)
    blocks = list(Lines(io.BytesIO(text)).blocks(len(text)))
    assert b"".join(blocks) == text and len(blocks) > 20
    assert all(100 <= len(block) <= 131 for block in blocks[:-1])


def test_a_range_behind_the_end_has_no_lines():
    for text in (b"a\nb\n", b"a\nb", b""):
        lines = Lines(io.BytesIO(text), 50)
        assert list(lines.blocks(60)) == [] and lines.is_at_end


def test_lines_tell_where_they_are():
    """`at` is behind what was read; the end is known once nothing more comes."""
    lines = Lines(io.BytesIO(b"aa\nbb\ncc"), 1)
    assert lines.at == 3
    assert list(lines.blocks(4)) == [b"bb\n"] and lines.at == 6 and not lines.is_at_end
    assert list(lines.blocks(5)) == [] and not lines.is_at_end, "its lines were read already"
    assert list(lines.blocks(100)) == [b"cc\n"] and lines.at == 8 and lines.is_at_end


class Counted(io.BytesIO):
    """Counts the bytes that are read."""

    taken = 0

    def read(self, size=-1):
        found = super().read(size)
        self.taken += len(found)
        return found

    def readline(self, size=-1):
        found = super().readline(size)
        self.taken += len(found)
        return found


def test_an_overlong_line_is_cut_and_not_read_to_its_end(monkeypatch):
    """A file of another kind may have no newline at all."""
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 50)
    monkeypatch.setattr(raw_files, "MAX_LINE_BYTES", 100)
    file = Counted(b"x" * 100_000)
    assert next(Lines(file).blocks(10_000)) == b"x" * 150 + b"\n"
    assert file.taken == 150
    file = Counted(b"x" * 100_000)
    assert next(Lines(file, 5000).blocks(10_000)) == b"x" * 150 + b"\n"
    assert file.taken == 250


def test_a_large_file_without_newlines_is_read_a_block_at_a_time():
    file = Counted(b"\0" * 9_000_000)
    block = next(Lines(file).blocks(32 << 20))
    most = BLOCK_BYTES + MAX_LINE_BYTES
    assert len(block) <= most + 1 and file.taken <= most


@pytest.mark.parametrize("seed", range(4))
def test_lines_around_overlong_ones_are_read_once(seed, monkeypatch):
    """However an overlong line is cut, those before and behind it are there, once, in order."""
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 16)
    monkeypatch.setattr(raw_files, "MAX_LINE_BYTES", 40)
    draw = random.Random(seed)
    lines, good = [], []
    for number in range(40):
        lines.append(b"x" * draw.choice([41, 60, 79, 80, 81, 82, 120, 300]))
        good += [b"line %d\n" % number] * (number % 3)
        lines += [b"line %d" % number] * (number % 3)
    text = b"\n".join(lines) + b"\n"
    for size in (*range(1, 60), 79, 80, 81, 100, 500, len(text)):
        for pieces in (in_ranges(text, size), in_turn(io.BytesIO(text), size)):
            found = [line for line in io.BytesIO(b"".join(pieces)) if line.startswith(b"line")]
            assert found == good


# ---------------------------------------------------------------- files


def write(path, text, members=1):
    """Text as a plain file, or as one of one or more members of gzip; gives the RawFile."""
    if path.suffix == ".gz":
        cuts = [len(text) * k // members for k in range(members + 1)]
        parts = zip(cuts[:-1], cuts[1:], strict=True)
        path.write_bytes(b"".join(gzip.compress(text[begin:end]) for begin, end in parts))
    else:
        path.write_bytes(text)
    return RawFile.at(path)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("last_newline", [True, False])
def test_a_packed_file_has_the_lines_of_the_plain_one(tmp_path, members, last_newline, monkeypatch):
    """From any byte of the text on, and in turn."""
    monkeypatch.setattr(raw_files, "BLOCK_BYTES", 333)
    text = random_text(random.Random(2), 300, 40, last_newline)
    plain = write(tmp_path / "day_0", text)
    packed = write(tmp_path / "day_1.gz", text, members)
    assert (plain.is_gzip, packed.is_gzip) == (False, True)
    for size in (100, 1000, 5000, len(text), 3 * len(text)):
        want = by_first_byte(text, size)
        for raw in (plain, packed):
            for number, lines_of_piece in enumerate(want):
                with raw.lines(number * size) as lines:
                    found = b"".join(lines.blocks((number + 1) * size))
                assert found == lines_of_piece
            with raw._open() as file:
                assert b"".join(in_turn(file, size)) == whole(text)


@pytest.mark.parametrize("damage", ["cut", "end", "flipped", "no gzip"])
def test_a_damaged_packed_file_is_named(tmp_path, damage):
    text = random_text(random.Random(3), 3000, 60)
    packed = write(tmp_path / "day_0.gz", text)
    content = bytearray(packed.path.read_bytes())
    if damage == "flipped":
        for at in range(len(content) // 2, len(content) // 2 + 40):
            content[at] ^= 0xFF
    cut = {"cut": content[: len(content) // 2], "end": content[:-4], "no gzip": text}
    packed.path.write_bytes(cut.get(damage, content))

    def read_all():
        with RawFile.at(packed.path).lines() as lines:
            list(lines.blocks(1 << 30))

    message = message_of(read_all)
    assert f"{packed.path} is truncated or damaged" in message and "fetch it again" in message


def grow(path):
    with open(path, "ab") as file:
        file.write(b"x\n")


def touch(path):
    os.utime(path, ns=(1, 1))


def replace_by_folder(path):
    os.remove(path)
    path.mkdir()


@pytest.mark.parametrize("change", [grow, touch, os.remove, replace_by_folder])
@pytest.mark.parametrize("name", ["day_0", "day_0.gz"])
def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, name, change):
    """By whoever asks, and by who has read lines of it."""
    raw = write(tmp_path / name, b"a\nb\n")
    raw.check_unchanged()
    with raw.lines() as lines:
        assert b"".join(lines.blocks(100)) == b"a\nb\n"

    def read_and_change():
        with raw.lines() as lines:
            list(lines.blocks(100))
            change(raw.path)

    assert f"{raw.path} changed while it was read" in message_of(read_and_change)
    assert f"{raw.path} changed while it was read" in message_of(raw.check_unchanged)


def test_a_file_is_the_same_by_name_size_and_time(tmp_path):
    raw = write(tmp_path / "day_0", b"a\nb\n")
    assert raw == RawFile.at(tmp_path / "day_0")
    assert raw.fingerprint == {"name": "day_0", "size": 4, "mtime_ns": raw.mtime_ns}
    touch(raw.path)
    assert RawFile.at(raw.path).fingerprint != raw.fingerprint


def criteo_like_text(draw, number):
    """Lines that pack about as well as Criteo's: 2.6 times."""
    integers = [str(draw.randrange(10 ** draw.randint(1, 4))) for _ in range(1000)]
    categories = [f"{draw.randrange(2**32):08x}" for _ in range(3000)]
    lines = [
        "\t".join(["0", *draw.choices(integers, k=13), *draw.choices(categories, k=26)]) + "\n"
        for _ in range(number)
    ]
    return "".join(lines).encode()


@pytest.mark.parametrize("name", ["day_0", "day_0.gz"])
def test_a_sample_is_the_first_lines_and_how_well_they_are_packed(tmp_path, name):
    text = criteo_like_text(random.Random(4), 5000)
    raw = write(tmp_path / name, text)
    found, unpacked = raw.sample(1 << 16)
    assert text.startswith(found) and found.endswith(b"\n")
    assert 1 << 16 <= len(found) < (1 << 16) + 400
    assert unpacked == pytest.approx(len(text) / raw.size, rel=0.25)
    raw.path.write_bytes(b"nothing of the kind" if raw.is_gzip else b"")
    assert RawFile.at(raw.path).sample(1 << 16) == (b"", 1.0)


# ---------------------------------------------------------------- which there are


def make_files(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"1\n")


def names_of(folder):
    found = find_raw_files(folder / "day", "terabyte")
    assert all(raw == RawFile.at(raw.path) and raw.path.parent == folder for raw in found)
    return [raw.path.name for raw in found]


def test_days_are_found_in_the_order_of_their_numbers(tmp_path):
    make_files(tmp_path, *(f"day_{day}" for day in range(12)))
    assert names_of(tmp_path) == [f"day_{day}" for day in range(12)]


def test_a_days_plain_file_comes_before_its_packed_one(tmp_path):
    make_files(tmp_path, "day_0.gz", "day_1", "day_1.gz", "day_2")
    assert names_of(tmp_path) == ["day_0.gz", "day_1", "day_2"]


def test_other_files_are_no_days(tmp_path):
    make_files(tmp_path, "day_0", "day_1", "day_01", "day_2_reordered.npz", "day_x", "day_3.bak")
    make_files(
        tmp_path, "day_", "day_-1", "day_\u0662", "day_4.gz.gz", "days_5", "day_6.zip", "day"
    )
    assert day_numbers(tmp_path / "day") == [0, 1]
    assert names_of(tmp_path) == ["day_0", "day_1"]


@pytest.mark.parametrize(
    "names, words",
    [
        ([], ["day_0: no such file"]),
        (["day_0"], ["only day_0", "at least two days"]),
        (["day_0.gz"], ["only day_0", "at least two days"]),
        (["day_1", "day_2"], ["lacks day_0 ", "day_2"]),
        (["day_0", "day_3"], ["lacks day_1, day_2 ", "day_3"]),
        (["day_9"], ["lacks day_0, day_1, day_2, day_3, day_4 ... ", "day_9"]),
    ],
)
def test_missing_days_are_named(tmp_path, names, words):
    make_files(tmp_path, *names)
    message = message_of(names_of, tmp_path)
    assert all(word in message for word in words) and str(tmp_path) in message


@pytest.mark.parametrize("name", ["day_0", "day_1.gz"])
def test_an_empty_day_is_named(tmp_path, name):
    make_files(tmp_path, "day_0", "day_1.gz")
    (tmp_path / name).write_bytes(b"")
    assert re.search(rf"{tmp_path}/{name} is empty", message_of(names_of, tmp_path))


def test_a_folder_of_a_days_name_is_no_file(tmp_path):
    make_files(tmp_path, "day_0")
    (tmp_path / "day_1").mkdir()
    assert f"{tmp_path}/day_1: no such file" in message_of(names_of, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_day_that_cannot_be_read_is_named(tmp_path):
    make_files(tmp_path, "day_0", "day_1")
    (tmp_path / "day_1").chmod(0)
    assert f"{tmp_path}/day_1: no permission" in message_of(names_of, tmp_path)


def test_kaggles_file_plain_before_packed(tmp_path):
    raw = tmp_path / "train.txt"
    assert f"{raw}: no such file" in message_of(find_raw_files, raw, "kaggle")
    make_files(tmp_path, "train.txt.gz")
    assert find_raw_files(raw, "kaggle") == [RawFile.at(tmp_path / "train.txt.gz")]
    make_files(tmp_path, "train.txt")
    assert find_raw_files(raw, "kaggle") == [RawFile.at(raw)]
    raw.write_bytes(b"")
    assert f"{raw} is empty" in message_of(find_raw_files, raw, "kaggle")
