"""What some of the torches that the program runs with lack: the only place that knows.

docs/npu.md has the versions that were tried. The code that uses a name from here has a slower way
for a torch without it.
"""

import platform
from typing import Any

import torch

from common.versions import release

_RELEASE = release(torch.__version__)

# The kernels are tested from this version on, which comes with torch 2.10.
OLDEST_TRITON = (3, 6)

# The operator of oneDNN that torch.compile emits: it does these products a tenth faster than MKL,
# torch's default, on the machines that were measured. None if this torch does not have it.
onednn_linear: Any = None
if platform.machine() == "x86_64" and torch.backends.mkldnn.is_available():
    onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

# Until 2.7 the end of a process group holds Python's lock while it waits for gloo's threads. One
# that has still to free a tensor waits for the lock, and the process for ever (pytorch#154976). A
# thread frees its last tensor within microseconds if it gets the lock.
SECONDS_BEFORE_GROUP_ENDS = 0.0 if _RELEASE >= (2, 8) else 0.2

# Whether a product of 16-bit factors may keep its float32 sums: torch 2.8 and newer, on a GPU only.
has_products_in_float32 = "dtype_out" in torch.ops.aten.mm.overloads()

# Every torch from 2.6 to 2.15 has these three, but torch has announced the end of other operators
# for quantized models. None if this torch does not have them.
int8_product: Any = getattr(torch, "_int_mm", None)


def quantized_operators(bits: int) -> tuple[Any, Any] | None:
    """Packing rows of 8 or 4 bits, and pooled sums of packed rows; None if this torch lacks one."""
    kind = {8: "byte", 4: "4bit"}[bits]
    found = [
        getattr(torch.ops.quantized, f"embedding_bag_{kind}_{what}", None)
        for what in ("prepack", "rowwise_offsets")
    ]
    return None if None in found else (found[0], found[1])
