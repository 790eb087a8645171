"""The machine says which torch and torch_npu go with its CANN, and whether it has such a pair."""

import os
import re
import shlex
import sys

import pytest
from conftest import PYTHON_FIRST, ROOT, shell, write_package
from test_env_npu import SOURCE, make_cann, without_ascend, without_driver

from common.versions import release
from devices import npu_pairs
from devices.npu_pairs import Installed, Pair, cann_version, known_pairs, pairs_of, recommended

CANNS = ("8.1.RC1", "8.2.RC1", "8.3.RC1", "8.5.0", "9.0.0", "9.1.0", "9.2.0")
TOOLKIT = "package_name=Ascend-cann-toolkit\nversion={0}\ncompatible_version=[V100R001C15]\n"
# what real installations of CANN have, by version: file and content
FILES = {
    "toolkit": ("aarch64-linux/ascend_toolkit_install.info", TOOLKIT),
    "toolkit on x86": ("x86_64-linux/ascend_toolkit_install.info", TOOLKIT),
    "nnae": ("ascend_nnae_install.info", "package_name=Ascend-cann-nnae\nversion={0}\n"),
    "runtime": ("share/info/runtime/version.info", "Version={0}\nversion_dir=cann\n"),
    "operators before 8.5": (
        "opp/version.info",
        "Version=7.6.0.1.220\nversion_dir={0}\ntimestamp=20250101_000000000\n",
    ),
    "operators since 9.0": ("opp/version.info", "Version={0}\nversion_dir=cann\n"),
    "versions": (
        "version.cfg",
        "# version: 1.0\nruntime_running_version=[7.7.0.1.1:7.0]\n"
        "toolkit_running_version=[8.2.0.2.220:{0}]\n",
    ),
    "short versions": ("version.cfg", "toolkit_running_version=[{0}]\n"),
}


def write(folder, name, text):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


# ---------------------------------------------------------------- CANN's version


@pytest.mark.parametrize("cann", [*CANNS, "8.5.0.alpha002", "9.2.0-beta.2", "8.2.RC2"])
@pytest.mark.parametrize("kind", FILES)
def test_each_file_tells_the_version(kind, cann, tmp_path):
    name, text = FILES[kind]
    write(tmp_path, name, text.format(cann))
    assert cann_version(tmp_path) == cann


def test_the_toolkits_own_file_comes_first_and_the_folders_name_last(tmp_path):
    for folder in ("cann-8.5.0", "ascend-toolkit/8.2.RC1"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "cann").symlink_to(tmp_path / "cann-8.5.0")
    (tmp_path / "latest").symlink_to(tmp_path / "ascend-toolkit" / "8.2.RC1")
    assert cann_version(tmp_path / "cann") == "8.5.0"
    assert cann_version(tmp_path / "latest") == "8.2.RC1"
    for number, kind in enumerate(reversed(FILES)):
        name, text = FILES[kind]
        write(tmp_path / "cann", name, text.format(f"9.{number}"))
        if kind != "operators since 9.0":  # the same file as before 8.5, overwritten next
            assert cann_version(tmp_path / "cann") == f"9.{number}"


def test_a_folder_that_does_not_tell(tmp_path):
    write(tmp_path, "opp/version.info", "nothing of use\n")
    write(tmp_path, "version.cfg", "runtime_running_version=[8.2.0.2.220:8.2.RC2]\n")
    assert cann_version(tmp_path) == "" and cann_version(tmp_path / "gone") == ""


@pytest.mark.parametrize("text", ["Version=V100R001\n", "Version=7.8.0.1.220\n", "version=\n"])
def test_a_line_that_is_odd_tells_nothing(text, tmp_path):
    for name in ("opp/version.info", "x86_64-linux/ascend_toolkit_install.info"):
        write(tmp_path, name, text)
    (tmp_path / "version.cfg").mkdir()
    assert cann_version(tmp_path) == ""


# ---------------------------------------------------------------- pairs


def test_the_table():
    pairs = known_pairs()
    assert len(pairs) == len(set(pairs)) and {pair.cann for pair in pairs} == set(CANNS)
    assert all(pair.newest_python.startswith("3.") for pair in pairs)
    for pair in pairs:
        assert pair.torch_npu.startswith(pair.torch), "built for that torch"
    assert sum(pair.fits for pair in pairs) == 29
    canns = [release(pair.cann) for pair in pairs]
    assert canns == sorted(canns, reverse=True), "newest first"


def test_the_recommended_pair_is_in_the_table_and_pinned():
    assert recommended() == Pair("9.1.0", "2.12.0", "2.12.0.post2", "3.13")
    pins = (ROOT / "requirements-npu.txt").read_text()
    assert "\ntorch==2.12.0\ntorch-npu==2.12.0.post2\n" in pins and "npu_pairs.tsv" in pins


@pytest.mark.parametrize("page", ["npu.md", "npu.zh.md"])
def test_the_pages_have_the_tables_pairs(page):
    """`| 8.5.0 | 2.9.0: 2.9.0 · 2.8.0: 2.8.0.post2 |` for each CANN."""
    text = (ROOT / "docs" / page).read_text()
    for cann in CANNS:
        row = re.search(rf"^\| \**{re.escape(cann)}\** \| ([^|]*)\|", text, re.M)
        assert row, f"{page} lacks CANN {cann}"
        found = {
            (torch.strip(" *"), one.strip(" *"))
            for torch, _, those in (entry.partition(":") for entry in row[1].split("·"))
            for one in those.split(",")
        }
        assert found == {(pair.torch, pair.torch_npu) for pair in pairs_of(cann)}


NUMPY_2 = "2.2.6"
KNOWN = [
    Installed("9.1.0", "2.12.0+cpu", "2.12.0.post2", NUMPY_2),
    Installed("8.5.0", "2.6.0", "2.6.0.post5", "1.26.4"),
    Installed("9.2.0", "2.14.0", "2.14.0", NUMPY_2),
]
COMPATIBLE = [
    Installed("9.1.0", "2.13.0", "2.13.0", NUMPY_2),
    Installed("8.5.0", "2.9.0", "2.9.0.post8", NUMPY_2),
    Installed("8.5.1", "2.9.0+cpu", "2.9.0", NUMPY_2),
    Installed("8.3.RC2", "2.8.0", "2.8.0", NUMPY_2),
    Installed("9.3.0", "2.9.0", "2.9.0", NUMPY_2),
]
UNKNOWN = [
    Installed("9.1.0", "2.12.0", "2.12.0.post77", NUMPY_2),
    Installed("8.3.RC1", "2.9.0", "2.9.0", NUMPY_2),
    Installed("", "2.9.0", "2.9.0", NUMPY_2),
    Installed("8.1.RC1", "2.6.0", "2.6.0", NUMPY_2),
    Installed("9.0.0", "", "", ""),
]


@pytest.fixture
def python_3_11(monkeypatch):
    """All versions of torch_npu have a wheel for it."""
    monkeypatch.setattr(sys, "version_info", (3, 11, 7, "final", 0))


@pytest.mark.parametrize("here", [*KNOWN, *COMPATIBLE, *UNKNOWN], ids=str)
def test_a_pair_is_known_or_not(here, python_3_11, monkeypatch):
    """What Ascend calls compatible is not to be replaced, so no command is given."""
    monkeypatch.setattr(npu_pairs.platform, "machine", lambda: "aarch64")
    assert here.pair_is_known == (here in KNOWN) and here.pair.startswith("known") == (
        here in KNOWN
    )
    advice = here.advice()
    assert any("pair known" in line for line in advice) == (here in KNOWN)
    assert all(line and "\n" not in line for line in advice)
    if not here.cann_is_too_old:
        installs = bool(here.cann) and here in UNKNOWN
        assert advice[-1].startswith("installed: torch ")
        assert ("pip install torch==" in advice[-1]) == installs
        assert ("were released for CANN" in advice[-1]) == (
            here in COMPATIBLE or here.cann == "8.3.RC1"
        )


@pytest.mark.parametrize("torch, asks", [("2.12.0+cpu", False), ("2.12.0", True)])
def test_on_x86_a_known_pair_wants_the_build_for_the_cpu(torch, asks, python_3_11, monkeypatch):
    monkeypatch.setattr(npu_pairs.platform, "machine", lambda: "x86_64")
    last = Installed("9.1.0", torch, "2.12.0.post2", NUMPY_2).advice()[-1]
    assert "pair known" in last
    assert ("torch==2.12.0+cpu torch-npu==2.12.0.post2" in last) == asks


@pytest.mark.parametrize("cann", CANNS)
def test_the_advice_names_every_pair_of_a_cann_and_installs_the_newest(
    cann, python_3_11, monkeypatch
):
    here = Installed(cann, "2.13.0", "", "1.26.4")
    newest = pairs_of(cann)[0]
    for machine, words in {
        "x86_64": f"--torch-backend=cpu torch=={newest.torch}+cpu torch-npu=={newest.torch_npu}",
        "aarch64": f"pip install torch=={newest.torch} torch-npu=={newest.torch_npu}",
    }.items():
        monkeypatch.setattr(npu_pairs.platform, "machine", lambda name=machine: name)
        text = "\n".join(here.advice())
        for pair in pairs_of(cann):
            assert f"torch {pair.torch} (" in text and pair.torch_npu in text
        assert (words in text) == newest.fits == (cann != "8.1.RC1")


@pytest.mark.parametrize(
    "cann, python, words",
    [
        ("9.1.0", (3, 14), "no wheel for Python 3.14: expected Python 3.13 or older"),
        ("9.2.0", (3, 14), "torch-npu==2.14.0"),
        ("8.5.0", (3, 13), "no wheel for Python 3.13: expected Python 3.12 or older"),
        ("8.2.RC1", (3, 12), "no wheel for Python 3.12: expected Python 3.11 or older"),
        ("9.0.0", (3, 13), "torch-npu==2.10.0"),
        ("9.1.0", (3, 9), "Python 3.9.0 is too old: expected 3.10 or newer"),
    ],
)
def test_a_pair_has_to_have_a_wheel_for_this_python(cann, python, words, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (*python, 0, "final", 0))
    assert words in Installed(cann, "", "", "1.26.4").advice()[-1]


def test_a_release_candidate_gets_the_pairs_of_its_release():
    first = Installed("8.3.RC2", "", "", "").advice()[0]
    assert first.startswith(
        "CANN 8.3.RC2 is not in the table; CANN 8.3.RC1 goes with torch 2.8.0 ("
    )
    line, last = Installed("9.9.9", "", "", "").advice()
    assert "no pair is known" in line and "9.2.0" in line and "torch none" in last


@pytest.mark.parametrize("cann, is_old", [("8.1.RC1", True), ("8.0.0", True), ("8.2.RC1", False)])
def test_a_cann_that_is_too_old_is_one_line_with_its_pairs(cann, is_old):
    line = Installed(cann, "2.6.0", "2.6.0", "1.26.4").cann_is_too_old
    assert bool(line) == is_old
    if is_old:
        assert f"CANN {cann} is too old" in line and "expected CANN 8.2 or newer" in line
        assert ("2.5.1" in line) == (cann == "8.1.RC1") and "2.12.0.post2" in line


@pytest.mark.parametrize(
    "cann, numpy, breaks, warns",
    [
        ("8.2.RC1", "2.0.2", True, True),
        ("8.2.RC1", "1.26.4", False, False),
        ("8.3.RC1", "2.2.6", False, True),
        ("8.5.0", "2.2.6", False, True),
        ("8.5.0", "1.26.4", False, False),
        ("9.0.0", "2.2.6", False, False),
        ("", "2.2.6", False, False),
    ],
)
def test_numpy_2_and_a_cann_that_wants_numpy_1(cann, numpy, breaks, warns, python_3_11):
    here = Installed(cann, "2.6.0", "2.6.0", numpy)
    assert bool(here.numpy_is_too_new) == breaks
    assert any("numpy<2" in line for line in here.advice()) == warns


# ---------------------------------------------------------------- as a user meets it


@pytest.fixture
def cann(tmp_path):
    """Makes a CANN of a version, of a folder layout that this version has."""

    def make(version):
        name = "cann" if release(version) >= (8, 5) else "ascend-toolkit"
        folder = make_cann(tmp_path / "home" / "Ascend" / name)
        inner = folder if name == "cann" else folder / "latest"
        with open(folder / "set_env.sh", "a") as file:
            file.write(f"export ASCEND_HOME_PATH={shlex.quote(str(inner))}\n")
        write(inner, *(text.format(version) for text in FILES["toolkit"]))
        return folder

    return make


@without_ascend
@pytest.mark.parametrize("version", CANNS)
def test_sourcing_env_npu_names_the_pairs(version, cann, tmp_path):
    cann(version)
    packages = tmp_path / "packages"
    pair = pairs_of(version)[0]
    for name, one in (("torch", f"{pair.torch}+cpu"), ("torch_npu", pair.torch_npu)):
        write_package(packages, name, one)
    done = shell(
        "bash", "-c", f"{SOURCE}; echo status $? $ASCEND_HOME_PATH",
        env={"HOME": str(tmp_path / "home"), "PYTHON": sys.executable, "PYTHONPATH": str(packages)},
    )  # fmt: skip
    first, *more = without_driver(done.stderr)
    assert all(one.torch_npu in first for one in pairs_of(version))
    assert done.stdout.startswith("status 0" if pair.fits else "status 1")
    if pair.fits:
        assert first.startswith(f"CANN {version} goes with torch {pair.torch} ")
        assert more[-1].endswith("pair known") and f"torch_npu {pair.torch_npu}" in more[-1]


@without_ascend
@pytest.mark.parametrize("python", ["no-python", "false"])
def test_a_python_that_does_not_work_is_no_error(python, cann, tmp_path):
    cann("9.1.0")
    settings = {"HOME": str(tmp_path / "home"), "PYTHON": python}
    done = shell("bash", "-c", f"set -e; {SOURCE}", env=settings)
    assert done.returncode == 0 and without_driver(done.stderr) == []


@without_ascend
def test_it_does_not_matter_where_one_is(cann, tmp_path):
    """A relative Python, CDPATH and PYTHONSAFEPATH are common in shells."""
    cann("9.1.0")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    settings = {"HOME": str(tmp_path / "home"), "PYTHON": "bin/python", "PYTHONSAFEPATH": "1"}
    settings |= {"CDPATH": str(ROOT.parent), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = shell("bash", "-c", SOURCE, env=settings, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    assert without_driver(done.stderr)[0].startswith("CANN 9.1.0 goes with")


@pytest.mark.parametrize(
    "version, numpy, words",
    [
        ("8.1.RC1", "1.26.4", "CANN 8.1.RC1 is too old"),
        ("8.2.RC1", "2.1.0", "numpy 2.1.0 and CANN"),
    ],
)
def test_the_program_ends_in_one_line(version, numpy, words, cann, tmp_path):
    home = cann(version)
    write_package(tmp_path / "packages", "numpy", numpy)
    done = shell(
        sys.executable, ROOT / "dlrm_s_pytorch.py", "--use-npu", "--dry-run",
        env={"ASCEND_HOME_PATH": str(home / "latest"), "PYTHONPATH": str(tmp_path / "packages")},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --use-npu: {words}") and done.stderr.count("\n") == 1


@without_ascend
def test_a_script_installs_no_torch_where_a_torch_npu_is_missing(cann, copy, tmp_path):
    """It would be a torch that may not go with CANN, and several GB."""
    cann("8.5.0")
    settings = PYTHON_FIRST | {"HOME": str(tmp_path / "home")}
    command = ["bash", copy / "test" / "train_full_8p.sh", "--demo", "--device=npu"]
    done = shell(*command, cwd=tmp_path, env=settings)
    assert done.returncode == 2 and not (copy / ".venv").exists()
    *advice, error = without_driver(done.stderr)
    assert advice[0].startswith("CANN 8.5.0 goes with torch 2.9.0 (")
    assert advice[-1].startswith("installed: torch ")
    assert error.startswith("error: --device=npu: torch_npu is not installed beside torch 2.6")


@pytest.mark.parametrize("torch, fits", [("2.5.1", False), ("2.6.0+cpu", True)])
def test_a_torch_npu_for_an_older_torch_does_not_count(torch, fits, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    assert not npu_pairs.has_torch_npu()
    write_package(tmp_path, "torch", torch)
    (tmp_path / "torch_npu.py").touch()
    assert npu_pairs.has_torch_npu() == fits
