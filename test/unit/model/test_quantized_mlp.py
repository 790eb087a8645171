"""MLPs of 8 and 16 bits equal plain formulas, however many rows are computed at a time."""

import numpy as np
import pytest
import torch
from torch import nn

from model import quantized_mlp
from model.mlp import MLP
from model.quantized_mlp import QuantizedMLP, multiplies_exactly
from ranks.process import Process

CPU = torch.device("cpu")
ALONE = Process(0, 1, 0, CPU, "gloo")
LAST = {"ReLU": nn.ReLU, "Sigmoid": nn.Sigmoid}
CASES = {"narrow": ((13, 8, 1), 5), "one_row": ((13, 64, 16), 1), "chunks": ((7, 32, 9), 5000)}


def make(widths, last="ReLU", rows=5):
    np.random.seed(1)
    mlp = MLP(widths, LAST[last](), CPU)
    return mlp, torch.randn(rows, widths[0], generator=torch.Generator().manual_seed(2))


def naive_int8(mlp, inputs):
    """torch's dynamic quantization of Linear layers, by its formulas, in float64."""
    outputs = inputs.double().numpy()
    modules = list(mlp)
    for linear, activation in zip(modules[::2], modules[1::2], strict=True):
        weight, bias = (p.detach().numpy() for p in (linear.weight, linear.bias))
        # in float32, as the largest weight is halfway between two integers
        of_weight = max(abs(weight).max() / np.float32(127.5), np.float32(2.0**-23))
        weight = np.clip(np.rint(weight * (1 / of_weight)), -128, 127).astype(np.float64)
        low, high = min(outputs.min(), 0), max(outputs.max(), 0)
        scale = max((high - low) / 127, 6.1e-5)
        zero_point = min(np.rint(-low / ((high - low) / 127)), 127) if high > low else 0
        integers = np.clip(np.rint(outputs / scale + zero_point), 0, 127) - zero_point
        outputs = integers @ weight.T * scale * of_weight + bias
        is_relu = isinstance(activation, nn.ReLU)
        outputs = outputs.clip(0) if is_relu else 1 / (1 + np.exp(-outputs))
    return torch.from_numpy(outputs).float()


def assert_almost_all_equal(got, want):
    """Rounding may put a number on the other side of a half: it differs by a step then."""
    assert got.shape == want.shape and got.dtype == torch.float32
    size = want.abs().max()
    assert ((got - want).abs() > 1e-5 * size).double().mean() < 0.002
    torch.testing.assert_close(got, want, rtol=0, atol=0.03 * size.item())


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("name", CASES)
def test_8_bits_are_dynamic_quantization(name, last):
    mlp, inputs = make(CASES[name][0], last, CASES[name][1])
    with torch.no_grad():
        got = QuantizedMLP(mlp, 8, ALONE)(inputs)
        assert_almost_all_equal(got, naive_int8(mlp, inputs))
        assert not torch.equal(got, mlp(inputs))


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(3, 4),
        torch.full((3, 4), 2.5),
        torch.full((3, 4), -1e-6),
        torch.tensor([[-3.0, -2.1, -0.97, -0.53]]),
    ],
    ids=["zeros", "constant", "tiny", "negative"],
)
def test_8_bits_of_inputs_with_an_odd_range(inputs):
    mlp, _ = make((4, 6, 2))
    got = QuantizedMLP(mlp, 8, ALONE)(inputs)
    torch.testing.assert_close(got, naive_int8(mlp, inputs), rtol=1e-5, atol=1e-6)
    for parameter in mlp.parameters():
        parameter.data.zero_()
    assert not QuantizedMLP(mlp, 8, ALONE)(inputs).any()


@pytest.mark.parametrize("bits", [8, 16])
def test_rows_at_a_time_change_nothing(bits, monkeypatch):
    mlp, inputs = make((13, 32, 8), rows=100)
    quantized = QuantizedMLP(mlp, bits, ALONE)
    whole = quantized(inputs)
    monkeypatch.setattr(quantized_mlp, "CHUNK_ROWS", 7)
    torch.testing.assert_close(quantized(inputs), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_rank_may_have_no_rows(bits):
    mlp, inputs = make((13, 32, 8), rows=0)
    assert QuantizedMLP(mlp, bits, ALONE)(inputs).shape == (0, 8)


def test_products_in_float32_are_the_same_where_the_processor_has_no_exact_ones(monkeypatch):
    mlp, inputs = make((300, 64, 1), "Sigmoid", 90)
    want = QuantizedMLP(mlp, 8, ALONE)(inputs)
    monkeypatch.setattr(quantized_mlp, "multiplies_exactly", lambda *shape: False)
    monkeypatch.setattr(quantized_mlp, "int8_product", None)
    assert torch.equal(QuantizedMLP(mlp, 8, ALONE)(inputs), want)


def test_a_processor_whose_sums_of_two_products_have_16_bits_is_found_out(monkeypatch):
    def saturating(left, right):
        """As x86_64 without VNNI: its kernels add 128 to one side's numbers, here the right's."""
        pairs = left.double()[:, :, None] * (right.double() + 128)[None]
        sums = (pairs[:, 0::2] + pairs[:, 1::2]).clamp(-(2**15), 2**15 - 1)
        return (sums.sum(1) - 128 * left.double().sum(1, keepdim=True)).int()

    assert multiplies_exactly.__wrapped__(16, 8), "int8 products are inexact here: float32's serve"
    monkeypatch.setattr(quantized_mlp, "int8_product", saturating)
    assert not multiplies_exactly.__wrapped__(16, 8)


def test_the_largest_weight_is_the_integer_that_torch_makes_of_it():
    """It is halfway between two integers, so its rounding decides."""
    mlp, _ = make((2, 1))
    found = set()
    for value in np.random.default_rng(5).uniform(0.1, 1, 200).astype(np.float32):
        mlp[0].weight.data = torch.tensor([[-value, 0.0]])
        scale = value / np.float32(127.5)
        want = max(np.rint(-value * (np.float32(1) / scale)), -128)
        inputs = torch.tensor([[127.0, 0.0]])  # their scale is 1
        with torch.no_grad():
            mlp[0].bias.fill_(200.0)  # so that the ReLU passes the sum
            got = QuantizedMLP(mlp, 8, ALONE)(inputs).item()
        assert got == pytest.approx(200 + 127 * want * scale, rel=1e-6)
        found.add(float(want))
    assert found == {-128.0, -127.0}


@pytest.mark.parametrize("last", LAST)
@pytest.mark.parametrize("name", CASES)
def test_16_bits_are_float16_weights_in_float32(name, last):
    mlp, inputs = make(CASES[name][0], last, CASES[name][1])
    got = QuantizedMLP(mlp, 16, ALONE)(inputs)
    for module in list(mlp)[::2]:
        module.weight.data = module.weight.data.half().float()
    torch.testing.assert_close(got, mlp(inputs), rtol=1e-5, atol=1e-6)


def test_weights_beyond_float16_are_its_largest():
    mlp, _ = make((1, 1))
    mlp[0].weight.data.fill_(1e9)
    mlp[0].bias.data.zero_()
    assert QuantizedMLP(mlp, 16, ALONE)(torch.ones(1, 1)).item() == 65504


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_integers_do_not_hide_what_is_not_finite(value, monkeypatch):
    """Though a maximum over ranks may lose what is nan."""

    def lossy(process, numbers):
        numbers.nan_to_num_(nan=0.0, posinf=float("inf"))

    monkeypatch.setattr(quantized_mlp, "largest_over_ranks", lossy)
    mlp, inputs = make((13, 8, 1), "Sigmoid", 4)
    inputs[1, 2], inputs[2, 3] = value, -value
    assert QuantizedMLP(mlp, 8, ALONE)(inputs).isnan().all()


def test_bytes_are_a_quarter_or_half_of_the_weights():
    mlp, _ = make((100, 50, 1))
    weights, biases = 100 * 50 + 50, 51
    assert QuantizedMLP(mlp, 16, ALONE).num_bytes == 2 * weights + 4 * biases
    assert QuantizedMLP(mlp, 8, ALONE).num_bytes == weights + 4 * biases + 2 * 4


def test_the_float32_mlp_stays_as_it_is():
    mlp, inputs = make((13, 8, 1), "Sigmoid")
    before = mlp(inputs)
    for bits in (8, 16):
        QuantizedMLP(mlp, bits, ALONE)
    assert torch.equal(mlp(inputs), before)
