"""What the scores of an evaluation look like: ROC, precision and recall, calibration, histogram."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

SCORE_BINS = 40  # of equal width in [0, 1]; a calibration bin is two of them
CALIBRATION_BINS = SCORE_BINS // 2


@dataclass(frozen=True)
class CalibrationBin:
    """The rows whose score lies in (low, high], or in [0, high] in the first bin.

    Attributes:
        low, high: the bin's ends.
        num_rows: how many rows it has, at least 1.
        score: their mean score.
        rate: the share of label 1.
    """

    low: float
    high: float
    num_rows: int
    score: float
    rate: float


@dataclass(frozen=True)
class ScoreCurves:
    """Counts over all rows of an evaluation.

    Attributes:
        num_rows: rows.
        positives: how many of them have label 1.
        thresholds: some of the scores, ascending; the lowest one is among them.
        true_positives, false_positives: rows of label 1 and of label 0 with at least that score,
            exact counts, for each threshold.
        ones, zeros: rows of label 1 and of label 0 in each of SCORE_BINS bins of scores.
        sums: (SCORE_BINS,) the sum of the scores in each bin.
    """

    num_rows: int
    positives: int
    thresholds: Sequence[float]
    true_positives: Sequence[int]
    false_positives: Sequence[int]
    ones: Sequence[int]
    zeros: Sequence[int]
    sums: Sequence[float]

    @property
    def has_both_labels(self) -> bool:
        """Whether there are ROC and precision-recall curves at all."""
        return 0 < self.positives < self.num_rows

    def roc(self) -> tuple[list[float], list[float]]:
        """False and true positive rates, descending to (0, 0); both labels are there."""
        negatives = self.num_rows - self.positives
        false = [count / negatives for count in self.false_positives]
        true = [count / self.positives for count in self.true_positives]
        return [*false, 0.0], [*true, 0.0]

    def precision_recall(self) -> tuple[list[float], list[float]]:
        """Recalls, descending, and the precision at each; both labels are there."""
        counts = zip(self.true_positives, self.false_positives, strict=True)
        pairs = [(true / self.positives, true / (true + false)) for true, false in counts]
        return [recall for recall, _ in pairs], [precision for _, precision in pairs]

    def calibration(self) -> list[CalibrationBin]:
        """Bins of equal width that have rows."""
        bins = []
        edges = pairwise(number / CALIBRATION_BINS for number in range(CALIBRATION_BINS + 1))
        for number, (low, high) in enumerate(edges):
            two = slice(2 * number, 2 * number + 2)
            ones, zeros = sum(self.ones[two]), sum(self.zeros[two])
            if rows := ones + zeros:
                score = sum(self.sums[two]) / rows
                bins.append(CalibrationBin(low, high, rows, score, ones / rows))
        return bins
