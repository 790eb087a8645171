"""How much memory this process takes, of its host and of its card."""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

_OF_PROCESS = Path("/proc/self/statm")
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that a process takes.

    Attributes:
        host: now; None where the system does not say it.
        host_peak: at most so far.
        device: bytes of the card in torch's tensors, now; None without a card.
        device_peak: at most so far.
    """

    host: int | None
    host_peak: int
    device: int | None
    device_peak: int | None


def memory_use(device: torch.device) -> MemoryUse:
    """What this process takes now; takes microseconds, and does not wait for the card."""
    host = _host_now()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT
    host_peak = max(peak, host or 0)  # the system brings its peak up to date now and then
    if device.type == "cpu":
        return MemoryUse(host, host_peak, None, None)
    module = torch.get_device_module(device.type)
    device_now, device_peak = module.memory_allocated(device), module.max_memory_allocated(device)
    return MemoryUse(host, host_peak, int(device_now), int(device_peak))


def _host_now() -> int | None:
    try:
        return int(_OF_PROCESS.read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError, ValueError):
        return None
