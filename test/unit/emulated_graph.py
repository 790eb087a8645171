"""Graphs of torch's operators, for devices that have none.

As in CUDA, recording runs nothing, and a replay runs the recorded operators on the same memory with
the numbers that the host had when they were recorded.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Graph(TorchDispatchMode):
    """The operators of a step, with their arguments and results."""

    made = []

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.replays, self.resets = [], [], 0, 0
        Graph.made.append(self)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        arguments = function._schema.arguments
        given = {argument.name: value for argument, value in zip(arguments, args, strict=False)}
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = {**given, **kwargs}[argument.name]
                for tensor in value if isinstance(value, (list, tuple)) else [value]:
                    self.before.append((tensor, tensor.clone()))
        found = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, found))
        return found

    @torch.no_grad()
    def undo(self):
        for tensor, content in reversed(self.before):
            tensor.copy_(content)
        self.before = []

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, found in self.calls:
            again = function(*args, **kwargs)
            if any(returned.alias_info is not None for returned in function._schema.returns):
                continue  # the result is a view, or was changed in place
            pairs = zip(flat(found), flat(again), strict=True)
            for tensor, content in pairs:
                tensor.copy_(content)

    def reset(self):
        self.resets += 1


def flat(found):
    found = found if isinstance(found, (list, tuple)) else [found]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def capture(work):
    graph = Graph()
    with graph:
        result = work().detach()
    graph.undo()
    return graph, result
