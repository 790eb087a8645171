"""Where the draws of random data stand: a resumed run need not draw the batches before."""

import base64
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from common.bag_kernels import Stream

NUM_WORDS = 624  # of the state of MT19937
_WORD = np.dtype("<u4")
_TOP_BIT = 1 << 31  # the only bit of the first word that later numbers depend on


@dataclass(frozen=True)
class DrawState:
    """The state of a stream in which the draws of a batch begin.

    Attributes:
        number: the batch's, from 0.
        key: the 624 words of MT19937, of 4 bytes each, the lowest first.
        position: of the next of the words that is used; 624: all are used.
        has_normal: whether a normal number is left of the last pair.
        normal: that number.

    Raises:
        ValueError: a value is none that a stream can have.
    """

    number: int
    key: bytes
    position: int
    has_normal: bool
    normal: float

    def __post_init__(self) -> None:
        position, normal = self.position, self.normal
        checks = {
            "number: expected one from 0 on": type(self.number) is int and self.number >= 0,
            f"key: expected {NUM_WORDS} words, not all 0": _is_key(self.key),
            f"position: expected one from 0 to {NUM_WORDS}": (
                type(position) is int and 0 <= position <= NUM_WORDS
            ),
            "has_normal: expected true or false": type(self.has_normal) is bool,
            "normal: expected a finite number": type(normal) is float and math.isfinite(normal),
        }
        for message, is_good in checks.items():
            if not is_good:
                raise ValueError(f"state of random data, {message}")

    @classmethod
    def of_stream(cls, stream: Stream, number: int) -> "DrawState":
        """The state of a stream that has come to batch `number`; it takes 30 to 40 us."""
        state: Any = stream.random.bit_generator.state
        key = state["state"]["key"].astype(_WORD).tobytes()
        has_normal, normal = stream.normal.tolist()
        return cls(number, key, int(state["state"]["pos"]), bool(has_normal), normal)

    def stream(self) -> Stream:
        """A stream in this state."""
        bits = np.random.MT19937()
        key = np.frombuffer(self.key, _WORD).astype(np.uint32)
        bits.state = {
            "bit_generator": "MT19937", "state": {"key": key, "pos": self.position}
        }  # fmt: skip
        return Stream(np.random.Generator(bits), np.array([self.has_normal, self.normal], float))

    def to_json(self) -> dict[str, Any]:
        """The state in values that JSON keeps exactly."""
        return asdict(self) | {"key": base64.b64encode(self.key).decode()}

    @classmethod
    def from_json(cls, value: object) -> "DrawState":
        """The state of which `to_json` made this value.

        Raises:
            ValueError: it is none that `to_json` can make.
        """
        names = set(cls.__dataclass_fields__)
        if not isinstance(value, dict) or set(value) != names:
            raise ValueError(f"state of random data: expected {', '.join(sorted(names))}")
        try:
            key = base64.b64decode(value["key"], validate=True)
        except (ValueError, TypeError) as error:
            raise ValueError(f"state of random data, key: expected base64: {error}") from error
        return cls(**(value | {"key": key}))


def _is_key(key: bytes) -> bool:
    """Whether these are words from which MT19937 makes numbers; from zeros it makes zeros only."""
    if len(key) != NUM_WORDS * _WORD.itemsize:
        return False
    words = np.frombuffer(key, _WORD)
    return bool(words[0] >= _TOP_BIT or words[1:].any())
