"""How a device is used: precision, kernels, streams, graphs."""

from dataclasses import dataclass

import torch

from common.errors import UserError
from devices.card import device_name


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
            )
    return LOWER_PRECISION[amp]
