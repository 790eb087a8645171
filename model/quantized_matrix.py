"""Rows of embedding tables as 8-bit or 4-bit integers, looked up without a float32 copy of a table.

A row is stored as torch's operators take it: its integers, then a scale and an offset of its own,
which are float32 for 8 bits and float16 for 4. Numbers of a row are offset + scale * integer.
"""

from collections.abc import Sequence

import torch

from common.errors import RankError
from devices.memory import out_of_memory_told
from devices.older_torch import quantized_operators
from model.batch import Bags
from optim.update import Update
from ranks.placement import Part

# Numbers of float32 that are made integers at a time: 4 MB beside the table and its integers.
VALUES_PER_PIECE = 1 << 20
# A scale and an offset of 4-bit rows are float16.
LARGEST = {8: torch.finfo(torch.float32).max / 2, 4: torch.finfo(torch.float16).max}


def bytes_of_row(dim: int, bits: int) -> int:
    """Bytes of a row of `dim` numbers at 4, 8 or 32 bits each, with its scale and offset."""
    return {32: 4 * dim, 8: dim + 2 * 4, 4: (dim + 1) // 2 + 2 * 2}[bits]


class QuantizedMatrix:
    """The quantized twin of an EmbeddingMatrix, for inference on the CPU.

    Args:
        weight: (R, D) float32, the rows of all parts, one part below the other.
        parts: the parts, one below the other.
        bits: 8 or 4.
        pooling: (R, 1) float32 weights in sums over bags, which are not quantized; None: all are 1.

    Attributes:
        parts: as given.
        dim: D.
        weight: (R, bytes of a row) uint8.

    Raises:
        RankError: there is no memory for the integers, or a number is too large for them.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        parts: Sequence[Part],
        bits: int,
        pooling: torch.Tensor | None = None,
    ) -> None:
        self.parts, self.dim, self._pooling = tuple(parts), weight.shape[1], pooling
        operators = quantized_operators(bits)
        assert operators is not None
        self._pack, self._sums = operators
        self.weight = _empty(len(weight), bytes_of_row(self.dim, bits))
        sizes = [part.num_rows for part in parts]
        assert sum(sizes) == len(weight)
        for k, (source, target) in enumerate(
            zip(weight.split(sizes), self.weight.split(sizes), strict=True)
        ):
            self._quantize(source, target, f"table {parts[k].matrix.table}", bits)

    def _quantize(self, source: torch.Tensor, target: torch.Tensor, name: str, bits: int) -> None:
        """Write the rows of `source` (n, D) as integers into `target`, some at a time."""
        rows_per_piece = max(1, VALUES_PER_PIECE // self.dim)
        pieces = zip(source.split(rows_per_piece), target.split(rows_per_piece), strict=True)
        for values, integers in pieces:
            low, high = values.aminmax()
            if not (-LARGEST[bits] <= low and high <= LARGEST[bits]):
                raise RankError(
                    f"--quantize-emb-with-bit={bits}: {name} has numbers from {low:g} to {high:g},"
                    f" expected +-{LARGEST[bits]:g} at most: leave the flag out"
                )
            if bits == 4 and self.dim % 2:  # two numbers share a byte
                values = torch.cat([values, values[:, -1:]], dim=1)
            integers.copy_(self._pack(values))

    def look_up(self, bags: Bags, update: Update | None) -> torch.Tensor:
        """Bags of rows of the matrix -> their pooled vectors (bags, D) in float32.

        Args:
            bags: any number of them.
            update: None, as there is no backward pass.
        """
        assert update is None, "integers are not trained"
        rows = bags.ids
        one_each = bags.lengths is None
        begins = torch.arange(len(rows)) if one_each else bags.begins().view(-1)
        weights = None if self._pooling is None else self._pooling[rows].view(-1)
        pooled: torch.Tensor = self._sums(self.weight, rows, begins, per_sample_weights=weights)
        return pooled[:, : self.dim].contiguous()  # without a copy, unless D is odd


def _empty(num_rows: int, num_bytes: int) -> torch.Tensor:
    size = num_rows * num_bytes
    what = f"{num_rows} quantized rows of {num_bytes} bytes ({1e-9 * size:.1f} GB of tables)"
    cpu = torch.device("cpu")
    with out_of_memory_told(cpu, what, "more ranks or a lower --max-ind-range", size):
        return torch.empty(num_rows, num_bytes, dtype=torch.uint8)
