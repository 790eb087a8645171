"""Values of a JSON file, checked one by one: whoever wrote the file, nothing but numbers comes in.

A value of another kind is a ValueError that names its key; what the reader makes of it is its own
business.
"""

import contextlib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

MOST = 10**15  # no count of a run is larger
_Kind = TypeVar("_Kind")
_INFINITE = {"inf": math.inf, "-inf": -math.inf}


def value_of(values: Any, key: str) -> Any:
    """The value of a key in what should be a JSON object."""
    if not isinstance(values, dict):
        raise ValueError(f"an object with {key} is expected, got {shown(values)}")
    if key not in values:
        raise ValueError(f"{key} is missing")
    return values[key]


def object_of(values: Any, key: str) -> dict[str, Any]:
    """The JSON object under a key."""
    return _of_kind(values, key, dict, "an object")


def list_of(values: Any, key: str) -> list[Any]:
    """The list under a key."""
    return _of_kind(values, key, list, "a list")


def text_of(values: Any, key: str) -> str:
    """The text under a key."""
    return _of_kind(values, key, str, "a text")


def bool_of(values: Any, key: str) -> bool:
    """The true or false under a key."""
    return _of_kind(values, key, bool, "true or false")


def _of_kind(values: Any, key: str, kind: type[_Kind], name: str) -> _Kind:
    found = value_of(values, key)
    if not isinstance(found, kind):
        raise ValueError(f"{key} is {shown(found)}, expected {name}")
    return found


def whole_of(values: Any, key: str, highest: int = MOST, lowest: int = 0) -> int:
    """The whole number under a key, within limits."""
    found = value_of(values, key)
    if isinstance(found, bool) or not isinstance(found, int) or not lowest <= found <= highest:
        raise ValueError(
            f"{key} is {shown(found)}, expected a whole number in [{lowest}, {highest}]"
        )
    return found


def number_of(values: Any, key: str) -> float:
    """The number under a key, as `as_json` has it."""
    found = value_of(values, key)
    if found is None:
        return math.nan
    if isinstance(found, str) and found in _INFINITE:
        return _INFINITE[found]
    if isinstance(found, int | float) and not isinstance(found, bool):
        with contextlib.suppress(OverflowError):  # of a whole number beyond all floats
            if math.isfinite(found):
                return float(found)
    raise ValueError(f"{key} is {shown(found)}, expected a number")


def numbers_of(values: Any, key: str) -> list[float]:
    """The list of numbers under a key."""
    found = list_of(values, key)
    return [number_of({key: number}, key) for number in found]


def as_json(value: Any) -> Any:
    """A value for a JSON file, which has no nan, no infinity and no tuples.

    Null stands for nan, the texts inf and -inf for infinities.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {key: as_json(inner) for key, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, tuple | list) else value


def readable(text: str) -> str:
    """A text of a file as it is, unless a terminal could make something else of it."""
    return text if text.isprintable() and len(text) <= 60 else shown(text)


def shown(value: Any) -> str:
    """A value in a few words."""
    text = repr(value) if value is None or isinstance(value, int | float | str | bool) else ""
    if isinstance(value, int) and value.bit_length() > 64:
        text = f"a number of {value.bit_length()} bits"
    return text if 0 < len(text) <= 60 else f"a {type(value).__name__}"
