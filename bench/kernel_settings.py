"""Settings of Triton's kernels that bench/kernels.py tries in place of the program's own."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from devices.gpu import triton_kernels

Setting = dict[str, int]  # values of a module's constants, and of "warps"
Settings = tuple[Setting, ...]
Kernel = tuple[str, str]  # <name> of a module devices/triton_<name>.py, and a kernel in it

WARPS = 4  # Triton's own number, where a launch names none
PASSES = ("RELU_PASSES", "HEAD_PASSES")  # the most: fewer leave at least LEAST_PROGRAMS


def _each(name: str, *numbers: int) -> Settings:
    return tuple({name: number} for number in numbers)


OF_DECODE = (
    *_each("DECODE_ROWS", 16, 64),
    *_each("warps", 2, 8),
    {"DECODE_ROWS": 16, "warps": 2},
    {"DECODE_ROWS": 8, "warps": 1},
)
OF_LOOKUP = (
    *_each("LOOKUP_IDS", 8, 32, 64),
    *_each("warps", 1, 2, 8),
    {"LOOKUP_IDS": 8, "warps": 1},
    {"LOOKUP_IDS": 8, "warps": 2},
    {"LOOKUP_IDS": 32, "warps": 8},
)
OF_SGD = (
    *_each("LOOKUP_IDS", 8, 32),
    *_each("warps", 1, 2, 8),
    {"LOOKUP_IDS": 8, "warps": 2},
)
OF_SUMMED_SGD = (
    *_each("SUMMED_IDS", 16, 64),
    *_each("warps", 1, 2, 8),
    {"SUMMED_IDS": 16, "warps": 2},
    {"SUMMED_IDS": 64, "warps": 8},
)
OF_DOT = _each("warps", 1, 2, 4, 8)
OF_HEAD = (
    *_each("HEAD_NUMBERS", 2048, 8192),
    *_each("HEAD_PASSES", 1, 4, 8, 16),
    *_each("warps", 2, 8),
    {"HEAD_NUMBERS": 2048, "warps": 2},
    {"HEAD_NUMBERS": 8192, "warps": 8},
)
OF_RELU = (
    *_each("RELU_ROWS", 16, 64),
    *_each("RELU_COLUMNS", 64, 256),
    *_each("RELU_PASSES", 1, 2, 4, 8, 16),
    *_each("warps", 2, 8),
    {"RELU_ROWS": 16, "RELU_COLUMNS": 256},
)
OF_UPDATE = (
    *_each("UPDATED_NUMBERS", 512, 2048, 4096),
    *_each("warps", 2, 8),
    {"UPDATED_NUMBERS": 2048, "warps": 8},
)


class _Launches:
    """Stands for a kernel: launches it with other warps, or only notes the launch."""

    def __init__(self, kernel: Any, warps: int | None, calls: list[Any] | None) -> None:
        self._kernel, self._warps, self._calls = kernel, warps, calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **settings: Any) -> None:
            if self._warps:
                settings["num_warps"] = self._warps
            if self._calls is None:
                self._kernel[grid](*args, **settings)
            else:
                self._calls.append((self._kernel, args, settings))

        return launch


@contextlib.contextmanager
def applied(kernel: Kernel, setting: Setting, calls: list[Any] | None = None) -> Iterator[None]:
    """Let the program launch a kernel with a setting; afterwards all is as before.

    Args:
        kernel: ("", "") of a product, with which nothing changes.
        setting: what differs from the program's own.
        calls: launches are not done but added to it: the kernel, its arguments, its settings.
    """
    if not kernel[0]:
        yield
        return
    module = triton_kernels(kernel[0])
    values: dict[str, Any] = {name: number for name, number in setting.items() if name != "warps"}
    if any(name in PASSES for name in setting):
        values["LEAST_PROGRAMS"] = 0
    values[kernel[1]] = _Launches(getattr(module, kernel[1]), setting.get("warps"), calls)
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def recorded(kernel: Kernel, setting: Setting, call: Callable[[], Any]) -> list[Any]:
    """The launches of a call: the kernel, its arguments, its settings. None is done."""
    calls: list[Any] = []
    with applied(kernel, setting, calls):
        call()
    return calls


def own_setting(kernel: Kernel, constants: tuple[str, ...], call: Callable[[], Any]) -> Setting:
    """What the program launches a kernel with.

    Args:
        kernel: ("", "") of a product, which has none.
        constants: names of those of its module that the kernel depends on.
        call: launches it.
    """
    if not kernel[0]:
        return {}
    module = triton_kernels(kernel[0])
    found = {name: getattr(module, name) for name in constants}
    ((_, _, settings),) = recorded(kernel, {}, call)
    found |= {name: settings["PASSES"] for name in constants if name in PASSES}
    return {**found, "warps": settings.get("num_warps", WARPS)}
