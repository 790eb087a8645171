"""torch_npu.npu.utils."""

import os


def is_support_inf_nan():
    """False: as on Ascend 910, float16 ends at 65504, and only a register tells."""
    return os.environ.get("EMULATED_NPU_INF", "1") != "0"
