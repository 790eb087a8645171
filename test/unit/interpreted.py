"""Triton's kernels for tests: on the CPU its interpreter runs them, in the test's own process.

The interpreter gets bfloat16 wrong, so its cases want a GPU. A test file that imports this is
skipped where Triton is missing or old.
"""

import contextlib
import importlib

import pytest
import torch

from devices.gpu import OLDEST_TRITON, triton_version

if triton_version() < OLDEST_TRITON:
    here, oldest = (".".join(map(str, one)) for one in (triton_version(), OLDEST_TRITON))
    reason = f"the kernels want triton {oldest} or newer, here: {here or 'none'}"
    pytest.skip(reason, allow_module_level=True)

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
LOWER = [torch.float16, *([torch.bfloat16] if ON_GPU else [])]
DTYPES = [torch.float32, *LOWER]


@contextlib.contextmanager
def kernel_module(name):
    """The module devices/triton_<name>.py, for as long as the block lasts."""
    with pytest.MonkeyPatch.context() as patch:
        import triton  # noqa: F401 (as torch may have done before: it makes no difference)

        patch.setenv("TRITON_INTERPRET", "0" if ON_GPU else "1")
        yield importlib.import_module(f"devices.triton_{name}")
