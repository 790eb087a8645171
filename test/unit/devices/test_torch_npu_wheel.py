"""The real torch_npu has what the program and the emulation take from it, and fails as expected.

test/signatures_of_torch_npu.tsv holds the real names. If a wheel lies in .wheels, the table is
compared with it, and the program runs beside the wheel's content.
"""

import ast
import inspect
import platform
import sys
import zipfile

import pytest
import torch
from conftest import RELEASE, ROOT, SMALL_MODEL, losses_of, shell

sys.path.insert(0, str(ROOT / "test"))
from signatures_of_torch_npu import PACKAGE, TABLE, emulated, table_of

VERSION = "2.13.0"
NO_CANN = {"LD_LIBRARY_PATH": ""}
# the files that name torch_npu's functions; objects such as streams are used in further ones
PROGRAM = "devices/npu.py devices/card.py devices/find.py devices/execution.py optim/dense.py"


@pytest.fixture(scope="module")
def signatures():
    """{name: parameters, or module, value, outside}."""
    header, *lines = TABLE.read_text().splitlines()
    assert header == f"name\ttorch_npu_{VERSION}"
    return dict(line.split("\t") for line in lines)


@pytest.fixture(scope="module")
def wheel():
    found = [*(ROOT / ".wheels").glob(f"torch_npu-{VERSION}-*.whl")]
    if not found:
        pytest.skip(f"no wheel: pip download --no-deps --dest .wheels torch-npu=={VERSION}")
    return found[0]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder for PYTHONPATH with the wheel's content, as pip installs it."""
    python = f"-cp{sys.version_info.major}{sys.version_info.minor}-"
    if python not in wheel.name or platform.machine() not in wheel.name:
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


def test_the_emulation_has_only_what_the_real_one_has(signatures):
    found = emulated()
    assert found.keys() == signatures.keys() and len(found) > 50
    assert [(name, ours) for name, ours in found.items() if not agree(ours, signatures[name])] == []


def test_the_table_is_the_wheels(wheel):
    assert table_of(wheel) == TABLE.read_text()


def uses_of(text):
    """{name in torch_npu: the calls of it} of a program's text.

    Variables and attributes are followed from torch.get_device_module and import_module.
    """
    names = {"importlib.import_module('torch_npu')": PACKAGE}
    found = {}

    def name_of(node):
        if isinstance(node, ast.Attribute) and name_of(node.value):
            return f"{name_of(node.value)}.{node.attr}"
        is_module = ast.unparse(node).startswith("torch.get_device_module(")
        own = f"{PACKAGE}.npu" if is_module and isinstance(node, ast.Call) else None
        return names.get(ast.unparse(node), own)

    for _ in range(2):  # a method may use what a later one assigns
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assign) and name_of(node.value):
                names[ast.unparse(node.targets[0])] = name_of(node.value)
            if isinstance(node, ast.Attribute) and name_of(node) not in (None, PACKAGE):
                found.setdefault(name_of(node), [])
            if isinstance(node, ast.Call) and name_of(node.func):
                found.setdefault(name_of(node.func), []).append(node)
    return found


def problems_of(text, signatures):
    """What a program's text takes from torch_npu that the table does not have."""
    problems = set()
    for name, calls in uses_of(text).items():
        if name not in signatures:
            problems.add(f"{name}: missing")
        elif signatures[name].startswith("("):
            function = eval(f"lambda {signatures[name][1:-1]}: 0", {"required": None})
            for call in calls:
                try:
                    keywords = {one.arg: 0 for one in call.keywords}
                    inspect.signature(function).bind(*call.args, **keywords)
                except TypeError as error:
                    problems.add(f"{name}: {error}")
    return problems


@pytest.mark.parametrize("file", PROGRAM.split())
def test_what_the_program_uses_is_in_the_real_one(file, signatures):
    text = (ROOT / file).read_text()
    assert uses_of(text) and problems_of(text, signatures) == set()


MISTAKES = {
    "torch.get_device_module('npu').made_up()": "torch_npu.npu.made_up: missing",
    "m = torch.get_device_module(kind)\nm.set_device()": "missing a required argument: 'device'",
    "m = importlib.import_module('torch_npu')\nm.optim.NpuFusedSGD(p, rate=1)": "'rate'",
    "self._m = importlib.import_module('torch_npu')\nself._m.npu.utils.gone": "utils.gone: missing",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_use_that_the_real_one_lacks_is_found(text, signatures):
    (problem,) = problems_of(text, signatures)
    assert MISTAKES[text] in problem


def test_the_table_is_of_the_version_that_is_pinned():
    pins = (ROOT / "requirements-npu.txt").read_text().splitlines()
    assert {f"torch-npu=={VERSION}", f"torch=={VERSION}"} <= set(pins)


# ---------------------------------------------------------------- a machine without CANN


def run_program(*flags, **environment):
    command = [sys.executable, ROOT / "dlrm_s_pytorch.py", "--tensor-board-filename=", *flags]
    return shell(*command, env=environment)


def test_without_cann(installed):
    if RELEASE != VERSION:
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
