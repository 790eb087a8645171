"""MLPerf's submission lines come from flags, else the environment; mistakes end a run early."""

import os
import sys

import pytest
from conftest import CRITEO_MODEL, SMALL_MODEL, train
from test_mlperf_log import events_of, values_of

WHAT = ("org", "division", "status", "platform")
FLAGS = "--mlperf-org=me --mlperf-division=closed --mlperf-status=cloud --mlperf-platform=here"
VARIABLES = {
    "MLPERF_ORG": "other",
    "MLPERF_DIVISION": "closed",
    "MLPERF_STATUS": "preview",
    "MLPERF_PLATFORM": " there ",
}
LOGGED = [*SMALL_MODEL, "--num-batches=1", "--mlperf-logging"]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def told(*flags):
    result = train(*LOGGED, *flags)
    assert result.status == 0, result.err
    events = events_of(result.out)
    (found,) = zip(*(values_of(events, f"submission_{what}") for what in WHAT), strict=True)
    return found


def test_flags_come_before_the_environment_and_that_before_defaults(monkeypatch):
    assert told() == ("none (this run is no MLPerf submission)", "open", "onprem", "1 x CPU")
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert told() == ("other", "closed", "preview", "there")
    assert told(*FLAGS.split()) == ("me", "closed", "cloud", "here")
    monkeypatch.setenv("MLPERF_ORG", "")
    assert told("--mlperf-division=open")[:2] == (
        "none (this run is no MLPerf submission)",
        "open",
    )


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--mlperf-org=", "--mlperf-org='' is empty: expected a name"),
        ("--mlperf-platform= ", "--mlperf-platform=' ' is empty: expected a name"),
        ("--mlperf-division=half", "choose from 'open', 'closed'"),
        ("--mlperf-status=lab", "choose from 'onprem', 'cloud', 'preview', 'research'"),
    ],
)
def test_a_wrong_flag_is_one_line(flag, message):
    result = train(*LOGGED, flag)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("error: ") and message in result.err


@pytest.mark.parametrize("name", ["MLPERF_DIVISION", "MLPERF_STATUS"])
def test_a_wrong_word_in_the_environment_is_one_line_if_it_is_used(name, monkeypatch):
    monkeypatch.setenv(name, "lab")
    result = train(*LOGGED)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith(f"error: {name}='lab' in the environment: expected o")
    assert train(*LOGGED, f"--{name.lower()}={'open' if 'DIV' in name else 'cloud'}").status == 0
    assert train(*SMALL_MODEL, "--num-batches=1").status == 0


def test_a_package_that_cannot_be_imported_is_one_line_before_data_is_prepared(
    kaggle_copy, monkeypatch
):
    for name in [name for name in sys.modules if name.startswith("mlperf_logging")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlperf_logging", None)
    before = os.listdir(kaggle_copy)
    result = train(*CRITEO_MODEL, f"--data_path={kaggle_copy}")
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("error: --mlperf-logging: mlperf-logging 4.")
    assert " cannot be imported (ModuleNotFoundError: " in result.err
    assert os.listdir(kaggle_copy) == before
