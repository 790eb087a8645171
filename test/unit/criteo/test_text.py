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
    "label 2": (0, "2", BAD_LABEL),
    "label -1": (0, "-1", BAD_LABEL),
    "label 10 digits": (0, "1000000000", BAD_LABEL),
    "label minus": (0, "-", BAD_NUMBER),
    "minus": (5, "-", BAD_NUMBER),
    "two minuses": (5, "--1", BAD_NUMBER),
    "plus": (5, "+1", BAD_NUMBER),
    "letters": (1, "x7", BAD_NUMBER),
    "letters behind": (13, "12345678901234567890z", BAD_NUMBER),
    "point": (7, "1.5", BAD_NUMBER),
    "blank": (7, " ", BAD_NUMBER),
    "return": (7, "1\r", BAD_NUMBER),
    "2^31": (4, "2147483648", OUT_OF_RANGE),
    "below -2^31": (4, "-2147483649", OUT_OF_RANGE),
    "-23 digits": (2, "-99999999999999999999999", OUT_OF_RANGE),
    "2^64": (2, "18446744073709551616", OUT_OF_RANGE),
    "2^64 and 1 label": (0, "18446744073709551617", OUT_OF_RANGE),
    "g among 8": (39, "1234567g", BAD_HEX),
    "minus in hex": (20, "-1234567", BAD_HEX),
    "0x": (20, "0x123456", BAD_HEX),
    "not ASCII": (20, "1234\xe9567", BAD_HEX),
    "9 digits": (14, "123456789", LONG_HEX),
    "9 digits in the last": (39, "000000001", LONG_HEX),
    "long and no hex": (27, "f" * 40 + "g", BAD_HEX),
}
BAD_LINES = {
    "39 fields": ("\t".join(["1"] * 39), 38, BAD_FIELD_COUNT),
    "41 fields": ("\t".join(["1"] * 41), 39, BAD_FIELD_COUNT),
    "empty": ("", 0, BAD_FIELD_COUNT),
    "return only": ("\r", 0, BAD_FIELD_COUNT),
    "40 tabs": ("\t" * 40, 39, BAD_FIELD_COUNT),
    "38 tabs": ("\t" * 38, 38, BAD_FIELD_COUNT),
    "a table of commas": (",".join(["1"] * 40), 0, BAD_FIELD_COUNT),
    "zero bytes": ("\0" * 300, 0, BAD_FIELD_COUNT),
    "usual with a field more": ("1\t" * 14 + "\t".join(["0123abcd"] * 27), 39, BAD_FIELD_COUNT),
    "usual with a tab more": ("1\t" * 14 + "0123abcd\t" * 26, 39, BAD_FIELD_COUNT),
    "usual with a field less": ("1\t" * 14 + "\t".join(["0123abcd"] * 25), 38, BAD_FIELD_COUNT),
}


def line_of(draw, bad_share):
    if draw.random() < bad_share / 2:
        return draw.choice(list(BAD_LINES.values()))[0]
    words = draw.choice([usual_words, unusual_words])(draw)
    while draw.random() < bad_share / 2:
        field, word, _ = draw.choice(list(BAD_WORDS.values()))
        words[field] = word
    return "\t".join(words)


def text_of(draw, num_lines, bad_share=0.0):
    """Lines of all forms, of which a share is bad."""
    lines = [
        line_of(draw, bad_share) + draw.choice(["\n"] * 9 + ["\r\n"]) for _ in range(num_lines)
    ]
    return "".join(lines).encode("latin-1")


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


@pytest.mark.parametrize("name", [*BAD_WORDS, *BAD_LINES])
def test_each_mistake_has_its_status_field_and_offsets(name):
    """It is the first line, one in the middle, and the last one among good lines."""
    draw = random.Random(1)
    good = ["\t".join(words(draw)) for words in (usual_words, unusual_words, usual_words)]
    if name in BAD_WORDS:
        field, word, status = BAD_WORDS[name]
        words = good[0].split("\t")
        words[field] = word
        line = "\t".join(words)
    else:
        line, field, status = BAD_LINES[name]
    want, counted, _ = parse("".join(f"{each}\n" for each in good).encode())
    counted[1] += 1
    for number in (0, 2, 3):
        lines = [*good[:number], line, *good[number:]]
        encoded = [f"{each}\n".encode("latin-1") for each in lines]
        begin = sum(map(len, encoded[:number]))
        rows, found, bad = parse(b"".join(encoded))
        assert bad == [(status, field, begin, begin + len(encoded[number]))]
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


@pytest.mark.parametrize(
    "status, field, line, text",
    [
        (BAD_LABEL, 0, "2" + "\t1" * 39, "column 1: got '2', expected the label 0 or 1"),
        (BAD_NUMBER, 1, "1\tx7" + "\t1" * 38, "column 2: got 'x7', expected a whole number"),
        (OUT_OF_RANGE, 13, "1\t" * 13 + "2147483648" + "\t1" * 26,
         "column 14: got '2147483648', expected a whole number of 32 bits"),
        (BAD_HEX, 39, "1\t" * 39 + "12g4\r\n",
         "column 40: got '12g4', expected hexadecimal digits"),
        (LONG_HEX, 14, "1\t" * 14 + "123456789" + "\t1" * 25,
         "column 15: got '123456789', expected at most 8 hexadecimal digits"),
        (BAD_FIELD_COUNT, 2, "1\t2\t3\n", f"3 {FIELDS}"),
        (BAD_FIELD_COUNT, 0, "\n", f"1 {FIELDS}"),
        (BAD_NUMBER, 1, "1\t" + "z" * 60 + "\t1" * 38,
         f"column 2: got '{'z' * 60}', expected a whole number"),
        (BAD_NUMBER, 1, "1\t" + "z" * 61 + "\t1" * 38,
         f"column 2: got '{'z' * 57}...', expected a whole number"),
        (BAD_NUMBER, 1, "1\t\x00\x1b[31m" + "\t1" * 38,
         "column 2: got '\\x00\\x1b[31m', expected a whole number"),
    ],
)  # fmt: skip
def test_a_bad_field_is_described_in_one_printable_line(status, field, line, text):
    """Column from 1, what it holds (60 characters at most), what was expected."""
    assert describe_bad_field(status, field, line.encode()) == text
    parsed = line.encode() if line.endswith("\n") else f"{line}\n".encode()
    assert parse(parsed)[2] == [(status, field, 0, len(parsed))]


def test_a_description_has_only_ascii():
    text = describe_bad_field(BAD_NUMBER, 1, b"1\t\xff\xc3\xa9" + b"\t1" * 38)
    assert text.isprintable() and text.isascii() and "xff" in text
