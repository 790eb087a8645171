"""How products round, and whether Triton's kernels can run: no GPU is needed to test these."""

import shutil
import sysconfig

import pytest
import torch

from common.errors import UserError
from devices import gpu as gpus
from devices.gpu import has_triton, set_product_precision


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
