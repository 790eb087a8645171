"""The tests share these ways to run the program, to read its lines, and to get data for it."""

import contextlib
import io
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

# The golden numbers are those of one CPU, and MKL sums in another order on each kind of CPU: on
# the latest ones losses differ by 2e-5 after 90 steps. Of this order all of them are capable.
os.environ.setdefault("MKL_CBWR", "AVX2")

for name in ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"):  # a CANN that is here is not the tests'
    os.environ.pop(name, None)

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "test" / "golden"
sys.path.insert(0, str(ROOT))

import dlrm_s_pytorch  # noqa: E402  (before torch: common/compiled.py says why)

# isort: split
import torch  # noqa: E402

RELEASE = torch.__version__.partition("+")[0]  # without a suffix such as +cpu
# for a shell in which python3 is the Python of the tests
PYTHON_FIRST = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def _through_os(name):
    return staticmethod(lambda *args: getattr(os, name)(*args))


# Python 3.10's Path keeps os's functions: tests that put others in os would miss its calls
if sys.version_info < (3, 11):
    for _name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
        setattr(pathlib._NormalAccessor, _name, _through_os(_name))

NUMBER = r"([-+.\deE]+|nan|inf)"
TRAINING = re.compile(
    rf"^Finished training it (\d+)/(\d+) of epoch (\d+), {NUMBER} ms/it, loss {NUMBER}", re.M
)
METRICS = re.compile(
    rf"^recall {NUMBER}, precision {NUMBER}, f1 {NUMBER}, ap {NUMBER}, auc {NUMBER}, "
    rf"best auc {NUMBER}, accuracy {NUMBER} %, best accuracy {NUMBER} %$",
    re.M,
)
METRIC_NAMES = ("recall", "precision", "f1", "ap", "auc", "best_auc", "accuracy", "best_accuracy")

SMALL_MODEL = (
    "--arch-sparse-feature-size=16 --arch-embedding-size=100-200-300-40 --arch-mlp-bot=13-64-16 "
    "--arch-mlp-top=64-32-1 --mini-batch-size=64 --data-size=640 --loss-function=bce "
    "--round-targets=True --learning-rate=0.1"
).split()
CRITEO_MODEL = (
    "--arch-sparse-feature-size=16 --arch-mlp-bot=13-64-16 --arch-mlp-top=64-1 --loss-function=bce "
    "--learning-rate=0.1 --mini-batch-size=128 --test-mini-batch-size=512 --mlperf-logging"
).split()


@dataclass
class Result:
    """A finished run: exit status and what it printed."""

    status: int
    out: str
    err: str

    @property
    def losses(self) -> list[tuple[int, int, int, float]]:
        """(it, of, epoch, loss) of each log line."""
        return losses_of(self.out)

    @property
    def tests(self) -> list[dict[str, float]]:
        """The metrics of each evaluation with --mlperf-logging."""
        return metrics_of(self.out)


def losses_of(text):
    return [(int(m[1]), int(m[2]), int(m[3]), float(m[5])) for m in TRAINING.finditer(text)]


def metrics_of(text):
    return [
        dict(zip(METRIC_NAMES, (float(word) for word in found.groups()), strict=True))
        for found in METRICS.finditer(text)
    ]


def train(*argv, program=dlrm_s_pytorch.main):
    """Run the program in this process as a user would from a shell."""
    out, err = io.StringIO(), io.StringIO()
    words = [str(word) for word in argv]
    if program is dlrm_s_pytorch.main and not any("tensor-board" in word for word in words):
        words.append("--tensor-board-filename=")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = program(words)
    return Result(status, out.getvalue(), err.getvalue())


def trained(*argv):
    """Run the program as `train` does; returns (trainer, Result)."""
    kept = []

    class Kept(dlrm_s_pytorch.Trainer):
        def __init__(self, *args):
            super().__init__(*args)
            kept.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dlrm_s_pytorch, "Trainer", Kept)
        result = train(*argv)
    assert result.status == 0, result.err
    return kept[0], result


def assert_same_losses(got, want):
    """Steps are equal; losses differ at most by the rounding of float32 and of six decimals."""
    assert [line[:3] for line in got] == [line[:3] for line in want]
    for one, other in zip(got, want, strict=True):
        assert abs(one[3] - other[3]) <= max(1e-5 * abs(other[3]), 1.1e-6), (one, other)


def at(name):
    """A `msg` for torch.testing.assert_close that begins with the name of the tensor."""
    return lambda text: f"{name}: {text}"


def shell(*command, cwd=None, env=None, timeout=300):
    """Run a command as a user does; returns the finished process with its text.

    It has one thread: tests run side by side, and threads that wait for one another's core would
    make a small step many times slower.
    """
    ours = ("RANK", "WORLD_SIZE", "TORCH_DEVICE_BACKEND_AUTOLOAD")  # a user's shell has none
    settings = {key: value for key, value in os.environ.items() if key not in ours}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=settings | {"OMP_NUM_THREADS": "1"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@contextlib.contextmanager
def largest_file(num_bytes):
    """A limit for the size of a file, which stands for a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# two files are at work at a time; short ones fill what the long ones leave
LONG = ("test_scripts.py", "test_npu.py", "test_ranks.py", "test_triton_kernels.py")


def pytest_collection_modifyitems(items):
    """Long files first, so that none is left to one worker at the end."""
    order = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


def golden(name):
    return json.loads((GOLDEN / name).read_text())


@pytest.fixture(scope="session")
def kaggle(tmp_path_factory):
    """A folder with the golden train.txt that tests share; those that write take a copy."""
    folder = tmp_path_factory.mktemp("data") / "kaggle"
    shutil.copytree(GOLDEN / "data" / "kaggle", folder)
    return folder


@pytest.fixture(scope="session")
def copy(tmp_path_factory):
    """The files of a clone, in a folder without .venv; with the kernels that numba has compiled."""
    target = tmp_path_factory.mktemp("copy") / "dlrm"
    test = ROOT / "test"
    ours = [*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt"), *ROOT.glob("[a-z]*/*.py")]
    ours += ROOT.glob("devices/*.tsv")
    kernels = [*ROOT.glob("*/__pycache__/*.nbi"), *ROOT.glob("*/__pycache__/*.nbc")]
    for path in [*ours, *test.glob("*.sh"), *kernels]:
        own = target / path.relative_to(ROOT)
        own.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, own)  # numba looks at the time of a file's last change
    return target


@pytest.fixture
def kaggle_copy(tmp_path):
    folder = tmp_path / "kaggle"
    shutil.copytree(GOLDEN / "data" / "kaggle", folder)
    return folder


def write_package(folder, name, version):
    """What pip leaves of a package: its metadata, here without the package itself."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def break_package(folder, monkeypatch, name, error, *users):
    """Put a package in front of the installed one whose import ends in an error, such as `OSError`.

    Modules that have imported it already, as `users` have, are to be imported anew.
    """
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f"raise {error}\n")
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    for module in users:
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(folder)


def rows_of(prepared, split):
    """The split's rows, however they lie on disk, as int32 (n, 40)."""
    return prepared.layout.unpack(np.asarray(prepared.rows(split)))


def write_days(folder, num_days, num_rows, seed=0, largest=(50,)):
    """Write tiny day files; returns their rows as lists of fields as text.

    The columns of integers take turns with the limits in `largest`.
    """
    import random

    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    days = []
    for day in range(num_days):
        rows = []
        for _ in range(num_rows):
            integers = [
                draw.choice(["", str(draw.randint(-2, largest[k % len(largest)]))])
                for k in range(13)
            ]
            categories = [
                draw.choice(["", f"{draw.randint(0, 9) * 0x1999999A:08x}"]) for _ in range(26)
            ]
            rows.append([str(draw.randint(0, 1)), *integers, *categories])
        (folder / f"day_{day}").write_text("".join("\t".join(row) + "\n" for row in rows))
        days.append(rows)
    return days
