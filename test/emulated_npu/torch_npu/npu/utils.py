"""The name of torch_npu.npu.utils that the program uses."""

import os


def is_support_inf_nan():
    """Whether float16 has infinity; on Ascend 910 it saturates, and only a register tells."""
    return os.environ.get("EMULATED_NPU_INF", "1") != "0"
