"""NVIDIA GPUs: precision of products, Triton, CUDA graphs, the driver."""

import importlib
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.versions import installed_version, release
from devices.older_torch import OLDEST_TRITON, has_products_in_float32

ALIGNED = 8  # numbers; tensor cores take rows of 16-bit numbers that begin at multiples of 16 bytes
COMPILERS = ("gcc", "clang")  # Triton looks for these if CC is not set


def padded_width(width: int) -> int:
    """The width that rows of 16-bit numbers are filled up to with zeros."""
    return -(-width // ALIGNED) * ALIGNED


def set_product_precision(device: torch.device, tf32: bool) -> None:
    """Set how matrix products round: sums are float32, also those of 16-bit factors.

    Args:
        device: where the products are computed.
        tf32: TensorFloat-32, inputs of float32 products rounded to 10 mantissa bits.

    Raises:
        UserError: tf32 is asked for on another device.
    """
    if tf32 and device.type != "cuda":
        raise UserError(f"--tf32 is for NVIDIA GPUs: the device is {device.type}")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    # by default, if several blocks of a GPU share a product, their sums are added in 16 bits
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def product_in_float32(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor) -> None:
    """Put left @ right into `out`: factors of 16 bits, sums that are never rounded to them.

    Where torch has no such product the factors become float32 first. TensorFloat-32 holds numbers
    of bfloat16 and float16 exactly, so a GPU may take them as such.

    Args:
        left: (m, b).
        right: (b, n).
        out: (m, n) float32.
    """
    if left.is_cuda and has_products_in_float32:
        torch.mm(left, right, out_dtype=torch.float32, out=out)
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if left.is_cuda else before)
    torch.mm(left.float(), right.float(), out=out)
    torch.set_float32_matmul_precision(before)


def has_triton(device: torch.device, lower: torch.dtype | None) -> bool:
    """Whether Triton's kernels can run: on a GPU or, with TRITON_INTERPRET=1, on the CPU.

    On the CPU they are interpreted, but not in bfloat16, which Triton's interpreter gets wrong.
    Where Triton is missing or old, operators do their work.

    Raises:
        UserError: there is no C compiler or no Python.h. Triton builds the code that starts its
            kernels with them.
    """
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    interpreted = interpreted and lower is not torch.bfloat16
    if not (interpreted or device.type == "cuda") or triton_version() < OLDEST_TRITON:
        return False
    missing = "" if interpreted else _missing_for_triton()
    if missing:
        raise UserError(
            f"{missing}, which Triton needs for its kernels: install it, or do without them by"
            " --triton=false"
        )
    return True


def triton_version() -> tuple[int, ...]:
    """Numbers of the version of Triton that is installed, such as (3, 6, 0); () if none is."""
    # the second one comes with torch's nightly builds
    return release(installed_version("triton") or installed_version("pytorch-triton"))


def _missing_for_triton() -> str:
    """Say what Triton needs and will not find; "" if nothing is missing."""
    chosen = os.environ.get("CC")
    if not any(map(shutil.which, [chosen] if chosen else COMPILERS)):
        return f"no C compiler found (looked for {f'CC={chosen}' if chosen else 'gcc and clang'})"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    return "" if header.is_file() else f"no {header} found (of Python's development files)"


def triton_kernels(name: str = "kernels") -> Any:
    """The module devices/triton_<name>.py, imported on first use: Triton may not be installed."""
    return importlib.import_module(f"devices.triton_{name}")


def capture(work: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """Record the kernels of `work` without running them.

    Returns:
        A graph whose replay() runs the kernels again on the same memory, and the result of
        `work`, which each replay overwrites.
    """
    graph = torch.cuda.CUDAGraph()
    # the thread that loads the next batches may take page-locked memory meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph, result


def cuda_driver() -> str:
    """The driver's own line about itself; `unknown` if there is none."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return "unknown"
