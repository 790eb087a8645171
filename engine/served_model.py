"""What a model is, for those who serve it: its shape, and what its inputs are."""

from dataclasses import dataclass

from ranks.placement import LogicalTable


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """The shape of a model that takes dense features and ids and returns click probabilities.

    Attributes:
        tables: the T tables; their vectors have D numbers each.
        bottom: widths of the bottom MLP, from the dense features to D.
        top: widths of the top MLP, from those of the interaction to 1.
        interaction: dot or cat.
        itself: dot keeps the products of a vector with itself.
        learned_pooling: each row of a table has a trained weight in the sum over a bag.
        clamp: predictions stay in [clamp, 1 - clamp]; 0: they are not clamped.
        takes_integers: the model has learned from log(x + 1) of the data's integers x.
        one_id: every bag that the model has learned from holds one id.
    """

    tables: tuple[LogicalTable, ...]
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    interaction: str
    itself: bool
    learned_pooling: bool
    clamp: float
    takes_integers: bool
    one_id: bool
