"""What some of the torches that the program runs with lack: the only place that knows.

docs/npu.md has the versions that were tried. Each name here is the newer torch's way, or says
whether it is there; the code that uses it has a slower way.
"""

import platform
from typing import Any

import torch

from common.versions import release

_RELEASE = release(torch.__version__)

# The operator of oneDNN that torch.compile emits: it does these products a tenth faster than MKL,
# torch's default, on the machines that were measured. None if this torch does not have it.
onednn_linear: Any = None
if platform.machine() == "x86_64" and torch.backends.mkldnn.is_available():
    onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

# Until 2.7 the end of a process group holds Python's lock while it waits for gloo's threads. One
# that has still to free a tensor waits for the lock, and the process for ever (pytorch#154976).
SECONDS_BEFORE_GROUP_ENDS = 0.0 if _RELEASE >= (2, 8) else 0.2
