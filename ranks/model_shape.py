"""The shape of a model: what its training, its picture and its ONNX file have to agree on."""

import itertools
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

    @property
    def num_dense(self) -> int:
        """How many weights both MLPs have, with their biases."""
        layers = (*itertools.pairwise(self.bottom), *itertools.pairwise(self.top))
        return sum((n + 1) * m for n, m in layers)

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters by their keys in model files, in the files' order."""
        matrices = [matrix for table in self.tables for matrix in table.matrices]
        shapes: dict[str, tuple[int, ...]] = {
            f"emb_l.{matrix.key}": (matrix.num_rows, matrix.dim) for matrix in matrices
        }
        if self.learned_pooling:
            shapes |= {f"v_W_l.{matrix.table}": (matrix.num_rows,) for matrix in matrices}
        for name, widths in (("bot_l", self.bottom), ("top_l", self.top)):
            for k, (n, m) in enumerate(itertools.pairwise(widths)):
                shapes |= {f"{name}.{2 * k}.weight": (m, n), f"{name}.{2 * k}.bias": (m,)}
        return shapes
