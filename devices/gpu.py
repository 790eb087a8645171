"""NVIDIA GPUs: Triton, CUDA graphs, precision of products, streams."""

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError

COMPILERS = ("gcc", "clang")


def has_triton(device: torch.device, lower: torch.dtype | None) -> bool:
    """Triton's kernels run there: on a GPU, or interpreted with TRITON_INTERPRET=1 on the CPU.

    Triton's interpreter gets bfloat16 wrong.

    Raises:
        UserError: there is no C compiler or no Python.h, with which Triton builds what starts its
            kernels.
    """
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    interpreted = interpreted and lower is not torch.bfloat16
    if not (interpreted or device.type == "cuda") or importlib.util.find_spec("triton") is None:
        return False
    missing = "" if interpreted else _missing_for_triton()
    if missing:
        raise UserError(
            f"{missing}, which Triton needs for its kernels: install it, or do without them by"
            " --triton=false",
        )
    return True


def _missing_for_triton() -> str:
    """What of a compiler it does not find, in the places where it looks; "" where all is there."""
    chosen = os.environ.get("CC")
    if not any(map(shutil.which, [chosen] if chosen else COMPILERS)):
        return f"no C compiler found (looked for {f'CC={chosen}' if chosen else 'gcc and clang'})"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    return "" if header.is_file() else f"no {header} found (of Python's development files)"


def triton_kernels() -> Any:
    """devices/triton_kernels.py, imported on first use: not every device has a Triton."""
    return importlib.import_module("devices.triton_kernels")


def set_product_precision(device: torch.device, tf32: bool) -> None:
    """How products are computed: sums are float32's, also of 16 bits' factors.

    Args:
        device: a GPU may round the factors of float32 products to 10 bits (TensorFloat-32).
        tf32: it does.

    Raises:
        UserError: tf32 on another device.
    """
    if tf32 and device.type != "cuda":
        raise UserError(f"--tf32 is for NVIDIA GPUs: the device is {device.type}")
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    # else a product that several blocks of a GPU share adds up their sums in 16 bits
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def capture(device: torch.device, work: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
    """Record the kernels of `work` without running them.

    Returns:
        A graph, whose replay() runs them again, on the same memory, and `work`'s result, which
        each run overwrites.
    """
    graph = torch.cuda.CUDAGraph()
    # the thread that makes the next batches may take page-locked memory meanwhile
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = work()
    return graph, result


def cuda_driver() -> str:
    """The driver's own line about itself; `unknown` where there is none."""
    try:
        return open("/proc/driver/nvidia/version").readline().strip()
    except OSError:
        return "unknown"
