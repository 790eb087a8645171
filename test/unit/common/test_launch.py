"""The launcher's variables as one record."""

import pytest

from common.errors import RankError
from common.launch import Launch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def launch(monkeypatch, *values):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in zip(NAMES, values, strict=False):
        monkeypatch.setenv(name, value)
    return Launch.from_environment()


def test_a_process_without_a_launcher_is_alone(monkeypatch):
    assert launch(monkeypatch) == Launch() == Launch(0, 1, 0, 1)


def test_torchruns_variables_are_the_record(monkeypatch):
    assert launch(monkeypatch, "5", "8", "1", "4") == Launch(5, 8, 1, 4)
    assert launch(monkeypatch, "1", "2", "1", "0").local_world_size == 1


@pytest.mark.parametrize(
    "values, message",
    [
        (("3", "1"), "RANK=3 with WORLD_SIZE=1: expected 0 to 0"),
        (("-1", "4"), "RANK=-1 with WORLD_SIZE=4: expected 0 to 3"),
        (("0", "x"), "WORLD_SIZE='x' in the environment: expected a whole number"),
        (("0", "1", ""), "LOCAL_RANK='' in the environment: expected a whole number"),
    ],
)
def test_a_wrong_variable_is_named(values, message, monkeypatch):
    with pytest.raises(RankError) as caught:
        launch(monkeypatch, *values)
    assert str(caught.value) == message
