"""The matrices of a checkpoint: every parameter with its optimiser's state, cut into rows.

A parameter's rows and those of its state lie side by side. A checkpoint says which rows of which
matrix each file holds, and not which rank wrote it: any number of ranks reads what any other wrote.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from checkpoints.shard_file import MOST_BYTES
from engine.model_file import ModelState

Tensors = dict[str, torch.Tensor]
WEIGHT = "weight"  # name of the parameter itself among a matrix's tensors


@dataclass(frozen=True)
class MatrixShape:
    """A parameter of the model, with its state.

    Attributes:
        num_rows: its rows, on all ranks.
        row_shapes: the shape of a row of the parameter and of each tensor of its state, by name.
    """

    num_rows: int
    row_shapes: Mapping[str, tuple[int, ...]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, which are float32."""
        return 4 * self.num_rows * sum(math.prod(shape) for shape in self.row_shapes.values())


@dataclass(frozen=True)
class Shard:
    """Rows begin to end of the matrix of that name in the model's state dict."""

    key: str
    begin: int
    end: int

    def tensor_name(self, name: str) -> str:
        """The name in a file of the shard's rows of one of the matrix's tensors."""
        return f"{self.key}/{self.begin}-{self.end}/{name}"

    def rows_in(
        self, tensors: Mapping[str, torch.Tensor], name: str, row_shape: Sequence[int]
    ) -> torch.Tensor:
        """The shard's rows of one of the matrix's tensors.

        Args:
            tensors: those of a file, by their names there.
            name: the tensor's name in the matrix.
            row_shape: the shape of a row.

        Raises:
            ValueError: they are missing, or of another shape or type.
        """
        full_name, shape = self.tensor_name(name), (self.end - self.begin, *row_shape)
        found = tensors.get(full_name)
        if found is None or tuple(found.shape) != shape or found.dtype != torch.float32:
            raise ValueError(f"it has no {full_name} of shape {shape} and type {torch.float32}")
        return found


@dataclass(frozen=True)
class HeldRows:
    """The rows of a matrix that this rank holds.

    Attributes:
        shard: which rows.
        tensors: views of them, by name.
        is_shared: all ranks hold the same rows, and the first one writes them.
    """

    shard: Shard
    tensors: Mapping[str, torch.Tensor]
    is_shared: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return _bytes_of(self.tensors)

    def overlap(self, shard: Shard) -> range:
        """The rows that a shard has in common with these, by their numbers in the matrix."""
        if shard.key != self.shard.key:
            return range(0)
        return range(max(shard.begin, self.shard.begin), min(shard.end, self.shard.end))

    def copy_from(self, shard: Shard, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the rows that a shard has in common with these.

        Args:
            shard: which rows the tensors have.
            tensors: those of a file, by their names there.

        Raises:
            ValueError: a tensor is missing, or is of another shape or type.
        """
        common = self.overlap(shard)
        there, here = common.start - shard.begin, common.start - self.shard.begin
        for name, view in self.tensors.items():
            rows = shard.rows_in(tensors, name, view.shape[1:])
            view[here : here + len(common)].copy_(rows[there : there + len(common)])

    def shards(self, most_bytes: int = MOST_BYTES) -> Iterator[tuple[Shard, Tensors]]:
        """(shard, views of its rows) of at most so many bytes, but a row at least."""
        num_rows = self.shard.end - self.shard.begin
        rows = max(1, most_bytes * num_rows // max(self.num_bytes, 1))
        for begin in range(0, num_rows, rows):
            end = min(begin + rows, num_rows)
            of_rows = {name: tensor[begin:end] for name, tensor in self.tensors.items()}
            offset = self.shard.begin
            yield Shard(self.shard.key, offset + begin, offset + end), of_rows


def matrix_shapes(state: ModelState) -> dict[str, MatrixShape]:
    """All matrices of the model by name, whichever ranks hold them."""
    tables = state.tables
    found = {
        f"emb_l.{matrix.key}": MatrixShape(matrix.num_rows, tables.row_shapes(matrix))
        for matrix in tables.all_matrices
    }
    for shard, tensors in _dense_rows(state):
        of_row = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
        found[shard.key] = MatrixShape(shard.end, of_row)
    return found


def held_rows(state: ModelState) -> list[HeldRows]:
    """The rows of all matrices that this rank holds."""
    found, tables = [], state.tables
    for matrix in tables.all_matrices:
        for part in tables.parts_of(matrix):
            views = {name: tables.part_view(part, name) for name in tables.row_shapes(matrix)}
            held = {name: view for name, view in views.items() if view is not None}
            if held:
                shard = Shard(f"emb_l.{matrix.key}", part.begin, part.end)
                found.append(HeldRows(shard, held, part.is_shared))
    found += [HeldRows(shard, tensors, True) for shard, tensors in _dense_rows(state)]
    return found


def _dense_rows(state: ModelState) -> Iterator[tuple[Shard, Tensors]]:
    of_rule = state.dense_optimizer.state
    for number, (key, parameter) in enumerate(state.model.named_parameters()):
        own = of_rule[number] if of_rule else {}
        tensors = {name: value for name, value in own.items() if value.shape == parameter.shape}
        yield Shard(key, 0, len(parameter)), {WEIGHT: parameter.detach(), **tensors}


def cut_into_files(
    rows: Sequence[HeldRows], most_bytes: int = MOST_BYTES
) -> Iterator[dict[Shard, dict[str, torch.Tensor]]]:
    """The shards of each file, of at most so many bytes, but a row at least.

    Args:
        rows: what is written.
        most_bytes: of the tensors in a file.
    """
    content: dict[Shard, Tensors] = {}
    size = 0
    for held in rows:
        for shard, tensors in held.shards(most_bytes):
            num_bytes = _bytes_of(tensors)
            if content and size + num_bytes > most_bytes:
                yield content
                content, size = {}, 0
            content[shard] = tensors
            size += num_bytes
    if content:
        yield content


def _bytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def named_tensors(content: Mapping[Shard, Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The tensors of a file's shards under their names in the file."""
    return {
        shard.tensor_name(name): tensor
        for shard, tensors in content.items()
        for name, tensor in tensors.items()
    }
