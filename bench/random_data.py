"""Steps that load random and synthetic batches, in turn with steps on batches made before.

    python bench/random_data.py [--steps 10] [--pairs 5]

The step is that of the 8-way scripts' network at batch 2048 with 26 tables, 2 threads. Batches are
drawn by a thread while steps run, and the first steps, for which none is ready, do not count.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dlrm_s_pytorch as dlrm
from devices.threads import set_up_threads
from dlrm_data_pytorch import READS_AHEAD, load_batches
from model.batch import Batch
from reporting.reporter import Reporter

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402

from bench.common import HEADER, row  # noqa: E402

MODEL = (
    "--arch-sparse-feature-size=64 --arch-mlp-bot=13-512-256-64 --arch-mlp-top=512-512-256-1"
    " --loss-function=bce --round-targets=true --mini-batch-size=2048"
)
TABLES, ROWS = 26, 10_000  # small tables: a step that waits for memory would hide the loader
MOST_RATIO, IDS = "1.20", (1, 10)
WARM_UP = READS_AHEAD + 1
MIDDLE = f"--rand-data-dist=gaussian --rand-data-max={ROWS - 1} --rand-data-sigma={ROWS // 8}"
KINDS = {
    "uniform": "",
    "gaussian": MIDDLE,
    "trace": "--data-generation=synthetic --data-trace-file=trace_j",
}


def write_traces(folder: Path, tables: int = TABLES, rows: int = ROWS) -> None:
    """A profile for each table: half of the ids are new, near distances come more often."""
    random = np.random.default_rng(1)
    distances = range(min(rows, 1000) + 1)
    weights = np.array([1.0, *(1 / np.arange(1, len(distances)))])
    weights[1:] *= 1 / weights[1:].sum()
    probabilities = np.cumsum(weights / 2).clip(max=1)
    for table in range(tables):
        lines = (random.permutation(rows), distances, probabilities)
        text = "\n".join(",".join(str(number) for number in line) for line in lines)
        (folder / f"trace_{table}").write_text(text)


class Run:
    """The program with its data and model, ready to train.

    Args:
        flags: of the command line.
    """

    def __init__(self, flags: Iterable[str]) -> None:
        options = dlrm.parse_options([*flags, "--tensor-board-filename="])
        process = dlrm.make_process(options)
        dlrm.seed_everything(options)
        self.data = dlrm.make_data(options, None, process)
        self._trainer = dlrm.Trainer(options, process, self.data, Reporter())

    def loaded(self, count: int) -> Iterator[Batch]:
        """Batches as training loads them."""
        trainer = self._trainer
        device = trainer.process.device
        return iter(load_batches(self.data.train, range(count), 0, device, trainer.execution))

    def seconds(self, batches: Iterable[Batch]) -> float:
        """Seconds of the steps on some batches."""
        begin = time.perf_counter()
        for it, batch in enumerate(batches, 1):
            self._trainer.train_step(batch, it)
        return time.perf_counter() - begin


def measure(run: Run, steps: int, pairs: int) -> tuple[float, float, float, float]:
    """Ms a step with the loader, with batches made before, their ratio, ms to make a batch alone.

    Medians of pairs; the two take turns, so that a machine that slows down slows both.
    """
    ready = [run.data.train[number] for number in range(steps + 1)][1:]
    made = []
    for number in range(steps):
        begin = time.perf_counter()
        run.data.train[steps + 1 + number]
        made.append(time.perf_counter() - begin)
    run.seconds(ready[:WARM_UP])
    found = []
    for _ in range(pairs):
        batches = run.loaded(WARM_UP + steps + WARM_UP)  # the reader is at work to the last step
        run.seconds(islice(batches, WARM_UP))
        found.append((run.seconds(islice(batches, steps)), run.seconds(ready)))
        batches.close()  # type: ignore[attr-defined]
    loaded, bare = (1000 / steps * statistics.median(column) for column in zip(*found, strict=True))
    ratio = statistics.median(one / other for one, other in found)
    return loaded, bare, ratio, 1000 * statistics.median(made)


def lines(
    folder: Path, steps: int = 10, pairs: int = 5, model: str = MODEL, tables: int = TABLES
) -> Iterator[str]:
    """Lines of the table, each as soon as it is measured.

    Args:
        folder: where the profiles of the traces go.
        steps: of a run.
        pairs: runs of each kind.
        model: the flags of network and batch.
        tables: how many tables there are.
    """
    write_traces(folder, tables)
    sizes = "-".join([str(ROWS)] * tables)
    for count in IDS:
        for kind, words in KINDS.items():
            flags = f"{model} {words} --num-indices-per-lookup-fixed=true".split()
            flags += [f"--arch-embedding-size={sizes}", f"--num-indices-per-lookup={count}"]
            flags += [f"--num-batches={2 * steps + 3 * WARM_UP}"]
            flags = [flag.replace("=trace_j", f"={folder}/trace_j") for flag in flags]
            loaded, bare, ratio, alone = measure(Run(flags), steps, pairs)
            found = (f"{loaded:.2f} ms", f"{bare:.2f} ms", f"{ratio:.2f}")
            wanted = f"at most {MOST_RATIO}; {alone:.2f} ms a batch alone"
            yield row(f"step, {kind} data, ids a bag: {count}", *found, wanted)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="of a run")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each kind")
    options = parser.parse_args()
    torch.set_num_threads(2)
    set_up_threads(2)
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for line in lines(Path(folder), options.steps, options.pairs):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
