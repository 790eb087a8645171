"""NpuFusedSGD with the limits of torch_npu's."""

import torch
from torch.optim.optimizer import Optimizer, required

from torch_npu._tensors import NpuTensor, flattened


class NpuFusedSGD(Optimizer):
    """From the first step on, one tensor holds all parameters of a type, another their gradients.

    float32 and float16 only; a parameter that has no gradient at the first step never gets one, and
    a gradient that is replaced later is not seen.
    """

    def __init__(
        self, params, lr=required, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False
    ):
        if momentum or weight_decay or nesterov:
            raise NotImplementedError("the emulation has plain SGD only")
        rest = {"momentum": momentum, "dampening": dampening}
        rest |= {"weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, {"lr": lr, **rest})
        self._flat = None

    @torch.no_grad()
    def _combine(self):
        if self._flat is not None or not any(p.grad is not None for p in self._all()):
            return
        self._flat = []
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            for p in found:
                if p.dtype not in (torch.float32, torch.float16):
                    raise TypeError(
                        "Fused optimizer's parameters must be either float32 or float16, but"
                        f" received {p.dtype}"
                    )
                for one in (p.data, p.grad):
                    if not isinstance(one, NpuTensor) or one.layout != torch.strided:
                        raise RuntimeError(f"Tensors to combine must be on NPU, got {one.device}.")
                    if not one.is_contiguous():
                        raise RuntimeError("Tensors to combine must be contiguous.")
            for dtype in {p.dtype for p in found}:
                alike = [p for p in found if p.dtype == dtype]
                pair = flattened(alike), flattened([p.grad for p in alike])
                self._flat.append((group, *pair))

    def _all(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        self._combine()
        for group, parameters, gradients in self._flat or []:
            parameters.add_(gradients, alpha=-group["lr"])

    @torch.no_grad()
    def zero_grad(self, set_to_none=False):
        if set_to_none:
            raise ValueError("set_to_none is not supported in fused optimizers")
        self._combine()
        for _, _, gradients in self._flat or []:
            gradients.zero_()
