"""The shape of a model: what its training, its picture and its ONNX file have to agree on."""

from dataclasses import dataclass

from ranks.placement import LogicalTable


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Tables, layers and how they are joined; B rows of dense features and ids go in.

    A record that adds facts is made from one of these by `**vars(shape)`.

    Attributes:
        tables: the T tables; their vectors have D numbers each.
        bottom: widths of the bottom MLP, from the dense features to D.
        top: widths of the top MLP, from those of the interaction to 1.
        interaction: dot or cat.
        itself: dot keeps the products of a vector with itself.
        pooling: weights in the sum over a bag: fixed, learned, or empty if there are none.
        clamp: predictions stay in [clamp, 1 - clamp]; 0: they are not clamped.
    """

    tables: tuple[LogicalTable, ...]
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    interaction: str
    itself: bool
    pooling: str
    clamp: float

    @property
    def learned_pooling(self) -> bool:
        """Whether each row of a table has a trained weight in the sum over a bag."""
        return self.pooling == "learned"
