"""Serving a model: how long one row takes on one core, and how large models are opened.

    python bench/serving.py [--gb 2]

Rows are scored one by one by engine.scorer and, if it is installed, by onnxruntime. For opening, a
model of --gb GB of tables is made; its private memory is what other processes cannot share.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dlrm_s_pytorch  # noqa: E402  (before torch)
from bench.common import ROOT  # noqa: E402
from criteo.demo import Demo, make_demo  # noqa: E402

NETWORK = [
    "--arch-sparse-feature-size=64", "--arch-mlp-bot=13-512-256-64", "--num-batches=1",
    "--arch-mlp-top=512-512-256-1", "--mini-batch-size=128", "--tensor-board-filename=",
]  # fmt: skip

# What follows runs in a process of its own, with the repository's root as its folder.
LATENCY = """
import os, sys, time
os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[0]])
from engine.scorer import Scorer
import numpy as np, torch
torch.set_num_threads(1)
scorer, lines = Scorer(sys.argv[1]), open(sys.argv[2]).read().splitlines()[:2000]
for kind in ("line of text", "network alone"):
    inputs = lines if kind == "line of text" else [scorer._from_text(line) for line in lines]
    score = scorer.score if kind == "line of text" else lambda pair: scorer.network(*pair)
    took = []
    with torch.inference_mode():
        for one in inputs:
            begin = time.perf_counter()
            score(one)
            took.append(time.perf_counter() - begin)
    p50, p99 = np.percentile(np.array(took[200:]) * 1e3, [50, 99])
    print(f"a row as {kind}: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
"""
ONNX_LATENCY = """
import os, sys, time
os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[0]])
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
row = {"dense": np.ones((1, 13), np.float32), "sparse": np.zeros((1, 26), np.int64)}
took = []
for _ in range(2000):
    begin = time.perf_counter()
    session.run(["pred"], row)
    took.append(time.perf_counter() - begin)
p50, p99 = np.percentile(np.array(took[200:]) * 1e3, [50, 99])
print(f"a row, onnxruntime: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
"""
OPENING = """
import sys, time
{imports}
def private():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1e3
before, begin = private(), time.perf_counter()
{opening}
took = time.perf_counter() - begin
{first_row}
print(f"{what}: open in {{took:.2f}} s, {{private() - before:.0f}} MB of private memory")
"""
SCORER_OPENING = {
    "imports": "from engine.scorer import Scorer; import numpy as np",
    "opening": "scorer = Scorer(sys.argv[1])",
    "first_row": "scorer.score((np.ones((1, 4)), np.ones((1, 8), int)))",
    "what": "engine.scorer",
}
ONNX_OPENING = {
    "imports": "import numpy as np, onnxruntime",
    "opening": "session = onnxruntime.InferenceSession(sys.argv[1],"
    " providers=['CPUExecutionProvider'])",
    "first_row": "session.run(['pred'], {'dense': np.ones((1, 4), np.float32),"
    " 'sparse': np.ones((1, 8), np.int64)})",
    "what": "onnxruntime",
}


def run(code: str, *words: object) -> None:
    """Run a program in a process of its own; it prints its line."""
    command = [sys.executable, "-c", code, *(str(word) for word in words)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def train(*flags: object) -> None:
    """Train a step, quietly."""
    with contextlib.redirect_stdout(sys.stderr):
        assert dlrm_s_pytorch.main([*NETWORK, *(str(flag) for flag in flags)]) == 0


@contextlib.contextmanager
def large_model(folder: Path, gb: float) -> Iterator[list[Path]]:
    """A model with 8 tables of that many GB together, as a model file and, if possible, as ONNX."""
    rows = "-".join([str(int(gb * 1e9 / 8 / 64 / 4))] * 8)
    paths = [folder / "large.pth", folder / "large.onnx"]
    flags = ["--arch-sparse-feature-size=64", "--arch-mlp-bot=4-64", "--arch-mlp-top=64-1"]
    onnx = ["--save-onnx", f"--onnx-file={paths[1]}"] if has_onnx() else []
    train(
        *flags, f"--arch-embedding-size={rows}", "--num-indices-per-lookup=1",
        f"--save-model={paths[0]}", *onnx,
    )  # fmt: skip
    yield [path for path in paths if path.exists()]


def has_onnx() -> bool:
    """Whether the packages of requirements-onnx.txt are here."""
    with contextlib.suppress(ImportError):
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401

        return True
    return False


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=2.0, help="tables of the model that is opened")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_demo(Demo(folder / "demo", 20_000, 2, 1))
        data = [f"--data_path={folder / 'demo'}", "--memory-map", "--max-ind-range=100000"]
        onnx = ["--save-onnx", f"--onnx-file={folder / 'm.onnx'}"] if has_onnx() else []
        train(*data, f"--save-model={folder / 'm.pth'}", *onnx)
        run(LATENCY, folder / "m.pth", folder / "demo" / "day_1")
        if onnx:
            run(ONNX_LATENCY, folder / "m.onnx")
        with large_model(folder, options.gb) as paths:
            for path, parts in zip(paths, (SCORER_OPENING, ONNX_OPENING), strict=False):
                size = sum(file.stat().st_size for file in folder.glob(f"{path.name}*"))
                print(f"{re.sub('.*[.]', '.', path.name)} of {size / 1e9:.1f} GB,", end=" ")
                sys.stdout.flush()
                run(OPENING.format(**parts), path)


if __name__ == "__main__":
    main()
