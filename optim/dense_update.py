"""The dense parameters' update with a rate that is on the device, so that it can be recorded."""

import torch


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
