"""Scores rows with a model file, for notebooks and services:

from engine.scorer import Scorer

Scorer("DLRM.pth").score(["\t".join(["5", "110", *["0"] * 11, *["68fd1e64"] * 26])])
"""

import common.compiled  # noqa: F401  (before torch: both use the same threads)

# isort: split
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.errors import UserError
from criteo.columns import FIRST_SPARSE, NUM_DENSE, NUM_SPARSE
from criteo.scored_text import ScoredText
from criteo.served_ids import ServedIds
from engine.prediction_options import vocabulary_of_model
from engine.saved_content import SavedContent, serving_facts_of
from engine.served_network import ServedNetwork
from engine.value_checks import Wanted

ROWS_AT_A_TIME = 2048  # more rows at a time leave the CPU's cache

Scores = npt.NDArray[np.float32]
Arrays = tuple[Any, Any]


class Scorer:
    """A model, ready to score rows on the CPU. Any number of threads may use it at once.

    The parameters stay in the file, which is mapped: it is opened in a moment, and several
    processes share one copy in memory. The vocabulary is read.

    Args:
        path: the model file, of --save-model.
        vocabulary: its vocabulary's file; empty: it is beside the model file.

    Attributes:
        network: dense features (B, m) float32 and ids (B, T) int64 -> scores (B,).

    Raises:
        UserError: it is no model file, or does not tell how to score rows.
    """

    def __init__(self, path: str, vocabulary: str = "") -> None:
        content = SavedContent(str(path))
        facts = serving_facts_of(str(path), content)
        if facts is None:
            raise UserError(
                f"{path} does not say how it was trained, as it is of an earlier version or of the"
                " original: continue from it with --load-model and --save-model, which says it"
            )
        shape = facts.architecture()
        # only the shapes are looked at: reading all numbers would take as long as the file is large
        wanted = {key: Wanted(size, None) for key, size in shape.parameter_shapes.items()}
        parameters = content.parameters(wanted)
        content.check_joins([table.join for table in shape.tables])
        self.network = ServedNetwork(shape, parameters, facts.is_criteo).eval()
        self._facts, self._ids = facts, None
        if facts.is_criteo:
            words = vocabulary_of_model(Path(path), facts, vocabulary)
            self._ids = ServedIds(words, facts.max_ind_range)

    def score(self, rows: str | bytes | Sequence[str | bytes] | Arrays) -> Scores:
        """The click probabilities of n rows, (n,) float32.

        Args:
            rows: lines of Criteo text, with or without the label; or (dense, sparse): integers
                (n, 13) and categories (n, 26) as numbers of 32 bits, 0 or nan if missing. A
                model of random data takes dense features (n, m) and ids (n, T).

        Raises:
            UserError: a line is bad, or an array has another shape.
        """
        is_text = not isinstance(rows, tuple) or all(isinstance(row, str | bytes) for row in rows)
        dense, ids = self._from_text(rows) if is_text else self._from_arrays(*rows)
        with torch.inference_mode():
            batches = zip(dense.split(ROWS_AT_A_TIME), ids.split(ROWS_AT_A_TIME), strict=True)
            scores: Scores = torch.cat([self.network(*batch) for batch in batches]).numpy()
        return scores

    def _from_text(self, rows: str | bytes | Sequence[str | bytes]) -> tuple[Any, Any]:
        if self._ids is None:
            raise UserError("this model was trained with random data: give (dense, ids)")
        if isinstance(rows, str | bytes):
            rows = [rows] if rows else []
        text = b"".join(_line(line) for line in rows)
        if not text:
            return torch.zeros(0, NUM_DENSE), torch.zeros(0, NUM_SPARSE, dtype=torch.int64)
        parsed = ScoredText("rows", self._facts.max_ind_range, 0).parse(text)
        columns = parsed.columns
        return self._features(columns[1:FIRST_SPARSE].T, columns[FIRST_SPARSE:])

    def _from_arrays(self, dense: Any, sparse: Any) -> tuple[Any, Any]:
        dense, sparse = _numbers("dense", dense), _numbers("sparse", sparse)
        num_tables = len(self._facts.num_rows)
        num_rows = len(dense) if dense.ndim else 0
        expected = (num_rows, self._facts.num_dense), (num_rows, num_tables)
        if (dense.shape, sparse.shape) != expected:
            raise UserError(
                f"arrays of shape {dense.shape} and {sparse.shape}, expected"
                f" (rows, {self._facts.num_dense}) and (rows, {num_tables})"
            )
        if self._ids is None:
            if len(sparse) and not (sparse.min() >= 0 and (sparse < self._facts.num_rows).all()):
                raise UserError("an id is outside its table's rows")
            return _tensors(dense, sparse)
        categories = sparse.astype(np.int64) & 0xFFFFFFFF
        if self._facts.max_ind_range > 0:
            categories %= self._facts.max_ind_range
        return self._features(np.maximum(dense, 0), categories.astype(np.uint32).view(np.int32).T)

    def _features(self, dense: Any, categories: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._ids is not None
        ids, _ = self._ids.ids(categories)
        return _tensors(dense, ids)


def _numbers(name: str, array: Any) -> npt.NDArray[Any]:
    """An array of numbers, where 0 stands for nan, as for an empty field.

    Raises:
        UserError: it holds something else.
    """
    try:
        found = np.asarray(array)
    except ValueError as error:  # rows of different lengths
        raise UserError(f"{name} is no array ({error}), expected rows of numbers") from error
    if found.dtype.kind not in "biuf":
        raise UserError(f"{name} has the type {found.dtype}, expected numbers")
    return np.nan_to_num(found) if found.dtype.kind == "f" else found


def _tensors(dense: Any, ids: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dense, ids = dense.astype(np.float32, order="C"), ids.astype(np.int64, order="C")
    return torch.from_numpy(dense), torch.from_numpy(ids)


def _line(line: str | bytes) -> bytes:
    text = line.encode() if isinstance(line, str) else line
    return text if text.endswith(b"\n") else text + b"\n"
