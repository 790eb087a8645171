"""Values of a JSON file, checked one by one: whoever wrote the file, nothing but numbers comes in.

A value of another kind is a ValueError that names its key; what the reader makes of it is its own
business.
"""

import math
from collections.abc import Mapping
from typing import Any

MOST = 10**15  # no count of a run is larger


def value_of(values: Any, key: str) -> Any:
    """The value of a key in what should be a JSON object."""
    if not isinstance(values, dict):
        raise ValueError(f"an object with {key} is expected, got {shown(values)}")
    if key not in values:
        raise ValueError(f"{key} is missing")
    return values[key]


def object_of(values: Any, key: str) -> dict[str, Any]:
    """The JSON object under a key."""
    found = value_of(values, key)
    if not isinstance(found, dict):
        raise ValueError(f"{key} is {shown(found)}, expected an object")
    return found


def list_of(values: Any, key: str) -> list[Any]:
    """The list under a key."""
    found = value_of(values, key)
    if not isinstance(found, list):
        raise ValueError(f"{key} is {shown(found)}, expected a list")
    return found


def text_of(values: Any, key: str) -> str:
    """The text under a key."""
    found = value_of(values, key)
    if not isinstance(found, str):
        raise ValueError(f"{key} is {shown(found)}, expected a text")
    return found


def whole_of(values: Any, key: str, highest: int = MOST, lowest: int = 0) -> int:
    """The whole number under a key, within limits."""
    found = value_of(values, key)
    if isinstance(found, bool) or not isinstance(found, int) or not lowest <= found <= highest:
        raise ValueError(
            f"{key} is {shown(found)}, expected a whole number in [{lowest}, {highest}]"
        )
    return found


def bool_of(values: Any, key: str) -> bool:
    """The true or false under a key."""
    found = value_of(values, key)
    if not isinstance(found, bool):
        raise ValueError(f"{key} is {shown(found)}, expected true or false")
    return found


def number_of(values: Any, key: str) -> float:
    """The number under a key; null stands for nan, which JSON does not have."""
    found = value_of(values, key)
    if found is None:
        return math.nan
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise ValueError(f"{key} is {shown(found)}, expected a number")
    return float(found)


def numbers_of(values: Any, key: str) -> list[float]:
    """The list of numbers under a key."""
    found = list_of(values, key)
    return [number_of({key: number}, key) for number in found]


def without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values for a JSON file: null in place of nan."""
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in values.items()
    }


def shown(value: Any) -> str:
    """A value in a few words."""
    text = repr(value) if value is None or isinstance(value, int | float | str | bool) else ""
    if isinstance(value, int) and value.bit_length() > 64:
        text = f"a number of {value.bit_length()} bits"
    return text if 0 < len(text) <= 60 else f"a {type(value).__name__}"
