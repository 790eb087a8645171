"""numba's kernels and torch's operators run on one pool of threads, or the kernels on one."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, shell

IMPORTS = """
import numba, torch
from devices import cpu_kernels
from devices.threads import set_up_threads, shares_threads_with_torch
"""
USE = """
set_up_threads(2)
target = torch.zeros(4, 2)
cpu_kernels.add_to_rows(target, torch.tensor([1, 3, 1]), torch.ones(3, 2), 0.5)
assert target.tolist() == [[0, 0], [1, 1], [0, 0], [0.5, 0.5]], target
print(shares_threads_with_torch(), torch.get_num_threads(), numba.get_num_threads())
"""


def run(program):
    """What a fresh process prints, as words."""
    settings = {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    finished = shell(sys.executable, "-c", program, env=settings, timeout=100)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout.split()


@pytest.fixture(scope="module")
def one_pool():
    """Skips where numba and torch cannot share one: not Linux, or numba has no OpenMP layer."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the kernels share torch's threads on Linux only")
    if shell(sys.executable, "-c", "import numba.np.ufunc.omppool").returncode:
        pytest.skip("numba.np.ufunc.omppool cannot be imported: no libgomp on this system?")
    if run("import numba; print(numba.config.NUMBA_NUM_THREADS)") == ["1"]:
        pytest.skip("this machine has one thread")
    if [*(Path(torch.__file__).parent / "lib").glob("libgomp-*")]:
        pytest.skip("this torch takes a libgomp of its own name only, as 2.6 for x86_64 does")


def test_the_program_and_its_kernels_share_torchs_threads(one_pool):
    """Kernels after operators and operators after kernels, beside scikit-learn's own libgomp."""
    imports = f"import dlrm_s_pytorch, ctypes\n{IMPORTS}"
    operator = "(torch.ones(999, 999) @ torch.ones(999, 999)).sum()"
    program = f"{imports}{USE}{operator}\n{USE}import sklearn.metrics\n{USE}"
    levels = "print(numba.threading_layer(), ctypes.CDLL(None).omp_get_max_active_levels())"
    assert run(f"{program}{levels}") == [*["True", "2", "2"] * 3, "omp", "1"]


def test_with_torch_imported_first_kernels_keep_to_one_thread():
    """Two pools on the same cores would wait for each other."""
    words = run(f"import torch\n{IMPORTS}{USE}")
    assert words == ["False", "2", "1"] or words == ["True", "2", "2"]
