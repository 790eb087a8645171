"""Devices: which there are, what each can do, and all that is said to torch_npu.

torch_npu's names are those of 2.13.0; docs/npu.md has the versions that go together.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from command_line import UserError

FLAGS = {"cuda": "--use-gpu", "npu": "--use-npu"}
COMPILERS = ("gcc", "clang")


@dataclass(frozen=True)
class Execution:
    """How a device is used. But for `lower` none of it changes what is computed.

    Where each comes from, with links, is told in docs/npu.md.

    Attributes:
        lower: type of the MLPs and the interaction; None: float32. (Mixed precision, in the
            Ascend Extension for PyTorch's guide; bfloat16 from Atlas A2 on.)
        one_lookup: one lookup for all tables; else one a table. (torch_npu's dispatch table: it
            has kernels for embedding and index_add, none for embedding_bag's backward.)
        fused_optimizer: one kernel updates all dense parameters. (NpuFusedSGD in torch_npu.optim.)
        static_shapes: a batch that is short is filled up, so that all have the same shapes.
            (CANN's migration guide, "fixing dynamic shapes": each new shape may compile anew.)
        pin_memory: batches wait in page-locked memory, from which copies need no host. (torch's
            notes on pinned memory, and torch_npu's own use of it in its GradScaler.)
        copy_stream: the next batch is copied on a stream of its own while a step is at work.
            (torch.npu.Stream, which waits, records and tells memory as torch.cuda.Stream does.)
        triton: kernels of triton_kernels.py take the place of chains of operators.
        graphs: a step is recorded once and then replayed with one call of the host. (CUDA
            graphs, in torch's notes on CUDA semantics.)
    """

    lower: torch.dtype | None = None
    one_lookup: bool = True
    fused_optimizer: bool = True
    static_shapes: bool = False
    pin_memory: bool = False
    copy_stream: bool = False
    triton: bool = False
    graphs: bool = False


LOWER_PRECISION = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_device(device_type: str, card: int) -> torch.device:
    """The device, made the current one.

    Args:
        device_type: cpu, cuda or npu.
        card: which one, if not the CPU.

    Raises:
        UserError: it is not there.
    """
    if device_type == "cpu":
        return torch.device("cpu")
    flag = FLAGS[device_type]
    if device_type == "npu":
        import_torch_npu()
    count = count_cards(device_type)
    if count == 0:
        raise UserError(
            f"{flag}: no {device_type} device found (looked with {_looked_with(device_type)});"
            f" without {flag} the CPU trains",
            everywhere=True,
        )
    if card >= count:
        found = f"found {count}, {device_type}:0 to {device_type}:{count - 1}"
        raise UserError(f"{flag}: card {card} is asked for, {found}")
    torch.get_device_module(device_type).set_device(card)
    return torch.device(device_type, card)


def count_cards(device_type: str) -> int:
    """Cards of that type (cuda, npu) that torch finds here."""
    module = torch.get_device_module(device_type)
    return module.device_count() if module.is_available() else 0


def _looked_with(device_type: str) -> str:
    if device_type == "npu":
        return f"torch_npu {_torch_npu_version()}; `npu-smi info` shows the cards and the driver"
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return f"torch {torch.__version__}, {cuda}"


# ---------------------------------------------------------------- torch_npu


def import_torch_npu() -> None:
    """Import torch_npu, which makes the npu device known to torch.

    Raises:
        UserError: it is not installed, is for another torch, or does not find CANN.
    """
    version = _torch_npu_version()
    if version and _release(version) != _release(torch.__version__):
        raise UserError(
            f"--use-npu: torch_npu {version} and torch {torch.__version__} do not go together:"
            f" expected torch {_release(version)}; requirements-npu.txt has a pair that does",
            everywhere=True,
        )
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # what it raises where CANN is not whole is a plain Exception
        raise UserError(f"--use-npu: {_why_not(error)}", everywhere=True) from error


def _torch_npu_version() -> str:
    """The version of what is installed; empty where that does not say."""
    try:
        return importlib.metadata.version("torch_npu")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> str:
    """`2.13.0` of `2.13.0+cpu` or `2.13.0.post1`."""
    found = re.match(r"\d+(\.\d+){0,2}", version)
    return found[0] if found else version


def _why_not(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name == "torch_npu":
        return "torch_npu is not installed: pip install -r requirements-npu.txt"
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    installed = f"torch_npu {_torch_npu_version()}".strip()
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
    """Whether an NPU compiles an operator for the shapes at hand, or takes a ready kernel.

    None leaves it as the chip has it: on for Ascend 910, off for Atlas A2 and A3 (set_compile_mode
    in the Ascend Extension for PyTorch's API reference). The newest chips refuse to compile.

    Raises:
        UserError: the chip or its settings refuse it.
    """
    if device.type != "npu" or compiles is None:
        return
    module = torch.get_device_module("npu")
    reason = "it stays off"
    try:
        module.set_compile_mode(jit_compile=compiles)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    if compiles == module.is_jit_compile_false():
        raise UserError(
            f"--jit-compile={str(compiles).lower()}: {device_name(device)} refuses it ({reason}):"
            " leave the flag out",
            everywhere=True,
        )


# ---------------------------------------------------------------- NVIDIA GPUs


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
            everywhere=True,
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
    """The module triton_kernels, imported on first use: not every device has a Triton."""
    return importlib.import_module("triton_kernels")


def set_product_precision(device: torch.device, tf32: bool) -> None:
    """How products are computed: sums are float32's, also of 16 bits' factors.

    Args:
        device: a GPU may round the factors of float32 products to 10 bits (TensorFloat-32).
        tf32: it does.

    Raises:
        UserError: tf32 on another device.
    """
    if tf32 and device.type != "cuda":
        raise UserError(f"--tf32 is for NVIDIA GPUs: the device is {device.type}", everywhere=True)
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


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    torch.get_device_module(device.type).synchronize(device)


@contextlib.contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """On a stream of its own, as steps that warm up for `capture` have to be (torch's notes)."""
    module = torch.get_device_module(device.type)
    main, side = module.current_stream(), _side_stream(device)
    side.wait_stream(main)
    with module.stream(side):
        yield
    main.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.get_device_module(device.type).Stream()


# ---------------------------------------------------------------- precision


def lower_precision(device: torch.device, amp: str) -> torch.dtype | None:
    """The type that --amp (off, bf16, fp16) names; None: all is float32.

    Raises:
        UserError: the card has no bfloat16.
    """
    if amp == "bf16" and device.type != "cpu":
        module = torch.get_device_module(device.type)
        if not module.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"--amp=bf16: {device} ({device_name(device)}) has no bfloat16; --amp=fp16 works",
                everywhere=True,
            )
    return LOWER_PRECISION[amp]


class OverflowFlag:
    """A chip's flag of float16 overflow, where one saturates at 65504 instead of giving infinity.

    That is Ascend 910 (INF_NAN_MODE_ENABLE in torch_npu's environment variables): no tensor shows
    an overflow there, only the float status register does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._torch_npu: Any = None
        if device.type == "npu":
            torch_npu = importlib.import_module("torch_npu")
            if not torch_npu.npu.utils.is_support_inf_nan():
                self._torch_npu = torch_npu

    def clear(self) -> None:
        """Forget earlier overflows."""
        if self._torch_npu is not None:
            self._torch_npu.npu_clear_float_status(torch.zeros(8, device=self._device))

    def add_to(self, found: torch.Tensor) -> None:
        """Add 1 to `found` (1,) on the device, without waiting, if there was one."""
        if self._torch_npu is not None:
            status = self._torch_npu.npu_get_float_status(torch.zeros(8, device=self._device))
            found.add_((status[:1] != 0).float())


# ---------------------------------------------------------------- what a card is


def device_name(device: torch.device) -> str:
    """What the card calls itself."""
    if device.type == "cpu":
        return "CPU"
    return str(torch.get_device_module(device.type).get_device_name(device))


def versions(device: torch.device) -> dict[str, str]:
    """What a run depends on, by name: device, driver, libraries; `unknown` where nothing tells."""
    found = {"device": f"{device} ({device_name(device)})"}
    if device.type == "npu":
        found |= _npu_versions()
    if device.type == "cuda":
        found["CUDA"] = f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        found["driver"] = _cuda_driver()
    return found | {"torch": torch.__version__}


def _npu_versions() -> dict[str, str]:
    torch_npu = importlib.import_module("torch_npu")
    found = {"torch_npu": torch_npu.__version__}
    for name, module in (("CANN", "CANN"), ("driver", "DRIVER")):
        with contextlib.suppress(RuntimeError, AttributeError):
            found[name] = torch_npu.utils.get_cann_version(module)
        found[name] = found.get(name) or "unknown"
    return found


def _cuda_driver() -> str:
    try:
        return open("/proc/driver/nvidia/version").readline().strip()
    except OSError:
        return "unknown"


# ---------------------------------------------------------------- the dense part's optimiser


def make_optimizer(
    name: str, parameters: Sequence[torch.nn.Parameter], lr: float, fused: bool
) -> torch.optim.Optimizer:
    """The optimiser of the dense parameters: sgd; adagrad for adagrad and rwsadagrad.

    Args:
        name: of --optimizer.
        parameters: on one device.
        lr: learning rate.
        fused: one kernel for all parameters, where the device has one: torch_npu's NpuFusedSGD
            (torch_npu.optim in the API reference of the Ascend Extension for PyTorch), torch's own
            on a GPU. There is none for Adagrad.
    """
    device_type = parameters[0].device.type
    foreach = None if device_type == "cpu" else True  # a kernel for lists of tensors
    if name != "sgd":
        return torch.optim.Adagrad(parameters, lr=lr, foreach=foreach)
    if fused and device_type == "npu":
        optimizer: torch.optim.Optimizer = importlib.import_module("torch_npu").optim.NpuFusedSGD(
            parameters, lr=lr
        )
        return optimizer
    if fused and device_type == "cuda":
        return torch.optim.SGD(parameters, lr=lr, fused=True)
    return torch.optim.SGD(parameters, lr=lr, foreach=foreach)


# ---------------------------------------------------------------- profiling


@contextlib.contextmanager
def npu_profiler(steps: int, folder: str) -> Iterator[Any]:
    """torch_npu's profiler for that many steps (`.step()` ends one); it leaves its files in folder.

    As in the guide of the Ascend PyTorch Profiler: schedule, and tensorboard_trace_handler.
    """
    profiler = importlib.import_module("torch_npu").profiler
    with profiler.profile(
        activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.NPU],
        schedule=profiler.schedule(wait=0, warmup=0, active=steps, repeat=1),
        on_trace_ready=profiler.tensorboard_trace_handler(folder),
    ) as active:
        yield active
