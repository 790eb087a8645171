"""--plot-compute-graph: the model as a picture, with all shapes.

The picture is the paper's (arXiv 1906.00091, figure 1), to be read from below: dense features and
ids, the bottom MLP beside the tables, the interaction, the top MLP, the loss.
"""

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ranks.model_shape import ModelShape
from ranks.placement import EVERY_RANK, LogicalTable, Matrix, Part, Placement
from ranks.process import Process
from reporting.drawing import (
    GAP,
    Arrow,
    Box,
    Column,
    Line,
    Picture,
    grid_box,
    of_equal_width,
    save_svg,
    text_box,
)

GRAPH_FLAG = "--plot-compute-graph"
GRAPH_FILE = Path("dlrm_s_pytorch_graph.svg")

MARGIN = 16.0  # around the picture
BETWEEN_LAYERS = 16.0  # room for the arrow from a layer to the next one
BETWEEN_SIDES = 32.0  # the bottom MLP and the tables; the loss and its labels
NUM_COLUMNS = 8  # tables side by side; more if there are more than 64

_LOSSES = {
    "mse": "Mean squared error",
    "bce": "Binary cross-entropy",
    "wbce": "Weighted binary cross-entropy",
}
_JOINS = {
    "mult": "mult: q and r are multiplied",
    "add": "add: q and r are added",
    "concat": "concat: q and r side by side",
}
_POOLING = {
    "": "the vectors of a bag are summed",
    "fixed": "the vectors of a bag are summed, each times the fixed weight of its row",
    "learned": "the vectors of a bag are summed, each times the learned weight of its row (v_W_l)",
}


@dataclass(frozen=True, kw_only=True)
class Network(ModelShape):
    """What the picture tells of a model, whose tables have been placed on ranks.

    Attributes:
        loss: mse, bce or wbce.
        loss_weights: those of label 0 and label 1, for wbce only.
        placement: which of the ranks that train it hold the rows of its tables.
    """

    loss: str
    loss_weights: tuple[float, ...]
    placement: Placement

    @classmethod
    def from_options(
        cls, options: argparse.Namespace, shape: ModelShape, placement: Placement
    ) -> "Network":
        """The network that the flags and the model's shape make, placed on ranks."""
        return cls(
            **vars(shape),
            loss=options.loss_function,
            loss_weights=tuple(options.loss_weights),
            placement=placement,
        )

    @property
    def dim(self) -> int:
        """Numbers in the vector that each table returns."""
        return self.tables[0].dim

    @property
    def num_ranks(self) -> int:
        """Ranks that train it."""
        return self.placement.world_size

    @property
    def has_ranks(self) -> bool:
        """Whether several ranks train it."""
        return self.num_ranks > 1

    @property
    def has_exchange(self) -> bool:
        """Whether ids and vectors travel: not those of tables that every rank holds."""
        return self.has_ranks and not all(part.is_shared for part in self.placement.parts)

    @property
    def kept(self) -> str:
        """What a rank has of the tables: whole ones, or parts of them."""
        return "parts of tables" if self.placement.is_cut else "tables"

    @property
    def rows(self) -> str:
        """The letter for the rows of a batch that one rank computes."""
        return "b" if self.has_ranks else "B"


def plot_if_asked(
    options: argparse.Namespace, shape: ModelShape, placement: Placement, process: Process
) -> None:
    """Draw the model into the current folder, on the first rank, with --plot-compute-graph.

    Raises:
        RankError: the file cannot be written.
    """
    if options.plot_compute_graph and process.is_first:
        network = Network.from_options(options, shape, placement)
        print(f"compute graph: {plot_compute_graph(network)}", flush=True)


def plot_compute_graph(network: Network) -> Path:
    """Draw the network into the current folder; returns the file's name.

    Raises:
        RankError: the file cannot be written.
    """
    save_svg(GRAPH_FLAG, layout(network), GRAPH_FILE)
    return GRAPH_FILE


def layout(network: Network) -> Picture:
    """Where every box and arrow of the picture lies; computed without matplotlib."""
    dense, sparse = _dense_side(network), _sparse_side(network)
    sides_width = dense.width + BETWEEN_SIDES + sparse.width
    head = _head(network, sides_width)
    labels, title = (
        text_box(_label_lines(network), "input"),
        text_box(_title_lines(network), "bare"),
    )
    loss, mlp, _ = head.boxes
    half = max(loss.width / 2 + BETWEEN_SIDES + labels.width, mlp.width / 2)
    width = 2 * MARGIN + max(head.width, 2 * half, title.width)
    fits_beside = MARGIN + title.width < width / 2 - half
    top = MARGIN + (0 if fits_beside else title.height + GAP)

    upper = head.placed(width / 2, top)
    side_top, side_height = top + upper.height, max(dense.height, sparse.height)
    left = (width - sides_width) / 2
    right = left + sides_width
    parts = (
        upper,
        dense.placed(left + dense.width / 2, side_top, side_height),
        sparse.placed(right - sparse.width / 2, side_top, side_height),
    )
    labels = labels.at(
        width / 2 + loss.width / 2 + BETWEEN_SIDES, top + (loss.height - labels.height) / 2
    )
    middle = top + loss.height / 2
    boxes = [title.at(MARGIN, MARGIN), labels, *(box for part in parts for box in part.boxes)]
    arrows = [
        Arrow(labels.x, middle, labels.x - BETWEEN_SIDES, middle),
        *(arrow for part in parts for arrow in part.arrows),
        *(arrow for box in boxes if box.style == "mlp" for arrow in _between_layers(box)),
    ]
    return Picture(width, side_top + side_height + MARGIN, tuple(boxes), tuple(arrows))


def _between_layers(mlp: Box) -> list[Arrow]:
    """An arrow from each layer of an MLP up to the next one."""
    middle = mlp.x + mlp.width / 2
    return [
        Arrow(middle, mlp.y + lower.y, middle, mlp.y + upper.y + upper.height)
        for upper, lower in itertools.pairwise(mlp.inner)
    ]


# ---------------------------------------------------------------- loss, top MLP, interaction


def _head(network: Network, min_width: float) -> Column:
    """The loss above the top MLP above the interaction, which is as wide as what is below it."""
    loss = text_box(_loss_lines(network), "loss")
    mlp = _mlp_box("Top MLP", "top_l", network.top, network)
    band = text_box(_interaction_lines(network), "interaction")
    band = replace(band, width=max(band.width, min_width))
    rows, width = network.rows, network.top[0]
    return Column((loss, mlp, band), (None, f"({rows}, 1)", f"({rows}, {width:,})"))


def _title_lines(network: Network) -> list[Line]:
    tables, in_mlps = network.tables, network.num_dense
    rows = sum(table.num_rows for table in tables)
    weights = sum(table.num_values for table in tables)
    plain = sum(table.num_rows * table.dim for table in tables)
    lines = [
        Line("DLRM", 14, bold=True),
        Line(f"{counted(len(tables), 'table')}: {counted(rows, 'row')},"),
        Line(f"{weights:,} weights, {size_text(weights)} in float32"),
    ]
    if weights != plain:
        lines.append(Line(f"(plain tables of D {network.dim:,}: {size_text(plain)})"))
    lines.append(Line(f"MLPs: {in_mlps:,} weights, {size_text(in_mlps)}"))
    if not network.has_ranks:
        return [*lines, Line("B: rows of a batch")]
    ranks = f"{network.num_ranks:,} ranks. B: rows of a batch, b: those of one rank"
    if not network.has_exchange:
        return [*lines, Line(ranks)]
    return [*lines, Line(f"{ranks},"), Line(f"t: the {network.kept} that one rank alone holds")]


def _label_lines(network: Network) -> list[Line]:
    return [Line("Labels", bold=True), Line(f"({network.rows}, 1)")]


def _loss_lines(network: Network) -> list[Line]:
    lines = [Line(f"Loss: {_LOSSES[network.loss]} ({network.loss})", 10, bold=True)]
    if network.loss == "wbce":
        of_zero, of_one = network.loss_weights
        lines.append(Line(f"label 0 weighs {of_zero:g}, label 1 weighs {of_one:g}"))
    if network.clamp > 0:
        low, high = network.clamp, 1 - network.clamp
        lines.append(Line(f"predictions are clamped to [{low:g}, {high:g}]"))
    return lines


def _interaction_lines(network: Network) -> list[Line]:
    count, width = len(network.tables) + 1, network.top[0]
    if network.interaction == "cat":
        name, how = "Concatenation", f"{count:,} vectors of {network.dim:,} side by side"
    else:
        name, pairs = "Dot interaction", math.comb(count + network.itself, 2)
        same = " and of each with itself" if network.itself else ""
        how = (
            f"the bottom MLP's {network.dim:,}, then {counted(pairs, 'product')} of pairs"
            f" of {count:,} vectors{same}"
        )
    return [Line(f"{name}: {width:,} wide", 10, bold=True), Line(how)]


# ---------------------------------------------------------------- dense features and MLPs


def _dense_side(network: Network) -> Column:
    """The bottom MLP above its input."""
    rows, widths = network.rows, network.bottom
    features = [Line("Dense features", bold=True), Line(f"({rows}, {widths[0]:,})")]
    mlp = _mlp_box("Bottom MLP", "bot_l", widths, network)
    return Column((mlp, text_box(features, "input")), (f"({rows}, {widths[-1]:,})", ""))


def _mlp_box(name: str, key: str, widths: Sequence[int], network: Network) -> Box:
    lines = [Line(name, 10, bold=True)]
    if network.has_ranks:
        lines.append(Line(f"the same on all {network.num_ranks:,} ranks:", 8))
        lines.append(Line("all-reduce of gradients", 8))
    last = len(widths) - 2
    layers = [
        text_box(_layer_lines(f"{key}.{2 * k}", n, m, k == last and key == "top_l"), "layer")
        for k, (n, m) in enumerate(itertools.pairwise(widths))
    ]
    return grid_box(lines, of_equal_width(layers)[::-1], 1, "mlp", BETWEEN_LAYERS)


def _layer_lines(key: str, inputs: int, outputs: int, is_output: bool) -> list[Line]:
    """A linear layer and its activation; model files have its weight (m, n) under the key."""
    activation = "Sigmoid" if is_output else "ReLU"
    return [
        Line(f"{inputs:,} → {outputs:,}, {activation}", bold=True),
        Line(f"{key}: weight {outputs:,} × {inputs:,}, bias {outputs:,}", 8),
    ]


# ---------------------------------------------------------------- ids and tables


def _sparse_side(network: Network) -> Column:
    """The tables above the ids; between ranks, ids and vectors are exchanged if any travel."""
    count, dim = len(network.tables), network.dim
    ids = text_box(
        [Line("Categories", bold=True), Line(f"ids, in {counted(count, 'bag')} a row")], "input"
    )
    tables, rows = _tables_box(network), network.rows
    if not network.has_exchange:
        return Column((tables, ids), (f"({rows}, {count:,}, {dim:,})", f"({rows}, {count:,}) bags"))
    to_rows = "pooled vectors go to the ranks of their rows, gradients come back"
    to_tables = "ids go to the ranks that hold their tables"
    if network.placement.is_cut:
        to_rows = "sums of a part's vectors go to the ranks of their rows, gradients come back"
        to_tables = "ids go to the ranks that hold rows of their tables"
    exchanges = [
        text_box([Line("All-to-all", bold=True), Line(words)], "exchange")
        for words in (to_rows, to_tables)
    ]
    exchanges = [replace(box, width=max(box.width, tables.width)) for box in exchanges]
    labels = (
        f"(b, {count:,}, {dim:,}): b rows, all tables",
        f"(B, t, {dim:,}): all rows, t {network.kept}",
        "(B, t) bags",
        f"(b, {count:,}) bags",
    )
    return Column((exchanges[0], tables, exchanges[1], ids), labels)


def _tables_box(network: Network) -> Box:
    """All tables, in a box for each rank that holds some if there are several ranks."""
    count = len(network.tables)
    num_columns = min(count, max(NUM_COLUMNS, math.ceil(math.sqrt(count))))
    lines = [
        Line(f"{counted(count, 'embedding table')}, D {network.dim:,}", 10, bold=True),
        Line(_POOLING[network.pooling]),
    ]
    of_ranks: dict[int, list[Part]] = {}
    for part in network.placement.parts:
        of_ranks.setdefault(part.rank, []).append(part)
    boxes = {rank: _table_boxes(network.tables, parts) for rank, parts in of_ranks.items()}
    if not network.has_ranks:
        return grid_box(lines, of_equal_width(boxes[0]), num_columns, "frame")
    idle = network.num_ranks - len(of_ranks.keys() - {EVERY_RANK})
    if idle and not any(part.matrix.is_looked_up for part in of_ranks.get(EVERY_RANK, ())):
        lines.append(Line(f"{idle:,} of {network.num_ranks:,} ranks hold no table"))
    width = max(box.width for of_rank in boxes.values() for box in of_rank)
    cells = {
        rank: (_rank_lines(rank, of_ranks[rank]), [replace(box, width=width) for box in found])
        for rank, found in sorted(boxes.items())
    }
    on_every = cells.pop(EVERY_RANK, None)
    if not on_every:
        return _ranks_box(lines, list(cells.values()), num_columns, "frame")
    if not cells:
        return grid_box(lines, [grid_box(*on_every, num_columns, "rank")], 1, "frame")
    on_one = _ranks_box([], list(cells.values()), num_columns, "bare")
    fit = int((on_one.width - GAP) // (width + GAP))
    band = grid_box(*on_every, max(1, min(fit, len(on_every[1]))), "rank")
    widest = max(on_one.width, band.width)
    return grid_box(lines, [replace(one, width=widest) for one in (band, on_one)], 1, "frame")


def _ranks_box(
    lines: list[Line], cells: Sequence[tuple[list[Line], list[Box]]], num_columns: int, style: str
) -> Box:
    """A box with one for each of some ranks, whose lines and tables are given."""
    most = max(len(tables) for _, tables in cells)
    inner_columns = min(most, max(1, num_columns // len(cells)))
    boxes = [grid_box(words, tables, inner_columns, "rank") for words, tables in cells]
    height = max(box.height for box in boxes)
    boxes = [replace(box, height=height) for box in boxes]
    return grid_box(lines, boxes, min(len(boxes), num_columns), style)


def _rank_lines(rank: int, parts: Sequence[Part]) -> list[Line]:
    size = Line(size_text(sum(part.num_values for part in parts)), 8)
    if rank != EVERY_RANK:
        return [Line(f"rank {rank}", bold=True), size]
    own = [Line(words, 8) for words in ("bags of its own b rows", "all-reduce of gradients")]
    return [Line("every rank", bold=True), size, *own]


def _table_boxes(tables: Sequence[LogicalTable], parts: Sequence[Part]) -> list[Box]:
    """A box for each table that has some of the parts, which are on one rank."""
    of_tables: dict[int, list[Part]] = {}
    for part in parts:
        of_tables.setdefault(part.matrix.table, []).append(part)
    return [_table_box(tables[number], found) for number, found in sorted(of_tables.items())]


def _table_box(table: LogicalTable, parts: Sequence[Part]) -> Box:
    first = table.matrices[0]
    name = Line(f"table {first.table}", bold=True)
    if table.join == "plain":
        (part,) = parts
        return text_box([name, Line(_shape(part.num_rows, first.dim)), *_rows_of(part)], "table")
    lines = [
        name,
        Line(f"{table.num_rows:,} rows, D {table.dim:,}"),
        Line(_JOINS.get(table.join, f"projection: {first.dim:,} → {table.dim:,}"), 8),
    ]
    boxes = [
        text_box(
            [
                Line(_matrix_name(part.matrix), 8),
                Line(_shape(part.num_rows, part.matrix.dim)),
                *_rows_of(part),
            ],
            "part",
        )
        for part in parts
    ]
    return grid_box(lines, of_equal_width(boxes), 1, "table", GAP / 2)


def _rows_of(part: Part) -> list[Line]:
    """Which rows they are, if they are not all."""
    return [] if part.is_whole else [Line(f"rows {part.begin:,} to {part.end - 1:,}", 8)]


def _matrix_name(matrix: Matrix) -> str:
    """The matrix's key in model files, behind that of its table, and the row of an id."""
    key = matrix.key.partition(".")[2]
    if not matrix.is_looked_up:
        return key
    quotient = f"id // {matrix.divisor:,}" if matrix.divisor > 1 else "id"
    return f"{key}: row {quotient}" + (f" % {matrix.modulus:,}" if matrix.modulus else "")


def _shape(rows: int, columns: int) -> str:
    return f"{rows:,} × {columns:,}"


def counted(count: int, noun: str) -> str:
    """`1 table`, `26 tables`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def size_text(num_values: int) -> str:
    """How many bytes so many float32 numbers take, with three digits: 48.1 GB."""
    size, unit = 4.0 * num_values, "bytes"
    for larger in ("kB", "MB", "GB", "TB", "PB", "EB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
