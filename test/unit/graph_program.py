"""Runs the program with --cuda-graphs on the emulated npu device; graphs are emulated too.

    PYTHONPATH=test/emulated_npu python graph_program.py cases.json results.json

cases: {name: argv}; results: {name: {"status", "out", "err", "recorded": how many steps were
recorded, "operators": of the last recorded step, "replays", "resets": of each}}
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
from emulated_graph import Graph, capture

from engine import step_graph


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
