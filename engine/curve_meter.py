"""The curves of a report, from the sorted keys of an evaluation (engine/score_meter.py)."""

import torch

from reporting.score_curves import SCORE_BINS, ScoreCurves

CURVE_STEPS = 200  # points in each direction of the ROC curve; at most twice as many are kept


class NoCurves:
    """Collects nothing."""

    def add(self, score: torch.Tensor, label: torch.Tensor) -> None:
        """Add the next part of the rows."""

    def curves(self) -> ScoreCurves | None:
        """The curves of all parts, if any are collected."""
        return None


class CurveMeter(NoCurves):
    """Collects the curves over rows in the order of their scores, a part of them at a time.

    Where there are more distinct scores than fit into a picture it keeps some: the first one at
    which another CURVE_STEPS-th of the rows of label 0, or of label 1, is passed. What it keeps of
    a score are exact counts, and the curve between two kept points stays in a small rectangle.

    Args:
        num_rows: rows of all parts together.
        positives: how many of them have label 1.
    """

    def __init__(self, num_rows: int, positives: int) -> None:
        self._num_rows, self._positives = num_rows, positives
        self._passed = (0, 0)  # rows, and rows of label 1, in the parts so far
        self._last_score = -1.0
        self._last_cell = (-1, -1)
        # of each kept score: the score, and rows, and rows of label 1, below it
        self._points: list[tuple[float, int, int]] = []
        self._bins = torch.zeros(2, SCORE_BINS, dtype=torch.int64)  # of label 0 and of label 1
        self._sums = torch.zeros(SCORE_BINS, dtype=torch.float64)

    def add(self, score: torch.Tensor, label: torch.Tensor) -> None:
        """Add the next part.

        Args:
            score: (n,) ascending scores in [0, 1], n > 0, none below those of earlier parts.
            label: (n,) integers 0 and 1.
        """
        ones = label.cumsum(0, dtype=torch.int64)
        self._add_points(score, ones - label)
        self._add_bins(score, ones)
        rows, positives = self._passed
        self._passed = rows + len(score), positives + int(ones[-1])
        self._last_score = float(score[-1])

    def _add_points(self, score: torch.Tensor, ones_before: torch.Tensor) -> None:
        """Keep the scores that are new and lie in another cell than the score before them."""
        previous = torch.cat([score.new_tensor([self._last_score]), score[:-1]])
        starts = (score != previous).nonzero().squeeze(1)
        if not len(starts):
            return
        rows, positives = self._passed
        ones = ones_before[starts] + positives
        zeros = starts + rows - ones
        negatives = self._num_rows - self._positives
        cells = torch.stack([zeros // _cell(negatives), ones // _cell(self._positives)])
        before = torch.cat([cells.new_tensor([self._last_cell]).T, cells[:, :-1]], dim=1)
        kept = (cells != before).any(dim=0).nonzero().squeeze(1)
        below = (zeros + ones)[kept].tolist(), ones[kept].tolist()
        self._points += zip(score[starts[kept]].tolist(), *below, strict=True)
        self._last_cell = tuple(cells[:, -1].tolist())

    def _add_bins(self, score: torch.Tensor, ones: torch.Tensor) -> None:
        edges = torch.linspace(0, 1, SCORE_BINS + 1, dtype=torch.float64, device=score.device)[1:]
        wide = score.double()
        ends = torch.searchsorted(wide, edges, right=True)
        positives, sums = _up_to(ends, ones), _up_to(ends, wide.cumsum(0))
        self._bins[0] += (ends.diff(prepend=ends[:1] * 0) - positives).cpu()
        self._bins[1] += positives.cpu()
        self._sums += sums.cpu()

    def curves(self) -> ScoreCurves:
        """The curves of all parts."""
        positives, negatives = self._positives, self._num_rows - self._positives
        points = self._points
        return ScoreCurves(
            num_rows=self._num_rows,
            positives=positives,
            thresholds=[score for score, _, _ in points],
            true_positives=[positives - ones for _, _, ones in points],
            false_positives=[negatives - (rows - ones) for _, rows, ones in points],
            ones=self._bins[1].tolist(),
            zeros=self._bins[0].tolist(),
            sums=self._sums.tolist(),
        )


def _cell(num_rows: int) -> int:
    """Rows of a label in a cell, so that there are CURVE_STEPS cells at most."""
    return max(-(-num_rows // CURVE_STEPS), 1)


def _up_to(ends: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """The sum between two ends each, from the running sums over the rows."""
    at_ends = torch.cat([sums.new_zeros(1), sums])[ends]
    return at_ends.diff(prepend=at_ends[:1] * 0)
