"""Time and memory of the evaluation metrics alone, on the CPU or a GPU.

    python bench/evaluation.py [--rows 89000000] [--device cuda]

Scores are drawn, labels are drawn from the scores, so the AUC is known to lie well above 0.5. From
other scripts: `from bench.evaluation import measure`, with the repository's root on sys.path.
"""

import argparse
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Before this folder, where this very file would be found as `evaluation`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from devices.card import synchronize
from engine.score_meter import ScoreMeter
from ranks.process import Process
from reporting.metrics import Metrics

CRITEO_TEST_ROWS = 89_000_000  # the test half of the last day of Criteo Terabyte
BATCH = 16384
MOST_COMPARED = 2_000_000  # rows up to which scikit-learn checks the result
GB = 1e9


@dataclass(frozen=True)
class Figures:
    """What one measurement found: seconds, GB of resident memory, and the metrics themselves."""

    rows: int
    add_s: float
    metrics_s: float
    memory_before_gb: float
    peak_memory_gb: float
    auc: float
    ap: float
    difference: float | None  # largest over all metrics, from scikit-learn; None: not compared

    @property
    def total_s(self) -> float:
        """All work on metrics; making the scores is not in it."""
        return self.add_s + self.metrics_s


def draw(rows: int, seed: int = 1) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of (b, 1) float32 scores and labels; a label is 1 with its score's probability."""
    random = torch.Generator().manual_seed(seed)
    for begin in range(0, rows, BATCH):
        size = min(BATCH, rows - begin)
        scores = torch.sigmoid(torch.randn(size, 1, generator=random) * 1.5 - 2)
        yield scores, (torch.rand(size, 1, generator=random) < scores).float()


def measure(rows: int, device: torch.device) -> Figures:
    """Feed that many rows through a ScoreMeter of one rank; its process's peak memory is told.

    Making the scores on the device, and what is done there once only, are not in the times.
    """
    _warm_up(device)
    before = _peak_memory()
    meter = ScoreMeter(_process(device))
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    add_s = 0.0
    for batch in draw(rows):
        on_device = [column.to(device) for column in batch]
        synchronize(device)
        start = time.perf_counter()
        meter.add(*on_device)
        synchronize(device)
        add_s += time.perf_counter() - start
        if rows <= MOST_COMPARED:
            kept.append(batch)
    start = time.perf_counter()
    found = meter.metrics()
    metrics_s = time.perf_counter() - start
    peak = _peak_memory()
    difference = _difference(found, kept) if kept else None
    return Figures(rows, add_s, metrics_s, before, peak, found.auc, found.ap, difference)


def _process(device: torch.device) -> Process:
    return Process(0, 1, 0, device, "gloo")


def _warm_up(device: torch.device) -> None:
    if device.type != "cpu":
        meter = ScoreMeter(_process(device))
        for batch in draw(BATCH):
            meter.add(*(column.to(device) for column in batch))
        meter.metrics()


def _peak_memory() -> float:
    """GB; getrusage counts in kB, on macOS in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GB


def _difference(found: Metrics, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    from sklearn import metrics as sk  # its memory is not the meter's

    scores, labels = (torch.cat(column).flatten().numpy() for column in zip(*batches, strict=True))
    classes = scores.round()
    wanted = {
        "accuracy": sk.accuracy_score(labels, classes),
        "recall": sk.recall_score(labels, classes, zero_division=0),
        "precision": sk.precision_score(labels, classes, zero_division=0),
        "f1": sk.f1_score(labels, classes, zero_division=0),
        "ap": sk.average_precision_score(labels, scores),
        "auc": sk.roc_auc_score(labels, scores),
        "log_loss": sk.log_loss(labels, scores.astype("float64"), labels=[0, 1]),
        "base_rate": labels.mean(dtype="float64"),
    }
    return max(abs(getattr(found, name) - want) for name, want in wanted.items())


def table(figures: Figures) -> str:
    """The figures, one a line."""
    lines = [
        ("rows", f"{figures.rows:,}"),
        ("add", f"{figures.add_s:.2f} s"),
        ("metrics", f"{figures.metrics_s:.2f} s"),
        ("metric work", f"{figures.total_s:.2f} s"),
        ("memory before", f"{figures.memory_before_gb:.2f} GB"),
        ("peak memory", f"{figures.peak_memory_gb:.2f} GB"),
        ("AUC", f"{figures.auc:.9f}"),
        ("AP", f"{figures.ap:.9f}"),
        ("machine", f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"),
    ]
    if figures.difference is not None:
        lines.insert(8, ("from scikit-learn", f"{figures.difference:.1e} at most"))
    return "\n".join(f"{name:<18} {value}" for name, value in lines)


def main() -> int:
    """Measure and print; gives the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=CRITEO_TEST_ROWS, help="scores to evaluate")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda: where the scores are")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(table(measure(options.rows, torch.device(options.device))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
