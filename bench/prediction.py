"""Scoring rows of text, beside the evaluation of prepared rows: rows a second, and memory.

    python bench/prediction.py [--rows 300000] [--pairs 3] [--memory-rows 10000000]

The yardstick is --inference-only on the same rows, prepared, and for small networks what parsing
and that evaluation allow one after the other. Both are taken in turn; figures are medians.
"""

import argparse
import contextlib
import io
import itertools
import os
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dlrm_s_pytorch  # noqa: E402  (before torch)

# isort: split
import torch  # noqa: E402

from bench.common import HEADER, row, start  # noqa: E402
from criteo.columns import FIRST_SPARSE  # noqa: E402
from criteo.demo import Demo, make_demo  # noqa: E402
from criteo.scored_text import ScoredText, blocks_of_file  # noqa: E402
from criteo.served_ids import ServedIds  # noqa: E402
from engine.prediction_options import vocabulary_of_model  # noqa: E402
from engine.saved_content import SavedContent, serving_facts_of  # noqa: E402

NETWORKS = {
    "D 64, the scripts'": ["64", "13-512-256-64", "512-512-256-1"],
    "D 16, Kaggle's": ["16", "13-512-256-64-16", "512-256-1"],
    "D 4, small": ["4", "13-16-4", "16-1"],
}
OF_INFERENCE, OF_BOTH = 0.85, 0.90  # wanted
MOST_BYTES = 200_000_000  # beside the model and 16 bytes a value of the vocabulary
SCORED = re.compile(r"^scored (\d+) rows in ([\d.]+) s", re.M)


@dataclass(frozen=True)
class Case:
    """A network with its model file, and the rows that it scores.

    Attributes:
        flags: those of the network and its data.
        model: the model file.
        text: the rows, as text.
        num_rows: how many there are.
    """

    flags: list[str]
    model: Path
    text: Path
    num_rows: int

    def evaluation(self) -> float:
        """Rows a second of an evaluation of the prepared rows."""
        times = []

        class Timed(dlrm_s_pytorch.Evaluator):
            def metrics(self, *args: object) -> object:
                begin = time.perf_counter()
                found = super().metrics(*args)
                times.append(time.perf_counter() - begin)
                return found

        own, dlrm_s_pytorch.Evaluator = dlrm_s_pytorch.Evaluator, Timed
        _run(*self.flags, f"--load-model={self.model}", "--inference-only")
        dlrm_s_pytorch.Evaluator = own
        return self.num_rows / times[0]

    def prediction(self) -> float:
        """Rows a second of scoring the text."""
        scores = self.model.with_suffix(".scores")
        flags = [f"--load-model={self.model}", f"--predict-file={self.text}"]
        found = SCORED.search(_run(*flags, f"--scores-file={scores}"))
        assert found and int(found[1]) == self.num_rows
        return self.num_rows / float(found[2])

    def parsing(self) -> float:
        """Rows a second of parsing the text and looking its categories up, in one thread."""
        facts = serving_facts_of(str(self.model), SavedContent(str(self.model)))
        assert facts is not None
        ids = ServedIds(vocabulary_of_model(self.model, facts), facts.max_ind_range)
        begin = time.perf_counter()
        parse = ScoredText(str(self.text), facts.max_ind_range, 0).parse
        for lines in map(parse, blocks_of_file(str(self.text))):
            ids.ids(lines.columns[FIRST_SPARSE:])
        return self.num_rows / (time.perf_counter() - begin)


def _run(*flags: str) -> str:
    """What the program prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert dlrm_s_pytorch.main([*flags, "--tensor-board-filename="]) == 0
    return out.getvalue()


def make_case(folder: Path, name: str, num_rows: int) -> Case:
    """Make the data, if it is not there, and a model of one training step.

    Two days of as many rows are made. The first half of the last one is what evaluations take.
    """
    data = folder / "data"
    if not data.exists():
        make_demo(Demo(data, 4 * num_rows, 2, 1))
        with open(data / "day_1", "rb") as day, open(folder / "rows", "wb") as text:
            text.writelines(itertools.islice(day, num_rows))
    dim, bottom, top = NETWORKS[name]
    flags = [
        f"--data_path={data}", "--max-ind-range=100000", "--memory-map", "--loss-function=bce",
        f"--arch-sparse-feature-size={dim}", f"--arch-mlp-bot={bottom}", f"--arch-mlp-top={top}",
        "--mini-batch-size=1024", "--test-mini-batch-size=16384", "--dataset-multiprocessing",
    ]  # fmt: skip
    model = folder / f"{dim}.pth"
    _run(*flags, "--num-batches=1", f"--save-model={model}")
    return Case(flags, model, folder / "rows", num_rows)


def speed_lines(case: Case, name: str, num_pairs: int) -> list[str]:
    """Lines of the table."""
    case.prediction()  # what is done once only
    pairs = [(case.evaluation(), case.prediction()) for _ in range(num_pairs)]
    inference = statistics.median(pair[0] for pair in pairs)
    ours = statistics.median(pair[1] for pair in pairs)
    ratio = statistics.median(pair[1] / pair[0] for pair in pairs)
    parsing = statistics.median(case.parsing() for _ in range(num_pairs))
    both = 1 / (1 / parsing + 1 / inference)
    is_large = name.startswith("D 64")
    rate, of_both = f"{ours:,.0f} rows/s", f"{ours / both:.2f}"
    return [
        row(name, rate, f"{inference:,.0f}", f"{ratio:.2f}", f"{OF_INFERENCE}" if is_large else ""),
        row("  of parsing, then evaluating", rate, f"{both:,.0f}", of_both, f"{OF_BOTH}"),
    ]


def memory_line(case: Case, folder: Path, num_rows: int) -> str:
    """Peak memory of scoring that many rows, less that of scoring none, the model's tables too."""
    text = folder / "many"
    num_copies = -(-num_rows // case.num_rows)
    with open(text, "wb") as many:
        for _ in range(num_copies):
            many.write(case.text.read_bytes())
    (folder / "none").write_bytes(b"")
    none, many_bytes = (_peak_bytes(case, path) for path in (folder / "none", text))
    text.unlink()
    grown = (many_bytes - none) / 1e6
    what = f"memory for {num_copies * case.num_rows:,} rows"
    return row(what, f"{grown:.0f} MB more", "", "", f"at most {MOST_BYTES / 1e6:.0f} MB")


def _peak_bytes(case: Case, text: Path) -> int:
    """Largest memory of a process that scores the text."""
    flags = [f"--load-model={case.model}", f"--predict-file={text}"]
    program = start("dlrm_s_pytorch.py", *flags, f"--scores-file={text}.scores")
    _, status, usage = os.wait4(program.pid, 0)
    assert status == 0, program.stderr.read() if program.stderr else ""
    return int(usage.ru_maxrss) * 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300_000, help="scored in each run")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--memory-rows", type=int, default=10_000_000, help="0: no memory line")
    parser.add_argument("--only", default="", help="beginning of a network's name")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    print(HEADER)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for network in NETWORKS:
            if network.startswith(options.only):
                case = make_case(folder, network, options.rows)
                print(*speed_lines(case, network, options.pairs), sep="\n", flush=True)
        if options.memory_rows:
            print(memory_line(case, folder, options.memory_rows))


if __name__ == "__main__":
    main()
