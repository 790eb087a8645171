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
    OK,
    OUT_OF_RANGE,
    _parse_any_line,
    _parse_usual_line,
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
    """(rows, counted, bad lines) as `parse` gives them."""
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
    """A line as nearly all of Criteo's are."""
    integers = [
        draw.choice(["", str(draw.randrange(-2, 10 ** draw.randint(1, 9)))]) for _ in range(13)
    ]
    categories = ["".join(draw.choices(HEX, k=8)) for _ in range(26)]
    categories = [word if draw.random() < 0.8 else "" for word in categories]
    return [draw.choice("01"), *integers, *categories]


def unusual_integer(draw):
    return draw.choice(
        ["", "0", "-0", "-1", "00000", "0000000000000007", "-000000000012", "2147483647"]
        + ["-2147483648", "1000000000", "0002147483647", "999999999", "-999999999"]
        + [str(draw.randrange(10**9, 2**31)), str(-draw.randrange(10**9, 2**31))]
    )


def unusual_category(draw):
    word = "".join(draw.choices(HEX + HEX.upper(), k=draw.randint(0, 8)))
    return draw.choice([word, word, word, "ffffffff", "80000000", "7FFFFFFF", "0", "00000000"])


def unusual_words(draw):
    """A line that is right all the same: usual but for some of its fields."""
    words = usual_words(draw)
    share = draw.choice([0.05, 0.9])
    for field in range(40):
        if draw.random() < share:
            words[field] = (
                draw.choice(["0", "1", "", "-0", "00", "0001", "00000000000"])
                if field == 0
                else unusual_integer(draw)
                if field < 14
                else unusual_category(draw)
            )
    return words


BAD_WORDS = {
    "label 2": (0, "2", BAD_LABEL),
    "label -1": (0, "-1", BAD_LABEL),
    "label 10 digits": (0, "1000000000", BAD_LABEL),
    "label minus": (0, "-", BAD_NUMBER),
    "label letter": (0, "a", BAD_NUMBER),
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
    "23 digits": (2, "99999999999999999999999", OUT_OF_RANGE),
    "-23 digits": (2, "-99999999999999999999999", OUT_OF_RANGE),
    "2^64": (2, "18446744073709551616", OUT_OF_RANGE),
    "2^64 and 1 label": (0, "18446744073709551617", OUT_OF_RANGE),
    "g": (14, "12g4", BAD_HEX),
    "g among 8": (39, "1234567g", BAD_HEX),
    "minus in hex": (20, "-1234567", BAD_HEX),
    "0x": (20, "0x123456", BAD_HEX),
    "not ASCII": (20, "1234\xe9567", BAD_HEX),
    "9 digits": (14, "123456789", LONG_HEX),
    "9 digits in the last": (39, "000000001", LONG_HEX),
    "40 digits": (27, "f" * 40, LONG_HEX),
    "long and no hex": (27, "f" * 40 + "g", BAD_HEX),
}  # fmt: skip
BAD_LINES = {
    "39 fields": ("\t".join(["1"] * 39), 38, BAD_FIELD_COUNT),
    "41 fields": ("\t".join(["1"] * 41), 39, BAD_FIELD_COUNT),
    "3 fields": ("0\t2\t3", 2, BAD_FIELD_COUNT),
    "empty": ("", 0, BAD_FIELD_COUNT),
    "return only": ("\r", 0, BAD_FIELD_COUNT),
    "40 tabs": ("\t" * 40, 39, BAD_FIELD_COUNT),
    "38 tabs": ("\t" * 38, 38, BAD_FIELD_COUNT),
    "200 tabs": ("\t" * 200, 39, BAD_FIELD_COUNT),
    "a comma's table": (",".join(["1"] * 40), 0, BAD_FIELD_COUNT),
    "zero bytes": ("\0" * 300, 0, BAD_FIELD_COUNT),
    "usual with a field more": ("1\t" * 14 + "\t".join(["0123abcd"] * 27), 39, BAD_FIELD_COUNT),
    "usual with a tab more": ("1\t" * 14 + "0123abcd\t" * 26, 39, BAD_FIELD_COUNT),
    "usual with a field less": ("1\t" * 14 + "\t".join(["0123abcd"] * 25), 38, BAD_FIELD_COUNT),
}  # fmt: skip


def bad_line(draw):
    """A bad line of any kind; a usual or an unusual one before its mistake."""
    if draw.random() < 0.4:
        return draw.choice(list(BAD_LINES.values()))[0]
    words = draw.choice([usual_words, unusual_words])(draw)
    for _ in range(draw.choice([1, 1, 2])):
        field, word, _ = draw.choice(list(BAD_WORDS.values()))
        words[field] = word
    return "\t".join(words)


def text_of(draw, number, bad_share=0.0, usual_share=0.5, returns=0.1):
    lines = []
    for _ in range(number):
        if draw.random() < bad_share:
            line = bad_line(draw)
        else:
            usual = draw.random() < usual_share
            line = "\t".join(usual_words(draw) if usual else unusual_words(draw))
        lines.append(line + ("\r\n" if draw.random() < returns else "\n"))
    return "".join(lines).encode("latin-1")


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("modulo", MODULOS)
def test_random_lines_are_parsed_as_by_hand(modulo):
    """Usual and unusual lines between each other: values, clicks, missing values of each field."""
    draw = random.Random(modulo)
    text = text_of(draw, 1500)
    assert_parsed_as_by_hand(text, modulo)
    assert parse(text, modulo)[2] == []


@pytest.mark.parametrize("modulo", [0, 2**32])
def test_no_limit_is_the_same_however_it_is_said(modulo):
    text = text_of(random.Random(3), 200)
    found, want = parse(text, modulo), parse(text, -1)
    np.testing.assert_array_equal(found[0], want[0])
    assert found[1:] == want[1:]


@pytest.mark.parametrize("modulo", [-1, 10_000_000])
@pytest.mark.parametrize("bad_share", [0.0, 0.3])
def test_dropped_lines_are_counted_but_only_rows_of_label_0_are_dropped(modulo, bad_share):
    """Bad lines have a number in `drop` too."""
    draw = random.Random(5)
    text = text_of(draw, 800, bad_share)
    drop = [draw.random() < 0.6 for _ in range(800)]
    assert_parsed_as_by_hand(text, modulo, drop)
    whole, dropped = parse(text, modulo), parse(text, modulo, drop)
    assert dropped[1][1:] == whole[1][1:] and dropped[1][0] < whole[1][0]
    assert dropped[0][:, 0].sum() == whole[0][:, 0].sum() == dropped[1][2], "no click is dropped"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bad_lines_between_good_ones_are_named_and_passed_over(seed):
    """Lines of random mistakes: place, kind and field of each; the good ones are all there."""
    draw = random.Random(seed)
    text = text_of(draw, 1200, bad_share=draw.choice([0.05, 0.5]), usual_share=0.7)
    assert_parsed_as_by_hand(text, draw.choice(MODULOS))
    assert {status for status, *_ in parse(text)[2]} == set(BAD_KINDS)


@pytest.mark.parametrize("kind", ["usual", "unusual"])
@pytest.mark.parametrize("name", [*BAD_WORDS, *BAD_LINES])
def test_each_mistake_has_its_status_field_and_place(name, kind):
    """Alone among good lines, in the first, a middle and the last place."""
    draw = random.Random(1)
    good = ["\t".join((usual_words if kind == "usual" else unusual_words)(draw)) for _ in range(4)]
    if name in BAD_WORDS:
        field, word, status = BAD_WORDS[name]
        words = good[0].split("\t")
        words[field] = word
        line = "\t".join(words)
    else:
        line, field, status = BAD_LINES[name]
    want, counted, _ = parse("".join(f"{each}\n" for each in good).encode())
    counted[1] += 1
    for place in (0, 2, 4):
        lines = [*good[:place], line, *good[place:]]
        encoded = [f"{each}\n".encode("latin-1") for each in lines]
        begin = sum(map(len, encoded[:place]))
        rows, found, bad = parse(b"".join(encoded))
        assert bad == [(status, field, begin, begin + len(encoded[place]))]
        np.testing.assert_array_equal(rows, want)
        assert found == counted, "a bad line counts as a line only"


def test_forty_empty_fields_are_a_row_of_zeros():
    for end in (b"\n", b"\r\n"):
        rows, counted, bad = parse(b"\t" * 39 + end)
        assert not bad and rows.tolist() == [[0] * 40]
        assert counted == [1, 1, 0, *[1] * 40]


def test_a_bad_line_alone_and_no_line_at_all():
    rows, counted, bad = parse(b"\n")
    assert len(rows) == 0 and counted == [0, 1, *[0] * 41] and bad == [(BAD_FIELD_COUNT, 0, 0, 1)]
    rows, counted, bad = parse(b"")
    assert len(rows) == 0 and counted == [0] * 43 and bad == []


def test_extreme_values_come_out_as_documented():
    words = ["1", "2147483647", "-2147483648", "-0", "007", "", *["1"] * 8]
    words += ["ffffffff", "FFFFFFFF", "80000000", "7fffffff", "f", "", *["0"] * 20]
    text = ("\t".join(words) + "\n").encode()
    row = parse(text)[0][0].tolist()
    assert row[:6] == [1, 2**31 - 1, 0, 0, 7, 0]
    assert row[14:20] == [-1, -1, -(2**31), 2**31 - 1, 15, 0]
    row = parse(text, 2**31 + 11)[0][0].tolist()
    assert row[14:20] == [2**31 - 12, 2**31 - 12, -(2**31), 2**31 - 1, 15, 0]
    assert parse(text, 7)[0][0].tolist()[14:20] == [v % 7 for v in (2**32 - 1, 2**32 - 1, 2**31,
                                                                   2**31 - 1, 15, 0)]  # fmt: skip


@pytest.mark.parametrize("modulo", MODULOS)
def test_the_way_for_usual_lines_and_the_way_for_all_agree(modulo):
    """Each usual line by both ways: columns, missing fields, where the next line begins."""
    draw = random.Random(7)
    limit = max(modulo, 0) if modulo < 2**32 else 0  # as parse_lines passes it on
    for line in text_of(draw, 150, usual_share=1.0, returns=0.0).splitlines(keepends=True):
        text = np.frombuffer(line, np.uint8)
        columns, missing = np.zeros((2, 40, 1), np.int32), np.zeros((2, 40), np.int64)
        ends = _parse_usual_line(text, 0, columns[0], 0, limit, missing[0])
        status, _, end = _parse_any_line(text, 0, columns[1], 0, limit, missing[1])
        assert status == OK and ends == end == len(line)
        np.testing.assert_array_equal(columns[0], columns[1])
        np.testing.assert_array_equal(missing[0], missing[1])


def otherwise(word, field, draw):
    """The same field in a form that usual lines do not have."""
    if not word:
        return word
    if field < 14:
        return "-" * word.startswith("-") + "0" * draw.randint(9, 12) + word.removeprefix("-")
    return draw.choice([word.upper(), word.lstrip("0") or "0"])


@pytest.mark.parametrize("modulo", MODULOS)
def test_rows_are_the_same_in_usual_and_in_unusual_form(modulo):
    """Leading zeros, upper case, short hexadecimal numbers and carriage returns change nothing."""
    draw = random.Random(11)
    rows = [usual_words(draw) for _ in range(300)]
    usual = "".join("\t".join(row) + "\n" for row in rows).encode()
    want = parse(usual, modulo)
    assert want[2] == []
    forms = [
        usual.replace(b"\n", b"\r\n"),
        usual.upper(),
        "".join(
            "\t".join(otherwise(word, field, draw) for field, word in enumerate(row)) + "\n"
            for row in rows
        ).encode(),
    ]
    for text in forms:
        assert text != usual
        found = parse(text, modulo)
        np.testing.assert_array_equal(found[0], want[0])
        assert found[1:] == want[1:]


def test_rows_are_appended_and_numbers_of_lines_go_on():
    """Two texts one after the other into the same arrays are the two as one text."""
    draw = random.Random(13)
    texts = [text_of(draw, 90), text_of(draw, 110)]
    drop = np.array([draw.random() < 0.5 for _ in range(200)])
    columns, counted = np.zeros((40, 200), np.int32), np.zeros(43, np.int64)
    for text in texts:
        as_array = np.frombuffer(text, np.uint8)
        found = parse_lines(as_array, 0, columns, 7, drop, counted)
        assert found == (OK, 0, 0, len(text))
    rows, want, _ = by_hand(b"".join(texts), 7, drop)
    np.testing.assert_array_equal(columns[:, : counted[0]].T, rows)
    assert counted.tolist() == want


def test_parsing_begins_where_it_is_told():
    text = text_of(random.Random(17), 20)
    start = len(b"".join(text.splitlines(keepends=True)[:5]))
    columns, counted = np.zeros((40, 15), np.int32), np.zeros(43, np.int64)
    parse_lines(np.frombuffer(text, np.uint8), start, columns, 0, np.zeros(0, bool), counted)
    np.testing.assert_array_equal(columns.T, by_hand(text[start:], -1, ())[0])


def test_written_rows_are_parsed_back():
    random_ = np.random.default_rng(19)
    numbers = random_.integers(-(2**31), 2**31, (300, 14)) // 10 ** random_.integers(
        0, 10, (300, 14)
    )
    numbers[:, 0] = random_.integers(0, 2, 300)
    categories = random_.integers(0, 2**32, (300, 26)).astype(np.uint32)
    missing = random_.random((300, 40)) < 0.3
    text = np.empty(400 * 300, np.uint8)
    size = write_rows(numbers, categories, missing, text)
    rows, counted, bad = parse(text[:size].tobytes())
    want = np.concatenate([np.maximum(numbers, 0), categories.view(np.int32)], axis=1)
    np.testing.assert_array_equal(rows, np.where(missing, 0, want))
    assert not bad and counted[3:] == missing.sum(0).tolist()


@pytest.mark.parametrize(
    "status, field, line, text",
    [
        (BAD_LABEL, 0, "2" + "\t1" * 39, "column 1: got '2', expected the label 0 or 1"),
        (BAD_NUMBER, 1, "1\tx7" + "\t1" * 38, "column 2: got 'x7', expected a whole number"),
        (BAD_NUMBER, 5, "1\t" * 5 + "-" + "\t1" * 34,
         "column 6: got '-', expected a whole number"),
        (OUT_OF_RANGE, 13, "1\t" * 13 + "2147483648" + "\t1" * 26,
         "column 14: got '2147483648', expected a whole number of 32 bits"),
        (BAD_HEX, 39, "1\t" * 39 + "12g4\r\n",
         "column 40: got '12g4', expected hexadecimal digits"),
        (LONG_HEX, 14, "1\t" * 14 + "123456789" + "\t1" * 25,
         "column 15: got '123456789', expected at most 8 hexadecimal digits"),
        (BAD_FIELD_COUNT, 2, "1\t2\t3\n",
         "3 tab-separated fields, expected 40 (label, 13 integers, 26 hex strings)"),
        (BAD_FIELD_COUNT, 0, "\n",
         "1 tab-separated fields, expected 40 (label, 13 integers, 26 hex strings)"),
        (BAD_FIELD_COUNT, 39, "\t" * 40 + "\n",
         "41 tab-separated fields, expected 40 (label, 13 integers, 26 hex strings)"),
        (BAD_NUMBER, 1, "1\t" + "z" * 60 + "\t1" * 38,
         f"column 2: got '{'z' * 60}', expected a whole number"),
        (BAD_NUMBER, 1, "1\t" + "z" * 61 + "\t1" * 38,
         f"column 2: got '{'z' * 57}...', expected a whole number"),
    ],
)  # fmt: skip
def test_a_bad_field_is_described(status, field, line, text):
    """Column from 1, what it holds (60 characters at most), what was expected."""
    assert describe_bad_field(status, field, line.encode()) == text
    parsed = line.encode() if line.endswith("\n") else f"{line}\n".encode()
    assert parse(parsed)[2] == [(status, field, 0, len(parsed))]


def test_a_description_is_one_printable_line():
    line = b"1\t\x00\xff\x1b[31m\xc3\xa9" + b"\t1" * 38
    text = describe_bad_field(BAD_NUMBER, 1, line)
    assert text.isprintable() and text.isascii() and "xff" in text
