"""The state of a stream of random numbers survives JSON and a loader's pickle, and is checked."""

import json
import pickle

import numpy as np
import pytest

from common.bag_kernels import Normal, Size, draw_gaussian, start_stream
from common.draw_state import NUM_WORDS, DrawState


def draw_normals(stream, num_numbers):
    values, lengths = np.empty((1, num_numbers)), np.empty(1, np.int32)
    draw_gaussian(stream, Size(num_numbers, True), Normal(0.0, 1.0, -9.0, 9.0), values, lengths)
    return values[0].tolist()


def through_json(state):
    return DrawState.from_json(json.loads(json.dumps(state.to_json())))


def through_pickle(state):
    return pickle.loads(pickle.dumps(state))


@pytest.mark.parametrize("copy", [through_json, through_pickle])
@pytest.mark.parametrize("num_drawn", [0, 1, 2, 777])
def test_a_stream_goes_on_from_its_state(copy, num_drawn):
    """Normal numbers come in pairs: after an odd number of them one is left."""
    stream = start_stream(5)
    draw_normals(stream, num_drawn)
    state = DrawState.of_stream(stream, 3)
    assert copy(state) == state and state.number == 3
    assert state.has_normal == (num_drawn % 2 == 1)
    want = draw_normals(stream, 2001), stream.random.random(700).tolist()
    for _ in range(2):  # the state does not change as its stream is drawn from
        other = copy(state).stream()
        assert (draw_normals(other, 2001), other.random.random(700).tolist()) == want


def test_a_state_in_json_is_small():
    text = json.dumps(DrawState.of_stream(start_stream(5), 3).to_json())
    assert len(text) < 3500


GOOD = DrawState.of_stream(start_stream(5), 3).to_json()
ZEROS = "A" * (4 * NUM_WORDS * 4 // 3)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"number": -1}, "number: expected one from 0 on"),
        ({"number": 1.0}, "number: expected one from 0 on"),
        ({"key": 5}, "key: expected base64"),
        ({"key": "é"}, "key: expected base64"),
        ({"key": GOOD["key"][:-1]}, "key: expected base64"),
        ({"key": "!" + GOOD["key"]}, "key: expected base64"),
        ({"key": GOOD["key"][:-4]}, "key: expected 624 words"),
        ({"key": ZEROS}, "key: expected 624 words, not all 0"),
        ({"position": NUM_WORDS + 1}, "position: expected one from 0 to 624"),
        ({"position": True}, "position: expected one from 0 to 624"),
        ({"has_normal": 1}, "has_normal: expected true or false"),
        ({"normal": float("inf")}, "normal: expected a finite number"),
        ({"normal": "0"}, "normal: expected a finite number"),
        ({"more": 0}, "expected has_normal, key, normal, number, position"),
    ],
)
def test_a_state_that_cannot_be_is_refused(change, words):
    with pytest.raises(ValueError, match=f"^state of random data.*{words}"):
        DrawState.from_json(GOOD | change)


@pytest.mark.parametrize("value", [None, [], {}, "state", {"number": 0}])
def test_what_is_no_state_is_refused(value):
    with pytest.raises(ValueError, match="^state of random data: expected has_normal, key"):
        DrawState.from_json(value)
