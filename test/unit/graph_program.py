"""Runs the program with --cuda-graphs on the emulated npu device; graphs are emulated too.

    PYTHONPATH=test/emulated_npu python graph_program.py cases.json results.json

cases: {name: argv}; results: {name: {"status", "out", "err", "recorded": how many steps were
recorded, "operators": of the last recorded step, "replays", "resets": of each}}

As in CUDA, recording runs nothing, and a replay runs the recorded operators on the same memory with
the numbers that the host had when they were recorded.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import dlrm_s_pytorch as dlrm  # noqa: E402  (before torch: common/compiled.py says why)

# isort: split
import npu_program
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import step_graph


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


def main():
    step_graph.capture = capture
    # the emulated streams want record_stream for each tensor, even if two streams take turns
    step_graph.on_side_stream = contextlib.nullcontext
    dlrm.check_graphs = lambda options, process: None
    cases = json.loads(Path(sys.argv[1]).read_text())
    found = {}
    for name, argv in cases.items():
        Graph.made = []
        run = npu_program.run(argv)
        found[name] = {key: run[key] for key in ("status", "out", "err")} | {
            "recorded": len(Graph.made),
            "resets": [graph.resets for graph in Graph.made],
            "replays": sum(graph.replays for graph in Graph.made),
            "operators": [str(call[0]) for graph in Graph.made[-1:] for call in graph.calls],
        }
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
