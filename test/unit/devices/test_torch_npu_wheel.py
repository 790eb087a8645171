"""torch_npu has what the program and the emulation take from it, and fails as expected.

test/signatures_of_torch_npu.tsv holds the names of several versions, test/operators.tsv what they
have kernels for. They are compared with the wheels that lie in .wheels, and the program runs beside
the content of one.
"""

import inspect
import platform
import shutil
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from conftest import RELEASE, ROOT, SMALL_MODEL, losses_of, shell

from devices.npu import npu_versions
from devices.npu_pairs import recommended

sys.path.insert(0, str(ROOT / "test"))
import kernels_of_torch_npu as kernels
import signatures_of_torch_npu as signatures
from tables_of_torch_npu import read, version_of

VERSION = "2.13.0"  # the emulation's
COLUMNS = read(signatures.TABLE)
PYTHON = f"-cp{sys.version_info.major}{sys.version_info.minor}-"
NO_CANN = {"LD_LIBRARY_PATH": ""}
GET_ONE = "pip download --no-deps --dest .wheels torch-npu=="


def wheels():
    return sorted((ROOT / ".wheels").glob("torch_npu-*.whl"))


@pytest.fixture(scope="module")
def wheel():
    found = [path for path in wheels() if version_of(path) == VERSION]
    if not found:
        pytest.skip(f"no wheel: {GET_ONE}{VERSION}")
    return max(found, key=lambda path: PYTHON in path.name)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder for PYTHONPATH with the wheel's content, as pip installs it."""
    if PYTHON not in wheel.name or platform.machine() not in wheel.name:
        pytest.skip(f"{wheel.name} is for another Python or platform")
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


# ---------------------------------------------------------------- names


def agree(ours, theirs):
    """Is the emulation's description the real one, or the beginning of it and **kwargs?"""
    beginning, has_kwargs, _ = ours.partition(", **kwargs")
    return ours == theirs or theirs == "outside" or (has_kwargs and theirs.startswith(beginning))


def test_the_emulation_has_only_what_the_real_one_has():
    found, real = signatures.emulated(), COLUMNS[VERSION]
    assert len(found) > 50
    assert [(name, ours) for name, ours in found.items() if not agree(ours, real[name])] == []


def test_the_table_has_the_names_of_the_emulation_and_the_program():
    for column in COLUMNS.values():
        assert list(column) == signatures.names_of_lines()
        assert signatures.NOT_LOOKED_AT not in column.values()


@pytest.mark.parametrize("version", COLUMNS)
def test_the_table_is_the_wheels(version):
    found = [path for path in wheels() if version_of(path) == version]
    if not found:
        pytest.skip(f"no wheel: {GET_ONE}{version}")
    assert signatures.column_of(found[0]) == COLUMNS[version]


def function_of(signature):
    return inspect.signature(eval(f"lambda {signature[1:-1]}: 0", {"required": None}))


def problems_of(uses, column):
    """What a program's uses take from torch_npu that a column of the table does not have."""
    problems = set()
    for name, calls in uses.items():
        if column.get(name, "missing") == "missing":
            problems.add(f"{name}: missing")
        elif column[name].startswith("("):
            for call in calls:
                try:
                    keywords = {one.arg: 0 for one in call.keywords}
                    function_of(column[name]).bind(*call.args, **keywords)
                except TypeError as error:
                    problems.add(f"{name}: {error}")
    return problems


@pytest.mark.parametrize("version", COLUMNS)
def test_what_the_program_uses_is_in_each_version(version):
    uses = signatures.program_uses()
    assert len(uses) > 30
    assert problems_of(uses, COLUMNS[version]) == set()


@pytest.mark.parametrize("version", COLUMNS)
def test_each_version_has_the_names_of_the_emulation(version):
    assert [name for name, cell in COLUMNS[version].items() if cell == "missing"] == []


# what the program leaves out of its calls, and relies on
DEFAULTS = {
    "torch_npu.optim.NpuFusedSGD": {
        "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False,
    },
    "torch_npu.optim.NpuFusedSGD.zero_grad": {"set_to_none": False},
    "torch_npu.npu.Stream": {"device": None, "priority": 0},
    "torch_npu.npu.Event": {"enable_timing": False, "blocking": False, "interprocess": False},
    "torch_npu.npu.current_stream": {"device": None},
    "torch_npu.profiler.schedule": {"skip_first": 0},
    "torch_npu.profiler.profile": {"record_shapes": False, "with_stack": False, "use_cuda": None},
    "torch_npu.profiler.tensorboard_trace_handler": {"analyse_flag": True, "async_mode": False},
}  # fmt: skip


@pytest.mark.parametrize("version", COLUMNS)
def test_the_defaults_are_those_that_the_program_counts_on(version):
    for name, defaults in DEFAULTS.items():
        parameters = function_of(COLUMNS[version][name]).parameters
        assert {key: parameters[key].default for key in defaults} == defaults, name


def test_versions_that_cann_does_not_tell_are_unknown(monkeypatch):
    def refuse(module):
        raise RuntimeError(module)

    utils = SimpleNamespace(get_cann_version=refuse)
    real = SimpleNamespace(__version__="2.6.0", npu=SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "torch_npu", real)
    found = npu_versions()
    assert found.pop("pair").startswith("unknown")
    assert found == {"torch_npu": "2.6.0", "CANN": "unknown", "driver": "unknown"}


MISTAKES = {
    "torch.get_device_module('npu').made_up()": "torch_npu.npu.made_up: missing",
    "m = torch.get_device_module(kind)\nm.set_device()": "missing a required argument: 'device'",
    "m = importlib.import_module('torch_npu')\nm.optim.NpuFusedSGD(p, rate=1)": "'rate'",
    "self._m = importlib.import_module('torch_npu')\nself._m.npu.utils.gone": "utils.gone: missing",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_use_that_the_real_one_lacks_is_found(text):
    for column in COLUMNS.values():
        (problem,) = problems_of(signatures.uses_of(text), column)
        assert MISTAKES[text] in problem


def test_the_pair_that_is_pinned_is_in_the_table():
    assert recommended().torch_npu in COLUMNS


# ---------------------------------------------------------------- kernels


def test_the_operators_are_of_the_same_versions():
    assert read(kernels.TABLE).keys() == COLUMNS.keys()


def test_the_operators_are_the_wheels():
    """Wheels that go with the torch that is here are imported beside libraries without code."""
    known = [path for path in wheels() if version_of(path) in COLUMNS]
    reasons = {path: kernels.why_not(path) for path in known}
    fit = [path for path, reason in reasons.items() if not reason]
    if not fit:
        reason = next(iter(reasons.values()), "no wheel")
        pytest.skip(f"{reason}; one that fits: {GET_ONE}{RELEASE}")
    for path in fit:
        column = read(kernels.TABLE)[version_of(path)]
        has = {name: kind for name, kind in column.items() if kind != kernels.ABSENT}
        try:
            assert kernels.kinds_of(path) == has
        except RuntimeError as error:
            if "Duplicated key" not in str(error):
                raise
            pytest.skip(f"torch {torch.__version__} is built for CUDA ({error})")


def test_a_wheel_for_another_torch_or_python_is_refused_in_one_line(tmp_path):
    machine = f"linux_{platform.machine()}.whl"
    script = ROOT / "test" / "kernels_of_torch_npu.py"
    for wheel, words in {
        f"torch_npu-1.2.3{PYTHON}none-{machine}": "another torch",
        f"torch_npu-{RELEASE}-cp27-none-{machine}": "another Python",
    }.items():
        if shutil.which("gcc") is None:
            words = "gcc is not installed"
        done = shell(sys.executable, script, tmp_path / wheel)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert words in done.stderr


# ---------------------------------------------------------------- a machine without CANN


def run_program(*flags, **environment):
    command = [sys.executable, ROOT / "dlrm_s_pytorch.py", "--tensor-board-filename=", *flags]
    return shell(*command, env=environment)


def test_without_cann(installed):
    if RELEASE != VERSION or torch.version.cuda:
        pytest.skip(f"torch {torch.__version__} is here: another error comes first")
    done = run_program("--use-npu", "--dry-run", PYTHONPATH=str(installed), **NO_CANN)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: --use-npu: torch_npu {VERSION} does not find CANN")
    assert "libhccl.so" in done.stderr and "set_env.sh" in done.stderr


def test_a_cpu_run_beside_the_real_torch_npu(installed):
    """A plain import of torch fails there, because torch loads torch_npu; the program does not."""
    settings = {"PYTHONPATH": str(installed), **NO_CANN}
    assert shell(sys.executable, "-c", "import torch", env=settings).returncode != 0
    done = run_program(*SMALL_MODEL, **settings)
    assert (done.returncode, done.stderr) == (0, "") and losses_of(done.stdout)
