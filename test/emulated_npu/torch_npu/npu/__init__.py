"""The names of torch.npu that torch or the program uses, as in torch_npu 2.13.0."""

import os
import warnings

import torch

from torch_npu._chip import chip
from torch_npu._record import record
from torch_npu._streams import (
    Event,
    Stream,
    StreamContext,
    current_stream,
    default_stream,
    set_stream,
    stream,
)
from torch_npu.npu import utils

__all__ = ["Event", "Stream", "StreamContext", "current_stream", "default_stream", "set_stream"]
__all__ += ["stream", "utils"]

_settings = {"device": 0, "jit_compile": None}


def device_count():
    return int(os.environ.get("EMULATED_NPU_CARDS", "8"))


def is_available():
    return device_count() > 0


def is_initialized():
    return True


def _lazy_init():
    pass


def _is_in_bad_fork():
    return False


def set_device(device):
    index = device if isinstance(device, int) else torch.device(device).index or 0
    if not 0 <= index < device_count():
        raise RuntimeError(f"Invalid device id {index}")
    _settings["device"] = index


def current_device():
    return _settings["device"]


def get_device_name(device_name=None):
    return f"{chip().name}, emulated on the CPU"


def is_bf16_supported(including_emulation=False):
    return chip().has_bfloat16


def get_amp_supported_dtype():
    return [torch.float16, torch.bfloat16, torch.float32]


def set_compile_mode(jit_compile=False):
    if jit_compile and not chip().may_compile:
        warnings.warn("Current device only support jit_compile=False", stacklevel=2)
        jit_compile = False
    _settings["jit_compile"] = jit_compile


def is_jit_compile_false():
    own = _settings["jit_compile"]
    return not (chip().compiles if own is None else own)


def synchronize(device=None):
    record.wait("synchronize")


def empty_cache():
    pass


def max_memory_allocated(device=None):
    return 0


def memory_allocated(device=None):
    return 0


def reset_peak_memory_stats(device=None):
    pass


def manual_seed(seed):
    pass


def manual_seed_all(seed):
    pass


def get_rng_state(device="npu"):
    return torch.get_rng_state()


def set_rng_state(new_state, device="npu"):
    torch.set_rng_state(new_state)
