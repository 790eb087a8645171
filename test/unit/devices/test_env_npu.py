"""test/env_npu.sh finds CANN, makes it usable in the shell, and says what is missing."""

import shlex
import shutil
from pathlib import Path

import pytest
from conftest import ROOT, shell

SCRIPT = ROOT / "test" / "env_npu.sh"
SOURCE = f"source {shlex.quote(str(SCRIPT))}"
COMMON = shlex.quote(str(ROOT / "test" / "common.sh"))
FUNCTIONS = SCRIPT.read_text().split("\nlook_for_driver /")[0]  # what comes before the calls
LIBRARIES = ("libhccl.so", "libascendcl.so")
EXPORTS = {  # {name: (value, reason)}; other settings keep the defaults of CANN and torch_npu
    "HCCL_CONNECT_TIMEOUT": ("600", "ranks fill tables and compile before they first meet"),
}
NO_DRIVER = "CANN: the NPU's driver is not here"
without_ascend = pytest.mark.skipif(
    Path("/usr/local/Ascend").exists() or Path("/etc/Ascend").exists(), reason="Ascend is here"
)


def make_cann(folder, libraries=LIBRARIES, more=""):
    """A folder that looks like CANN; its set_env.sh reads two variables that are not set."""
    (folder / "lib64").mkdir(parents=True)
    for library in libraries:
        (folder / "lib64" / library).touch()
    (folder / "set_env.sh").write_text(
        f": $NO_SUCH_VARIABLE\nexport ASCEND_TOOLKIT_HOME={shlex.quote(str(folder))}\n"
        f"export LD_LIBRARY_PATH={shlex.quote(str(folder))}/lib64:$LD_LIBRARY_PATH\n{more}"
    )
    return folder


@pytest.fixture
def bash(tmp_path):
    """Runs a command in a shell whose only variables are HOME, PATH and the given ones."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "cat", "dirname", "env", "sed"):  # no npu-smi of this machine's
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    clean = {"HOME": tmp_path / "home", "PATH": tmp_path / "bin"}

    def run(command, **variables):
        settings = [f"{name}={value}" for name, value in (clean | variables).items()]
        return shell("env", "-i", *settings, "bash", "-c", command, "bash")

    return run


def without_driver(err):
    """The lines on stderr, less the warning that a machine without an NPU gets."""
    return [line for line in err.splitlines() if not line.startswith(NO_DRIVER)]


def test_the_places_are_looked_at_in_order(bash, tmp_path):
    home, first, second, third = (tmp_path / name for name in ("own", "a root", "b", "c"))
    names = ("cann", "ascend-toolkit", "ascend-toolkit/latest", "nnae", "")
    places = [home, *(root / name for root in (first, second, third) for name in names)]
    for place in places:
        make_cann(place)
    info = tmp_path / "install.info"
    info.write_text(f"[Toolkit]\nInstall_Path={third}\nversion=1\nInstall_Path=/elsewhere\n")
    roots = " ".join(shlex.quote(str(path)) for path in (info, first, second))
    command = f"{FUNCTIONS}\nuse_cann {roots} && echo $ASCEND_TOOLKIT_HOME"
    for place in places:
        done = bash(command, ASCEND_HOME_PATH=home)
        assert (done.returncode, done.stdout) == (0, f"{place}\n".replace("/\n", "\n"))
        (place / "set_env.sh").unlink()
    done = bash(command, ASCEND_HOME_PATH=home)
    assert done.returncode == 1 and f"under {first}, {second}, {third}: install" in done.stderr


@without_ascend
def test_what_is_looked_at_where_nothing_is_said(bash, tmp_path):
    """The message names the real roots, and a CANN below HOME is found."""
    command = f"{SOURCE} && echo $ASCEND_TOOLKIT_HOME"
    done = bash(command)
    lines = without_driver(done.stderr)
    assert done.returncode == 1 and done.stdout == "" and len(lines) == 1
    assert f"under /usr/local/Ascend, {tmp_path}/home/Ascend: install CANN or set" in lines[0]
    assert "ASCEND_HOME_PATH" in lines[0]
    make_cann(tmp_path / "home" / "Ascend" / "cann")
    done = bash(command)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/home/Ascend/cann\n")


@pytest.mark.parametrize("given", ["own", "own/latest"])
def test_ascend_home_path_wins(bash, tmp_path, given):
    """Older CANN sets it to a folder `latest` that is beside set_env.sh."""
    make_cann(tmp_path / "home" / "Ascend" / "cann")
    make_cann(tmp_path / "own")
    done = bash(f"{SOURCE}; echo $? $ASCEND_TOOLKIT_HOME", ASCEND_HOME_PATH=tmp_path / given)
    assert done.stdout == f"0 {tmp_path}/own\n" and without_driver(done.stderr) == []


def test_a_wrong_ascend_home_path_is_named_and_the_search_goes_on(bash, tmp_path):
    make_cann(tmp_path / "root" / "nnae")
    command = f"{FUNCTIONS}\nuse_cann /no/info {tmp_path}/root; echo $? $ASCEND_TOOLKIT_HOME"
    done = bash(command, ASCEND_HOME_PATH="/gone")
    assert done.stdout == f"0 {tmp_path}/root/nnae\n"
    assert done.stderr == "CANN: no set_env.sh in ASCEND_HOME_PATH=/gone: looking elsewhere\n"


@pytest.mark.parametrize("more", ["", "set -eu +u; false; export GONE_ON=1", "set +eu; return 1"])
@pytest.mark.parametrize("options", ["+eu", "-u", "-e", "-eu"])
def test_the_callers_options_come_back(bash, tmp_path, options, more):
    """The shell has its own options again, whatever set_env.sh has set and however it ends."""
    own = make_cann(tmp_path / "own", more=more)
    command = f"set {options}; echo $-; {SOURCE}; echo $-; echo ${{GONE_ON-}}"
    before, after, gone_on = bash(command, ASCEND_HOME_PATH=own).stdout.split("\n")[:3]
    assert before == after and gone_on == ("1" if "GONE_ON" in more else "")


@without_ascend
@pytest.mark.parametrize("options", ["+eu", "-eu"])
def test_a_shell_with_set_e_is_told_what_is_missing(bash, options):
    """The message is printed before a status of 1 can end the shell."""
    done = bash(f"unset HOME; set {options}; {SOURCE} || echo status $?")
    assert done.stdout == "status 1\n" and "CANN: not found" in done.stderr


def test_set_env_sees_neither_our_arguments_nor_our_input(bash, tmp_path):
    own = make_cann(tmp_path / "own", more="echo $#; cat\n")
    done = bash(f"{SOURCE} <<<input", ASCEND_HOME_PATH=own)
    assert done.stdout == "0\ninput\n"


def exported(bash, own, **variables):
    """What the script adds to the environment, less what the fake set_env.sh exports."""
    command = f"env -0; echo -n SPLIT; {SOURCE}; env -0; :"  # : or bash ends in env, one SHLVL less
    done = bash(command, ASCEND_HOME_PATH=own, **variables)
    assert done.returncode == 0, done.stderr
    before, after = (
        dict(entry.split("=", 1) for entry in text.split("\0") if entry)
        for text in done.stdout.split("SPLIT")
    )
    new = {name: value for name, value in after.items() if before.get(name) != value}
    del new["ASCEND_TOOLKIT_HOME"], new["LD_LIBRARY_PATH"]
    return new


def test_every_exported_variable_has_its_reason(bash, tmp_path):
    found = exported(bash, make_cann(tmp_path / "own"))
    assert found == {name: value for name, (value, _) in EXPORTS.items()}


@pytest.mark.parametrize("name", EXPORTS)
def test_what_the_user_has_set_stays(bash, tmp_path, name):
    assert name not in exported(bash, make_cann(tmp_path / "own"), **{name: "123"})


@pytest.mark.parametrize("missing", [LIBRARIES[:1], LIBRARIES[1:], LIBRARIES])
def test_an_incomplete_cann_is_one_line_and_status_1(bash, tmp_path, missing):
    own = make_cann(tmp_path / "own", [name for name in LIBRARIES if name not in missing])
    done = bash(f"set -u; {SOURCE}", ASCEND_HOME_PATH=own)
    lines = without_driver(done.stderr)
    assert done.returncode == 1 and len(lines) == 1
    assert lines[0].startswith(f"CANN: incomplete: after {own}/set_env.sh ")
    assert f" has {' or '.join(missing)}: " in lines[0]


def test_libraries_may_be_in_different_folders(bash, tmp_path):
    own = make_cann(tmp_path / "own", LIBRARIES[:1])
    other = make_cann(tmp_path / "other", LIBRARIES[1:])
    paths = {"ASCEND_HOME_PATH": own, "LD_LIBRARY_PATH": f"/gone:{other}/lib64"}
    assert bash(SOURCE, **paths).returncode == 0


def test_a_missing_driver_is_a_warning(bash, tmp_path):
    """A driver has a folder or npu-smi; a line says that both are missing, with status 0."""
    command = f"set -e; {FUNCTIONS}\nlook_for_driver {tmp_path}/driver"
    done = bash(command)
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"{NO_DRIVER} (neither {tmp_path}/driver nor npu-smi)")
    (tmp_path / "driver").mkdir()
    done = bash(command)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "driver").rmdir()
    (tmp_path / "bin" / "npu-smi").symlink_to(shutil.which("true"))
    done = bash(command)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@without_ascend
def test_a_missing_driver_leaves_cann_usable(bash, tmp_path):
    done = bash(SOURCE, ASCEND_HOME_PATH=make_cann(tmp_path / "own"))
    assert done.returncode == 0 and without_driver(done.stderr) == []
    assert done.stderr.startswith(f"{NO_DRIVER} (neither /usr/local/Ascend/driver nor npu-smi)")


def test_the_scripts_say_that_a_cann_is_incomplete(bash, tmp_path):
    """Nothing is said if there is no CANN at all; the scripts go on in both cases."""
    command = f"source {COMMON}; find_cann && echo found && source_cann; echo $?"
    done = bash(command, ASCEND_HOME_PATH=make_cann(tmp_path / "own", ()))
    assert done.stdout == "found\n0\n" and done.stderr.count("CANN: incomplete") == 1


@without_ascend
def test_the_scripts_pass_over_a_missing_cann_in_silence(bash):
    done = bash(f"source {COMMON}; find_cann; echo $?")
    assert (done.stdout, done.stderr) == ("1\n", "")
