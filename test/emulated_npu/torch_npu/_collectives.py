"""The hccl backend is gloo, because a collective of wrapped tensors runs on the host tensors."""

import torch.distributed as dist


def _make(options, group_options=None):
    size, rank = options.group_size, options.group_rank
    return dist.ProcessGroupGloo(options.store, rank, size, timeout=options.timeout)


def install():
    if dist.is_available() and "hccl" not in dist.Backend.backend_list:
        dist.Backend.register_backend("hccl", _make, extended_api=True, devices=["npu"])
