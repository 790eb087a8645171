"""The names of torch_npu.npu.utils that the program uses."""

from torch_npu._chip import chip


def is_support_inf_nan():
    """Whether float16 has infinity; on Ascend 910 it saturates, and only a register tells."""
    return chip().has_infinity


def get_cann_version(module="CANN"):
    return "emulated"
