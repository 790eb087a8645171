"""Checks of the values that a run takes from a model file: each mistake is one line.

Types and shapes are the same for all ranks: a fault in them is a UserError. The rows of a table are
read by the rank that holds them: a fault in their numbers is a RankError.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from common.errors import UserError

LARGEST = torch.finfo(torch.float32).max
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Wanted:
    """A tensor of real numbers that a model takes from a file.

    Attributes:
        shape: its shape.
        fault: the error if its numbers are wrong: UserError if all ranks read it, RankError if only
            this one does. None: another rank reads it.
        lowest: its lowest number; sums of squares have 0.
        rows: those that this rank reads; None: all.
    """

    shape: tuple[int, ...]
    fault: type[UserError] | None = UserError
    lowest: float = -LARGEST
    rows: range | None = None


class ValueChecks:
    """Checks of a file's values; a method raises a UserError that names the file and the key.

    Args:
        path: where the file is.
    """

    def __init__(self, path: str) -> None:
        self._path = path

    def dict_of(self, key: str, value: Any) -> dict[Any, Any]:
        """The value, which must be a dict."""
        if not isinstance(value, dict):
            raise self.fault(key, shown(value), "a dict")
        return value

    def names_of_numbers(self, key: str, found: Mapping[Any, Any], names: Sequence[str]) -> None:
        """Raise a UserError unless the dict `found` has numbers of these names, and no others."""
        for name in sorted(set(names) - set(found)):
            raise self.fault(f"{key}.{name}", "missing", "a number")
        for name in sorted(set(found) - set(names), key=shown):
            raise self.fault(f"{key}[{shown(name)}]", shown(found[name]), "no value of this name")

    def one_of(self, key: str, value: Any, texts: Sequence[str]) -> None:
        """The value must be one of the texts."""
        if not isinstance(value, str) or value not in texts:
            raise self.fault(key, shown(value), " or ".join(texts))

    def whole(self, key: str, value: Any, highest: int, lowest: int = 0) -> int:
        """The value, which must be a whole number in that range."""
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not lowest <= value <= highest:
            raise self.fault(key, shown(value), f"a whole number from {lowest} to {highest}")
        return int(value)

    def number(
        self, key: str, value: Any, lowest: float, highest: float, or_nan: bool = False
    ) -> float:
        """The value, which must be a number in that range, or may be nan."""
        is_good = is_number(value) and lowest <= value <= highest
        is_nan = isinstance(value, float) and math.isnan(value)
        if not is_good and not (or_nan and is_nan):
            raise self.fault(key, shown(value), f"a number from {lowest:g} to {highest:g}")
        return float(value)

    def tensor(self, key: str, value: Any, shape: tuple[int, ...]) -> None:
        """The value must be a tensor of real numbers, of that shape."""
        if not is_plain(value) or value.dtype not in _FLOATS:
            raise self.fault(key, shown(value), "a tensor of real numbers")
        if tuple(value.shape) != shape:
            raise UserError(
                f"--load-model={self._path}: {key} has shape {tuple(value.shape)} there,"
                f" {shape} in this model"
            )

    def numbers(self, key: str, value: torch.Tensor, wanted: Wanted) -> None:
        """Raise the wanted tensor's fault if a number is nan, infinite or below the lowest one."""
        if wanted.fault is None or not value.numel():
            return
        if wanted.rows is not None:
            value = value[wanted.rows.start : wanted.rows.stop]
        if value.dtype not in (torch.float32, torch.float64):
            value = value.float()
        lowest, highest = (float(extreme) for extreme in torch.aminmax(value.detach()))  # or nan
        if wanted.lowest <= lowest and highest <= LARGEST:
            return
        odd = lowest if not lowest >= wanted.lowest else highest
        is_finite = math.isfinite(odd)
        what = "numbers that are nan or infinite" if not is_finite else f"the number {odd:g}"
        raise wanted.fault(
            f"--load-model={self._path}: {key} has {what} in the file:"
            " the run that saved it had diverged, or the file is damaged; load another one"
        )

    def fault(self, key: str, got: str, expected: str) -> UserError:
        """The error about a value that is none of those expected."""
        return UserError(
            f"--load-model={self._path}: {key} is {got}, expected {expected}:"
            " the file is damaged or foreign; load another one"
        )


def is_number(value: Any) -> bool:
    """Whether it is a whole number or a float, of any size."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_plain(value: Any) -> bool:
    """Whether it is a tensor with its numbers in memory: not sparse, nested or without any."""
    is_tensor = isinstance(value, torch.Tensor) and not value.is_nested
    return is_tensor and value.layout == torch.strided and value.device.type == "cpu"


def shown(value: Any) -> str:
    """A value of a file in a few words."""
    if isinstance(value, torch.Tensor):
        shape = "" if value.is_nested else f" of shape {tuple(value.shape)}"
        return f"a tensor{shape} and type {value.dtype}"
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, int | float | str):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}..."
    return f"a {type(value).__name__}"
