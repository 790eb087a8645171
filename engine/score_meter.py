"""Exact metrics of all scores of an evaluation, from one integer a row.

A score in [0, 1] is a non-negative float. The bits of such floats, read as integers, have the order
of the floats. So the key `bits * 2 + label` holds everything about a row in as many bytes as its
score, and sorting the keys sorts the rows by score without an index array.
"""

from collections.abc import Iterator, Sequence

import torch

from engine.curve_meter import CurveMeter, NoCurves
from ranks.collectives import gather_on_first, numbers_from_first, sum_over_ranks
from ranks.process import Process
from reporting.metrics import NAN, Metrics
from reporting.score_curves import ScoreCurves

# Keys that are sent or counted at a time. The tensors made from them take at most about 100 bytes a
# key: 200 MB.
KEYS_AT_A_TIME = 1 << 21
KEY_OF = {torch.float32: torch.int32, torch.float64: torch.int64}
SCORE_OF = {key: score for score, key in KEY_OF.items()}


class ScoreMeter:
    """Collects scores and labels of one evaluation on the device, batch by batch.

    Args:
        process: this rank. Scores come from its device, and on rank 0 keys are sorted there.
        with_curves: rank 0 also collects `curves`.

    Attributes:
        curves: those of a report, after `metrics`; None: not collected, or there are none, as
            labels are not 0 and 1 or a score is not finite.
    """

    def __init__(self, process: Process, with_curves: bool = False) -> None:
        self._process, self._with_curves = process, with_curves
        self.curves: ScoreCurves | None = None
        self._keys: list[torch.Tensor] = []
        # A host takes longer to start a batch's operators than a card takes to run them, so batches
        # of a card wait for others. A CPU turns them into keys while they are in its cache.
        self._waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._num_waiting = 0
        self._rows_at_a_time = 0 if process.device.type == "cpu" else KEYS_AT_A_TIME
        # rows with a score in [0, 1], a finite score, label 0 or 1, label 1, the right prediction
        self._counts = torch.zeros(5, dtype=torch.int64, device=process.device)

    def add(self, predicted: torch.Tensor, label: torch.Tensor) -> None:
        """Add a batch, which must not change any more; does not wait for the device.

        Args:
            predicted: (b, 1) or (b,) scores in [0, 1], float32 or float64, the same type in all
                batches of all ranks; narrower floats are widened to float32. A rank without rows
                of a batch adds its empty share.
            label: 0 or 1, of the same shape on the same device.
        """
        score, label = predicted.reshape(-1), label.reshape(-1)
        self._waiting.append((score if score.dtype == torch.float64 else score.float(), label))
        self._num_waiting += len(score)
        if self._num_waiting >= self._rows_at_a_time:
            self._make_keys()

    def _make_keys(self) -> None:
        """Turn the waiting batches into keys."""
        if not self._waiting:
            return
        score, label = (torch.cat(column) for column in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting = [], 0
        is_one = label == 1
        facts = (
            (score >= 0) & (score <= 1),
            score.isfinite(),
            is_one | (label == 0),
            is_one,
            (score > 0.5) == label,  # scores are rounded half to even, so 0.5 predicts 0
        )
        # A sum for each fact: one sum over all of them would be shared by the CPU's threads, which
        # on a busy machine wait for one another a hundred times longer than the sum takes.
        self._counts += torch.stack([fact.sum() for fact in facts])
        self._keys.append(keys_of(score, is_one))

    def metrics(self) -> Metrics:
        """Metrics of all rows of all ranks; every rank calls this once, after its last batch.

        If a score is not finite, all metrics are nan. If labels are not 0 and 1, all but the
        accuracy are nan; if all labels are the same, ap and auc are. The AUC is an exact count of
        pairs; ap and the log loss are sums in float64.

        No rank waits long in a collective. A few numbers are summed, the other ranks send their
        keys to rank 0 in parts, and then wait for a broadcast of eight numbers while rank 0 sorts
        and counts. That takes seconds for the 89 million rows of Criteo Terabyte's test half, and
        the backends give up after minutes. If rank 0 fails, the wait ends with its process.

        Raises:
            AssertionError: no row was added, or a finite score is outside [0, 1]; on all ranks.
        """
        self._make_keys()
        counts, sizes = self._sum_counts()
        num_rows = sum(sizes)
        in_range, finite, binary, positives, right = counts
        assert num_rows > 0, "an evaluation of no rows has no metrics"
        if finite < num_rows:
            return Metrics(NAN)
        assert in_range == num_rows, "a score lies outside [0, 1]"
        if binary < num_rows:
            return Metrics(right / num_rows)
        keys = self._gather(sizes)
        numbers = Metrics(right / num_rows).numbers()
        if self._process.is_first:
            ranking = Ranking(num_rows, positives)
            curves = CurveMeter(num_rows, positives) if self._with_curves else NoCurves()
            for part in _in_order(keys):
                ranking.add(part)
                curves.add(_scores(part), part & 1)
            self.curves = curves.curves()
            numbers = ranking.metrics(right).numbers()
        return Metrics(*numbers_from_first(self._process, numbers))

    def _sum_counts(self) -> tuple[list[int], list[int]]:
        """The counts of all ranks together, and the number of rows of each rank."""
        sizes = torch.zeros(self._process.world_size, dtype=torch.int64)
        sizes[self._process.rank] = sum(len(keys) for keys in self._keys)
        # on the host, as not every device's backend sums int64
        counts = self._counts.cpu()
        sum_over_ranks(self._process, [counts, sizes])
        return counts.tolist(), sizes.tolist()

    def _gather(self, sizes: Sequence[int]) -> torch.Tensor:
        """On rank 0 the keys of all ranks, in any order, on its device; elsewhere this rank's own.

        Rank 0 receives the keys in parts, and holds one part of each rank at a time beside them.
        """
        own = sizes[self._process.rank]
        first = self._process.is_first
        like = self._keys[0]
        keys = like.new_empty(sum(sizes) if first else own)
        torch.cat(self._keys, out=keys[:own])
        self._keys = []
        end = own
        for begin in range(0, max(sizes[1:], default=0), KEYS_AT_A_TIME):
            parts = [min(max(size - begin, 0), KEYS_AT_A_TIME) for size in sizes]
            mine = keys[:0] if first else keys[begin : begin + parts[self._process.rank]]
            for part in gather_on_first(self._process, mine.cpu(), parts)[1:]:
                keys[end : end + len(part)] = part
                end += len(part)
        return keys


def _in_order(keys: torch.Tensor) -> Iterator[torch.Tensor]:
    """The keys in ascending order, in parts on the device that counts them; overwrites `keys`.

    An NPU sorts, but the host counts: counting is in float64, which an NPU may lack or leave to the
    host one operator at a time.
    """
    ordered = _sort(keys)
    for part in ordered.split(KEYS_AT_A_TIME):
        yield part.cpu() if part.device.type == "npu" else part


def _sort(keys: torch.Tensor) -> torch.Tensor:
    """The (n,) keys in ascending order on their device; may overwrite `keys`."""
    if keys.device.type == "cpu":
        # torch's sort also makes an int64 index for each key; NumPy's sorts in place, with SIMD
        keys.numpy().sort()
        return keys
    try:
        return torch.sort(keys).values
    except torch.OutOfMemoryError:
        # tables may fill the card; the index and the work space of a sort take 24 bytes a key
        return _sort(keys.cpu())


def keys_of(score: torch.Tensor, is_one: torch.Tensor) -> torch.Tensor:
    """The keys (n,) of scores (n,) in [0, 1], given where the label is 1."""
    # abs: -0.0 is no smaller than 0.0, but its bits are
    return score.abs().view(KEY_OF[score.dtype]).mul_(2).add_(is_one)


def _scores(keys: torch.Tensor) -> torch.Tensor:
    """The scores of the keys."""
    return (keys >> 1).view(SCORE_OF[keys.dtype])


class Ranking:
    """Sums over rows in the order of their scores, a part of the rows at a time.

    Rows of equal scores form a group. A group is counted when the next one starts, because it may
    continue in the next part. int64 is wide enough for 4 billion rows: twice the number of pairs of
    a row of label 1 and a row of label 0 is at most rows ** 2 / 2.

    Args:
        num_rows: rows of all parts together.
        positives: how many of them have label 1.
    """

    def __init__(self, num_rows: int, positives: int) -> None:
        self._num_rows, self._positives = num_rows, positives
        self._passed = (0, 0)  # rows, and rows of label 1, in the parts so far
        self._last: torch.Tensor | None = None  # bits of the last score so far
        # (2, 1): rows, and rows of label 1, before the group that is not counted yet
        self._open = torch.zeros(2, 1, dtype=torch.int64)
        self._pairs_twice = 0
        self._precision = self._loss = 0.0
        self._rounded_up = self._found = 0

    def add(self, keys: torch.Tensor) -> None:
        """Add the next part: (n,) ascending keys, n > 0, none below those of earlier parts."""
        bits, label = keys >> 1, keys & 1
        self._add_rows(bits.view(SCORE_OF[keys.dtype]), label)
        self._add_groups(bits, label)

    def _add_rows(self, score: torch.Tensor, label: torch.Tensor) -> None:
        """Add the sums that need no order: the log loss, and scores that round to 1."""
        up = score > 0.5
        self._rounded_up += int(up.sum())
        self._found += int((up & label.bool()).sum())
        # clipped as in scikit-learn, so that the loss of a wrong 0 or 1 is finite
        eps = torch.finfo(torch.float64).eps
        likelihood = torch.where(label == 1, score.double(), 1 - score.double())
        self._loss -= float(likelihood.clamp_(eps, 1 - eps).log_().sum())

    def _add_groups(self, bits: torch.Tensor, label: torch.Tensor) -> None:
        rows, positives = self._passed
        before = bits[:1] - 1 if self._last is None else self._last
        starts = (bits != torch.cat([before, bits[:-1]])).nonzero().squeeze(1)
        ones = label.cumsum(0, dtype=torch.int64)
        ones_before = (ones - label)[starts]
        self._count_groups(torch.stack([starts + rows, ones_before + positives]))
        self._passed = rows + len(bits), positives + int(ones[-1])
        self._last = bits[-1:]

    def _count_groups(self, starts: torch.Tensor) -> None:
        """Count all groups but the last one, which becomes the open group.

        Args:
            starts: (2, g) int64: rows, and rows of label 1, before each group that starts now.
        """
        starts = torch.cat([self._open.to(starts.device), starts], dim=1)
        rows, ones = starts
        zeros = rows - ones
        # scikit-learn's precision is over all rows of at least this score
        precision = (self._positives - ones[:-1]).double() / (self._num_rows - rows[:-1])
        # a row of label 1 wins the pair with each lower row of label 0, and half of one with an
        # equal row
        self._pairs_twice += int((ones.diff() * (zeros[:-1] + zeros[1:])).sum())
        self._precision += float((ones.diff() * precision).sum())
        self._open = starts[:, -1:]

    def metrics(self, right: int) -> Metrics:
        """Metrics of all parts; `right` counts the rows whose rounded score is their label."""
        rows, positives = self._num_rows, self._positives
        negatives = rows - positives
        self._count_groups(torch.tensor([[rows], [positives]], device=self._open.device))
        one_class = positives == 0 or negatives == 0
        return Metrics(
            accuracy=right / rows,
            recall=_share(self._found, positives),
            precision=_share(self._found, self._rounded_up),
            f1=_share(2 * self._found, positives + self._rounded_up),
            ap=NAN if one_class else self._precision / positives,
            auc=NAN if one_class else self._pairs_twice / (2 * positives * negatives),
            log_loss=self._loss / rows,
            base_rate=positives / rows,
        )


def _share(part: int, whole: int) -> float:
    """The share of a part in the whole; 0 if the whole is 0 (scikit-learn's zero_division=0)."""
    return part / whole if whole else 0.0
