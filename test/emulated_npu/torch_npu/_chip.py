"""The chips that can be emulated, with what differs between them; docs/npu.md has the sources."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What torch_npu says of a chip.

    Attributes:
        name: what get_device_name returns.
        has_bfloat16: it computes in bfloat16.
        has_infinity: float16 overflows to infinity; else it saturates, and only a register tells.
        compiles: operators are compiled for their shapes unless it is said otherwise.
        may_compile: they can be.
    """

    name: str
    has_bfloat16: bool = True
    has_infinity: bool = True
    compiles: bool = False
    may_compile: bool = True


CHIPS = {
    "910": Chip("Ascend910ProB", has_bfloat16=False, has_infinity=False, compiles=True),
    "A2": Chip("Ascend910B3"),
    "A3": Chip("Ascend910_9391"),
    "950": Chip("Ascend950PR_9579", may_compile=False),
}


def chip():
    """The chip of EMULATED_NPU_CHIP; A2 if it is not set."""
    name = os.environ.get("EMULATED_NPU_CHIP", "A2")
    if name not in CHIPS:
        raise RuntimeError(f"EMULATED_NPU_CHIP={name}: expected {', '.join(CHIPS)}")
    return CHIPS[name]
