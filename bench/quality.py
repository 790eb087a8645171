"""What speed costs in quality: AUC of the fast flags beside float32's, in pairs of equal seeds.

    python bench/quality.py [--seeds 5] [--rows 6000000] [--device cuda] [--ranks 1]
    python bench/quality.py --device=cpu --ranks=2 --fast=--exchange-type=bf16

Both train on the same demo data (a planted click model) from the same initial values; the rows are
those of the last day's first half. Each AUC is an exact count of pairs, read with all its digits
from the metrics file.

The bar: the mean difference of the pairs is below 5e-4, and within 2 standard errors of 0. The
first half alone decides where the second one cannot tell anything:

- The mean is below 4e-5. Float32 differs as much from itself: sums in another order, as other
  processors have them, moved the AUC of a model that had seen a million rows by 4e-6 and 4e-5 (of
  one that had seen 200,000 by 3e-3 to 1e-2: rows are not to be spared).
- The standard error is below 1e-6, as where all differences are alike. None of them is known that
  well: scores are float32, so rows whose scores are 6e-8 of them apart may change places, and AUCs
  are told with 6 digits.

A mean above 5e-4 that is within 2 standard errors leaves the question open: more pairs tell.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import output, row, run_ranks  # noqa: E402
from common.flags import number_in  # noqa: E402

FAST = {"cuda": "--amp=bf16 --cuda-graphs", "cpu": "--amp=bf16"}
DAYS = 3
MODEL = (
    "--arch-sparse-feature-size=64 --arch-mlp-bot=13-512-256-64 --arch-mlp-top=512-512-256-1"
    " --loss-function=bce --data-set=terabyte --max-ind-range=100000 --memory-map"
    " --data-randomize=none --mini-batch-size=2048 --test-mini-batch-size=16384"
    " --learning-rate=1 --lr-num-warmup-steps=100 --print-freq=1000000 --test-freq=1000000"
    " --mlperf-logging --mlperf-events=false --tensor-board-filename="
)
MOST_DIFFERENCE, MOST_ERRORS = 5e-4, 2
ROUNDING, TELLABLE = 4e-5, 1e-6  # of float32's own AUC; the least standard error that tells


def auc(folder: Path, seed: int, flags: str, ranks: int) -> float:
    """Of a run on so many ranks."""
    file = folder / "metrics.jsonl"
    file.unlink(missing_ok=True)
    words = f"{MODEL} {flags} --numpy-rand-seed={seed} --data_path={folder} --metrics-file={file}"
    if ranks == 1:
        output("dlrm_s_pytorch.py", *words.split())
    else:
        run_ranks(ranks, "dlrm_s_pytorch.py", *words.split())
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return float([one["auc"] for one in found if one["kind"] == "evaluation"][-1])


class Decision(NamedTuple):
    """What differences of AUC in pairs of runs say.

    Attributes:
        mean: of the differences.
        error: its standard error.
        verdict: `ok`, `no`, or `open`: too few pairs to tell.
    """

    mean: float
    error: float
    verdict: str


def decide(differences: Sequence[float]) -> Decision:
    """Whether runs are as good as those that they are compared with, by at least two pairs."""
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    may_be_none = abs(mean) <= MOST_ERRORS * error
    if abs(mean) >= MOST_DIFFERENCE:
        return Decision(mean, error, "open" if may_be_none else "no")
    is_right = may_be_none or abs(mean) < ROUNDING or error < TELLABLE
    return Decision(mean, error, "ok" if is_right else "no")


def lines(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """A line a pair, then what they say together."""
    device = "--use-gpu " if options.device == "cuda" else ""
    fast = options.fast or FAST[options.device]
    differences = []
    for seed in range(1, options.seeds + 1):
        plain, found = (
            auc(folder, seed, f"{device}{flags}", options.ranks) for flags in ("", fast)
        )
        differences.append(found - plain)
        yield row(f"seed {seed}, AUC", f"{found:.6f}", f"{plain:.6f}", "", f"{found - plain:+.1e}")
    mean, error, verdict = decide(differences)
    yield row(
        f"{fast}: mean difference",
        f"{mean:+.1e}",
        f"+-{error:.1e}",
        verdict,
        f"below {MOST_DIFFERENCE:.0e} and {MOST_ERRORS} standard errors",
    )


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flag = parser.add_argument
    flag("--seeds", type=number_in(int, 2), default=5, help="pairs of runs")
    flag("--rows", type=int, default=6_000_000, help="of all days; a sixth is evaluated")
    flag("--device", choices=tuple(FAST), default="cuda", help="what trains")
    flag("--ranks", type=int, default=1, help="that train together")
    flag("--fast", default="", help="the flags to compare with none; default: by device")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        demo = [f"--make-demo={folder}", f"--demo-rows={options.rows}", f"--demo-days={DAYS}"]
        output("data_utils.py", *demo)
        print(row("", "fast", "float32", "", "difference"), flush=True)
        for line in lines(Path(folder), options):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
