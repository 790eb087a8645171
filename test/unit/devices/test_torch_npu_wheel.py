"""The real torch_npu: what the program and the emulation take from it is there, and how it fails.

Its wheel is read, not imported. It is the one that TORCH_NPU_WHEEL names, or else the newest of
torch_npu-2.13.0-*.whl in .wheels; where there is none, the tests that want it are skipped.
"""

import importlib.util
import os
import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL_MODEL, losses_of, shell
from packaging.requirements import Requirement
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename
from packaging.version import Version
from wheel_names import ROOT_MODULE, Uses, disagreements, folder_sources, public_names
from wheel_names import wheel_sources as read_wheel

VERSION = "2.13.0"
DOWNLOAD = f"pip download --no-deps --dest .wheels torch-npu=={VERSION}"
PROGRAM = sorted([*ROOT.glob("*.py"), *(ROOT / "optim").glob("*.py")])
EMULATION = ROOT / "test" / "emulated_npu"
PUBLIC_MODULES = [
    ROOT_MODULE,
    *(f"{ROOT_MODULE}.{name}" for name in ("npu", "npu.utils", "utils", "optim", "profiler")),
]
OWN = {f"{ROOT_MODULE}.is_emulated", f"{ROOT_MODULE}.record"}  # of the emulation alone
FLAGS = {"train": (), "dry run": ("--dry-run",)}
NO_CANN = {"LD_LIBRARY_PATH": ""}


@pytest.fixture(scope="module")
def wheel():
    given = os.environ.get("TORCH_NPU_WHEEL")
    if given:
        assert Path(given).is_file(), f"TORCH_NPU_WHEEL={given}: no such file"
        return Path(given)
    found = [*(ROOT / ".wheels").glob(f"torch_npu-{VERSION}-*.whl")]
    if not found:
        pytest.skip(f"no torch_npu wheel in .wheels, and TORCH_NPU_WHEEL names none: {DOWNLOAD}")
    return max(found, key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module")
def real(wheel):
    return read_wheel(wheel)


@pytest.fixture(scope="module")
def uses(real):
    return Uses(real, PROGRAM)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder for PYTHONPATH with the wheel's content, as pip installs it."""
    tags = parse_wheel_filename(wheel.name)[3]
    if tags.isdisjoint(sys_tags()):
        pytest.skip(f"{wheel.name} is for another Python or platform: {DOWNLOAD}")
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def public_names_of(sources):
    return [name for module in PUBLIC_MODULES for name in public_names(sources, module)]


def release(version):
    return Version(version).base_version


def metadata_of(wheel):
    """Lines `Name: value` of the wheel's METADATA, as (name, value)."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [one for one in archive.namelist() if one.endswith(".dist-info/METADATA")]
        header = archive.read(name).decode().split("\n\n")[0]
    return [line.split(": ", 1) for line in header.splitlines() if ": " in line]


# ---------------------------------------------------------------- names


def test_the_emulation_has_only_what_the_wheel_has(real):
    emulated = folder_sources(EMULATION)
    names = public_names_of(emulated)
    assert set(names) >= OWN and len(names) > 50
    assert disagreements(emulated, real, [name for name in names if name not in OWN]) == []


def test_what_the_program_uses_is_in_the_wheel(uses):
    """And is called with parameters that it has."""
    assert uses.problems == []


def test_every_way_of_use_is_followed(uses):
    """One name of each, and the emulation has all that are found."""
    expected = {
        "npu_clear_float_status",  # through an attribute of self
        "__version__",
        "npu.set_device",  # through torch.get_device_module
        "npu.set_compile_mode",
        "npu.utils.is_support_inf_nan",
        "npu.Event.record",  # of an object
        "npu.Stream.wait_event",  # of what current_stream gives
        "optim.NpuFusedSGD",
        "profiler.ProfilerActivity.NPU",
        "profiler.schedule",
        "profiler.profile.step",  # of what devices.npu_profiler yields
    }
    assert {f"{ROOT_MODULE}.{name}" for name in expected} - uses.names == set()
    emulated = folder_sources(EMULATION)
    assert [name for name in sorted(uses.names) if emulated.find(name) is None] == []


def test_requirements_pin_the_wheel_and_its_torch(wheel):
    lines = (ROOT / "requirements-npu.txt").read_text().splitlines()
    pins = {one.name: one for one in map(Requirement, filter(re.compile(r"\w").match, lines))}
    fields = metadata_of(wheel)
    assert str(pins["torch-npu"].specifier) == f"=={dict(fields)['Version']}"
    wanted = [Requirement(value) for name, value in fields if name == "Requires-Dist"]
    [torch_wanted] = [one.specifier for one in wanted if one.name == "torch"]
    assert str(torch_wanted) in (str(pins["torch"].specifier), f"{pins['torch'].specifier}.*")
    assert str(parse_wheel_filename(wheel.name)[1]) == dict(fields)["Version"]


# ---------------------------------------------------------------- a machine without CANN


def run_program(*flags, **environment):
    command = [sys.executable, ROOT / "dlrm_s_pytorch.py", "--tensor-board-filename=", *flags]
    return shell(*command, env=environment)


def hidden(folder):
    """Settings with which there is no torch_npu, also where it is installed."""
    if importlib.util.find_spec(ROOT_MODULE) is None:
        return {}
    text = f"import sys\nsys.modules[{ROOT_MODULE!r}] = None\n"
    (folder / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": str(folder)}


def the_error(done):
    """The one line on stderr of a run that ended with status 2 before it did anything."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: --use-npu: ") and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_without_torch_npu(flags, tmp_path):
    done = run_program("--use-npu", *flags, **hidden(tmp_path))
    expected = "torch_npu is not installed: pip install -r requirements-npu.txt\n"
    assert the_error(done).endswith(expected)


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_without_cann(installed, flags):
    if release(torch.__version__) != VERSION:
        pytest.skip(f"torch {torch.__version__} is here: another error comes first")
    error = the_error(run_program("--use-npu", *flags, PYTHONPATH=str(installed), **NO_CANN))
    for expected in (f"torch_npu {VERSION} does not find CANN", "libhccl.so", "set_env.sh"):
        assert expected in error


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_versions_that_do_not_match(installed, flags, tmp_path):
    """Its metadata says another version than torch's; the package is the real one."""
    other = "2.12.0" if release(torch.__version__) != "2.12.0" else "2.11.0"
    (tmp_path / ROOT_MODULE).symlink_to(installed / ROOT_MODULE)
    [info] = installed.glob("*.dist-info")
    shutil.copytree(info, tmp_path / info.name)
    metadata = tmp_path / info.name / "METADATA"
    before = metadata.read_text()
    metadata.write_text(re.sub(r"(?m)^Version: .*$", f"Version: {other}", before, count=1))
    error = the_error(run_program("--use-npu", *flags, PYTHONPATH=str(tmp_path), **NO_CANN))
    for expected in (
        f"torch_npu {other} and torch {torch.__version__} do not go together",
        f"expected torch {other};",
        "requirements-npu.txt",
    ):
        assert expected in error


def test_a_cpu_run_beside_the_real_torch_npu(installed):
    """A plain import of torch fails beside it, as it is loaded then; the program is not harmed."""
    settings = {"PYTHONPATH": str(installed), **NO_CANN}
    assert shell(sys.executable, "-c", "import torch", env=settings).returncode != 0
    done = run_program(*SMALL_MODEL, **settings)
    assert (done.returncode, done.stderr) == (0, "") and losses_of(done.stdout)


# ---------------------------------------------------------------- the checks find what is wrong

TINY_WHEEL = {
    "__init__.py": "import torch_npu.profiler.more\nfrom .version import __version__",
    "version.py": "__version__ = '1'",
    "unloaded.py": "def lost(): ...",
    "npu/__init__.py": (
        "from .utils import set_device, current_stream\nfrom .config import *\n"
        "from .config import _o"
    ),
    "npu/utils.py": (
        "import torch_npu\nfrom .streams import Stream as _Stream\ndef set_device(device): ...\n"
        "def current_stream(device=None):\n    return _Stream(stream_id=1)"
    ),
    "npu/streams.py": (
        "import torch_npu\nclass Base:\n    def wait(self, event): ...\n"
        "class Stream(Base, torch_npu._C._StreamBase):\n"
        "    def __new__(cls, device=None, priority=0, **kwargs): ..."
    ),
    "npu/config.py": (
        "from outside import nothing\n__all__ = ['set_mode', 'scale', 'Stream']\nSMALL = 0.0\n"
        "from .streams import Stream\n"
        "def set_mode(compiles=False, *, level=nothing): ...\ndef _o(): ...\n"
        "def scale(factor=SMALL, times=1): ...\ndef unlisted(): ..."
    ),
    "profiler/__init__.py": (
        "from torch_npu._C._profiler import Activity\n"
        "class profile:\n"
        "    def __init__(self, *, steps=None, folder): ...\n"
        "    def __enter__(self): ...\n    def step(self): ..."
    ),
    "profiler/more.py": "from . import Activity\nwanted = {Activity.NPU}  # Activity.TPU",
    "utils/__init__.py": "",
    "utils/exposed_api.py": "public_npu_functions = ['npu_clear', 'npu_undocumented']",
    "_op_plugin_docs.py": '_add("npu_clear", """\ntorch_npu.npu_clear(self, dim=0) -> Tensor\n""")',
    "_init/loader.py": "def load():\n    import torch_npu.npu, torch_npu.utils",
}


@pytest.fixture
def tiny(tmp_path):
    """A wheel with a little of everything that the real one has."""
    path = tmp_path / "torch_npu-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in TINY_WHEEL.items():
            archive.writestr(f"{ROOT_MODULE}/{name}", text + "\n")
    return read_wheel(path)


EMULATIONS = {  # what an emulation's torch_npu.npu may have: what is wrong with it
    "def set_device(device): ...": "",
    "def set_mode(compiles=False): ...": "",
    "def set_mode(compiles): ...": "",
    "def set_mode(compiles=False, **kwargs): ...": "",
    "def set_mode(*, compiles=False): ...": "",
    "def set_mode(compiles=0): ...": "set_mode: parameter compiles: default 0, the wheel has False",
    "def set_mode(compiles=None): ...": "set_mode: parameter compiles: default None,",
    "def set_mode(compile=False): ...": "parameter compile: the wheel has compiles there",
    "def set_mode(compiles=False, levels=1): ...": "parameter levels: the wheel has level there",
    "def set_mode(compiles=False, level=1): ...": "parameter level is positional or keyword",
    "import outside\ndef set_mode(compiles=False, *, level=outside.nothing): ...": "",
    "def set_mode(compiles=False, *, level=1): ...": "default 1, the wheel has outside.nothing",
    "def set_device(device=0): ...": "parameter device: default 0, the wheel has none",
    "def set_device(): ...": "parameter device of the wheel is left out and has no default",
    "def set_device(device, *more): ...": "parameter more: the wheel has none there",
    "def scale(factor=0.0, times=1): ...": "",
    "def scale(factor=0.1): ...": "scale: parameter factor: default 0.1, the wheel has 0.0",
    "def scale(times=1, factor=0.0): ...": "parameter times: the wheel has factor there",
    "def made_up(): ...": "torch_npu.npu.made_up: not in the wheel",
    "def unlisted(): ...": "torch_npu.npu.unlisted: not in the wheel",
    "def _private(): ...": "",
    "from torch_npu._more import made_up": "",
    "from torch_npu._more import made_up\n__all__ = ['made_up']": "npu.made_up: not in the wheel",
    "class Stream:\n    def __init__(self, device=None): ...": "",
    "class Stream:\n    def __init__(self, device=0): ...": "Stream: parameter device: default 0",
    "class Stream:\n    def wait(self, event): ...": "",
    "class Stream:\n    def wait(self, other): ...": "Stream.wait: parameter other: the wheel has",
    "class Stream:\n    def begin(self): ...": "torch_npu.npu.Stream.begin: not in the wheel",
}


@pytest.mark.parametrize("text", EMULATIONS)
def test_an_emulation_that_disagrees_is_found(text, tiny, tmp_path):
    files = {
        "__init__.py": "from torch_npu import npu",
        "npu/__init__.py": text,
        "_more.py": "def made_up(): ...",
    }
    for name, content in files.items():
        path = tmp_path / "emulated" / ROOT_MODULE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    emulated = folder_sources(tmp_path / "emulated")
    found = disagreements(emulated, tiny, public_names(emulated, f"{ROOT_MODULE}.npu"))
    if EMULATIONS[text]:
        assert len(found) == 1 and EMULATIONS[text] in found[0]
    else:
        assert found == []


IMPORTED = "importlib.import_module('torch_npu')"
MODULE = "streams = torch.get_device_module(device)\n"
OVERFLOW = """
class Flag:
    def __init__(self):
        self.module = None
        torch_npu = importlib.import_module("torch_npu")
        self.module = torch_npu
    def clear(self):
        self.module.npu_clear(1, {})
"""
PROFILED = """
def run():
    def after_step():
        profiler.{}()
    with npu_profiler() as profiler:
        after_step()
def npu_profiler():
    module = importlib.import_module("torch_npu").profiler
    with module.profile(steps=[module.Activity.NPU], folder="") as active:
        yield active
"""
PROGRAMS = {  # lines of a program: the line and what is wrong with it
    "torch.npu.set_device(0)": "",
    "torch.npu.made_up": "1: torch_npu.npu.made_up: not in the wheel",
    "torch.npu.set_device(0, 1)": "1: torch_npu.npu.set_device: too many positional arguments",
    "torch.npu.set_device()": "1: torch_npu.npu.set_device: missing a required argument: 'device'",
    "torch.npu.set_device(*cards)": "",
    "torch.npu.set_device(card=0, **more)": "set_device: got an unexpected keyword argument 'card'",
    "torch.npu.set_mode(True, level=3)": "",
    "torch.npu.set_mode(True, 3)": "set_mode: too many positional arguments",
    "import torch_npu\ntorch_npu.npu._o()": "",
    "import torch_npu.made_up": "1: torch_npu.made_up: not in the wheel",
    "from torch_npu.npu import set_device as use\nuse(0)": "",
    "from torch_npu.npu import set_device as use\nuse(x=0)": "2: torch_npu.npu.set_device: missing",
    "from torch_npu.npu import lost": "1: torch_npu.npu.lost: not in the wheel",
    f"{IMPORTED}.unloaded.lost()": "1: torch_npu.unloaded: not in the wheel",
    f"{IMPORTED}.utils": "",
    f"found = {IMPORTED}.__version__": "",
    f"{IMPORTED}.npu_undocumented(1, 2)": "",
    f"{IMPORTED}.npu_hidden(1)": "1: torch_npu.npu_hidden: not in the wheel",
    f"module = {IMPORTED}\n\nmodule.npu.scale(times=2)": "",
    f"module = {IMPORTED}\n\nmodule.npu.scale(time=2)": "3: torch_npu.npu.scale: got an unexpected",
    f"{IMPORTED}.profiler.Activity.NPU": "",
    f"{IMPORTED}.profiler.Activity.TPU": "torch_npu.profiler.Activity.TPU: not in the wheel",
    MODULE + "streams.Stream().wait(1)": "",
    MODULE + "streams.Stream(priority=1, more=2)": "",
    MODULE + "side = streams.Stream()\nside.rest()": "3: torch_npu.npu.Stream.rest: not in the",
    MODULE + "main = streams.current_stream()\nmain.wait(1)": "",
    MODULE
    + "main = streams.current_stream()\nmain.rest()": "3: torch_npu.npu.streams.Stream.rest: not",
    MODULE + "def use():\n    streams.made_up()": "3: torch_npu.npu.made_up: not in the wheel",
    MODULE + "def use(streams):\n    streams.made_up()": "",
    OVERFLOW.format("dim=1"): "",
    OVERFLOW.format("dims=1"): "torch_npu.npu_clear: got an unexpected keyword argument 'dims'",
    PROFILED.format("step"): "",
    PROFILED.format("steps"): "4: torch_npu.profiler.profile.steps: not in the wheel",
    "import torch\ntorch.nn.made_up(npu=1)": "",
}


@pytest.mark.parametrize("text", PROGRAMS)
def test_a_program_that_uses_what_is_not_there_is_found(text, tiny, tmp_path):
    path = tmp_path / "program.py"
    path.write_text(text + "\n")
    found = Uses(tiny, [path]).problems
    if PROGRAMS[text]:
        assert len(found) == 1 and found[0].startswith("program.py:") and PROGRAMS[text] in found[0]
    else:
        assert found == []
