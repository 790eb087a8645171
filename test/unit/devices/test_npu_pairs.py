"""The machine says which torch and torch_npu go with its CANN, and whether it has such a pair."""

import re
import shlex
import sys

import pytest
from conftest import PYTHON_FIRST, ROOT, shell, write_package
from test_env_npu import make_cann, without_ascend, without_driver

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


# ---------------------------------------------------------------- pairs


def test_the_table():
    pairs = known_pairs()
    assert len(pairs) == len(set(pairs)) and {pair.cann for pair in pairs} == set(CANNS)
    for pair in pairs:
        assert pair.torch_npu.startswith(pair.torch), "built for that torch"
    assert sum(pair.fits for pair in pairs) == 29
    canns = [pair.cann for pair in pairs]
    assert canns == sorted(canns, reverse=True), "newest first"


def test_the_recommended_pair_is_in_the_table_and_pinned():
    assert recommended() == Pair("9.1.0", "2.12.0", "2.12.0.post2")
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
            Pair(cann, torch.strip(" *"), one.strip(" *"))
            for torch, _, those in (entry.partition(":") for entry in row[1].split("·"))
            for one in those.split(",")
        }
        assert found == set(pairs_of(cann))


NUMPY_2 = "2.2.6"
KNOWN = [
    Installed("9.1.0", "2.12.0+cpu", "2.12.0.post2", NUMPY_2),
    Installed("8.5.0", "2.6.0", "2.6.0.post5", "1.26.4"),
    Installed("9.2.0", "2.14.0", "2.14.0", NUMPY_2),
]
UNKNOWN = [
    Installed("9.1.0", "2.13.0", "2.13.0", NUMPY_2),
    Installed("8.5.0", "2.9.0", "2.9.0.post8", NUMPY_2),
    Installed("8.5.1", "2.9.0", "2.9.0", NUMPY_2),
    Installed("", "2.9.0", "2.9.0", NUMPY_2),
    Installed("9.3.0", "2.9.0", "2.9.0", NUMPY_2),
    Installed("8.1.RC1", "2.6.0", "2.6.0", NUMPY_2),
    Installed("9.0.0", "", "", ""),
]


@pytest.mark.parametrize("here", [*KNOWN, *UNKNOWN], ids=str)
def test_a_pair_is_known_or_not(here):
    assert here.pair_is_known == (here in KNOWN) and here.pair.startswith("known") == (
        here in KNOWN
    )
    advice = here.advice()
    assert any("pair known" in line for line in advice) == (here in KNOWN)
    assert all(line and "\n" not in line for line in advice)


@pytest.mark.parametrize("cann", CANNS)
def test_the_advice_names_every_pair_of_a_cann_and_installs_the_newest(cann, monkeypatch):
    here = Installed(cann, "2.13.0", "", "1.26.4")
    text = "\n".join(here.advice())
    for pair in pairs_of(cann):
        assert f"torch {pair.torch} (" in text and pair.torch_npu in text
    newest = pairs_of(cann)[0]
    line = f"torch=={newest.torch} torch-npu=={newest.torch_npu}"
    assert (line in text) == newest.fits == (cann != "8.1.RC1")
    for machine, words in {
        "x86_64": "--torch-backend=cpu torch==",
        "aarch64": "pip install torch==",
    }.items():
        monkeypatch.setattr(npu_pairs.platform, "machine", lambda name=machine: name)
        assert (words in "\n".join(here.advice())) == newest.fits


def test_a_release_candidate_gets_the_pairs_of_its_release():
    first = Installed("8.3.RC2", "", "", "").advice()[0]
    assert first.startswith(
        "CANN 8.3.RC2 is not in the table; CANN 8.3.RC1 goes with torch 2.8.0 ("
    )
    (line,) = Installed("9.9.9", "", "", "").advice()
    assert "no pair is known" in line and "9.2.0" in line


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
def test_numpy_2_and_a_cann_that_wants_numpy_1(cann, numpy, breaks, warns):
    here = Installed(cann, "2.6.0", "2.6.0", numpy)
    assert bool(here.numpy_is_too_new) == breaks
    assert any("numpy<2" in line for line in here.advice()) == warns


# ---------------------------------------------------------------- as a user meets it


@pytest.fixture
def cann(tmp_path):
    """Makes a CANN of a version, of a folder layout that this version has."""

    def make(version):
        name = "cann" if version >= "8.5" else "ascend-toolkit"
        folder = make_cann(tmp_path / "home" / "Ascend" / name)
        inner = folder if name == "cann" else folder / "latest"
        with open(folder / "set_env.sh", "a") as file:
            file.write(f"export ASCEND_HOME_PATH={shlex.quote(str(inner))}\n")
        write(inner, *(text.format(version) for text in FILES["toolkit"]))
        return folder

    return make


@pytest.mark.parametrize("version", CANNS)
def test_sourcing_env_npu_names_the_pairs(version, cann, tmp_path):
    cann(version)
    packages = tmp_path / "packages"
    pair = pairs_of(version)[0]
    for name, one in (("torch", f"{pair.torch}+cpu"), ("torch_npu", pair.torch_npu)):
        write_package(packages, name, one)
    done = shell(
        "bash", "-c", f"source {ROOT}/test/env_npu.sh; echo status $? $ASCEND_HOME_PATH",
        env={"HOME": str(tmp_path / "home"), "PYTHON": sys.executable, "PYTHONPATH": str(packages)},
    )  # fmt: skip
    first, *more = without_driver(done.stderr)
    assert all(one.torch_npu in first for one in pairs_of(version))
    assert done.stdout.startswith("status 0" if pair.fits else "status 1")
    if pair.fits:
        assert first.startswith(f"CANN {version} goes with torch {pair.torch} ")
        assert more[-1].endswith("pair known") and f"torch_npu {pair.torch_npu}" in more[-1]


def test_a_python_that_is_not_there_is_no_error(cann, tmp_path):
    cann("9.1.0")
    settings = {"HOME": str(tmp_path / "home"), "PYTHON": "no-python"}
    done = shell("bash", "-c", f"source {ROOT}/test/env_npu.sh", env=settings)
    assert done.returncode == 0 and without_driver(done.stderr) == []


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
    assert "torch==2.9.0 torch-npu==2.9.0" in advice[-1]
    assert error.startswith("error: --device=npu: torch_npu is not installed")
