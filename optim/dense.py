"""Optimisers of the dense parameters: both MLPs, held alike by all ranks.

They follow torch.optim's SGD and Adagrad to the bit and have its state_dict, but do not use it:
making one of torch's optimisers imports torch._dynamo, which no step needs and which takes 1.3 s.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch

from optim.row_optimizers import Rate

# torch.optim's settings by name and default, in its order: the original's model files have them all
SGD_SETTINGS = {
    "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False,
    "foreach": None, "differentiable": False, "fused": None,
}  # fmt: skip
ADAGRAD_SETTINGS = {
    "lr_decay": 0, "eps": 1e-10, "weight_decay": 0, "initial_accumulator_value": 0,
    "foreach": None, "maximize": False, "differentiable": False, "fused": None,
}  # fmt: skip


class DenseOptimizer:
    """Plain SGD, and the base class of the other optimisers.

    Args:
        parameters: the parameters, all on one device.
        lr: learning rate, a number, until `lr` is set anew.
        fused: one kernel updates all parameters.

    Attributes:
        parameters: as given.
        lr: rate of the last step; model files have it, `update` does not look at it.
        state: what the rule remembers of each parameter, by name.
    """

    settings: dict[str, Any] = SGD_SETTINGS

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], lr: float, fused: bool = False
    ) -> None:
        self.parameters, self.lr, self._fused = list(parameters), lr, fused
        self.state: list[dict[str, torch.Tensor]] = []

    def gradients(self) -> list[torch.Tensor]:
        """The gradients that there are."""
        return [p.grad for p in self.parameters if p.grad is not None]

    @torch.no_grad()
    def update(self, lr: Rate) -> None:
        """Update the parameters that have gradients, and forget these.

        Args:
            lr: learning rate, a number or () on the parameters' device.
        """
        parameters: list[torch.Tensor] = [p for p in self.parameters if p.grad is not None]
        if parameters:
            self._apply(parameters, self.gradients(), lr)
        for parameter in parameters:
            parameter.grad = None

    def _apply(
        self, parameters: list[torch.Tensor], gradients: list[torch.Tensor], lr: Rate
    ) -> None:
        if isinstance(lr, torch.Tensor):
            torch._foreach_add_(parameters, torch._foreach_mul(gradients, -lr))
        elif self._fused:
            torch._fused_sgd_(
                parameters,
                gradients,
                [],
                lr=lr,
                weight_decay=0.0,
                momentum=0.0,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=True,
            )
        else:
            torch._foreach_add_(parameters, gradients, alpha=-lr)

    def count_step(self) -> None:
        """Count a step on the host, where Adagrad's state counts them: a replay does not."""
        if self.state:
            torch._foreach_add_([state["step"] for state in self.state], 1)

    def state_dict(self) -> dict[str, Any]:
        """State and settings in the form of torch.optim's state_dict."""
        numbers = list(range(len(self.parameters)))
        group = {"lr": self.lr} | self.settings | {"params": numbers}
        return {"state": dict(enumerate(self.state)), "param_groups": [group]}

    def load_state_dict(self, state: dict[int, dict[str, torch.Tensor]]) -> None:
        """Take over each parameter's state, by its number; other devices' tensors are copied.

        Raises:
            KeyError, ValueError: a parameter's state is missing or has another shape.
        """
        for number, own in enumerate(self.state):
            for name, value in own.items():
                found = torch.as_tensor(state[number][name])  # older torch counts steps as numbers
                if found.shape != value.shape:
                    raise ValueError(f"optimiser state {number} has another shape")
                value.copy_(found)


class DenseAdagrad(DenseOptimizer):
    """Adagrad (Duchi et al., 2011): sum += gradient^2; p -= lr * gradient / (sqrt(sum) + eps)."""

    settings: dict[str, Any] = ADAGRAD_SETTINGS

    def __init__(self, parameters: Sequence[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, lr)
        self.state = [
            {"step": torch.zeros(()), "sum": torch.zeros_like(p, requires_grad=False)}
            for p in self.parameters
        ]

    def _apply(
        self, parameters: list[torch.Tensor], gradients: list[torch.Tensor], lr: Rate
    ) -> None:
        has_gradient = [p.grad is not None for p in self.parameters]
        states = [state for state, has in zip(self.state, has_gradient, strict=True) if has]
        sums = [state["sum"] for state in states]
        torch._foreach_addcmul_(sums, gradients, gradients)
        roots = torch._foreach_sqrt(sums)
        torch._foreach_add_(roots, self.settings["eps"])
        if isinstance(lr, torch.Tensor):
            steps = torch._foreach_mul(torch._foreach_div(gradients, roots), -lr)
            torch._foreach_add_(parameters, steps)
        else:
            torch._foreach_addcdiv_(parameters, gradients, roots, -lr)
            torch._foreach_add_([state["step"] for state in states], 1)


class NpuFusedSGD(DenseOptimizer):
    """SGD by torch_npu's kernel that updates all parameters at once; its rate is a number.

    See torch_npu.optim in the API reference of the Ascend Extension for PyTorch.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, lr)
        module = importlib.import_module("torch_npu")
        self._optimizer = module.optim.NpuFusedSGD(self.parameters, lr=lr)

    def update(self, lr: Rate) -> None:
        """Update the parameters that have gradients, and forget these."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()


def settings_of(name: str) -> dict[str, Any]:
    """The settings of the dense parameters' optimiser, as a model file has them.

    Args:
        name: sgd, adagrad or rwsadagrad.

    Raises:
        ValueError: it is no optimiser's name.
    """
    if name not in ("sgd", "adagrad", "rwsadagrad"):
        raise ValueError(f"optimizer is {name!r}, expected sgd, adagrad or rwsadagrad")
    return dict(SGD_SETTINGS if name == "sgd" else ADAGRAD_SETTINGS)


def make_dense_optimizer(
    name: str, parameters: Sequence[torch.nn.Parameter], lr: float, fused: bool
) -> DenseOptimizer:
    """The optimiser of the dense parameters.

    Args:
        name: sgd, adagrad or rwsadagrad, as --optimizer says; the last two both give Adagrad.
        parameters: the parameters, all on one device.
        lr: learning rate.
        fused: SGD is one kernel if the device has one: torch_npu's, or torch's own on a GPU.
    """
    device_type = parameters[0].device.type
    if name != "sgd":
        return DenseAdagrad(parameters, lr)
    if fused and device_type == "npu":
        return NpuFusedSGD(parameters, lr)
    return DenseOptimizer(parameters, lr, fused and device_type == "cuda")
