"""Random numbers go on where they were; a state that is none changes no generator."""

import base64
import copy
import json

import numpy as np
import pytest
import torch

from checkpoints.generators import generators_as_json, restore_generators


def draw():
    """Some numbers of both generators, in all their kinds."""
    return (
        np.random.rand(3).tolist(),
        np.random.randn(3).tolist(),  # three: numpy keeps the fourth
        np.random.randint(1000, size=5).tolist(),
        torch.rand(3).tolist(),
        torch.randn(17).tolist(),
        torch.randperm(9).tolist(),
    )


@pytest.fixture(autouse=True)
def seeded():
    numpys, torchs = np.random.get_state(), torch.get_rng_state()
    np.random.seed(5)
    torch.manual_seed(6)
    yield
    np.random.set_state(numpys)
    torch.set_rng_state(torchs)


@pytest.mark.parametrize("num_draws", [0, 1, 2, 300])
def test_numbers_go_on(num_draws):
    for _ in range(num_draws):
        draw()
    values = json.loads(json.dumps(generators_as_json(), allow_nan=False))
    wanted = [draw() for _ in range(3)]
    np.random.seed(1)
    torch.manual_seed(1)
    restore_generators(values)
    assert [draw() for _ in range(3)] == wanted


def test_asking_draws_nothing():
    wanted = draw()
    np.random.seed(5)
    torch.manual_seed(6)
    generators_as_json()
    assert draw() == wanted


def text_of(num_bytes):
    return base64.b64encode(bytes(num_bytes)).decode()


WRONG = {
    "numpy": [None, [], "x", 1],
    "numpy.words": [None, 3, [], "", "no base64", "ä", "\ud800", text_of(4), text_of(623 * 4),
                    text_of(624 * 4 + 1), text_of(624 * 8)],
    "numpy.position": [None, -1, 625, 10**400, 1.0, True, "1"],
    "numpy.has_normal": [None, -1, 2, 10**400, True, 1.0],
    "numpy.normal": [None, "x", [], True, 10**400],
    "torch": [None, 3, [], "", "no base64", "ä", text_of(4), text_of(5056), text_of(5060),
              base64.b64encode(b"\xff" * 5056).decode()],
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_a_value_that_is_none_is_an_error_and_changes_nothing(key):
    values, wanted = generators_as_json(), draw()
    restore_generators(values)
    for wrong in WRONG[key]:
        crafted = copy.deepcopy(values)
        *above, last = key.split(".")
        (crafted[above[0]] if above else crafted)[last] = wrong
        with pytest.raises(ValueError, match=last):
            restore_generators(crafted)
        del (crafted[above[0]] if above else crafted)[last]
        with pytest.raises(ValueError, match=f"{last} is missing"):
            restore_generators(crafted)
    for values in (None, [], "text"):
        with pytest.raises(ValueError):
            restore_generators(values)
    assert draw() == wanted
