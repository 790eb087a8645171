"""A demo data set: day files in Criteo's raw format, drawn from a planted click model and a seed.

The click probability of a row is planted: it has a part that is linear in the 13 integers, an
effect of each category, and dot products of latent vectors of pairs of categories. No model can
rank better than that probability does, so its AUC, the Bayes AUC, is the bound for training.
"""

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from common.errors import RankError
from common.flags import number_in
from common.shares import split_evenly
from criteo.columns import FIRST_SPARSE, NUM_DENSE, NUM_FIELDS, NUM_SPARSE
from criteo.text import MAX_ROW_BYTES, write_rows

ROWS_PER_DRAW = 1 << 15  # drawn and written at a time

# How many values each category can take: as many as in Criteo's Kaggle sample.
NUM_VALUES = np.array(
    [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194]
    + [27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]
)
HEAVY_TAIL = 2 + 1.5 * np.log10(NUM_VALUES)  # value = floor(n * u**tail): few values are common
MISSING_DENSE = np.array(
    [0.45, 0.0, 0.21, 0.22, 0.03, 0.22, 0.04, 0.0, 0.04, 0.45, 0.04, 0.77, 0.22]
)
MISSING_SPARSE = 0.03
PAIRS = ((0, 1), (4, 5), (8, 13), (16, 21), (19, 22), (5, 16))
BASE_LOGIT = -0.9
DENSE_SCALE, CATEGORY_SCALE, PAIR_SCALE = 0.28, 0.4, 0.25
RARE_FROM = 20  # from about this value on, a category's effect fades: rare values carry little
NUM_LATENT = 4096  # planted effects and vectors; a value's hash chooses one
LATENT_DIM = 4
AUC_BINS = 1 << 16

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Demo:
    """The demo to make: `num_rows` rows over `num_days` files `day_0, day_1, ...` in `folder`."""

    folder: Path
    num_rows: int
    num_days: int
    seed: int

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "Demo":
        """The flags of `add_demo_options` as a record."""
        return cls(Path(options.make_demo), options.demo_rows, options.demo_days, options.demo_seed)


def add_demo_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `Demo.from_options` reads."""
    flag = parser.add_argument_group("Demo data").add_argument
    flag(
        "--make-demo", metavar="DIR", help="make day files of a planted click model there, and stop"
    )
    flag("--demo-rows", type=number_in(int, 100), default=500_000, help="rows, over all days")
    flag("--demo-days", type=number_in(int, 2), default=8, help="day files; the last one evaluates")
    flag("--demo-seed", type=number_in(int, 0), default=1, help="decides every row")


class PlantedModel:
    """Draws rows and knows their click probabilities."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._dense_weight = self._random.normal(0, DENSE_SCALE, NUM_DENSE)
        self._effect = self._random.normal(0, 1, NUM_LATENT)
        vectors = self._random.normal(0, 1, (NUM_LATENT, LATENT_DIM))
        self._vector = vectors / np.sqrt(LATENT_DIM)
        self._salt = self._random.integers(0, 2**32, NUM_SPARSE, dtype=np.uint64)

    def draw(self, size: int) -> tuple[Any, Any, Any, Floats]:
        """Draw `size` rows.

        Returns:
            (label and integers (n, 14) int64, categories (n, 26) uint32, missing (n, 40) bool,
            click probabilities (n,)).
        """
        random = self._random
        normal = random.standard_normal((size, NUM_DENSE))
        integers = np.exp(normal * 1.4 + 1.5).astype(np.int64) - np.array([0, 2] + [0] * 11)
        value = (NUM_VALUES * random.random((size, NUM_SPARSE)) ** HEAVY_TAIL).astype(np.uint64)
        hashed = hash_values(value, self._salt)
        missing = np.zeros((size, NUM_FIELDS), bool)
        missing[:, 1:FIRST_SPARSE] = random.random((size, NUM_DENSE)) < MISSING_DENSE
        missing[:, FIRST_SPARSE:] = random.random((size, NUM_SPARSE)) < MISSING_SPARSE
        logit = self._logit(integers, value, hashed, missing)
        probability = 1 / (1 + np.exp(-logit))
        label = random.random(size) < probability
        return np.column_stack([label, integers]), hashed, missing, probability

    def _logit(self, integers: Any, value: Any, hashed: Any, missing: Any) -> Floats:
        seen = np.where(missing[:, 1:FIRST_SPARSE], 0, np.maximum(integers, 0))
        logit = BASE_LOGIT + (np.log1p(seen) - 1.5) @ self._dense_weight
        slot = (hashed >> np.uint32(7)) % NUM_LATENT
        fade = ~missing[:, FIRST_SPARSE:] / (1 + value / RARE_FROM)
        logit += CATEGORY_SCALE * (self._effect[slot] * fade).sum(1)
        for one, other in PAIRS:
            product = (self._vector[slot[:, one]] * self._vector[slot[:, other]]).sum(1)
            logit += PAIR_SCALE * product * fade[:, one] * fade[:, other]
        return np.asarray(logit)


def hash_values(value: Any, salt: Any) -> npt.NDArray[np.uint32]:
    """Hashes of values below 2^32, uint32; distinct values have distinct hashes.

    Each step can be undone: it is an odd multiplication, or a shift that is added by xor.
    """
    low = np.uint64(2**32 - 1)
    mixed = (value ^ salt) & low
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        mixed ^= mixed >> np.uint64(16)
        mixed = (mixed * np.uint64(factor)) & low
    mixed ^= mixed >> np.uint64(15)
    return mixed.astype(np.uint32)


class BayesAuc:
    """The expected AUC of a model that knows the planted probabilities, from their histogram."""

    def __init__(self) -> None:
        self._clicks = np.zeros(AUC_BINS)
        self._others = np.zeros(AUC_BINS)

    def add(self, probability: Floats) -> None:
        """Count rows with click probabilities p (n,): each as p clicks and 1 - p other rows."""
        bins = np.minimum((probability * AUC_BINS).astype(np.int64), AUC_BINS - 1)
        self._clicks += np.bincount(bins, probability, AUC_BINS)
        self._others += np.bincount(bins, 1 - probability, AUC_BINS)

    def value(self) -> float:
        """The chance that a click has a higher probability than another row; ties count half."""
        below = np.cumsum(self._others) - self._others / 2
        return float((self._clicks * below).sum() / (self._clicks.sum() * self._others.sum()))


def make_demo(demo: Demo) -> str:
    """Write the day files, all of them or none; returns two sentences about them.

    Raises:
        RankError: the folder has day files already, or the disk is full or read-only.
    """
    if any(demo.folder.glob("day_*")):
        raise RankError(f"--make-demo={demo.folder}: it holds day files already; name another one")
    partial = demo.folder.with_name(demo.folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    begin = time.perf_counter()
    try:
        partial.mkdir(parents=True)
        auc = _write_days(demo, partial)
        with contextlib.suppress(FileNotFoundError):
            demo.folder.rmdir()  # an empty folder may be there; one with files is an error
        os.rename(partial, demo.folder)
    except OSError as error:
        raise RankError(
            f"--make-demo={demo.folder}: cannot write there ({error.strerror})"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    seconds = time.perf_counter() - begin
    return (
        f"Made {demo.num_rows} rows in {demo.num_days} day files in {seconds:.1f} s"
        f" ({demo.num_rows / seconds:.0f} rows/s): {demo.folder}\n"
        f"Bayes AUC {auc:.4f}: no model can rank better than the planted click probabilities do"
    )


def _write_days(demo: Demo, folder: Path) -> float:
    """Write all day files; returns the Bayes AUC of their rows."""
    model, auc = PlantedModel(demo.seed), BayesAuc()
    with tqdm(total=demo.num_rows, unit="row", unit_scale=True, desc="demo", disable=None) as bar:
        for day, num_rows in enumerate(split_evenly(demo.num_rows, demo.num_days)):
            for probability in _write_day(model, folder / f"day_{day}", num_rows):
                auc.add(probability)
                bar.update(len(probability))
    return auc.value()


def _write_day(model: PlantedModel, path: Path, num_rows: int) -> Iterator[Floats]:
    """Write a day's rows, ROWS_PER_DRAW at a time; yields the click probabilities of each draw."""
    text = np.empty(ROWS_PER_DRAW * MAX_ROW_BYTES, np.uint8)
    with open(path, "wb") as file:
        for begin in range(0, num_rows, ROWS_PER_DRAW):
            size = min(ROWS_PER_DRAW, num_rows - begin)
            numbers, categories, missing, probability = model.draw(size)
            file.write(text[: write_rows(numbers, categories, missing, text)].tobytes())
            yield probability
