"""What a model's tables are made of: a matrix with all rows, or two that need less memory.

Quotient-remainder tables: Shi et al., Compositional Embeddings Using Complementary Partitions,
arXiv 1909.02107. Mixed dimensions: Ginart et al., Mixed Dimension Embeddings, arXiv 1909.11810.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.errors import UserError
from common.flags import number_in
from ranks.placement import LogicalTable, Matrix


def add_compression_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of compressed tables."""
    flag = parser.add_argument_group("Compressed tables").add_argument
    flag(
        "--qr-flag",
        action="store_true",
        help="quotient-remainder tables: two small tables for a large one (arXiv 1909.02107)",
    )
    flag(
        "--qr-threshold",
        type=number_in(int, 0),
        default=200,
        help="tables of at most so many rows stay plain",
    )
    flag(
        "--qr-operation",
        choices=("mult", "add", "concat"),
        default="mult",
        help="how the vectors of quotient and remainder join; concat: --arch-mlp-bot ends in 2 D",
    )
    flag(
        "--qr-collisions",
        type=number_in(int, 2),
        default=4,
        help="rows that share a quotient: the large table is about so many times smaller",
    )
    flag(
        "--md-flag",
        action="store_true",
        help="mixed dimensions: large tables have narrow rows, projected to D (arXiv 1909.11810)",
    )
    flag(
        "--md-threshold",
        type=number_in(int, 0),
        default=200,
        help="tables of at most so many rows stay plain",
    )
    flag(
        "--md-temperature",
        type=number_in(float, 0),
        default=0.3,
        help="how fast dimensions shrink as tables grow; 0: not at all",
    )
    flag("--md-round-dims", action="store_true", help="dimensions are powers of two")


@dataclass(frozen=True)
class Compression:
    """Makes the tables of a model; the base class of all ways to make them.

    Attributes:
        dim: D, as --arch-sparse-feature-size says.
    """

    dim: int

    @property
    def vector_dim(self) -> int:
        """Numbers in the vector that each table returns."""
        return self.dim

    def make_tables(self, num_rows: Sequence[int]) -> tuple[LogicalTable, ...]:
        """The tables of a model.

        Args:
            num_rows: ids of each table.
        """
        raise NotImplementedError


class NoCompression(Compression):
    """Every table is a matrix with a row for each id."""

    def make_tables(self, num_rows: Sequence[int]) -> tuple[LogicalTable, ...]:
        """The tables of a model.

        Args:
            num_rows: ids of each table.
        """
        return tuple(_plain(table, rows, self.vector_dim) for table, rows in enumerate(num_rows))


@dataclass(frozen=True)
class QuotientRemainder(Compression):
    """Id i of a large table is row i // collisions of one matrix and i % collisions of another one.

    Attributes:
        threshold: tables of at most that many rows are plain.
        operation: how the two vectors are joined.
        collisions: ids that share a quotient; rows of the remainders' matrix.
    """

    threshold: int
    operation: Literal["mult", "add", "concat"]
    collisions: int

    @property
    def vector_dim(self) -> int:
        """D, or 2 D where two vectors of D numbers are put side by side."""
        return 2 * self.dim if self.operation == "concat" else self.dim

    def make_tables(self, num_rows: Sequence[int]) -> tuple[LogicalTable, ...]:
        """The tables of a model.

        Args:
            num_rows: ids of each table.
        """
        return tuple(
            self._pair(table, rows)
            if rows > self.threshold
            else _plain(table, rows, self.vector_dim)
            for table, rows in enumerate(num_rows)
        )

    def _pair(self, table: int, rows: int) -> LogicalTable:
        bound, step = math.sqrt(1 / rows), self.collisions
        num_quotients = -(-rows // step)
        quotients = Matrix(table, f"{table}.weight_q", num_quotients, self.dim, bound, divisor=step)
        remainders = Matrix(table, f"{table}.weight_r", step, self.dim, bound, modulus=step)
        return LogicalTable(rows, self.vector_dim, (quotients, remainders), self.operation)


@dataclass(frozen=True)
class MixedDimensions(Compression):
    """A large table has vectors of fewer than D numbers, which a matrix projects to D.

    Attributes:
        threshold: tables of at most that many rows are plain.
        temperature: how fast the dimension shrinks as tables grow; 0: not at all.
        round_dims: dimensions are powers of two.
    """

    threshold: int
    temperature: float
    round_dims: bool

    def make_tables(self, num_rows: Sequence[int]) -> tuple[LogicalTable, ...]:
        """The tables of a model.

        Args:
            num_rows: ids of each table.
        """
        return tuple(
            self._mixed(table, rows, dim)
            if rows > self.threshold
            else _plain(table, rows, self.dim)
            for table, (rows, dim) in enumerate(zip(num_rows, self.dims(num_rows), strict=True))
        )

    def dims(self, num_rows: Sequence[int]) -> list[int]:
        """The dimension d of each table, if it is large: max(1, D (n0 / n)^temperature).

        n is the table's number of rows and n0 that of the smallest one (arXiv 1909.11810, section
        4; computed in float32, as the original does, and rounded half to even).

        Args:
            num_rows: ids of each table.
        """
        rows = np.array(num_rows, np.float32)
        shrunk = np.float32(self.dim) * (rows.min() / rows) ** np.float32(self.temperature)
        dims = np.round(np.maximum(shrunk, 1))
        if self.round_dims:
            dims = np.minimum(2 ** np.round(np.log2(dims)), self.dim)
        return [int(dim) for dim in dims]

    def _mixed(self, table: int, rows: int, dim: int) -> LogicalTable:
        vectors = Matrix(table, f"{table}.embs.weight", rows, dim, math.sqrt(1 / rows))
        if dim == self.dim:
            return LogicalTable(rows, self.dim, (vectors,))
        projection = Matrix(
            table,
            f"{table}.proj.weight",
            self.dim,
            dim,
            math.sqrt(6 / (dim + self.dim)),
            is_looked_up=False,
        )
        return LogicalTable(rows, self.dim, (vectors, projection), "project")


def _plain(table: int, rows: int, dim: int) -> LogicalTable:
    matrix = Matrix(table, f"{table}.weight", rows, dim, math.sqrt(1 / rows))
    return LogicalTable(rows, dim, (matrix,))


def compression_from_options(options: argparse.Namespace) -> Compression:
    """How the flags ask for the tables to be made.

    Raises:
        UserError: they ask for two ways, or for one that does not go with --weighted-pooling.
    """
    dim = options.arch_sparse_feature_size
    asked = [name for name in ("qr", "md") if getattr(options, f"{name}_flag")]
    if len(asked) > 1:
        raise UserError("--qr-flag and --md-flag: give one of them")
    if asked and options.weighted_pooling:
        raise UserError(
            f"--{asked[0]}-flag does not go with --weighted-pooling={options.weighted_pooling}:"
            " give one of them"
        )
    if options.qr_flag:
        return QuotientRemainder(
            dim, options.qr_threshold, options.qr_operation, options.qr_collisions
        )
    if options.md_flag:
        return MixedDimensions(
            dim, options.md_threshold, options.md_temperature, options.md_round_dims
        )
    return NoCompression(dim)
