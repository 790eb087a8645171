"""How products round, and whether Triton's kernels can run: no GPU is needed to test these."""

import shutil
import sysconfig

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from devices import gpu as gpus
from devices.gpu import has_triton, product_in_float32, set_product_precision
from devices.older_torch import has_products_in_float32


@pytest.mark.parametrize("before", ["high", "highest"])
def test_products_are_float32s_unless_it_is_said_otherwise(before):
    """Even if an earlier run in the same process had --tf32; also sums of 16-bit products."""
    torch.set_float32_matmul_precision(before)
    settings = torch.backends.cuda.matmul
    settings.allow_bf16_reduced_precision_reduction = True
    settings.allow_fp16_reduced_precision_reduction = True
    set_product_precision(torch.device("cpu"), tf32=False)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not settings.allow_bf16_reduced_precision_reduction
    assert not settings.allow_fp16_reduced_precision_reduction


def test_triton_wants_a_compiler_and_a_version_that_was_tested(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path))
    (tmp_path / "Python.h").touch()
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(gpus, "triton_version", lambda: (3, 6, 0))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not has_triton(cpu, None)
    with pytest.raises(UserError, match="no C compiler found.*--triton=false"):
        has_triton(gpu, None)
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/gcc" if name == "gcc" else None)
    assert has_triton(gpu, None)
    monkeypatch.setenv("CC", "no-cc")
    with pytest.raises(UserError, match="no C compiler found .looked for CC=no-cc"):
        has_triton(gpu, None)
    monkeypatch.delenv("CC")
    (tmp_path / "Python.h").unlink()
    with pytest.raises(UserError, match="no .*Python.h found .*--triton=false"):
        has_triton(gpu, None)
    for missing_or_old in ((), (3, 2, 0), (3, 5, 1)):
        monkeypatch.setattr(gpus, "triton_version", lambda found=missing_or_old: found)
        assert not has_triton(gpu, None), "operators do the kernels' work"
    monkeypatch.setattr(gpus, "triton_version", lambda: (3, 6))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert has_triton(cpu, None) and not has_triton(cpu, torch.bfloat16)


class Operators(TorchDispatchMode):
    """Keeps which operators are called, and whether float32 products may take TensorFloat-32."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append((str(function), torch.get_float32_matmul_precision()))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("has_operator", [True, False])
def test_sums_of_16_bit_factors_stay_float32_on_a_gpu(has_operator, monkeypatch):
    """Tensors of a GPU without numbers. TensorFloat-32 holds factors of 16 bits exactly."""
    if has_operator and not has_products_in_float32:
        pytest.skip("this torch has no such product")
    monkeypatch.setattr(gpus, "has_products_in_float32", has_operator)
    torch.set_float32_matmul_precision("highest")
    with FakeTensorMode():
        lower = {"device": "cuda", "dtype": torch.bfloat16}
        left, right = torch.empty(32, 8, **lower).t(), torch.empty(32, 16, **lower)
        out = torch.empty(8, 16, device="cuda")
        with Operators() as operators:
            product_in_float32(left, right, out)
    products = [one for one in operators.called if one[0].startswith("aten.mm")]
    direct, converted = ("aten.mm.dtype_out", "highest"), ("aten.mm.out", "high")
    assert products == [direct if has_operator else converted]
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_other_way_is_exact_too():
    """Sums that 16 bits do not hold, by operators that every device has."""
    left, right = torch.ones(2, 3001, dtype=torch.float16), torch.ones(3001, 4).half()
    out = torch.empty(2, 4)
    product_in_float32(left, right, out)
    assert (out == 3001).all()
