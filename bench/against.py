"""Speed of this checkout against another one's, for example that of an earlier commit.

    git clone . ../before && git -C ../before checkout COMMIT
    python bench/against.py ../before [--pairs 5] [--only step]

The two take turns, so that a machine that slows down slows both. A line has both medians and the
median of the pairs' ratios: above 1, this checkout is slower.
"""

import argparse
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import ROOT, output  # noqa: E402
from bench.training import CASES, Case, make_rows, our_ms  # noqa: E402

METRICS_ROWS, DEMO_ROWS = 20_000_000, 1_000_000
ONE_STEP = ("dlrm_s_pytorch.py", "--mini-batch-size=2", "--data-size=2", "--tensor-board-filename=")
STARTS = {
    "start, --help, s": ("dlrm_s_pytorch.py", "--help"),
    "start, --dry-run, s": ("dlrm_s_pytorch.py", "--dry-run"),
    "start, one step, s": ONE_STEP,
    "start, one step of adagrad, s": (*ONE_STEP, "--optimizer=adagrad"),
    "start, data_utils.py --help, s": ("data_utils.py", "--help"),
}

Measurement = Callable[[Path], float]  # of the checkout in a folder


def step_ms(case: Case, data: Path, root: Path) -> float:
    """Ms a training step; the rows are made in `data` if they are not there."""
    if not data.exists():
        make_rows(data)
    return our_ms(case, data, root)


def program_seconds(words: Sequence[str], root: Path) -> float:
    """Seconds that a program runs, given its path in the checkout and its flags."""
    begin = time.perf_counter()
    output(*words, root=root)
    return time.perf_counter() - begin


def metrics_seconds(root: Path) -> float:
    """Seconds of the metrics of METRICS_ROWS scores."""
    text = output("bench/evaluation.py", f"--rows={METRICS_ROWS}", root=root)
    return float(re.findall(r"^metric work +([\d.]+) s$", text, re.M)[0])


def preparation_seconds(folder: Path, root: Path) -> float:
    """Seconds to prepare DEMO_ROWS rows on all cores; the files are in `folder`."""
    raw, prepared = folder / "raw", folder / "prepared"
    if not raw.exists():
        output("data_utils.py", f"--make-demo={raw}", f"--demo-rows={DEMO_ROWS}")
    shutil.rmtree(prepared, ignore_errors=True)
    prepared.mkdir()
    flags = ("--memory-map", "--max-ind-range=10000000", "--dataset-multiprocessing")
    where = (f"--data_path={raw}", f"--processed-data-file={prepared}/x.npz")
    return program_seconds(("data_utils.py", *where, *flags), root)


def measurements(folder: Path) -> dict[str, Measurement]:
    """The measurements by name; their files go to `folder`."""
    found: dict[str, Measurement] = {
        f"step, batch {case.name}, ms": partial(step_ms, case, folder / "steps") for case in CASES
    }
    found |= {name: partial(program_seconds, words) for name, words in STARTS.items()}
    found[f"metrics of {METRICS_ROWS:,} rows, s"] = metrics_seconds
    found[f"preparation of {DEMO_ROWS:,} rows, s"] = partial(preparation_seconds, folder)
    return found


def main() -> int:
    """Print the table, line by line as it is measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each checkout a line")
    parser.add_argument("--only", default="", help="lines whose names have this in them")
    options = parser.parse_args()
    other = options.other.resolve()
    print(f"{'':<38} {'other':>10} {'this':>10} {'ratio':>7}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in measurements(Path(folder)).items():
            if options.only in name:
                measure(other), measure(ROOT)  # warms up
                pairs = [(measure(other), measure(ROOT)) for _ in range(options.pairs)]
                theirs, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
                ratio = statistics.median(mine / their for their, mine in pairs)
                print(f"{name:<38} {theirs:>10.3f} {ours:>10.3f} {ratio:>7.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
