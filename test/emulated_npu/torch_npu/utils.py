"""torch_npu.utils."""


def get_cann_version(module="CANN"):
    return "emulated"
