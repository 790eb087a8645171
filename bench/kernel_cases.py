"""What bench/kernels.py measures: the kernels and the products of a step, and their settings.

A Work is a kernel or a product at the shape of a step. Its bytes are those that must move if every
tensor is read or written once from end to end, and of the tables each distinct row; small tensors
that all programs share (weights of the head, label weights) are left out.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch

from bench import kernel_settings
from bench.kernel_settings import Kernel, Setting, Settings
from criteo.columns import NUM_DENSE, NUM_SPARSE
from criteo.row_layout import Layout
from devices.gpu import padded_width, product_in_float32, triton_kernels
from model.layer_operators import Target
from optim.flat_parameters import FlatParameters
from optim.row_optimizers import EPS

LARGEST_INTEGER = 65535
LOWER_BYTES, FLOAT_BYTES = 2, 4
IDS = ("uniform", "skewed", "one row")
SHARE_OF_ONE_ROW = 0.9
RATE = 1e-6

# What a whole step was estimated to take before any card had run it, in us: bytes at 2.8 TB/s.
ESTIMATED_US = {(32768, 64): 1010, (65536, 128): 3600, (2048, 64): 170}


@dataclass(frozen=True)
class Shape:
    """A model and a batch.

    Attributes:
        name: of a line.
        batch: rows.
        dim: D.
        bottom: widths of the bottom MLP, its inputs first, as they are padded.
        top: the same of the top MLP.
        tables: rows of each table.
    """

    name: str
    batch: int
    dim: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    tables: tuple[int, ...]

    @classmethod
    def of(cls, case: Any, tables: Sequence[int]) -> "Shape":
        """That of a Case of bench/training.py."""
        bottom = [int(width) for width in case.bottom.split("-")]
        vectors = len(tables) + 1
        joined = case.dim + vectors * (vectors - 1) // 2
        top = [joined, *(int(width) for width in case.top.split("-"))]
        for widths in (bottom, top):
            widths[0] = padded_width(widths[0])
        return cls(case.name, case.batch, case.dim, tuple(bottom), tuple(top), tuple(tables))

    @property
    def num_ids(self) -> int:
        """Of a batch."""
        return self.batch * len(self.tables)

    @property
    def activation_bytes(self) -> int:
        """The bytes of all activations of a step and of their gradients."""
        widths = sum(self.bottom) + sum(self.top[:-1]) + (len(self.tables) + 1) * self.dim
        return 2 * LOWER_BYTES * self.batch * widths

    def parameter_shapes(self) -> list[tuple[int, ...]]:
        """Those of all weights and biases, with padded columns."""
        layers = [*pairwise(self.bottom), *pairwise(self.top)]
        return [shape for n, m in layers for shape in ((m, n), (m,))]


class Inputs:
    """Makes tensors for works.

    Args:
        device: where; "meta" has shapes alone.
        lower: type of 16 bits.
    """

    def __init__(self, device: str, lower: torch.dtype) -> None:
        self.device, self.lower = torch.device(device), lower
        self._matrix = self.zeros(0)

    def zeros(self, *sizes: int) -> torch.Tensor:
        """Float32."""
        return torch.zeros(sizes, device=self.device)

    def numbers(self, *sizes: int) -> torch.Tensor:
        """16 bits, about half of them below 0."""
        return torch.randn(sizes, device=self.device, dtype=self.lower)

    def matrix(self, num_rows: int, dim: int) -> torch.Tensor:
        """All tables below one another (num_rows, dim) float32; all matrices share their memory."""
        if len(self._matrix) < num_rows * dim:
            self._matrix = torch.empty(0)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # a smaller one's memory is part of the larger one's
            self._matrix = torch.empty(num_rows * dim, device=self.device).uniform_(-0.01, 0.01)
        return self._matrix[: num_rows * dim].view(num_rows, dim)

    def shifts(self, tables: Sequence[int]) -> torch.Tensor:
        """(T,) int32 the first row of each table."""
        begins = [0, *accumulate(tables[:-1])]
        return torch.tensor(begins, dtype=torch.int32).to(self.device)

    def rows(self, shape: Shape, kind: str) -> torch.Tensor:
        """Rows of the matrix (batch * T,) int32, drawn as one of IDS."""
        counts = torch.tensor(shape.tables, dtype=torch.float64).to(self.device)
        size = shape.batch, len(shape.tables)
        drawn = torch.rand(size, device=self.device, dtype=torch.float64)
        if kind == "skewed":
            drawn = drawn**3
        ids = (drawn * counts).int()
        if kind == "one row":
            is_other = torch.rand(size, device=self.device) >= SHARE_OF_ONE_ROW
            ids = ids * is_other.int()
        return (ids + self.shifts(shape.tables)).int().view(-1)


@dataclass(frozen=True)
class Copy:
    """One set of inputs: the call that uses them, and the rows of the tables in them, if any."""

    call: Callable[[], Any]
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class Work:
    """A kernel or a product.

    Attributes:
        shape: of the step.
        name: of the kernel, or of the product.
        detail: which of several of this name.
        make: makes one set of inputs.
        moved: bytes that must move, without rows of tables.
        row_bytes: the same for each distinct row.
        operations: of a product.
        times: how often a step calls it; 0: it is not in the step by default, or has other ids.
        is_cold: no cache has its inputs, even if it holds all activations of a step.
        kernel: module and name of the kernel in devices/triton_*.py; ("", "") of a product.
        settings: to try in place of the program's own; each has what differs.
        constants: those that the program's own setting has.
    """

    shape: Shape
    name: str
    detail: str
    make: Callable[[Inputs], Copy]
    moved: int
    row_bytes: int = 0
    operations: int = 0
    times: int = 1
    is_cold: bool = False
    kernel: Kernel = ("", "")
    settings: Settings = ()
    constants: tuple[str, ...] = ()

    def bytes(self, copy: Copy) -> int:
        """Those that must move with these inputs."""
        distinct = 0 if copy.rows is None else len(torch.unique(copy.rows))
        return self.moved + self.row_bytes * distinct

    def own_setting(self, copy: Copy) -> Setting:
        """What the program launches it with; `copy` has inputs, of any device."""
        return kernel_settings.own_setting(self.kernel, self.constants, copy.call)

    def other_settings(self, own: Setting) -> list[Setting]:
        """All settings to try that differ from the program's own."""
        return [one for one in self.settings if {**own, **one} != own]


# ---------------------------------------------------------------- kernels


def works(shape: Shape) -> list[Work]:
    """All of a shape: kernels in the order of a step, then products."""
    return [*_rows(shape), *_interaction(shape), *_layers(shape), *_products(shape)]


def _rows(shape: Shape) -> Iterator[Work]:
    """Decoding, lookup, and both updates of rows."""
    num_tables, dim = len(shape.tables), shape.dim
    missing = [0] * (NUM_SPARSE - num_tables)
    largest = [1, *[LARGEST_INTEGER] * NUM_DENSE, *(rows - 1 for rows in shape.tables), *missing]
    layout, num_columns = Layout.holding(largest), 1 + NUM_DENSE + num_tables
    bytes_out = shape.bottom[0] * LOWER_BYTES + (num_tables + 1) * FLOAT_BYTES

    def make_decode(inputs: Inputs) -> Copy:
        numbers = [one[:num_columns] for one in (layout.offsets.tolist(), layout.widths)]
        columns = torch.tensor(numbers, dtype=torch.int32).to(inputs.device)
        shifts = inputs.shifts(shape.tables)
        size = shape.batch, layout.row_bytes
        block = torch.randint(0, 100, size, dtype=torch.uint8, device=inputs.device)
        arguments = block, columns, NUM_DENSE, num_tables, inputs.lower, shifts
        return Copy(lambda: triton_kernels().decode(*arguments))

    yield Work(
        shape,
        "decode",
        "",
        make_decode,
        shape.batch * (layout.row_bytes + bytes_out),
        kernel=("kernels", "_decode"),
        constants=("DECODE_ROWS",),
        settings=kernel_settings.OF_DECODE,
    )
    moved = shape.num_ids * (FLOAT_BYTES + LOWER_BYTES * dim)  # ids, and vectors or gradients
    for kind in IDS:
        times, tried = int(kind == "skewed"), kind == "skewed"
        yield Work(
            shape,
            "look_up",
            kind,
            _make_look_up(shape, kind),
            moved,
            FLOAT_BYTES * dim,
            times=times,
            is_cold=True,
            kernel=("rows", "_look_up"),
            constants=("LOOKUP_IDS",),
            settings=kernel_settings.OF_LOOKUP if tried else (),
        )
        yield Work(
            shape,
            "sgd",
            kind,
            _make_sgd(shape, kind, 0),
            moved,
            2 * FLOAT_BYTES * dim,
            times=times,
            kernel=("rows", "_sgd"),
            constants=("LOOKUP_IDS",),
            settings=kernel_settings.OF_SGD if tried else (),
        )
        yield Work(
            shape,
            "sgd, equal rows summed",
            kind,
            _make_sgd(shape, kind, num_tables),
            moved,
            2 * FLOAT_BYTES * dim,
            times=0,
            kernel=("rows", "_sgd_summed"),
            constants=("SUMMED_IDS",),
            settings=() if kind == "uniform" else kernel_settings.OF_SUMMED_SGD,
        )


def _make_look_up(shape: Shape, kind: str) -> Callable[[Inputs], Copy]:
    def make(inputs: Inputs) -> Copy:
        matrix, rows = inputs.matrix(sum(shape.tables), shape.dim), inputs.rows(shape, kind)
        return Copy(lambda: triton_kernels("rows").look_up(matrix, rows, inputs.lower), rows)

    return make


def _make_sgd(shape: Shape, kind: str, num_columns: int) -> Callable[[Inputs], Copy]:
    def make(inputs: Inputs) -> Copy:
        matrix, rows = inputs.matrix(sum(shape.tables), shape.dim), inputs.rows(shape, kind)
        gradients, rate = inputs.numbers(len(rows), shape.dim), inputs.zeros() + RATE
        arguments = matrix, rows, gradients, rate, num_columns
        return Copy(lambda: triton_kernels("rows").sgd(*arguments), rows)

    return make


def _interaction(shape: Shape) -> Iterator[Work]:
    """The dot interaction, both ways."""
    num_tables, dim, padded = len(shape.tables), shape.dim, shape.top[0]
    vectors = (num_tables + 1) * dim

    def make_forward(inputs: Inputs) -> Copy:
        dense, pooled = inputs.numbers(shape.batch, dim), _pooled(inputs, shape)
        return Copy(lambda: triton_kernels().dot_forward(dense, pooled, False))

    def make_backward(inputs: Inputs) -> Copy:
        dense, pooled = inputs.numbers(shape.batch, dim), _pooled(inputs, shape)
        gradient = inputs.numbers(shape.batch, padded)
        return Copy(lambda: triton_kernels().dot_backward(gradient, dense, pooled, False))

    one_way = LOWER_BYTES * shape.batch * (vectors + padded)
    both = LOWER_BYTES * shape.batch * (2 * vectors + padded)
    for name, make, moved in (
        ("forward", make_forward, one_way),
        ("backward", make_backward, both),
    ):
        kernel = ("kernels", f"_dot_{name}")
        yield Work(
            shape, f"dot_{name}", "", make, moved, kernel=kernel, settings=kernel_settings.OF_DOT
        )


def _pooled(inputs: Inputs, shape: Shape) -> torch.Tensor:
    return inputs.numbers(shape.batch, len(shape.tables), shape.dim)


def _layers(shape: Shape) -> Iterator[Work]:
    """Head, ReLUs backward, update of the dense parameters."""
    batch, width = shape.batch, shape.top[-2]
    yield Work(
        shape,
        "head_with_loss",
        f"{width} columns",
        _make_head(shape),
        2 * batch * (LOWER_BYTES * width + FLOAT_BYTES),
        kernel=("layers", "_head_with_loss"),
        constants=("HEAD_NUMBERS", "HEAD_PASSES"),
        settings=kernel_settings.OF_HEAD,
    )
    # the head's own kernel goes through the last ReLU
    widths = [(width, True) for width in (*shape.bottom[1:-1], *shape.top[1:-2])]
    for (m, in_place), times in Counter([*widths, (shape.bottom[-1], False)]).items():
        yield Work(
            shape,
            "relu_backward",
            f"{m} columns{'' if in_place else ', copied'}",
            _make_relu(batch, m, in_place),
            3 * LOWER_BYTES * batch * m,
            times=times,
            kernel=("layers", "_relu_backward"),
            constants=("RELU_ROWS", "RELU_PASSES", "RELU_COLUMNS"),
            settings=kernel_settings.OF_RELU if m == shape.bottom[1] else (),
        )
    shapes = shape.parameter_shapes()
    yield Work(
        shape,
        "update_parameters",
        "sgd",
        _make_update(shapes),
        sum(map(math.prod, shapes)) * (5 * FLOAT_BYTES + LOWER_BYTES),
        kernel=("layers", "_update"),
        constants=("UPDATED_NUMBERS",),
        settings=kernel_settings.OF_UPDATE,
    )


def _make_head(shape: Shape) -> Callable[[Inputs], Copy]:
    def make(inputs: Inputs) -> Copy:
        hidden = inputs.numbers(shape.batch, shape.top[-2]).relu_()
        weight, bias = inputs.zeros(1, shape.top[-2]), inputs.zeros(1)
        label = (torch.rand(shape.batch, 1, device=inputs.device) < 0.3).float()
        target = Target(label, inputs.zeros(2) + 1, divisor=float(shape.batch))
        gradients = inputs.zeros(1, shape.top[-2]), inputs.zeros(1), inputs.zeros(shape.top[-2])
        arguments = hidden, (weight + 0.01, bias), target, gradients
        return Copy(lambda: triton_kernels("layers").head_with_loss(*arguments))

    return make


def _make_relu(batch: int, width: int, in_place: bool) -> Callable[[Inputs], Copy]:
    def make(inputs: Inputs) -> Copy:
        gradient, output = inputs.numbers(batch, width), inputs.numbers(batch, width).relu_()
        arguments = gradient, output, inputs.zeros(width), in_place
        return Copy(lambda: triton_kernels("layers").relu_backward(*arguments))

    return make


def _make_update(shapes: Sequence[tuple[int, ...]]) -> Callable[[Inputs], Copy]:
    def make(inputs: Inputs) -> Copy:
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        flat = FlatParameters(parameters, [shape[-1] for shape in shapes], inputs.lower)
        buffers = tuple(buffer.to(inputs.device) for buffer in flat.buffers())
        arguments = buffers, None, inputs.zeros() + RATE, EPS
        return Copy(lambda: triton_kernels("layers").update_parameters(*arguments))

    return make


# ---------------------------------------------------------------- products


def _products(shape: Shape) -> Iterator[Work]:
    """Each layer forward, and backward its inputs' and its weights' gradients; not the head's."""
    bottom, top = list(pairwise(shape.bottom)), list(pairwise(shape.top[:-1]))
    batch, without_inputs = shape.batch, Counter(bottom[:1])  # data have no gradient
    counts = Counter([*bottom, *top])
    for (n, m), times in counts.items():
        lower = LOWER_BYTES * (batch * n + batch * m)
        weights = {"forward": LOWER_BYTES, "of inputs": LOWER_BYTES, "of weights": FLOAT_BYTES}
        makes = {
            "forward": _make_forward,
            "of inputs": _make_of_inputs,
            "of weights": _make_of_weights,
        }
        for kind, make in makes.items():
            often = times - without_inputs[n, m] if kind == "of inputs" else times
            if not often:
                continue
            moved = lower + n * m * weights[kind]
            name, detail = f"product {kind}", f"{n} to {m}"
            yield Work(shape, name, detail, make(batch, n, m), moved, 0, 2 * batch * n * m, often)


def _make_forward(batch: int, n: int, m: int) -> Callable[[Inputs], Copy]:
    def make(inputs: Inputs) -> Copy:
        x, weight, bias = inputs.numbers(batch, n), inputs.numbers(m, n), inputs.numbers(m)
        return Copy(lambda: torch._addmm_activation(bias, x, weight.t()))

    return make


def _make_of_inputs(batch: int, n: int, m: int) -> Callable[[Inputs], Copy]:
    def make(inputs: Inputs) -> Copy:
        gradient, weight = inputs.numbers(batch, m), inputs.numbers(m, n)
        return Copy(lambda: torch.mm(gradient, weight))

    return make


def _make_of_weights(batch: int, n: int, m: int) -> Callable[[Inputs], Copy]:
    def make(inputs: Inputs) -> Copy:
        gradient, x, out = inputs.numbers(batch, m), inputs.numbers(batch, n), inputs.zeros(m, n)
        return Copy(lambda: product_in_float32(gradient.t(), x, out))

    return make
