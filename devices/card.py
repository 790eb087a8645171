"""What torch does alike for any card: its name, how many there are, waiting, streams."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch


def count_cards(device_type: str) -> int:
    """Cards of that type (cuda, npu) that torch finds here."""
    module = torch.get_device_module(device_type)
    return module.device_count() if module.is_available() else 0


# ---------------------------------------------------------------- what a card is


def device_name(device: torch.device) -> str:
    """What the card calls itself."""
    if device.type == "cpu":
        return "CPU"
    return str(torch.get_device_module(device.type).get_device_name(device))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    torch.get_device_module(device.type).synchronize(device)


@functools.cache
def side_stream(device: torch.device) -> Any:
    """A stream beside the main one, the same for all callers: memory is kept by stream."""
    return torch.get_device_module(device.type).Stream()


@contextlib.contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """On a stream of its own, as steps that warm up for `capture` have to be (torch's notes)."""
    module = torch.get_device_module(device.type)
    main, side = module.current_stream(), side_stream(device)
    side.wait_stream(main)
    with module.stream(side):
        yield
    main.wait_stream(side)
