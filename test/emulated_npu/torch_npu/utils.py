"""The name of torch_npu.utils that the program uses."""


def get_cann_version(module="CANN"):
    return "emulated"
