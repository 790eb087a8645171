"""Numbers, texts and lists come out of JSON as what they are; all else is a ValueError."""

import json
import math

import pytest

from checkpoints.json_values import (
    MOST,
    as_json,
    bool_of,
    list_of,
    number_of,
    numbers_of,
    object_of,
    readable,
    shown,
    text_of,
    value_of,
    whole_of,
)

HUGE = 10**400
ANY = [None, True, False, 0, 1, -1, HUGE, -HUGE, 1.5, "", "text", [], [1], {}, {"a": 1}]
TAKEN = {
    object_of: [{}, {"a": 1}],
    list_of: [[], [1]],
    text_of: ["", "text"],
    whole_of: [0, 1],
    bool_of: [True, False],
    number_of: [0, 1, -1, 1.5],
    numbers_of: [[], [1]],
}


@pytest.mark.parametrize("read", TAKEN, ids=lambda read: read.__name__)
def test_a_value_of_another_kind_is_an_error_that_names_its_key(read):
    for value in ANY:
        # True == 1, but is no number
        if any(type(value) is type(other) and value == other for other in TAKEN[read]):
            assert read({"key": value}, "key") == value
        elif value is not None or read is not number_of:
            with pytest.raises(ValueError, match="^key is ") as error:
                read({"key": value}, "key")
            assert len(str(error.value)) < 150


@pytest.mark.parametrize("read", [value_of, *TAKEN], ids=lambda read: read.__name__)
def test_a_missing_key_or_object_is_an_error(read):
    with pytest.raises(ValueError, match="^key is missing$"):
        read({"other": 1}, "key")
    for values in (None, 3, "key", ["key"]):
        with pytest.raises(ValueError, match="an object with key is expected"):
            read(values, "key")


def test_whole_numbers_have_limits():
    assert whole_of({"n": MOST}, "n") == MOST
    assert whole_of({"n": -3}, "n", highest=-1, lowest=-3) == -3
    for number, limits in [(MOST + 1, {}), (-1, {}), (5, {"highest": 4}), (2, {"lowest": 3})]:
        with pytest.raises(ValueError, match=r"expected a whole number in \["):
            whole_of({"n": number}, "n", **limits)


def test_floats_come_back_to_the_bit():
    numbers = [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, 7.0]
    found = numbers_of(json.loads(json.dumps({"n": as_json(numbers)})), "n")
    assert [number.hex() for number in found] == [number.hex() for number in numbers]


def test_nan_and_infinities_come_back_though_json_has_none():
    values = {"a": (math.nan, [math.inf, 1.5]), "b": {"c": -math.inf, "d": (2, "inf")}, "e": None}
    text = json.dumps(as_json(values), allow_nan=False)
    assert json.loads(text) == {
        "a": [None, ["inf", 1.5]], "b": {"c": "-inf", "d": [2, "inf"]}, "e": None,
    }  # fmt: skip
    found = as_json({"a": [math.nan, math.inf, -math.inf]})
    assert [str(number) for number in numbers_of(found, "a")] == ["nan", "inf", "-inf"]
    for text in ("nan", "Infinity", "1"):
        with pytest.raises(ValueError, match="expected a number"):
            number_of({"n": text}, "n")


def test_a_wrong_number_in_a_list_is_an_error():
    for number in (True, "x", [1], HUGE):
        with pytest.raises(ValueError, match="n is .*, expected a number"):
            numbers_of({"n": [1, number]}, "n")


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\nb", "a\ud800b", "a\u202eb", "x" * 61])
def test_a_text_that_a_terminal_obeys_or_that_is_long_is_not_shown_as_it_is(text):
    for found in (readable(text), shown(text)):
        assert found.isprintable() and len(found) <= 60 and found != text
        found.encode()


def test_what_is_shown_is_short():
    assert readable("emb_l.0.weight") == "emb_l.0.weight"
    assert [shown(value) for value in (None, True, 1.5, "a")] == ["None", "True", "1.5", "'a'"]
    assert [shown(value) for value in ([1] * 99, {}, HUGE)] == [
        "a list", "a dict", "a number of 1329 bits",
    ]  # fmt: skip
