"""The model's shape, and the flags that decide it."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from common.errors import UserError
from common.flags import dashed_ints, number_in
from criteo.columns import NUM_DENSE
from model.compression import compression_from_options
from model.interaction import num_pairs
from ranks.model_shape import ModelShape


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the network."""
    flag = parser.add_argument_group("Model").add_argument
    flag(
        "--arch-sparse-feature-size",
        type=number_in(int, 1),
        default=2,
        help="embedding dimension D",
    )
    flag(
        "--arch-embedding-size",
        type=dashed_ints,
        default="4-3-2",
        help="rows of each table; a data set brings its own",
    )
    flag(
        "--arch-mlp-bot",
        type=dashed_ints,
        default="4-3-2",
        help="widths of the bottom MLP: first the dense features (a data set has 13), last D",
    )
    flag(
        "--arch-mlp-top",
        type=dashed_ints,
        default="4-2-1",
        help="widths of the top MLP, counted from behind the interaction; the last is 1",
    )
    flag(
        "--arch-interaction-op",
        choices=("dot", "cat"),
        default="dot",
        help="inner products of all pairs of vectors, or the vectors side by side",
    )
    flag(
        "--arch-interaction-itself",
        action="store_true",
        help="with dot: also the product of each vector with itself",
    )
    flag(
        "--weighted-pooling",
        choices=("fixed", "learned"),
        help="a weight for each row in the sum over a bag, 1 at first",
    )
    flag("--activation-function", choices=("relu",), default="relu", help="of hidden layers")


def add_clamp_option(flag: Callable[..., Any]) -> None:
    """Add the flag of predictions' bounds, which is among those of the loss."""
    flag(
        "--loss-threshold",
        type=float,
        default=0.0,
        help="clamp predictions to [t, 1-t]; 0: do not",
    )


class Architecture(ModelShape):
    """The model's shape as the flags and the data have it."""

    @classmethod
    def from_options(
        cls, options: argparse.Namespace, num_rows: Sequence[int], num_dense: int
    ) -> "Architecture":
        """The shape that follows from the flags and the data.

        Args:
            options: the parsed command line.
            num_rows: rows of each table.
            num_dense: number of dense features in the data.

        Raises:
            UserError: the bottom MLP does not end in the dimension of the tables' vectors.
        """
        compression = compression_from_options(options)
        dim, bottom = compression.vector_dim, (num_dense, *options.arch_mlp_bot[1:])
        if len(bottom) < 2 or bottom[-1] != dim:
            widths = "-".join(str(width) for width in options.arch_mlp_bot)
            times = "twice " if dim > compression.dim else ""
            why = "--qr-operation=concat: " if times else ""
            raise UserError(
                f"--arch-mlp-bot={widths} ends in {bottom[-1]},"
                f" --arch-sparse-feature-size={compression.dim}: {why}the bottom MLP's last width"
                f" must equal {times}the embedding dimension ({dim})"
            )
        vectors = len(num_rows) + 1
        pairs = num_pairs(vectors, options.arch_interaction_itself)
        width = dim + pairs if options.arch_interaction_op == "dot" else dim * vectors
        return cls(
            tables=compression.make_tables(num_rows),
            bottom=bottom,
            top=(width, *options.arch_mlp_top),
            interaction=options.arch_interaction_op,
            itself=options.arch_interaction_itself,
            pooling=options.weighted_pooling or "",
            clamp=options.loss_threshold,
        )

    @classmethod
    def without_data(cls, options: argparse.Namespace) -> "Architecture":
        """The shape if --arch-embedding-size gives the rows, also in place of a data set's.

        Raises:
            UserError: as `from_options` does.
        """
        num_rows, num_dense = options.arch_embedding_size, options.arch_mlp_bot[0]
        if options.data_generation == "dataset":
            num_dense, most = NUM_DENSE, options.max_ind_range
            num_rows = [min(rows, most) if most > 0 else rows for rows in num_rows]
        return cls.from_options(options, num_rows, num_dense)
