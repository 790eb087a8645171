"""numpy's and torch's global random generators as JSON, and back."""

import base64
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from checkpoints.json_values import number_of, object_of, text_of, whole_of
from common.draw_state import NUM_WORDS


def generators_as_json() -> dict[str, Any]:
    """The state of both generators."""
    state = np.random.get_state(legacy=False)
    words = state["state"]["key"].astype("<u4").tobytes()
    return {
        "numpy": {
            "words": base64.b64encode(words).decode(),
            "position": int(state["state"]["pos"]),
            "has_normal": int(state["has_gauss"]),
            "normal": float(state["gauss"]),
        },
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
    }


def restore_generators(values: Any) -> None:
    """Set both generators to what `generators_as_json` has returned.

    Raises:
        ValueError: it has returned no such values.
    """
    of_numpy, of_torch = states_of(values)
    try:
        torch.set_rng_state(of_torch)
    except RuntimeError as error:
        raise ValueError("torch is no state of torch's generator") from error
    np.random.set_state(of_numpy)


def states_of(values: Any) -> tuple[dict[str, Any], torch.Tensor]:
    """What np.random.get_state(legacy=False) and torch.get_rng_state() returned.

    Args:
        values: what `generators_as_json` has returned.

    Raises:
        ValueError: it has returned no such values.
    """
    saved = object_of(values, "numpy")
    words, position = _words_of(saved), whole_of(saved, "position", NUM_WORDS)
    normal = number_of(saved, "normal")
    if math.isnan(normal):
        raise ValueError("numpy.normal is no number")
    of_numpy = {
        "bit_generator": "MT19937",
        "state": {"key": words, "pos": position},
        "has_gauss": whole_of(saved, "has_normal", 1),
        "gauss": normal,
    }
    of_torch = torch.frombuffer(bytearray(_bytes_of(values, "torch")), dtype=torch.uint8)
    return of_numpy, of_torch


def _words_of(saved: Any) -> npt.NDArray[np.uint32]:
    """(624,) the words of numpy's generator."""
    words = np.frombuffer(_bytes_of(saved, "words"), "<u4").astype(np.uint32)
    if len(words) != NUM_WORDS:
        raise ValueError(f"numpy.words are {len(words)} numbers, expected {NUM_WORDS}")
    return words


def _bytes_of(values: Any, key: str) -> bytes:
    text = text_of(values, key)
    try:
        found = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ValueError(f"{key} is no base64 text") from error
    if not found or len(found) % 4:
        raise ValueError(f"{key} has {len(found)} bytes")
    return found
