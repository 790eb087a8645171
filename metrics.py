"""Evaluation metrics, exact, of all scores of an evaluation."""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

NAN = float("nan")


@dataclass(frozen=True)
class Metrics:
    """Metrics of predictions against labels; accuracy and base rate as fractions.

    ap and auc are scikit-learn's average_precision_score and roc_auc_score of the raw predictions,
    log_loss the mean negative log likelihood in nats, base_rate the share of label 1.
    """

    accuracy: float
    recall: float = NAN
    precision: float = NAN
    f1: float = NAN
    ap: float = NAN
    auc: float = NAN
    log_loss: float = NAN
    base_rate: float = NAN

    def numbers(self) -> list[float]:
        """The values in the order of the fields: `Metrics(*numbers)` is the way back."""
        return [getattr(self, field.name) for field in fields(self)]


def compute(scores: npt.NDArray[np.float32], labels: npt.NDArray[np.float32]) -> Metrics:
    """Metrics of (n,) predictions in [0, 1] against (n,) labels.

    Predictions are rounded half to even at 0.5 where a class is needed. Where labels are not 0 and
    1 only the accuracy means something; where they are all the same ap and auc do not exist: the
    rest is nan, as is everything where a prediction is not finite.
    """
    # it takes a second to import: only the rank that computes pays it, when it computes
    from sklearn import metrics as sklearn_metrics

    if not np.isfinite(scores).all():
        return Metrics(NAN)
    rounded = np.round(scores)
    accuracy = float((rounded == labels).mean())
    if not np.isin(labels, (0, 1)).all():
        return Metrics(accuracy)
    recall_precision = sklearn_metrics.precision_recall_fscore_support(
        labels, rounded, average="binary", zero_division=0
    )
    one_class = labels.min() == labels.max()
    return Metrics(
        accuracy=accuracy,
        recall=float(recall_precision[1]),
        precision=float(recall_precision[0]),
        f1=float(recall_precision[2]),
        ap=NAN if one_class else float(sklearn_metrics.average_precision_score(labels, scores)),
        auc=NAN if one_class else float(sklearn_metrics.roc_auc_score(labels, scores)),
        log_loss=float(sklearn_metrics.log_loss(labels, scores.astype(np.float64), labels=[0, 1])),
        base_rate=float(labels.astype(np.float64).mean()),
    )


def remark(metrics: Metrics) -> str:
    """What a user should be told about the metrics; empty if nothing."""
    if np.isnan(metrics.base_rate):
        return (
            "labels are not 0 and 1 (--round-targets=true makes them so):"
            " only the accuracy is computed"
        )
    if np.isnan(metrics.auc):
        return f"all labels are {metrics.base_rate:.0f}: auc and ap do not exist"
    if metrics.auc <= 0.5:
        return f"auc {metrics.auc:.4f} is not above 0.5: the model ranks no better than chance"
    return ""
