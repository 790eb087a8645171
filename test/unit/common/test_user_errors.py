"""What ends a program becomes one line on stderr and an exit status."""

import functools
import os
import pickle
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL_MODEL

from common.errors import RankError, UserError, reports_errors


def end_with(error, argv=()):
    @reports_errors
    def main(argv=None):
        if error is not None:
            raise error
        return len(argv)

    return main(argv)


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("--a is\n   wrong"), "error: --a is wrong"),
        (RankError("the card is hot"), "error: the card is hot"),
        (PermissionError(13, "Permission denied", "/a/file"), "error: /a/file: Permission denied"),
        (OSError("no\nname"), "error: the output or a file: no name"),
        (MemoryError("1 TB"), "error: out of memory (1 TB): smaller batches or tables help"),
    ],
)
def test_an_error_is_one_line_and_status_2(error, line, capsys):
    assert end_with(error) == 2
    assert capsys.readouterr() == ("", line + "\n")


def test_an_interrupt_is_status_130_and_a_bug_keeps_its_traceback(capsys):
    assert end_with(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):
        end_with(ZeroDivisionError())
    assert end_with(None, ["a", "b"]) == 2, "the program's own status"


@pytest.mark.parametrize(
    "environment, is_first",
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, True),
        ({"RANK": "9", "LOCAL_RANK": "1"}, False),
        ({"RANK": "1"}, False),
        ({"RANK": "nonsense"}, False),
    ],
)
def test_what_all_ranks_find_is_printed_once_a_machine(environment, is_first, monkeypatch, capsys):
    """What one rank finds is printed by that rank, whichever it is."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert end_with(UserError("all find it")) == 2
    assert capsys.readouterr().err == ("error: all find it\n" if is_first else "")
    assert end_with(RankError("one finds it")) == 2
    assert capsys.readouterr().err == "error: one finds it\n"


@pytest.mark.parametrize("kind", [UserError, RankError])
def test_an_error_keeps_its_type_and_line_between_processes(kind):
    error = pickle.loads(pickle.dumps(kind("one line")))
    assert type(error) is kind and str(error) == "one line"


BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
run = functools.partial(subprocess.run, cwd=ROOT, env=BUFFERED, timeout=100, check=False)
NO_BOARD = "--tensor-board-filename="
MANY_LINES = [*SMALL_MODEL, "--nepochs=100", NO_BOARD]
LONG = {
    "help": ["dlrm_s_pytorch.py", "--help"],
    "training": ["dlrm_s_pytorch.py", *MANY_LINES],
    "a training with loaders": ["dlrm_s_pytorch.py", *MANY_LINES, "--num-workers=2"],
    "demo data": ["data_utils.py", "--make-demo={here}/demo", "--demo-rows=1000"],
    "help of preparation": ["data_utils.py", "--help"],
    "help of results": ["-m", "reporting.results", "--help"],
}


@pytest.mark.parametrize(
    "both", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["stdout", "both"]
)
@pytest.mark.parametrize("name", LONG)
def test_a_reader_that_has_gone_is_no_error(name, both, tmp_path):
    """As in `| head -1` and `2>&1 | head -1`, but here nobody reads at all."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *(word.format(here=tmp_path) for word in LONG[name])]
    with open(tmp_path / "errors", "w+") as errors_of_program:
        err = writer if both else errors_of_program
        done = run(command, stdout=writer, stderr=err)
        os.close(writer)
        assert done.returncode == 141
        assert (tmp_path / "errors").read_text() == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no /dev/full")
@pytest.mark.parametrize("name", ["help", "training"])
def test_an_output_that_cannot_be_written_is_one_line(name):
    command = [sys.executable, *LONG[name]]
    with open("/dev/full", "w") as full:
        done = run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the output or a file: No space left on device\n"


def test_an_error_is_said_even_if_nobody_reads_the_output():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "dlrm_s_pytorch.py", "--nepochs=0"]
    done = run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
