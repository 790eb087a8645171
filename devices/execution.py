"""How a device is used: precision, kernels, streams, graphs, and the flags that choose them."""

import argparse
from dataclasses import dataclass

import torch

from common.errors import UserError
from common.flags import number_in, true_or_false
from devices.card import device_name, has_bfloat16
from devices.gpu import has_triton

LOWER_PRECISION = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the device, the precision and the processes."""
    flag = parser.add_argument_group("Device and processes").add_argument
    flag("--use-npu", action="store_true", help="train on Ascend NPUs, through torch_npu")
    flag("--use-gpu", action="store_true", help="train on NVIDIA GPUs; without either on the CPU")
    flag("--local_rank", type=number_in(int, -1), default=-1, help="which card; -1: $LOCAL_RANK")
    flag(
        "--amp",
        choices=tuple(LOWER_PRECISION),
        default="off",
        help="precision of MLPs, interaction and exchange; tables stay float32",
    )
    flag(
        "--dist-backend",
        choices=("nccl", "hccl", "gloo", "mpi"),
        help="of torch.distributed; default: the device's own",
    )
    flag(
        "--dist-timeout",
        type=number_in(int, 1, 10**8),
        default=1800,
        help="seconds that a rank may keep the others waiting",
    )
    flag(
        "--world_size",
        type=int,
        help="kept for compatibility: the launcher says how many ranks there are",
    )
    flag("--dry-run", action="store_true", help="check options and device, prepare data, then stop")
    flag(
        "--self-check",
        action="store_true",
        help="try 20 steps, evaluation, saving and loading on the device; print PASS or why not",
    )


def add_execution_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that turn off what makes an NPU or a GPU faster."""
    group = parser.add_argument_group("NPU and GPU: optimisations; =false disables one")

    def flag(name: str, help_text: str, default: bool | None = True) -> None:
        group.add_argument(name, type=true_or_false, default=default, help=help_text)

    flag("--fused-optimizer", "one kernel updates both MLPs (sgd)")
    flag("--one-lookup", "one lookup for all tables, not one a table (also on the CPU)")
    flag("--static-shapes", "fill up short batches, so that all shapes are alike")
    flag("--pin-memory", "batches wait in page-locked memory")
    flag("--copy-stream", "copy the next batch during a step, on a stream of its own")
    flag(
        "--jit-compile",
        "NPU: compile operators for their shapes; not given: as the chip does",
        None,
    )


def add_gpu_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only an NVIDIA GPU takes."""
    flag = parser.add_argument_group("NVIDIA GPU").add_argument
    flag("--cuda-graphs", action="store_true", help="record a step once, then replay it")
    flag(
        "--tf32",
        action="store_true",
        help="TF32: inputs of float32 products rounded to 10 mantissa bits",
    )
    flag(
        "--triton",
        type=true_or_false,
        default=True,
        help="kernels in Triton (with TRITON_INTERPRET=1 also on the CPU)",
    )
    flag(
        "--sum-equal-rows",
        type=true_or_false,
        default=False,
        help="sgd, in Triton: sum gradients of equal rows among 32 before a row is changed",
    )


@dataclass(frozen=True)
class Execution:
    """How a device is used. Only `lower` changes what is computed.

    docs/npu.md has the sources, with links.

    Attributes:
        lower: type of the MLPs and the interaction; None: float32. (Mixed precision, in the
            Ascend Extension for PyTorch's guide; bfloat16 from Atlas A2 on.)
        one_lookup: one lookup for all tables, else one for each table. (torch_npu's dispatch
            table: it has kernels for embedding and index_add, none for embedding_bag's backward.)
        fused_optimizer: one kernel updates all dense parameters. (NpuFusedSGD in torch_npu.optim.)
        static_shapes: a short batch is padded, so that all batches have the same shapes.
            (CANN's migration guide, "fixing dynamic shapes": each new shape may compile anew.)
        pin_memory: batches wait in page-locked memory, from which copies need no host. (torch's
            notes on pinned memory, and torch_npu's own use of it in its GradScaler.)
        copy_stream: the next batch is copied on a stream of its own during a step.
            (torch.npu.Stream, which waits and records as torch.cuda.Stream does.)
        triton: kernels of the modules triton_*.py replace chains of operators.
        sums_equal_rows: sgd's kernel sums gradients of equal rows before it adds them to a row.
        graphs: a step is recorded once and then replayed by one call of the host. (CUDA
            graphs, in torch's notes on CUDA semantics.)
    """

    lower: torch.dtype | None = None
    one_lookup: bool = True
    fused_optimizer: bool = True
    static_shapes: bool = False
    pin_memory: bool = False
    copy_stream: bool = False
    triton: bool = False
    sums_equal_rows: bool = False
    graphs: bool = False

    @classmethod
    def from_options(cls, options: argparse.Namespace, device: torch.device) -> "Execution":
        """How the flags ask for the device to be used, without what it cannot do.

        Raises:
            UserError: the device has no bfloat16, or Triton's kernels cannot be built.
        """
        on_card = device.type != "cpu"
        lower = lower_precision(device, options.amp)
        triton = options.triton and has_triton(device, lower)
        return cls(
            lower=lower,
            one_lookup=options.one_lookup,
            fused_optimizer=options.fused_optimizer,
            static_shapes=on_card and options.static_shapes,
            pin_memory=on_card and options.pin_memory,
            copy_stream=on_card and options.copy_stream,
            triton=triton,
            sums_equal_rows=triton and options.sum_equal_rows,
            graphs=options.cuda_graphs,
        )


def lower_precision(device: torch.device, amp: str) -> torch.dtype | None:
    """The type that --amp (off, bf16, fp16) names; None: everything is float32.

    Raises:
        UserError: the device has no bfloat16.
    """
    if amp == "bf16" and device.type != "cpu" and not has_bfloat16(device):
        raise UserError(
            f"--amp=bf16: {device} ({device_name(device)}) has no bfloat16; --amp=fp16 works"
        )
    return LOWER_PRECISION[amp]
