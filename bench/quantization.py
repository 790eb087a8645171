"""What quantized inference costs in quality, and spares in bytes and time, on the demo's data.

    python bench/quantization.py [--rows 500000] [--dim 64] [--repeats 5]

It trains the scripts' network for one epoch on a planted click model, then evaluates that model
with each of the flags on the CPU; the evaluations take turns. Rows/s are medians, reading included.
"""

import argparse
import contextlib
import io
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import ClassVar
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dlrm_s_pytorch as dlrm  # noqa: E402
from bench.common import output  # noqa: E402

EMBEDDINGS, MLPS = "--quantize-emb-with-bit=", "--quantize-mlp-with-bit="
KINDS = {
    "float32": "",
    "tables 8": f"{EMBEDDINGS}8",
    "tables 4": f"{EMBEDDINGS}4",
    "MLPs 16": f"{MLPS}16",
    "MLPs 8": f"{MLPS}8",
    "tables 8, MLPs 8": f"{EMBEDDINGS}8 {MLPS}8",
    "tables 4, MLPs 8": f"{EMBEDDINGS}4 {MLPS}8",
}
MODEL = (
    "--arch-mlp-bot=13-512-256-{dim} --arch-mlp-top=512-512-256-1 --arch-sparse-feature-size={dim}"
    " --loss-function=bce --max-ind-range=100000 --memory-map --learning-rate=1"
    " --mini-batch-size=1024 --test-mini-batch-size=16384 --print-freq=1000000 --mlperf-logging"
    " --tensor-board-filename= --data_path={folder}"
)
SIZES = re.compile(r"^(?:embeddings|MLPs): ([\d,]+) bytes, (?:not|([\d,]+) with)", re.M)


class TimedTrainer(dlrm.Trainer):
    """A trainer whose evaluations are timed.

    Attributes:
        speeds: rows a second of each evaluation since this was last emptied.
    """

    speeds: ClassVar[list[float]] = []  # of all trainers, as the program makes one a run

    def evaluate(self) -> dlrm.Metrics:
        """Evaluate once to warm up, then once more."""
        super().evaluate()
        begin = time.perf_counter()
        found = super().evaluate()
        rows = self.data.test.num_rows
        self.speeds.append(rows / (time.perf_counter() - begin))
        return found


def evaluated(flags: str) -> str:
    """What the program prints with these flags; it runs in this process."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), mock.patch.object(dlrm, "Trainer", TimedTrainer):
        if dlrm.main(flags.split()):
            raise SystemExit(f"dlrm_s_pytorch.py {flags} has failed")
    return out.getvalue()


def num_bytes(text: str, quantized: bool = True) -> int:
    """Bytes of tables and MLPs, as they were or are, in what a run with such flags has printed."""
    sizes = SIZES.findall(text)
    return sum(int((after * quantized or before).replace(",", "")) for before, after in sizes)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flag = parser.add_argument
    flag("--rows", type=int, default=500_000, help="of all days; a sixteenth is evaluated")
    flag("--dim", type=int, default=64, help="embedding dimension D")
    flag("--repeats", type=int, default=5, help="evaluations of each kind")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        output("data_utils.py", f"--make-demo={folder}", f"--demo-rows={options.rows}")
        flags = MODEL.format(dim=options.dim, folder=folder)
        path = f"{folder}/model.pth"
        output("dlrm_s_pytorch.py", *flags.split(), f"--save-model={path}")
        flags += f" --inference-only --load-model={path}"
        texts: dict[str, str] = {}
        speeds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(options.repeats):
            for kind, more in KINDS.items():
                TimedTrainer.speeds.clear()
                texts[kind] = evaluated(f"{flags} {more}")
                speeds[kind] += TimedTrainer.speeds
    full = num_bytes(texts["tables 8"], quantized=False)
    print(f"{'':<18} {'AUC':>7} {'log loss':>9} {'MB':>8} {'rows/s':>9}")
    for kind, text in texts.items():
        auc, loss = (re.findall(rf"{name} ([\d.]+)", text)[0] for name in (" auc", "log loss"))
        size = num_bytes(text) or full
        speed = statistics.median(speeds[kind])
        print(f"{kind:<18} {auc:>7} {loss:>9} {1e-6 * size:8.2f} {speed:9,.0f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
