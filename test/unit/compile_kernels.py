"""Compiles the Triton kernels for NVIDIA GPUs, without a GPU; prints a line for each.

python compile_kernels.py
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from devices.triton_kernels import (
    DECODE_ROWS,
    LOOKUP_IDS,
    LOSS_ROWS,
    _cross_entropy,
    _decode,
    _dot_backward,
    _dot_blocks,
    _dot_forward,
    _dot_warps,
    _look_up,
    _sgd,
    dot_width,
)

CAPABILITIES = (80, 90)  # A100, H100
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_kernel(kernel, types, constants, capabilities=CAPABILITIES):
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps", 4)}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    for capability in capabilities:
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
        print(kernel.__name__, capability, len(compiled.asm["cubin"]))


def main():
    for kind, precision in (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
        capabilities = CAPABILITIES if kind == "bf16" else CAPABILITIES[-1:]  # it takes seconds
        width, padded = dot_width(27, 64, itself=False)
        block_v, block_d = _dot_blocks(27, 64)
        warps = _dot_warps(TYPES[kind], precision, block_v, block_d)
        settings = {"V": 27, "D": 64, "PADDED": padded, "ITSELF": False, "PRECISION": precision,
                    "BLOCK_V": block_v, "BLOCK_D": block_d, "num_warps": warps}  # fmt: skip
        types = dict.fromkeys(("dense", "pooled", "out"), f"*{kind}")
        compile_kernel(_dot_forward, types, {"WIDTH": width, **settings}, capabilities)
        names = ("gradient", "dense", "pooled", "dense_gradient", "pooled_gradient")
        compile_kernel(_dot_backward, dict.fromkeys(names, f"*{kind}"), settings, capabilities)
    of_ids = {"D": 64, "IDS": LOOKUP_IDS, "BLOCK_D": 64}
    types = {"weight": "*fp32", "rows": "*i64", "out": "*bf16", "num_ids": "i32"}
    compile_kernel(_look_up, types, of_ids)
    for lr in ("*fp32", "fp32"):
        types = {"weight": "*fp32", "rows": "*i64", "gradients": "*bf16", "lr": lr}
        constants = {"LR_ON_DEVICE": lr == "*fp32", **of_ids}
        compile_kernel(_sgd, {**types, "num_ids": "i32"}, constants)
    names = ("predicted", "label", "label_weights", "mask", "gradient", "sums")
    types = {**dict.fromkeys(names, "*fp32"), "num_rows": "i32"}
    for has_mask in (True, False):
        constants = {"HAS_MASK": has_mask, "ROWS": LOSS_ROWS}
        compile_kernel(_cross_entropy, types, constants)
    types = {"block": "*u8", "column_bytes": "*i32", "dense": "*fp32", "ids": "*i32",
             "label": "*fp32", "num_rows": "i32", "row_bytes": "i32"}  # fmt: skip
    counts = {"NUM_DENSE": 13, "NUM_SPARSE": 26, "ROWS": DECODE_ROWS, "COLUMNS": 64}
    compile_kernel(_decode, types, counts)


if __name__ == "__main__":
    main()
