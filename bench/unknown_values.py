"""What is best scored in the place of a category that no training row had.

    python bench/unknown_values.py [--rows 500000] [--max-ind-range 100000]

A model is trained on all days of the demo but the last one, whose rows then have categories that it
does not know. Each way takes another vector in their place. docs/serving.md has the figures.
"""

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dlrm_s_pytorch  # noqa: E402  (before torch)

# isort: split
import numpy as np  # noqa: E402
import torch  # noqa: E402

from criteo.columns import FIRST_SPARSE, NUM_SPARSE  # noqa: E402
from criteo.demo import Demo, make_demo  # noqa: E402
from criteo.scored_text import ScoredText, blocks_of_file  # noqa: E402
from criteo.vocabulary import IdLookup  # noqa: E402
from criteo.vocabulary_file import Vocabulary  # noqa: E402
from engine.labelled_scores import LabelledScores  # noqa: E402
from engine.saved_content import SavedContent, serving_facts_of  # noqa: E402
from engine.scorer import Scorer  # noqa: E402

DAYS = 8
NETWORK = [
    "--arch-sparse-feature-size=64", "--arch-mlp-bot=13-512-256-64", "--memory-map",
    "--arch-mlp-top=512-512-256-1", "--loss-function=bce", "--learning-rate=1",
    "--mini-batch-size=1024", "--tensor-board-filename=", "--print-freq=1000000",
]  # fmt: skip

# (table's rows (n, D), id of the missing category or -1) -> the vector (D,)
WAYS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "the row of a missing category": lambda rows, missing: rows[missing],
    "zeros": lambda rows, missing: torch.zeros_like(rows[0]),
    "the mean row": lambda rows, missing: rows.mean(0),
    "the row nearest to zeros": lambda rows, missing: rows[rows.square().sum(1).argmin()],
    "the last row": lambda rows, missing: rows[-1],
}


def train(folder: Path, max_ind_range: int) -> Path:
    """Train on all days but the last one; returns the model file."""
    known = folder / "known"
    known.mkdir()
    for day in range(DAYS - 1):
        os.link(folder / "demo" / f"day_{day}", known / f"day_{day}")
    path = folder / "m.pth"
    flags = [f"--data_path={known}", f"--max-ind-range={max_ind_range}", f"--save-model={path}"]
    with contextlib.redirect_stdout(sys.stderr):
        assert dlrm_s_pytorch.main([*NETWORK, *flags]) == 0
    return path


def measure(path: Path, text: Path) -> None:
    """Print the ranking of the text's rows for each way."""
    facts = serving_facts_of(str(path), SavedContent(str(path)))
    assert facts is not None
    lookup = IdLookup(
        Vocabulary(path.with_suffix(".vocabulary"), facts.num_rows, facts.vocabulary),
        facts.max_ind_range,
    )
    parse = ScoredText(str(text), facts.max_ind_range, 0).parse
    columns = np.concatenate([lines.columns for lines in map(parse, blocks_of_file(str(text)))], 1)
    ids = lookup.ids(columns[FIRST_SPARSE:])
    (missing,) = lookup.ids(np.zeros((NUM_SPARSE, 1), np.int32))
    print(f"unknown: {(ids < 0).mean():.2%} of categories, {(ids < 0).any(1).mean():.1%} of rows")
    dense = torch.from_numpy(columns[1:FIRST_SPARSE].T.astype(np.float32, order="C"))
    for name, way in WAYS.items():
        network = Scorer(str(path)).network
        for table in range(NUM_SPARSE):
            key = f"emb_l_{table}_weight"
            rows = network.get_buffer(key)
            setattr(network, key, torch.cat([rows, way(rows, missing[table])[None]]))
        served = torch.from_numpy(np.where(ids < 0, facts.num_rows, ids))
        with torch.inference_mode():
            batches = zip(dense.split(2048), served.split(2048), strict=True)
            scores = torch.cat([network(*batch) for batch in batches]).numpy()
        labelled = LabelledScores(text.parent)
        labelled.add(scores, columns[0])
        found = labelled.metrics()
        print(f"{name:<32} AUC {found.auc:.5f}, log loss {found.log_loss:.5f}", flush=True)


def main() -> None:
    """Make the data, train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=500_000, help="of the demo, over all days")
    parser.add_argument("--max-ind-range", type=int, default=100_000, help="-1: no limit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(make_demo(Demo(folder / "demo", options.rows, DAYS, 1)), file=sys.stderr)
        path = train(folder, options.max_ind_range)
        measure(path, folder / "demo" / f"day_{DAYS - 1}")


if __name__ == "__main__":
    main()
