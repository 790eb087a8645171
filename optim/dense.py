"""The dense parameters' optimiser."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence

import torch


def make_optimizer(
    name: str, parameters: Sequence[torch.nn.Parameter], lr: float, fused: bool
) -> torch.optim.Optimizer:
    """The optimiser of the dense parameters: sgd; adagrad for adagrad and rwsadagrad.

    Args:
        name: of --optimizer.
        parameters: on one device.
        lr: learning rate.
        fused: one kernel for all parameters, where the device has one: torch_npu's NpuFusedSGD
            (torch_npu.optim in the API reference of the Ascend Extension for PyTorch), torch's own
            on a GPU. There is none for Adagrad.
    """
    device_type = parameters[0].device.type
    foreach = None if device_type == "cpu" else True  # a kernel for lists of tensors
    if name != "sgd":
        return torch.optim.Adagrad(parameters, lr=lr, foreach=foreach)
    if fused and device_type == "npu":
        optimizer: torch.optim.Optimizer = importlib.import_module("torch_npu").optim.NpuFusedSGD(
            parameters, lr=lr
        )
        return optimizer
    if fused and device_type == "cuda":
        return torch.optim.SGD(parameters, lr=lr, fused=True)
    return torch.optim.SGD(parameters, lr=lr, foreach=foreach)


class DenseUpdate:
    """What `optimizer.step()` does, for torch.optim's SGD (without momentum) and Adagrad.

    Args:
        optimizer: its parameters and its state are updated; its own rate is not looked at.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._is_adagrad = isinstance(optimizer, torch.optim.Adagrad)

    def apply(self, lr: torch.Tensor) -> None:
        """Update the parameters that have gradients.

        Args:
            lr: (), on their device.
        """
        group = self._optimizer.param_groups[0]
        parameters = [p for p in group["params"] if p.grad is not None]
        steps = [p.grad for p in parameters]
        with torch.no_grad():
            if self._is_adagrad:
                sums = [self._optimizer.state[p]["sum"] for p in parameters]
                torch._foreach_addcmul_(sums, steps, steps)
                roots = torch._foreach_sqrt(sums)
                torch._foreach_add_(roots, group["eps"])
                steps = list(torch._foreach_div(steps, roots))
            torch._foreach_add_(parameters, torch._foreach_mul(steps, -lr))

    def count_step(self) -> None:
        """Note on the host that a step was made: Adagrad's state has their number."""
        if self._is_adagrad:
            torch._foreach_add_([state["step"] for state in self._optimizer.state.values()], 1)
