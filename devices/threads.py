"""The CPU's threads: numba and torch share one OpenMP pool.

common/compiled.py loads the pool before torch does. If numba and torch cannot share one, numba's
kernels run on one thread: so it is with torch 2.6 for x86_64, which brings a libgomp of its own
under another name.
"""

import contextlib
import ctypes
from pathlib import Path
from typing import Any

import numba

from common.compiled import compiler

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def _openmp_libraries() -> list[Path]:
    """The OpenMP libraries that this process has loaded."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.is_file() else []
    paths = {Path(line[line.index("/") :]) for line in lines if "/" in line}
    return [path for path in paths if path.name.startswith(("libgomp", "libiomp", "libomp."))]


def shares_threads_with_torch() -> bool:
    """Whether numba and torch use one OpenMP library, and with it the same threads."""
    libraries = _openmp_libraries()
    torchs_own = any({"torch", "torch.libs"} & set(path.parts) for path in libraries)
    others = any(not path.name.startswith("libgomp") for path in libraries)
    return bool(libraries) and not torchs_own and not others


def set_up_threads(num_threads: int) -> None:
    """Run numba's kernels on torch's threads, and keep freed memory in the process.

    glibc returns freed blocks of some MB to the system, which zeroes their pages when the next
    step takes them again: a sixth of a step at batch 2048.

    Args:
        num_threads: torch's threads; kernels use as many, or one if they cannot share them.
    """
    settings: Any = numba.config
    shared = shares_threads_with_torch()
    settings.THREADING_LAYER = "omp" if shared else "default"
    numba.set_num_threads(min(num_threads, settings.NUMBA_NUM_THREADS) if shared else 1)
    _start_threads()
    # When numba starts its threads it claims all cores and switches nested parallel regions on.
    # MKL has some inside torch's, and each would start threads of its own: a logarithm would take
    # 4 ms instead of 0.02.
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
