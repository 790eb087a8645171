"""Numbers of threads in the environment that are none are one line and status 2."""

import os
import sys

import pytest
from conftest import ROOT, shell

from common import environment, versions

NONSENSE = ["0", "-3", "abc", "1.5", "2,x", "4,", "٣", "100000", "9" * 400]


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "NUMBA_NUM_THREADS"])
@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_is_one_line(name, text, monkeypatch, capsys):
    monkeypatch.setenv(name, text)
    with pytest.raises(SystemExit) as stop:
        versions.demand("__main__", "numba")
    assert stop.value.code == 2
    line = f"error: {name}={text!r} in the environment: expected a whole number of 1 to 4096"
    assert capsys.readouterr().err == f"{line}, or no such variable\n"
    with pytest.raises(ImportError, match=f"{name}=.* in the environment"):
        versions.demand("dlrm_s_pytorch", "numba")


@pytest.mark.parametrize("text", ["1", " 2 ", "16"])
def test_numbers_are_taken(text, monkeypatch):
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, text)
    assert environment.problem_of_threads() == ""
    assert environment.num_omp_threads(default=3) == int(text)


def test_a_list_is_one_number_a_level_of_nesting(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "4,3,2")
    assert environment.problem_of_threads() == "" and environment.num_omp_threads(default=1) == 4
    monkeypatch.setenv("NUMBA_NUM_THREADS", "4,3,2")
    assert environment.problem_of_threads().startswith("NUMBA_NUM_THREADS='4,3,2'")


def test_an_empty_value_is_none(monkeypatch):
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "")
    assert environment.problem_of_threads() == ""
    assert not {"OMP_NUM_THREADS", "NUMBA_NUM_THREADS"} & set(os.environ)
    assert environment.num_omp_threads(default=3) == 3


@pytest.mark.parametrize("script", ["dlrm_s_pytorch.py", "data_utils.py"])
@pytest.mark.parametrize("setting", ["NUMBA_NUM_THREADS=0", "OMP_NUM_THREADS=abc"])
def test_the_programs_say_it_before_a_library_does(script, setting):
    name, _, text = setting.partition("=")
    done = shell(sys.executable, ROOT / script, "--help", env={name: text})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {name}={text!r}") and done.stderr.count("\n") == 1
