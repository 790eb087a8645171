"""Ascend NPUs: everything that this program asks of torch_npu but its optimiser (optim/dense.py).

The names are in torch_npu 2.6.0 to 2.14.0 (test/signatures_of_torch_npu.tsv).
"""

import contextlib
import importlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from common.errors import UserError
from common.versions import installed_version
from devices.card import device_name
from devices.npu_pairs import Installed


def import_torch_npu() -> None:
    """Import torch_npu, which makes the npu device known to torch.

    Raises:
        UserError: torch_npu is not installed, is built for another torch, or does not find CANN;
            or CANN is too old for it, or for numpy.
    """
    installed = Installed.find()
    problem = (
        installed.cann_is_too_old
        or installed.torch_differs
        or installed.numpy_is_too_new
        or installed.aborts_beside(torch.version.cuda)
    )
    if problem:
        raise UserError(f"--use-npu: {problem}")
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # an incomplete CANN raises a plain Exception
        raise UserError(f"--use-npu: {_why_not_imported(error)}") from error


def _why_not_imported(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
        return (
            "torch_npu is not installed: `source test/env_npu.sh` names the one that goes with CANN"
        )
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    installed = f"torch_npu {installed_version('torch_npu')}".strip()
    if "undefined symbol" in reason:
        return (
            f"{installed} and the CANN that is here do not go together ({reason}):"
            " docs/npu.md has the versions that do"
        )
    if re.search(r"lib\w+\.so|ASCEND_|set_env\.sh", reason):
        return (
            f"{installed} does not find CANN ({reason}): install CANN and source its set_env.sh"
            " (`source test/env_npu.sh` looks for it)"
        )
    return f"{installed} cannot be imported ({reason}): docs/npu.md has the versions it wants"


def set_jit_compile(device: torch.device, compiles: bool | None) -> None:
    """Let an NPU compile each operator for the shapes at hand, or take a ready kernel.

    The default is the chip's: on for Ascend 910, off for Atlas A2 and A3 (set_compile_mode in the
    Ascend Extension for PyTorch's API reference). On Ascend 950 torch_npu warns and keeps it off.

    Args:
        device: any; only an NPU is changed.
        compiles: None leaves the chip's default.

    Raises:
        UserError: the chip or its settings refuse it.
    """
    if device.type != "npu" or compiles is None:
        return
    module = torch.get_device_module("npu")
    reason = "it stays as it is"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch_npu's: the line below says the same
        try:
            module.set_compile_mode(jit_compile=compiles)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
    if compiles == module.is_jit_compile_false():
        raise UserError(
            f"--jit-compile={str(compiles).lower()}: {device_name(device)} refuses it ({reason}):"
            " leave the flag out"
        )


class OverflowFlag:
    """The overflow flag of a chip whose float16 saturates at 65504 instead of becoming infinite.

    Ascend 910 is such a chip (INF_NAN_MODE_ENABLE in torch_npu's environment variables): no tensor
    shows an overflow there, only the float status register does. On other devices the flag is
    never set.

    Raises:
        UserError: the environment asks for a mode that the chip does not have.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._torch_npu: Any = None
        if device.type == "npu":
            torch_npu = importlib.import_module("torch_npu")
            try:
                saturates = not torch_npu.npu.utils.is_support_inf_nan()
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"INF_NAN_MODE_ENABLE: unset it ({reason})") from error
            if saturates:
                self._torch_npu = torch_npu

    def clear(self) -> None:
        """Forget earlier overflows."""
        if self._torch_npu is not None:
            self._torch_npu.npu_clear_float_status(torch.zeros(8, device=self._device))

    def add_to(self, count: torch.Tensor) -> None:
        """Add 1 to `count` (1,) if there was an overflow; the host does not wait for the device."""
        if self._torch_npu is not None:
            status = self._torch_npu.npu_get_float_status(torch.zeros(8, device=self._device))
            count.add_((status[:1] != 0).float())


def npu_versions() -> dict[str, str]:
    """Versions of torch_npu, CANN and the driver, by name; `unknown` if one is not found.

    `pair` says whether Ascend's table has this torch, torch_npu and CANN together.
    """
    torch_npu = importlib.import_module("torch_npu")
    found = {"torch_npu": torch_npu.__version__}
    for name, module in (("CANN", "CANN"), ("driver", "DRIVER")):
        with contextlib.suppress(RuntimeError, AttributeError):
            found[name] = torch_npu.npu.utils.get_cann_version(module)
        found[name] = found.get(name) or "unknown"
    return found | {"pair": Installed.find().pair}


@contextlib.contextmanager
def npu_profiler(steps: int, folder: str) -> Iterator[Any]:
    """Run torch_npu's profiler during the block; it writes its files into the folder at the end.

    The calls follow the guide of the Ascend PyTorch Profiler: schedule, tensorboard_trace_handler.

    Args:
        steps: how many are profiled; `.step()` of the profiler ends one.
        folder: where the files go.
    """
    profiler = importlib.import_module("torch_npu").profiler
    with profiler.profile(
        activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU],
        schedule=profiler.schedule(wait=0, warmup=0, active=steps, repeat=1),
        on_trace_ready=profiler.tensorboard_trace_handler(folder),
    ) as active:
        yield active
