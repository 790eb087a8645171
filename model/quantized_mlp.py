"""Multilayer perceptrons with weights of 8 or 16 bits, for inference on the CPU.

16 bits are float16 weights whose products are float32's. 8 bits are torch's dynamic quantization
without its quantized types, which torch 2.13 and later warn of and will drop: weights are int8 with
one scale a layer, a layer's inputs are 7-bit integers whose scale and zero point follow from their
range, and the sums of products are exact. The original has 7 bits on x86_64, so its numbers do.
"""

import functools
import math

import torch
from torch import nn

from devices import cpu_kernels
from devices.older_torch import int8_product
from model.mlp import linear_layer
from ranks.collectives import largest_over_ranks
from ranks.process import Process

Chunks = tuple[torch.Tensor, ...]

# More rows leave the cache, and the system zeroes the pages of tensors above 32 MB each time: a
# batch of 16384 rows would take half as long again.
CHUNK_ROWS = 2048
LEVELS = 127  # the integers of inputs are 0 to 127
LEAST_INPUT_SCALE = 6.1e-5  # torch's own
LARGEST_WEIGHT = 127.5  # torch's scale takes the largest weight for that, then clamps it to int8
LEAST_WEIGHT_SCALE = torch.finfo(torch.float32).eps
LARGEST_FLOAT16 = torch.finfo(torch.float16).max


class QuantizedMLP(nn.Module):
    """The quantized twin of an MLP.

    Args:
        mlp: linear layers and activations in turn; it stays as it is.
        bits: 8 or 16.
        process: this rank. With 8 bits all ranks call `forward` together, each with its rows of
            the same batch: the range of a layer's inputs is that of the whole batch, so N ranks
            compute what one does.

    Attributes:
        num_bytes: bytes of the weights, biases and scales.
    """

    def __init__(self, mlp: nn.Sequential, bits: int, process: Process) -> None:
        super().__init__()
        modules = list(mlp)
        self._layers: list[_Int8Layer | _Float16Layer] = []
        for linear, activation in zip(modules[::2], modules[1::2], strict=True):
            assert isinstance(linear, nn.Linear)
            name = type(activation).__name__
            if bits == 8:
                self._layers.append(_Int8Layer(linear, name, process))
            else:
                self._layers.append(_Float16Layer(linear, name))
        self.num_bytes = sum(layer.num_bytes for layer in self._layers)

    def forward(
        self, inputs: torch.Tensor, sgd_lr: float | None = None, is_fast: bool = False
    ) -> torch.Tensor:
        """(B, n) -> (B, last width), both float32.

        Args:
            inputs: those of the first layer.
            sgd_lr: None, as there is no backward pass.
            is_fast: as in an MLP; there is one way.
        """
        assert sgd_lr is None, "quantized weights are not trained"
        chunks = inputs.split(CHUNK_ROWS)
        for layer in self._layers:
            chunks = layer(chunks)
        return torch.cat(chunks)


class _Float16Layer:
    def __init__(self, linear: nn.Linear, activation: str) -> None:
        weight = linear.weight.detach()
        self._weight = weight.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).half()
        self._bias, self._activation = linear.bias.detach(), activation
        self.num_bytes = self._weight.nbytes + self._bias.nbytes

    def __call__(self, chunks: Chunks) -> Chunks:
        # fbgemm's product takes float16 as it is, but no faster, and only x86_64 has it
        weight = self._weight.float()
        return tuple(linear_layer(rows, weight, self._bias, self._activation) for rows in chunks)


class _Int8Layer:
    def __init__(self, linear: nn.Linear, activation: str, process: Process) -> None:
        weight = linear.weight.detach()
        scale = (weight.abs().max() / LARGEST_WEIGHT).clamp_(min=LEAST_WEIGHT_SCALE)
        self._scale = scale.item()
        # as torch rounds: by a quotient the largest weight would be another integer now and then
        self._weight = (weight * (1 / scale)).round_().clamp_(-128, 127).to(torch.int8)
        self._row_sums = self._weight.sum(1, dtype=torch.int32)
        self._bias, self._activation, self._process = linear.bias.detach(), activation, process
        exact = multiplies_exactly(*self._weight.shape)
        self._product = int8_product if exact else _product_in_float32
        scale_bytes = 4
        self.num_bytes = self._weight.nbytes + self._bias.nbytes + scale_bytes

    def __call__(self, chunks: Chunks) -> Chunks:
        minus_low, high = self._range(chunks)
        step = (minus_low + high) / LEVELS
        if not math.isfinite(step):  # integers would hide that a model diverges
            return tuple(rows.new_full((len(rows), len(self._bias)), math.nan) for rows in chunks)
        zero_point = min(round(minus_low / step), LEVELS) if step else 0
        scale = max(step, LEAST_INPUT_SCALE)
        return tuple(self._compute(rows, scale, zero_point) for rows in chunks)

    def _compute(self, inputs: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
        integers = torch.empty(inputs.shape, dtype=torch.int8)
        cpu_kernels.to_int8(inputs, scale, zero_point, integers)
        sums = self._product(integers, self._weight.t())
        of_zero_point = (zero_point - cpu_kernels.INT8_SHIFT) * self._row_sums
        outputs = torch.empty(sums.shape)
        cpu_kernels.from_sums(sums, of_zero_point, scale * self._scale, self._bias, outputs)
        return outputs.relu_() if self._activation == "ReLU" else outputs.sigmoid_()

    def _range(self, chunks: Chunks) -> tuple[float, float]:
        """(-least, largest) input of all ranks, neither below 0; infinite if an input is nan."""
        found = [torch.stack(rows.aminmax()) for rows in chunks if len(rows)]
        ends = torch.zeros(2)
        if found:
            low, high = torch.stack(found).unbind(1)
            ends = torch.stack([-low.min(), high.max()]).clamp_(min=0)
        ends.nan_to_num_(nan=math.inf, posinf=math.inf)  # not all backends keep nan in a maximum
        largest_over_ranks(self._process, ends)
        minus_low, high_end = ends.tolist()
        return minus_low, high_end


@functools.cache
def multiplies_exactly(num_outputs: int, num_inputs: int) -> bool:
    """Whether products of int8 are exact here for weights (num_outputs, num_inputs).

    oneDNN's kernels for x86_64 without VNNI instructions sum pairs of products in 16 bits, which
    may not hold them.
    """
    random = torch.Generator().manual_seed(1)
    shape = (num_outputs, num_inputs)
    weight = (torch.randint(2, shape, generator=random) * 255 - 128).to(torch.int8)
    for num_rows in (1, 64):  # a single row has a kernel of its own
        inputs = torch.randint(2, (num_rows, num_inputs), generator=random) * LEVELS
        integers = (inputs - cpu_kernels.INT8_SHIFT).to(torch.int8)
        sums = int8_product(integers, weight.t())
        if not torch.equal(sums.double(), integers.double() @ weight.double().t()):
            return False
    return True


def _product_in_float32(integers: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B, n) int8 times (n, m) int8 -> (B, m) int32: as slow as float32's, but exact up to 2^24."""
    return torch.mm(integers.float(), weight.float()).to(torch.int32)
