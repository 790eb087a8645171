"""The CPU's threads: numba and torch share one OpenMP pool.

common/compiled.py loads the pool before torch does. Where the pools cannot be one, numba's kernels
keep to one thread.
"""

import contextlib
import ctypes
from pathlib import Path
from typing import Any

import numba

from common.compiled import compiler

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def _openmp_libraries() -> list[Path]:
    """Those that this process has loaded."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    paths = {Path(line[line.index("/") :]) for line in lines if "/" in line}
    return [path for path in paths if path.name.startswith(("libgomp", "libiomp", "libomp."))]


def shares_threads_with_torch() -> bool:
    """Do numba and torch use one OpenMP library, and so the same threads?"""
    libraries = _openmp_libraries()
    torchs_own = any({"torch", "torch.libs"} & set(path.parts) for path in libraries)
    others = any(not path.name.startswith("libgomp") for path in libraries)
    return bool(libraries) and not torchs_own and not others


def set_up_threads(num_threads: int) -> None:
    """Kernels run on `num_threads` threads, torch's; and freed memory stays with the process.

    glibc gives blocks of some MB back to the system when they are freed, and each step would pay
    for having their pages zeroed again: a sixth of a step at batch 2048.
    """
    settings: Any = numba.config
    shared = shares_threads_with_torch()
    settings.THREADING_LAYER = "omp" if shared else "default"
    numba.set_num_threads(min(num_threads, settings.NUMBA_NUM_THREADS) if shared else 1)
    _start_threads()
    # Starting, numba takes all cores and switches nested parallel regions on. MKL has some inside
    # torch's, and each then starts threads of its own: a logarithm takes 4 ms instead of 0.02.
    for path in _openmp_libraries():
        with contextlib.suppress(OSError, AttributeError):
            openmp = ctypes.CDLL(str(path))
            openmp.omp_set_max_active_levels(1)
            openmp.omp_set_num_threads(num_threads)
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that glibc allows
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@compiler(parallel=True)
def _start_threads() -> None:
    for _ in numba.prange(1):
        pass
