"""What torch does alike for any card: counting them, naming one, waiting for it, its streams."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch


def count_cards(device_type: str) -> int:
    """How many cards of the type (cuda, npu) torch finds here."""
    module = torch.get_device_module(device_type)
    return module.device_count() if module.is_available() else 0


def device_name(device: torch.device) -> str:
    """The card's own name; `CPU` for the CPU."""
    if device.type == "cpu":
        return "CPU"
    return str(torch.get_device_module(device.type).get_device_name(device))


def card_memory(device: torch.device) -> int:
    """Bytes that an NVIDIA GPU has."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a card computes in bfloat16 itself, not through float32."""
    if device.type == "cuda":  # torch.cuda also counts what it emulates, unless asked not to
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.get_device_module(device.type).is_bf16_supported())


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was asked of it."""
    torch.get_device_module(device.type).synchronize(device)


@functools.cache
def side_stream(device: torch.device) -> Any:
    """A stream beside the main one.

    All callers share one: torch's allocator keeps the free memory of each stream apart.
    """
    return torch.get_device_module(device.type).Stream()


@contextlib.contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """Run the block on the side stream, between the main stream's earlier and later work.

    torch's notes on CUDA graphs ask this of the steps that warm up for `devices.gpu.capture`.
    """
    module = torch.get_device_module(device.type)
    main, side = module.current_stream(), side_stream(device)
    side.wait_stream(main)
    with module.stream(side):
        yield
    main.wait_stream(side)
