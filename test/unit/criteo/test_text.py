"""Criteo's text against a parser of plain loops: usual lines, unusual ones and bad ones."""

import random
import re

import numpy as np
import pytest

from criteo.text import (
    BAD_FIELD_COUNT,
    BAD_HEX,
    BAD_KINDS,
    BAD_LABEL,
    BAD_NUMBER,
    LONG_HEX,
    MAX_ROW_BYTES,
    OK,
    OUT_OF_RANGE,
    describe_bad_field,
    parse_lines,
    write_rows,
)

MODULOS = [-1, 7, 10_000_000, 2**31 + 11, 2**32]
HEX = "0123456789abcdef"


# ---------------------------------------------------------------- by hand


def status_of(field, word):
    """What is wrong with a field alone."""
    if field >= 14:
        if not re.fullmatch(b"[0-9a-fA-F]*", word):
            return BAD_HEX
        return LONG_HEX if len(word) > 8 else OK
    if not re.fullmatch(b"(-?[0-9]+)?", word):
        return BAD_NUMBER
    number = int(word or b"0")
    if not -(2**31) <= number < 2**31:
        return OUT_OF_RANGE
    return OK if field > 0 or number in (0, 1) else BAD_LABEL


def first_mistake(words):
    """(status, field): fields are looked at in order, and a field in excess with the last one."""
    for field in range(40):
        if (field == len(words) - 1) != (field == 39):
            return BAD_FIELD_COUNT, field
        if status := status_of(field, words[field]):
            return status, field
    return OK, 0


def value_of(field, word, modulo):
    if field < 14:
        return max(int(word or b"0"), 0)
    value = int(word or b"0", 16)
    value = value % modulo if modulo > 0 else value
    return value - 2**32 if value >= 2**31 else value  # int32 of the same bits


def by_hand(text, modulo, drop):
    """(rows, counted, bad lines) as `parse` returns them."""
    rows, bad, at = [], [], 0
    counted = [0] * 43
    for number, line in enumerate(text.split(b"\n")[:-1]):
        words = line.removesuffix(b"\r").split(b"\t")
        end = at + len(line) + 1
        status, field = first_mistake(words)
        counted[1] += 1
        if status != OK:
            bad.append((status, field, at, end))
        else:
            row = [value_of(field, word, modulo) for field, word in enumerate(words)]
            counted[2] += row[0]
            for field, word in enumerate(words):
                counted[3 + field] += word == b""
            if row[0] == 1 or not len(drop) or not drop[number]:
                rows.append(row)
        at = end
    counted[0] = len(rows)
    return np.array(rows, np.int64).reshape(-1, 40), counted, bad


def parse(text, modulo=-1, drop=()):
    """All that `parse_lines` finds: rows, what it counted, and (status, field, begin, end)."""
    columns = np.full((40, text.count(b"\n")), -77, np.int32)
    counted = np.zeros(43, np.int64)
    drop = np.array(drop, bool)
    as_array, at, bad = np.frombuffer(text, np.uint8), 0, []
    while at < len(text):
        status, field, line, at = parse_lines(as_array, at, columns, max(modulo, 0), drop, counted)
        if status != OK:
            bad.append((status, field, line, at))
    return columns[:, : counted[0]].T.astype(np.int64), counted.tolist(), bad


def assert_parsed_as_by_hand(text, modulo=-1, drop=()):
    found, want = parse(text, modulo, drop), by_hand(text, modulo, drop)
    assert found[2] == want[2]
    np.testing.assert_array_equal(found[0], want[0])
    assert found[1] == want[1]


# ---------------------------------------------------------------- lines


def usual_words(draw):
    """A line of the form of nearly all of Criteo's."""
    integers = [
        draw.choice(["", str(draw.randrange(-2, 10 ** draw.randint(1, 9)))]) for _ in range(13)
    ]
    categories = ["".join(draw.choices(HEX, k=8)) for _ in range(26)]
    categories = [word if draw.random() < 0.8 else "" for word in categories]
    return [draw.choice("01"), *integers, *categories]


INTEGERS = [
    *("", "0", "-0", "-1", "00000", "0000000000000007", "-000000000012", "2147483647"),
    *("-2147483648", "1000000000", "0002147483647", "999999999", "-999999999"),
]
LABELS = ["0", "1", "", "-0", "00", "0001", "00000000000"]
CATEGORIES = ["ffffffff", "FFFFFFFF", "80000000", "7FFFFFFF", "0", "00000000", "f", "aBcD"]


def unusual_words(draw):
    """A line that is right all the same: some of its fields have another form."""
    words = usual_words(draw)
    share = draw.choice([0.05, 0.9])
    for field in range(40):
        if draw.random() < share:
            forms = LABELS if field == 0 else INTEGERS if field < 14 else CATEGORIES
            words[field] = draw.choice(forms)
    return words


BAD_WORDS = {
    BAD_LABEL: [(0, "2"), (0, "-1"), (0, "1000000000")],
    BAD_NUMBER: [
        *((5, word) for word in ("-", "--1", "+1", " ", "1\r", "1.5")),
        *((0, "-"), (1, "x7"), (13, "12345678901234567890z")),
    ],
    OUT_OF_RANGE: [
        *((4, "2147483648"), (4, "-2147483649"), (2, "-99999999999999999999999")),
        *((2, "18446744073709551616"), (0, "18446744073709551617")),  # 2^64, 2^64 + 1
    ],
    BAD_HEX: [
        *((20, word) for word in ("-1234567", "0x123456", "1234\xe9567", "g", "f" * 40 + "g")),
        *((39, "1234567g"), (14, "1234567G")),
    ],
    LONG_HEX: [(14, "123456789"), (39, "000000001"), (27, "f" * 40)],
}
USUAL = "1\t" * 14
BAD_LINES = {  # field that is the last one, or one too many: lines
    38: ["\t".join(["1"] * 39), "\t" * 38, USUAL + "\t".join(["0123abcd"] * 25)],
    39: ["\t".join(["1"] * 41), "\t" * 40, USUAL + "\t".join(["0123abcd"] * 27)],
    0: ["", "\r", ",".join(["1"] * 40), "\0" * 300],
}


def all_bad_lines(words):
    """(status, field, line) of each mistake, those of a word in a line of the given words."""
    for status, mistakes in BAD_WORDS.items():
        for field, word in mistakes:
            yield status, field, "\t".join([*words[:field], word, *words[field + 1 :]])
    for field, lines in BAD_LINES.items():
        yield from ((BAD_FIELD_COUNT, field, line) for line in lines)


def text_of(draw, num_lines, bad_share=0.0):
    """Lines of all forms, of which a share is bad."""
    text = ""
    for _ in range(num_lines):
        words = draw.choice([usual_words, unusual_words])(draw)
        is_bad = draw.random() < bad_share
        text += draw.choice(list(all_bad_lines(words)))[2] if is_bad else "\t".join(words)
        text += "\n" if draw.random() < 0.9 else "\r\n"
    return text.encode("latin-1")


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("bad_share", [0.0, 0.4])
@pytest.mark.parametrize("modulo", MODULOS)
def test_random_lines_are_parsed_as_by_hand(modulo, bad_share):
    """Values, clicks, missing values of each field, and each bad line's kind, field and offsets.

    A line with a number in `drop` is counted all the same, and a click is never dropped.
    """
    draw = random.Random(modulo)
    text = text_of(draw, 1000, bad_share)
    drop = [draw.random() < 0.6 for _ in range(1000)]
    assert_parsed_as_by_hand(text, modulo)
    assert_parsed_as_by_hand(text, modulo, drop)
    whole, dropped = parse(text, modulo), parse(text, modulo, drop)
    assert {status for status, *_ in whole[2]} == (set(BAD_KINDS) if bad_share else set())
    assert dropped[1][1:] == whole[1][1:] and dropped[1][0] < whole[1][0]
    assert dropped[0][:, 0].sum() == whole[0][:, 0].sum()


def test_each_mistake_has_its_status_field_and_offsets():
    """As the only line, and as the first, a middle and the last one among good lines."""
    draw = random.Random(1)
    words = usual_words(draw)
    good = ["\t".join(each(draw)) for each in (usual_words, unusual_words, usual_words)]
    want, counted, _ = parse("".join(f"{line}\n" for line in good).encode())
    counted[1] += 1
    for status, field, line in all_bad_lines(words):
        line = f"{line}\n".encode("latin-1")
        assert parse(line)[2] == [(status, field, 0, len(line))], line
        for number in (0, 2, 3):
            encoded = [f"{each}\n".encode() for each in good]
            encoded.insert(number, line)
            begin = sum(map(len, encoded[:number]))
            rows, found, bad = parse(b"".join(encoded))
            assert bad == [(status, field, begin, begin + len(line))], line
            np.testing.assert_array_equal(rows, want)
            assert found == counted, "a bad line counts as a line only"


def test_empty_fields_are_zeros_and_an_empty_text_has_no_lines():
    for end in (b"\n", b"\r\n"):
        rows, counted, bad = parse(b"\t" * 39 + end)
        assert not bad and rows.tolist() == [[0] * 40] and counted == [1, 1, 0, *[1] * 40]
    rows, counted, bad = parse(b"")
    assert len(rows) == 0 and counted == [0] * 43 and bad == []


def test_extreme_values_come_out_as_documented():
    words = ["1", "2147483647", "-2147483648", "-0", "007", "", *["1"] * 8]
    words += ["ffffffff", "FFFFFFFF", "80000000", "7fffffff", "f", "", *["0"] * 20]
    text = ("\t".join(words) + "\n").encode()
    categories = np.array([2**32 - 1, 2**32 - 1, 2**31, 2**31 - 1, 15, 0])
    row = parse(text)[0][0].tolist()
    assert row[:6] == [1, 2**31 - 1, 0, 0, 7, 0]
    assert row[14:20] == categories.astype(np.uint32).view(np.int32).tolist()
    row = parse(text, 2**31 + 11)[0][0].tolist()
    assert row[14:20] == [2**31 - 12, 2**31 - 12, -(2**31), 2**31 - 1, 15, 0]
    assert parse(text, 7)[0][0].tolist()[14:20] == (categories % 7).tolist()


def in_another_form(word, field, draw):
    if not word:
        return word
    if field < 14:
        return "-" * word.startswith("-") + "0" * draw.randint(9, 12) + word.removeprefix("-")
    return draw.choice([word.upper(), word.lstrip("0") or "0"])


@pytest.mark.parametrize("modulo", MODULOS)
def test_rows_are_the_same_in_usual_and_in_unusual_form(modulo):
    """Leading zeros, upper case, short hexadecimal numbers and carriage returns change nothing.

    So the quick way for lines of the usual form and the way for all lines agree.
    """
    draw = random.Random(11)
    rows = [usual_words(draw) for _ in range(300)]
    others = [[in_another_form(word, k, draw) for k, word in enumerate(row)] for row in rows]
    usual, other = (
        "".join("\t".join(row) + "\n" for row in each).encode() for each in (rows, others)
    )
    want = parse(usual, modulo)
    assert want[2] == []
    for text in (other, usual.upper(), usual.replace(b"\n", b"\r\n")):
        found = parse(text, modulo)
        np.testing.assert_array_equal(found[0], want[0])
        assert found[1:] == want[1:]


def test_rows_are_appended_and_numbers_of_lines_go_on():
    """Two texts one after the other are one text, also if the second begins at an offset."""
    draw = random.Random(13)
    texts = [text_of(draw, 90), text_of(draw, 110)]
    drop = np.array([draw.random() < 0.5 for _ in range(200)])
    columns, counted = np.zeros((40, 200), np.int32), np.zeros(43, np.int64)
    before = b"any other bytes\n"
    for skipped, text in zip((b"", before), texts, strict=True):
        as_array = np.frombuffer(skipped + text, np.uint8)
        found = parse_lines(as_array, len(skipped), columns, 7, drop, counted)
        assert found == (OK, 0, 0, len(as_array))
    rows, want, _ = by_hand(b"".join(texts), 7, drop)
    np.testing.assert_array_equal(columns[:, : counted[0]].T, rows)
    assert counted.tolist() == want


def test_written_rows_are_parsed_back():
    random_ = np.random.default_rng(19)
    numbers = random_.integers(-(2**31), 2**31, (300, 14))
    numbers //= 10 ** random_.integers(0, 10, (300, 14))
    numbers[:, 0] = random_.integers(0, 2, 300)
    categories = random_.integers(0, 2**32, (300, 26)).astype(np.uint32)
    missing = random_.random((300, 40)) < 0.3
    text = np.empty(MAX_ROW_BYTES * 300, np.uint8)
    size = write_rows(numbers, categories, missing, text)
    rows, counted, bad = parse(text[:size].tobytes())
    want = np.concatenate([np.maximum(numbers, 0), categories.view(np.int32)], axis=1)
    np.testing.assert_array_equal(rows, np.where(missing, 0, want))
    assert not bad and counted[3:] == missing.sum(0).tolist()


def test_the_longest_row_fits_max_row_bytes():
    numbers = np.array([[1, *[-(2**31)] * 13]])
    categories, missing = np.zeros((1, 26), np.uint32), np.zeros((1, 40), bool)
    assert write_rows(numbers, categories, missing, np.empty(1000, np.uint8)) <= MAX_ROW_BYTES


FIELDS = "tab-separated fields, expected 40 (label, 13 integers, 26 hex strings)"
NUMBER = "expected a whole number"


@pytest.mark.parametrize(
    "status, field, word, text",
    [
        (BAD_LABEL, 0, b"2", "column 1: got '2', expected the label 0 or 1"),
        (BAD_NUMBER, 1, b"x7", f"column 2: got 'x7', {NUMBER}"),
        (OUT_OF_RANGE, 13, b"2147483648", f"column 14: got '2147483648', {NUMBER} of 32 bits"),
        (BAD_HEX, 39, b"12g4\r\n", "column 40: got '12g4', expected hexadecimal digits"),
        (LONG_HEX, 14, b"123456789",
         "column 15: got '123456789', expected at most 8 hexadecimal digits"),
        (BAD_FIELD_COUNT, 0, b"1\t2", f"41 {FIELDS}"),
        (BAD_NUMBER, 1, b"z" * 60, f"column 2: got '{'z' * 60}', {NUMBER}"),
        (BAD_NUMBER, 1, b"z" * 61, f"column 2: got '{'z' * 57}...', {NUMBER}"),
        (BAD_NUMBER, 1, b"\0\x1b\xe9", r"column 2: got '\x00\x1b\\xe9', " + NUMBER),
    ],
)  # fmt: skip
def test_a_bad_field_is_described_in_one_printable_line(status, field, word, text):
    """Column from 1, what it holds (60 characters at most), what was expected."""
    words = [b"1"] * 40
    words[field] = word
    assert describe_bad_field(status, field, b"\t".join(words)) == text and text.isprintable()
