"""Compiles what bench/kernels.py measures, in processes of their own, into Triton's cache.

A kernel takes about a second to compile, and there are more than a hundred of them.
"""

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from bench.kernel_cases import Inputs, Shape, works
from bench.kernel_settings import recorded

MOST_COMPILERS = 12


def to_compile(shapes: Sequence[Shape], lower: torch.dtype) -> list[Any]:
    """One launch of each machine code that the run wants: kernel, arguments, settings."""
    inputs, found = Inputs("meta", lower), {}
    made = [
        (work, work.make(inputs)) for shape in shapes for work in works(shape) if work.kernel[0]
    ]
    owns: list[Any] = [(work, copy, [{}]) for work, copy in made]
    others = [(work, copy, work.other_settings(work.own_setting(copy))) for work, copy in made]
    for work, copy, settings in [*owns, *others]:
        for setting in settings:
            for kernel, arguments, constants in recorded(work.kernel, setting, copy.call):
                kinds = [_kind(argument) for argument in arguments]
                key = kernel.__name__, str(kinds), str(sorted(constants.items()))
                found[key] = kernel, arguments, constants
    return list(found.values())


def _kind(argument: Any) -> Any:
    """What Triton compiles a kernel anew for."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0
    return type(argument)


def compile_share(launches: Sequence[Any], capability: int) -> None:
    """Put machine code into Triton's cache, from a process that leaves the card alone."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", capability, 32)
    # Triton asks its driver for no more than this until a kernel is launched
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: target,
        )
    )
    for kernel, arguments, constants in launches:
        with contextlib.suppress(Exception):  # the run itself will meet it, and tell
            kernel.warmup(*arguments, grid=(1,), **constants)


class Compilers:
    """Processes that compile all kernels while products are measured.

    Args:
        command: of a program that compiles if it gets --compile=CAPABILITY,NUMBER,COUNT too; empty:
            nothing is compiled.
        capability: of the card, such as 90.
    """

    def __init__(self, command: Sequence[str], capability: int) -> None:
        count = max(1, min(MOST_COMPILERS, (os.cpu_count() or 1) - 2)) if command else 0
        silent = subprocess.DEVNULL
        self._processes = [
            subprocess.Popen(
                [*command, f"--compile={capability},{number},{count}"], stdout=silent, stderr=silent
            )
            for number in range(count)
        ]

    def wait(self, seconds: float) -> str:
        """Until all have ended, or so long; says how it went."""
        begin = time.monotonic()
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, begin + seconds - time.monotonic()))
        ended = sum(process.poll() == 0 for process in self._processes)
        waited = time.monotonic() - begin
        return f"{ended} of {len(self._processes)} compilers are done, waited {waited:.1f} s"

    def stop(self) -> None:
        """End those that still run."""
        for process in self._processes:
            process.kill()
            process.wait()
