"""A torch_npu whose `npu` device is emulated on the CPU, for tests on a machine without one.

With this package's folder on PYTHONPATH the program runs as it does beside the real torch_npu:

    PYTHONPATH=test/emulated_npu python dlrm_s_pytorch.py --use-npu

torch.device("npu"), torch.npu, an hccl backend (gloo underneath) and the names of torch_npu 2.13.0
that the program uses exist, with the limits of the real ones. A tensor on the device is a wrapper
around a host tensor; operators run on what is wrapped. `torch_npu.record` holds what was called,
copied and waited for.

Environment: EMULATED_NPU_CARDS (8), EMULATED_NPU_CHIP (A2; 910, A3 and 950 are the others of
_chip.py).
"""

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from torch_npu import npu
from torch_npu._record import record

_setup_privateuseone_for_python_backend("npu", backend_module=npu)

from torch_npu import _collectives, _tensors, optim, profiler  # noqa: E402

__version__ = torch.__version__.partition("+")[0]
is_emulated = True

npu_clear_float_status = _tensors.npu_clear_float_status
npu_get_float_status = _tensors.npu_get_float_status
_tensors.install()
_collectives.install()

__all__ = ["is_emulated", "npu", "optim", "profiler", "record"]
