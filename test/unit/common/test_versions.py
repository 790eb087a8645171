"""A Python or a torch that is missing or too old is one line and status 2; newer ones are taken."""

import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, shell, write_package

from common import versions

OLD_PYTHONS = ("python3.9", "python3.8")


def run(program, python=sys.executable, **environment):
    return shell(python, *program, "--help", env=environment)


@pytest.mark.parametrize(
    "version", ["2.6.0+cpu", "2.6.0a0+df5bbc09d1.nv24.12", "2.13.0.post1", "2.16.0", "10.0"]
)
def test_newer_torches_are_taken(version, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write_package(tmp_path, "torch", version)
    versions.demand("__main__", "torch", "numpy", "numba")


@pytest.mark.parametrize("version", ["1.13.1+cpu", "2.5.1", "2.5.1+cu124"])
def test_an_old_torch_is_one_line_for_the_program_and_an_import_error_for_others(
    version, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(tmp_path)
    write_package(tmp_path, "torch", version)
    with pytest.raises(ImportError, match="torch .* is too old"):
        versions.demand("dlrm_s_pytorch", "torch")
    with pytest.raises(SystemExit) as stop:
        versions.demand("__main__", "numpy", "torch", "numba")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: torch {version} is too old: expected 2.6 or newer: ")
    assert err.count("\n") == 1 and "pip install -r" in err and "requirements.txt" in err


def test_the_program_itself_says_that_torch_is_old(tmp_path):
    write_package(tmp_path, "torch", "2.5.1")
    done = run([ROOT / "dlrm_s_pytorch.py"], PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: torch 2.5.1 is too old") and done.stderr.count("\n") == 1
    assert run([ROOT / "data_utils.py"], PYTHONPATH=str(tmp_path)).returncode == 0, "needs no torch"


@pytest.mark.parametrize("script", ["dlrm_s_pytorch.py", "data_utils.py"])
def test_a_python_without_packages_is_told_what_to_install(script):
    """-S leaves out the folder of installed packages."""
    done = run(["-S", ROOT / script])
    first = "torch" if script == "dlrm_s_pytorch.py" else "numpy"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {first} is not installed: expected ")
    assert done.stderr.count("\n") == 1


def all_packages_but(names, folder):
    """A folder in which Python finds every installed package but these."""
    for installed in (path for path in map(Path, sys.path) if path.name.endswith("-packages")):
        for path in installed.iterdir():
            if (
                path.name.partition("-")[0].lower() not in names
                and not (folder / path.name).exists()
            ):
                (folder / path.name).symlink_to(path)
    return {"PYTHONPATH": str(folder)}


@pytest.mark.parametrize("script", ["dlrm_s_pytorch.py", "data_utils.py"])
@pytest.mark.parametrize("package", ["numba", "tqdm"])
def test_a_package_that_is_missing_alone_is_named(script, package, tmp_path):
    done = run(["-S", ROOT / script], **all_packages_but([package], tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {package} is not installed: expected ")
    assert done.stderr.count("\n") == 1


OTHERS = ("sklearn", "tensorboard", "matplotlib", "mlperf_logging")


@pytest.mark.parametrize(
    "packages",
    [OTHERS, *(pytest.param([package], marks=pytest.mark.slow) for package in OTHERS)],
    ids=lambda packages: " ".join(packages),
)
def test_other_packages_are_not_needed_to_train(packages, tmp_path):
    """Without tensorboard the log has a warning, and training goes on."""
    flags = [f"--tensor-board-filename={tmp_path}/board", "--test-freq=1", "--mlperf-logging"]
    flags += ["--mlperf-events=false"] * ("mlperf_logging" in packages)
    command = [sys.executable, "-S", ROOT / "dlrm_s_pytorch.py", *flags]
    done = shell(*command, env=all_packages_but(packages, tmp_path))
    assert done.returncode == 0 and "Finished training" in done.stdout, done.stderr
    assert ("warning: no TensorBoard log" in done.stdout) == ("tensorboard" in packages)


def test_mlperfs_events_ask_for_their_package_before_data_is_prepared(tmp_path, kaggle_copy):
    before = sorted(kaggle_copy.iterdir())
    flags = [f"--data_path={kaggle_copy}", "--mlperf-logging"]
    command = [sys.executable, "-S", ROOT / "dlrm_s_pytorch.py", *flags]
    done = shell(*command, env=all_packages_but(["mlperf_logging"], tmp_path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    begin = "error: --mlperf-logging: mlperf-logging is not installed: expected 4.1 or newer: "
    assert done.stderr.startswith(begin) and "pip install -r" in done.stderr
    assert done.stderr.endswith("; or give --mlperf-events=false\n")
    assert sorted(kaggle_copy.iterdir()) == before


@pytest.mark.parametrize("script", ["dlrm_s_pytorch.py", "data_utils.py"])
def test_an_old_python_is_one_line(script):
    found = [python for python in map(shutil.which, OLD_PYTHONS) if python]
    working = [python for python in found if shell(python, "-c", "").returncode == 0]
    if not working:
        pytest.skip(f"none of {', '.join(OLD_PYTHONS)} here")
    done = run([ROOT / script], python=working[0])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: Python 3.") and done.stderr.count("\n") == 1
    assert "expected 3.10 or newer" in done.stderr


def test_an_old_python_gets_one_line_wherever_the_tests_run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(SystemExit) as stop:
        versions.demand("__main__", "torch")
    line = f"error: Python 3.9.18 is too old: expected 3.10 or newer; this one is {sys.executable}"
    assert stop.value.code == 2 and capsys.readouterr().err == line + "\n"


def test_the_reason_of_a_failing_import_stays_one_short_line():
    def import_it():
        raise TypeError("no descriptors\n" + "how to mend that: read this page " * 100)

    problem = versions.problem_of_import("numpy", import_it)
    assert "cannot be imported (TypeError: no descriptors how to mend that" in problem
    assert "\n" not in problem and len(problem) < 800
    assert versions.problem_of_import("numpy", lambda: None) == ""
