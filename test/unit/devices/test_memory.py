"""A lack of memory, of the host or of a card, is one line of the rank that lacks it."""

import pytest
import torch

from common.errors import RankError, UserError
from devices.memory import out_of_memory_told

CPU = torch.device("cpu")
# what torch, torch_npu, numpy and Python have said, and what of it is told
SAID = [
    (
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
            " memory: you tried to allocate 400000000000000 bytes. Error code 12 (Cannot allocate"
            " memory)"
        ),
        " (asked for 400000000000000 bytes)",
    ),
    (
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11"
            " GiB of which 1.06 GiB is free."
        ),
        " (asked for 2.00 GiB)",
    ),
    (RuntimeError("NPU out of memory. Tried to allocate 2.0 MiB (NPU 0;"), " (asked for 2.0 MiB)"),
    (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ..."), ""),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), ""),
    (RuntimeError("Storage size calculation overflowed with sizes=[1, 2]"), ""),
    (MemoryError("Unable to allocate 2.91 TiB for an array"), " (asked for 2.91 TiB)"),
    (MemoryError(), ""),
    (RuntimeError("unable to mmap 672 bytes from file <a>: Cannot allocate memory (12)"), ""),
]  # fmt: skip


@pytest.mark.parametrize("error, told", SAID)
def test_a_lack_of_memory_is_one_line(error, told):
    with pytest.raises(RankError) as raised, out_of_memory_told(CPU):
        raise error
    assert str(raised.value).startswith(f"out of memory on cpu{told}: a smaller --mini-batch-size")
    with pytest.raises(RankError) as raised, out_of_memory_told(CPU, "the MLPs", "fewer layers"):
        raise error
    assert str(raised.value) == f"no memory for the MLPs on cpu{told}: fewer layers help"


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), UserError("x"), OSError("memory")]
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, out_of_memory_told(CPU):
        raise error
    assert raised.value is error
