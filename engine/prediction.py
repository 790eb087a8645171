"""Scores of a text's rows in order: parsed while the model computes, written as they come.

Every rank reads the text and scores its share of each batch; the first rank writes.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol, TextIO

import numpy as np
import torch

from common.errors import RankError
from common.read_ahead import read_ahead
from common.shares import split_evenly
from common.whole_files import target_of, write_whole
from criteo.columns import FIRST_SPARSE, NUM_FIELDS, NUM_SPARSE, Columns, Rows
from criteo.row_layout import FLAT
from criteo.scored_text import (
    RowsOfBatch,
    ScoredText,
    about_num_lines,
    blocks_of_file,
    in_batches,
)
from criteo.served_ids import ServedIds
from devices.execution import Execution
from engine.labelled_scores import LabelledScores
from engine.prediction_options import ServedData
from engine.quantization import mlps_take_whole_batches
from engine.saved_content import reason_of
from engine.score_files import FLAG, STDOUT, Scores, score_file
from engine.step import Chunking
from model.batch import CriteoBatch, Decoding, Features
from ranks.collectives import gather_on_first, sum_over_ranks
from ranks.process import Process
from reporting.log_lines import calibration_line, metrics_line
from reporting.metrics import remark
from reporting.progress_bar import ProgressBar


class Model(Protocol):
    """What scores rows.

    Attributes:
        decoding: what it takes of a batch.
    """

    decoding: Decoding

    def __call__(self, features: Features, rows_per_rank: Sequence[int]) -> torch.Tensor:
        """Click probabilities (b, 1)."""


@dataclass
class Prediction:
    """One pass over a text: its rows, how they are scored, and what was found on the way.

    Attributes:
        path: where the text is; `-`: stdin.
        text: its rows.
        ids: makes ids of their categories.
        process: this rank.
        chunking: how the model sees a batch.
        batch_size: rows of a batch, over all ranks.
        labelled: the scores with their labels, on the first rank.
        num_unknown: unknown categories of this rank's rows.
        num_rows: rows scored, over all ranks.
    """

    path: str
    text: ScoredText
    ids: ServedIds
    process: Process
    chunking: Chunking
    batch_size: int
    labelled: LabelledScores
    num_unknown: int = field(default=0, init=False)
    num_rows: int = field(default=0, init=False)

    @classmethod
    def from_options(
        cls,
        options: argparse.Namespace,
        data: ServedData,
        process: Process,
        execution: Execution,
    ) -> "Prediction":
        """The pass that the flags ask for."""
        batch_size, source = options.test_mini_batch_size, f"--predict-file={options.predict_file}"
        chunking = Chunking.of_data(2, batch_size, process, execution)
        if mlps_take_whole_batches(options):
            chunking = Chunking(process.device)
        name = options.scores_file
        folder = Path(tempfile.gettempdir()) if name == STDOUT else target_of(Path(name)).parent
        return cls(
            path=options.predict_file,
            text=ScoredText(source, options.max_ind_range, options.max_bad_lines),
            ids=ServedIds(data.vocabulary, options.max_ind_range),
            process=process,
            chunking=chunking,
            batch_size=batch_size,
            labelled=LabelledScores(folder),
        )

    @torch.no_grad()
    def scores(self, model: Model) -> Iterator[Scores]:
        """The scores of the text's lines in order, on the first rank; all ranks ask for all.

        Other ranks get as many empty arrays.

        Raises:
            UserError: the text is wrong.
            RankError: it cannot be read, or scores are not finite.
        """
        with closing(read_ahead(self._batches())) as batches:
            for rows, batch in batches:
                scores = self._score(model, batch)
                if not self.process.is_first:
                    yield np.zeros(0, np.float32)
                    continue
                self._note(rows, scores)
                of_lines = np.full(len(rows.is_row), np.nan, np.float32)
                of_lines[rows.is_row] = scores
                yield of_lines

    def _batches(self) -> Iterator[tuple[RowsOfBatch, CriteoBatch]]:
        """(rows of all ranks, this rank's share of them as the model takes it)."""
        parsed = map(self.text.parse, blocks_of_file(self.path))
        for rows in in_batches(parsed, self.batch_size):
            sizes = split_evenly(rows.columns.shape[1], self.process.world_size)
            begin = sum(sizes[: self.process.rank])
            own = rows.columns[:, begin : begin + sizes[self.process.rank]]
            block = torch.from_numpy(self._with_ids(own).view(np.uint8))
            yield rows, CriteoBatch(block, len(block), tuple(sizes), FLAT)

    def _with_ids(self, columns: Columns) -> Rows:
        """Columns (40, n) as rows (n, 40) of the flat layout, with ids in place of categories."""
        found, num_unknown = self.ids.ids(columns[FIRST_SPARSE:])
        self.num_unknown += num_unknown
        rows = np.empty((len(found), NUM_FIELDS), np.int32)
        rows[:, :FIRST_SPARSE], rows[:, FIRST_SPARSE:] = columns[:FIRST_SPARSE].T, found
        return rows

    def _score(self, model: Model, batch: CriteoBatch) -> Scores:
        """Scores of the batch's rows, on the first rank; all ranks call it together."""
        parts = []
        for chunk in self.chunking.chunks(batch):
            features = chunk.decode(model.decoding)
            predicted = model(features, chunk.rows_per_rank)
            parts.append(predicted[: chunk.num_rows - chunk.num_padding].float())
        own = torch.cat(parts).view(-1).cpu()
        of_ranks = gather_on_first(self.process, own, batch.rows_per_rank)
        return torch.cat(of_ranks).numpy() if of_ranks else np.zeros(0, np.float32)

    def _note(self, rows: RowsOfBatch, scores: Scores) -> None:
        if not np.isfinite(scores).all():
            raise RankError("scores are nan: the model's parameters are too large")
        self.num_rows += len(scores)
        if self.text.has_labels:
            self.labelled.add(scores, rows.columns[0])


def write_scores(name: str, prediction: Prediction, model: Model) -> None:
    """Write the scores to --scores-file, whole or not at all. All ranks call it.

    Raises:
        UserError: the text is wrong.
        RankError: it cannot be read, scores are not finite, or the file cannot be written.
    """
    if not prediction.process.is_first:
        for _ in prediction.scores(model):
            pass
        return

    def write(file: BinaryIO) -> None:
        written = score_file(name, file)
        num_lines = about_num_lines(prediction.path)
        try:
            with ProgressBar("scoring", num_lines, file=_console(name)) as bar:
                for scores in prediction.scores(model):
                    written.write(scores)
                    bar.update(len(scores))
            written.finish()
        finally:
            written.leave()

    if name == STDOUT:
        write(sys.stdout.buffer)
        sys.stdout.flush()
        return
    try:
        write_whole([(target_of(Path(name)), write)])
    except OSError as error:
        raise RankError(
            f"{FLAG}={name}: cannot write it ({reason_of(error)}); what was there before is kept"
        ) from error


def _console(name: str) -> TextIO:
    """Where lines and the bar go: stdout, unless the scores are there."""
    return sys.stderr if name == STDOUT else sys.stdout


def predict(options: argparse.Namespace, prediction: Prediction, model: Model) -> None:
    """Score the text's rows and tell about it. All ranks call it.

    Raises:
        UserError: the text is wrong.
        RankError: it cannot be read, scores are not finite, or the file cannot be written.
    """
    begin = time.perf_counter()
    write_scores(options.scores_file, prediction, model)
    seconds = time.perf_counter() - begin
    unknown = torch.tensor([prediction.num_unknown])
    sum_over_ranks(prediction.process, [unknown])
    if not prediction.process.is_first:
        return
    out = _console(options.scores_file)
    for line in _lines(prediction, options.scores_file, seconds, int(unknown)):
        print(line, file=out, flush=True)


def _lines(prediction: Prediction, name: str, seconds: float, num_unknown: int) -> Iterator[str]:
    num_rows, text = prediction.num_rows, prediction.text
    speed = num_rows / max(seconds, 1e-9)
    yield f"scored {num_rows} rows in {seconds:.2f} s, {speed:.0f} rows/s: {name}"
    if num_rows:
        share = 100 * num_unknown / (num_rows * NUM_SPARSE)
        yield (
            f"unknown categories: {num_unknown} of {num_rows * NUM_SPARSE} ({share:.2f} %),"
            " scored as missing ones"
        )
    if text.num_bad:
        bad = f"{text.num_bad}; the first: {text.first_bad}"
        yield f"warning: bad lines skipped, whose score is nan: {bad}"
    if num_rows and text.has_labels:
        found = prediction.labelled.metrics()
        yield metrics_line(found, found.accuracy, found.auc)
        yield calibration_line(found)
        if warning := remark(found):
            yield f"warning: {warning}"
