"""Raw files: each line is read once, whoever reads which bytes; which files there are."""

import gzip
import io
import os
import random

import pytest

from common.errors import RankError, UserError
from criteo.raw_files import Lines, RawFile, day_numbers, find_raw_files

BLOCK_SIZES = (1, 2, 7, 333, 4 << 20)


def random_text(draw, num_lines, longest, last_newline=True):
    """Lines of random lengths, empty ones too; each byte but the newline tells its line."""
    lines = [bytes([97 + k % 26]) * draw.randint(0, longest) for k in range(num_lines)]
    text = b"".join(line + b"\n" for line in lines)
    return text if last_newline or not text else text[:-1]


def whole(text):
    """The text as blocks give it: its last line, too, ends in a newline."""
    return text if text.endswith(b"\n") or not text else text + b"\n"


def by_first_byte(text, size):
    """For each range of `size` bytes: the lines that begin in it."""
    ranges = [b""] * max(-(-len(text) // size), 1)
    at = 0
    for line in io.BytesIO(text):
        ranges[at // size] += whole(line)
        at += len(line)
    return ranges


def in_ranges(text, size, **sizes):
    """The lines of consecutive ranges, each read by itself from the text's beginning."""
    found = []
    for begin in range(0, max(len(text), 1), size):
        blocks = list(Lines(io.BytesIO(text), begin, **sizes).blocks(begin + size))
        assert all(block.endswith(b"\n") for block in blocks)
        found.append(b"".join(blocks))
    return found


def in_turn(lines, size):
    """The lines of consecutive ranges, read one after the other until the text is at its end."""
    found = []
    while not lines.is_at_end:
        found.append(b"".join(lines.blocks((len(found) + 1) * size)))
    return found


def message_of(kind, action, *args):
    with pytest.raises(UserError) as caught:
        action(*args)
    assert type(caught.value) is kind and "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- lines


@pytest.mark.parametrize("block_bytes", BLOCK_SIZES)
@pytest.mark.parametrize("last_newline", [True, False])
def test_each_line_belongs_to_the_range_of_its_first_byte(block_bytes, last_newline):
    """Ranges of any size, each by itself or in turn, have all lines, once and in order."""
    draw = random.Random(block_bytes)
    texts = [random_text(draw, 9, longest, last_newline) for longest in (0, 1, 3, 12)]
    sizes = [range(1, len(text) + 3) for text in texts]
    texts += [b"", b"\r\n\r\n", b"a\n\nb", random_text(draw, 300, 60, last_newline)]
    sizes += [range(1, 5)] * 3 + [(50, 999, 10_000)]
    for text, of_text in zip(texts, sizes, strict=True):
        for size in of_text:
            want = by_first_byte(text, size)
            assert in_ranges(text, size, block_bytes=block_bytes) == want
            assert b"".join(want) == whole(text)
            turns = in_turn(Lines(io.BytesIO(text), block_bytes=block_bytes), size)
            assert turns[: len(want)] == want and not b"".join(turns[len(want) :])


def test_blocks_are_bounded_and_end_with_a_line():
    text = random_text(random.Random(1), 200, 30)
    blocks = list(Lines(io.BytesIO(text), block_bytes=100).blocks(len(text)))
    assert b"".join(blocks) == text and len(blocks) > 20
    assert all(100 <= len(block) <= 131 for block in blocks[:-1])


def test_lines_tell_how_far_they_are():
    """`at` is behind the bytes that were read; the end is known once nothing more comes."""
    lines = Lines(io.BytesIO(b"aa\nbb\ncc"), 1)
    assert lines.at == 3
    assert list(lines.blocks(4)) == [b"bb\n"] and lines.at == 6 and not lines.is_at_end
    assert list(lines.blocks(5)) == [] and not lines.is_at_end, "its lines were read already"
    assert list(lines.blocks(100)) == [b"cc\n"] and lines.at == 8 and lines.is_at_end
    behind = Lines(io.BytesIO(b"a\nb\n"), 50)
    assert list(behind.blocks(60)) == [] and behind.is_at_end


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


@pytest.mark.parametrize("begin, taken", [(0, 150), (5000, 250)])
def test_an_overlong_line_is_cut_and_not_read_to_its_end(begin, taken):
    """A file of another kind may have no newline at all."""
    file = Counted(b"x" * 100_000)
    lines = Lines(file, begin, block_bytes=50, max_line_bytes=100)
    assert next(lines.blocks(10_000)) == b"x" * 150 + b"\n" and file.taken == taken


@pytest.mark.parametrize("seed", range(2))
def test_lines_around_overlong_ones_are_read_once(seed):
    """However an overlong line is cut, those before and behind it come once and in order."""
    draw = random.Random(seed)
    lines, good = [], []
    for number in range(40):
        lines.append(b"x" * draw.choice([41, 60, 79, 80, 81, 82, 120, 300]))
        good += [b"line %d\n" % number] * (number % 3)
        lines += [b"line %d" % number] * (number % 3)
    text, sizes = b"\n".join(lines) + b"\n", {"block_bytes": 16, "max_line_bytes": 40}
    for size in (*range(1, 60), 79, 80, 81, 100, 500, len(text)):
        turns = in_turn(Lines(io.BytesIO(text), **sizes), size)
        for ranges in (in_ranges(text, size, **sizes), turns):
            found = [line for line in io.BytesIO(b"".join(ranges)) if line.startswith(b"line")]
            assert found == good


# ---------------------------------------------------------------- files


def write(path, text, num_members=1):
    """Text as a plain file, or as one of one or more members of gzip; returns the RawFile."""
    if path.suffix == ".gz":
        cuts = [len(text) * k // num_members for k in range(num_members + 1)]
        parts = zip(cuts[:-1], cuts[1:], strict=True)
        path.write_bytes(b"".join(gzip.compress(text[begin:end]) for begin, end in parts))
    else:
        path.write_bytes(text)
    return RawFile.at(path)


@pytest.mark.parametrize("num_members", [1, 3])
@pytest.mark.parametrize("last_newline", [True, False])
def test_a_packed_file_has_the_lines_of_the_plain_one(tmp_path, num_members, last_newline):
    """From any byte of the text on, and in turn."""
    text = random_text(random.Random(2), 300, 40, last_newline)
    plain = write(tmp_path / "day_0", text)
    packed = write(tmp_path / "day_1.gz", text, num_members)
    assert (plain.is_gzip, packed.is_gzip) == (False, True)
    for raw in (plain, packed):
        for size in (100, 1000, 3 * len(text)):
            for number, want in enumerate(by_first_byte(text, size)):
                with raw.lines(number * size, block_bytes=333) as lines:
                    assert b"".join(lines.blocks((number + 1) * size)) == want
            with raw.lines(block_bytes=333) as lines:
                assert b"".join(in_turn(lines, size)) == whole(text)
                assert lines.packed == raw.size


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

    message = message_of(RankError, read_all)
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
    raw = write(tmp_path / name, b"a\nb\n")
    assert raw == RawFile.at(raw.path)
    assert raw.fingerprint == {"name": name, "size": raw.size, "mtime_ns": raw.mtime_ns}
    raw.check_unchanged()

    def read_and_change():
        with raw.lines() as lines:
            assert b"".join(lines.blocks(100)) == b"a\nb\n"
            change(raw.path)

    for action in (read_and_change, raw.check_unchanged):
        assert f"{raw.path} changed while it was read" in message_of(RankError, action)


@pytest.mark.parametrize("name", ["day_0", "day_0.gz"])
def test_a_sample_is_the_first_lines_and_how_well_they_are_packed(tmp_path, name):
    draw = random.Random(4)
    text = "".join(f"{draw.randrange(2**32):08x}\t" * 2 + "7\n" for _ in range(40_000)).encode()
    raw = write(tmp_path / name, text)
    found, ratio = raw.sample(1 << 16)
    assert text.startswith(found) and found.endswith(b"\n")
    assert 1 << 16 <= len(found) < (1 << 16) + 400
    assert ratio == pytest.approx(len(text) / raw.size, rel=0.25)
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


def test_days_are_found_in_the_order_of_their_numbers_plain_before_packed(tmp_path):
    names = ["day_0.gz", *(f"day_{day}" for day in range(1, 12))]
    make_files(tmp_path, *names, "day_1.gz")
    assert names_of(tmp_path) == names


def test_other_files_are_no_days(tmp_path):
    make_files(tmp_path, "day_0", "day_1", "day_01", "day_2_reordered.npz", "day_x", "day_3.bak")
    make_files(
        tmp_path, "day_", "day_-1", "day_\u0662", "day_4.gz.gz", "days_5", "day_6.zip", "day"
    )
    assert day_numbers(tmp_path / "day") == [0, 1] and names_of(tmp_path) == ["day_0", "day_1"]


@pytest.mark.parametrize(
    "names, words",
    [
        ([], ["day_0: no such file"]),
        (["day_0.gz"], ["only day_0", "at least two days"]),
        (["day_1", "day_2"], ["lacks day_0 ", "day_2"]),
        (["day_0", "day_3"], ["lacks day_1, day_2 ", "day_3"]),
        (["day_9"], ["lacks day_0, day_1, day_2, day_3, day_4 ... ", "day_9"]),
    ],
)
def test_missing_days_are_named(tmp_path, names, words):
    make_files(tmp_path, *names)
    message = message_of(UserError, names_of, tmp_path)
    assert all(word in message for word in words) and str(tmp_path) in message


def test_a_huge_day_is_no_reason_to_count_to_it(tmp_path):
    make_files(tmp_path, "day_0", f"day_{'9' * 40}", "day_1")
    message = message_of(UserError, names_of, tmp_path)
    assert "lacks day_2, day_3, day_4, day_5, day_6 ... (it has day_9999" in message


def test_days_of_a_name_with_blanks_and_wildcards_are_found(tmp_path):
    make_files(tmp_path, "d[a]y *_0", "d[a]y *_1", "day x_2")
    assert day_numbers(tmp_path / "d[a]y *") == [0, 1]


MAKERS = {
    "a folder, expected a file": os.mkdir,
    "a fifo, expected a file": os.mkfifo,
    "a device, expected a file": lambda path: path.symlink_to("/dev/null"),
    "a link to nothing, which is not there": lambda path: path.symlink_to("nothing"),
}


@pytest.mark.parametrize("what", MAKERS)
def test_what_is_in_place_of_a_file_is_named(tmp_path, what):
    make_files(tmp_path, "day_0")
    for name, data_set, raw in (("day_1", "terabyte", "day"), ("x.txt", "kaggle", "x.txt")):
        MAKERS[what](tmp_path / name)
        message = message_of(UserError, find_raw_files, tmp_path / raw, data_set)
        assert message.startswith(f"{tmp_path}/{name}: {what}; --data_path or --raw")


def test_a_day_that_is_empty_is_named(tmp_path):
    make_files(tmp_path, "day_0", "day_1.gz")
    (tmp_path / "day_1.gz").write_bytes(b"")
    assert f"{tmp_path}/day_1.gz is empty" in message_of(UserError, names_of, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_day_that_cannot_be_read_is_named(tmp_path):
    make_files(tmp_path, "day_0", "day_1")
    (tmp_path / "day_1").chmod(0)
    assert f"{tmp_path}/day_1: no permission" in message_of(UserError, names_of, tmp_path)


def test_kaggles_file_plain_before_packed(tmp_path):
    raw = tmp_path / "train.txt"
    assert f"{raw}: no such file" in message_of(UserError, find_raw_files, raw, "kaggle")
    make_files(tmp_path, "train.txt.gz")
    assert find_raw_files(raw, "kaggle") == [RawFile.at(tmp_path / "train.txt.gz")]
    make_files(tmp_path, "train.txt")
    assert find_raw_files(raw, "kaggle") == [RawFile.at(raw)]
    raw.write_bytes(b"")
    assert f"{raw} is empty" in message_of(UserError, find_raw_files, raw, "kaggle")
