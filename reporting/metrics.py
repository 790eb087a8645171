"""Metrics of an evaluation, and warnings about them."""

import math
from dataclasses import dataclass, fields

NAN = float("nan")


@dataclass(frozen=True)
class Metrics:
    """Metrics of predictions against labels, as fractions; nan if one is not computed or undefined.

    Accuracy, recall, precision and f1 take predictions above 0.5 for label 1. ap and auc are
    scikit-learn's average_precision_score and roc_auc_score of the raw predictions, log_loss is the
    mean negative log likelihood in nats, base_rate the share of label 1.
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
        """The values in the order of the fields, so that `Metrics(*numbers)` equals this one."""
        return [getattr(self, field.name) for field in fields(self)]


def remark(metrics: Metrics) -> str:
    """A warning that the user should see with the metrics; empty if there is none."""
    if math.isnan(metrics.base_rate):
        return (
            "labels are not 0 and 1 (--round-targets=true makes them so):"
            " only the accuracy is computed"
        )
    if math.isnan(metrics.auc):
        return f"all labels are {metrics.base_rate:.0f}: auc and ap do not exist"
    if metrics.auc <= 0.5:
        return f"auc {metrics.auc:.4f} is not above 0.5: the model ranks no better than chance"
    return ""
