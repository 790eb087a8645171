"""The network for those who only score rows: plain operators on parameters that lie in a file.

The parameters are not copied, so a mapped model file is opened in a moment, and processes that
serve it share its pages. torch.export takes the module as it is.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from model.interaction import num_pairs
from ranks.model_shape import ModelShape
from ranks.placement import LogicalTable


class ServedNetwork(nn.Module):
    """Dense features and one id a table -> click probabilities, on the CPU.

    Args:
        shape: the model's.
        parameters: those of its model file, by their keys; they are used where they are.
        takes_integers: dense features are integers x, and the model has learned from log(x + 1).
    """

    def __init__(
        self, shape: ModelShape, parameters: Mapping[str, torch.Tensor], takes_integers: bool
    ) -> None:
        super().__init__()
        self._shape, self._takes_integers = shape, takes_integers
        self._names = {key: key.replace(".", "_") for key in parameters}
        for key, value in parameters.items():
            self.register_buffer(self._names[key], value.float())
        num_vectors = len(shape.tables) + 1
        row, column = torch.tril_indices(num_vectors, num_vectors, 0 if shape.itself else -1)
        assert len(row) == num_pairs(num_vectors, shape.itself)
        self.register_buffer("pairs", row * num_vectors + column)

    def forward(self, dense: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Click probabilities (B,) of B rows.

        Args:
            dense: (B, m) float32.
            ids: (B, T) int64.
        """
        shape = self._shape
        if self._takes_integers:
            dense = (dense + 1).log()
        bottom = self._layers("bot_l", dense, shape.bottom).relu()
        of_tables = zip(shape.tables, ids.unbind(1), strict=True)
        vectors = [self._look_up(table, own) for table, own in of_tables]
        joined = self._interact(torch.stack([bottom, *vectors], dim=1))
        probability = self._layers("top_l", joined, shape.top).sigmoid().squeeze(1)
        return probability.clamp(shape.clamp, 1 - shape.clamp) if shape.clamp else probability

    def _parameter(self, key: str) -> torch.Tensor:
        # for one row, get_buffer of all tables takes as long as their lookups
        found = self._buffers[self._names[key]]
        assert found is not None
        return found

    def _layers(self, name: str, inputs: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """The outputs of an MLP, without the activation of its last layer."""
        for k in range(len(widths) - 1):
            inputs = inputs.relu() if k else inputs
            weight = self._parameter(f"{name}.{2 * k}.weight")
            inputs = F.linear(inputs, weight, self._parameter(f"{name}.{2 * k}.bias"))
        return inputs

    def _look_up(self, table: LogicalTable, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B,) -> the table's vectors (B, D)."""
        found: list[torch.Tensor] = []
        for matrix in table.matrices:
            weight = self._parameter(f"emb_l.{matrix.key}")
            if not matrix.is_looked_up:
                return found[0] @ weight.t()
            rows = ids // matrix.divisor if matrix.divisor > 1 else ids
            rows = rows % matrix.modulus if matrix.modulus else rows
            found.append(F.embedding(rows, weight))
        if self._shape.learned_pooling:
            weights = self._parameter(f"v_W_l.{table.matrices[0].table}")
            return found[0] * F.embedding(ids, weights.view(-1, 1))
        if table.join == "concat":
            return torch.cat(found, dim=1)
        if table.join == "plain":
            return found[0]
        return found[0] * found[1] if table.join == "mult" else found[0] + found[1]

    def _interact(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (B, T + 1, D) -> what the top MLP takes."""
        if self._shape.interaction == "cat":
            return vectors.flatten(1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return torch.cat([vectors[:, 0], products.index_select(1, self.get_buffer("pairs"))], dim=1)
