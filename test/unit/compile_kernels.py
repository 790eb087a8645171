"""Compiles the Triton kernels for NVIDIA GPUs, without a GPU; prints what their machine code is.

    python compile_kernels.py [--shape=B] [--capability=90] [--only=_dot_backward] [--code]

A line for each kernel: its name, capability, type, bytes of code, registers, bytes spilled,
instructions of the tensor cores, loads of 16 bytes, additions in memory of 16 bytes, and barriers
before the last load. Pointers are taken to be aligned to 16 bytes, as torch's are.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from devices import triton_kernels, triton_layers, triton_loss, triton_rows

CAPABILITIES = (80, 90)  # A100, H100
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = {"A": (64, 512), "B": (128, 1024)}  # D, and the widest layer
COUNTS = ("num_rows", "num_ids", "num_values")  # multiples of 16, for which Triton compiles anew
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Kernel:
    """A kernel, the types of its arguments that are no constants, and the constants."""

    kernel: object
    types: dict
    constants: dict
    kind: str = "bf16"

    @property
    def name(self):
        return self.kernel.__name__


@dataclass(frozen=True)
class Code:
    """What a kernel has become."""

    kernel: Kernel
    capability: int
    num_bytes: int
    registers: int
    spilled: int
    text: str

    def count(self, pattern):
        return len(re.findall(pattern, self.text))

    def barriers_before_the_last_load(self):
        last = [found.start() for found in re.finditer(r" LDG[.]", self.text)][-1:]
        return self.text.count("BAR.SYNC", 0, last[0]) if last else 0

    def line(self):
        numbers = [
            f"{self.registers} registers",
            f"{self.spilled} spilled",
            f"{self.count(r' HG?MMA[.]')} products",
            f"{self.count(r' LDG[.A-Z0-9]*[.]128')} of {self.count(r' LDG[.]')} loads wide",
            f"{self.count(r' REDG?[.A-Z0-9]*F32x4')} of {self.count(r' REDG?[.]')} additions wide",
            f"{self.barriers_before_the_last_load()} barriers before the last load",
        ]
        what = f"{self.kernel.name} {self.capability} {self.kernel.kind} {self.num_bytes}"
        return f"{what}: {', '.join(numbers)}"


def compile_kernel(one, capability):
    constants = dict(one.constants)
    options = {"num_warps": constants.pop("num_warps", 4)}
    names = one.kernel.arg_names
    signature = {name: one.types.get(name, "constexpr") for name in names}
    is_multiple = [signature[name].startswith("*") or name in COUNTS for name in names]
    places = [(k,) for k, found in enumerate(is_multiple) if found]
    attributes = {place: [["tt.divisibility", 16]] for place in places}
    source = ASTSource(one.kernel, signature, constants, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options)
    cubin = compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        used, text = (
            subprocess.run([TOOL, what, file.name], capture_output=True, text=True, check=True)
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", used.stdout).groups()
    return Code(one, capability, len(cubin), int(registers), int(stack), text.stdout)


def interaction(kind, precision, dim):
    """Both kernels of the dot interaction."""
    width, padded = triton_kernels.dot_width(27, dim, itself=False)
    block_v, block_d = triton_kernels._dot_blocks(27, dim)
    settings = {"V": 27, "D": dim, "PADDED": padded, "ITSELF": False, "PRECISION": precision,
                "BLOCK_V": block_v, "BLOCK_D": block_d}  # fmt: skip
    warps = triton_kernels._dot_warps(TYPES[kind], precision, block_v, block_d)
    settings["num_warps"] = warps
    types = dict.fromkeys(("dense", "pooled", "out"), f"*{kind}")
    label = f"{kind},{precision}"
    yield Kernel(triton_kernels._dot_forward, types, {"WIDTH": width, **settings}, label)
    names = ("gradient", "dense", "pooled", "dense_gradient", "pooled_gradient")
    types = dict.fromkeys(names, f"*{kind}")
    yield Kernel(triton_kernels._dot_backward, types, settings, label)


def rows(dim):
    """Lookup and updates."""
    ids = triton_rows.LOOKUP_IDS
    of_ids = {"D": dim, "IDS": ids, "BLOCK_D": dim}
    types = {"weight": "*fp32", "rows": "*i32", "out": "*bf16", "num_ids": "i32"}
    yield Kernel(triton_rows._look_up, types, of_ids)
    for lr in ("*fp32", "fp32"):
        types = {"weight": "*fp32", "rows": "*i32", "gradients": "*bf16", "lr": lr,
                 "num_ids": "i32"}  # fmt: skip
        constants = {"LR_ON_DEVICE": lr == "*fp32", **of_ids}
        yield Kernel(triton_rows._sgd, types, constants)
        constants["IDS"] = triton_rows.SUMMED_IDS
        yield Kernel(triton_rows._sgd_summed, {**types, "num_columns": "i32"}, constants)


def loss_and_batches():
    """Cross entropy, and unpacking of rows."""
    names = ("predicted", "label", "label_weights", "mask", "gradient", "sums")
    types = {**dict.fromkeys(names, "*fp32"), "num_rows": "i32"}
    for has_mask in (True, False):
        constants = {"HAS_MASK": has_mask, "ROWS": triton_loss.LOSS_ROWS}
        yield Kernel(triton_loss._cross_entropy, types, constants)
    for kind in ("fp32", "bf16"):
        types = {"block": "*u8", "column_bytes": "*i32", "dense": f"*{kind}", "ids": "*i32",
                 "label": "*fp32", "num_rows": "i32", "row_bytes": "i32",
                 "shifts": "*i32"}  # fmt: skip
        pitch = 13 if kind == "fp32" else 16
        counts = {"NUM_DENSE": 13, "NUM_SPARSE": 26, "ROWS": triton_kernels.DECODE_ROWS,
                  "COLUMNS": 64, "PITCH": pitch, "HAS_SHIFTS": kind == "bf16"}  # fmt: skip
        yield Kernel(triton_kernels._decode, types, counts)


def layers(kind, widest):
    """ReLU backward, the head, the update."""
    types = {**dict.fromkeys(("gradient", "output", "target"), f"*{kind}"),
             "bias_gradient": "*fp32", "num_rows": "i32"}  # fmt: skip
    for passes in (1, triton_layers.RELU_PASSES):
        constants = {"M": widest, "ROWS": triton_layers.RELU_ROWS, "PASSES": passes,
                     "COLUMNS": triton_layers.RELU_COLUMNS}  # fmt: skip
        yield Kernel(triton_layers._relu_backward, types, constants, kind)
    numbers = ("weight", "bias", "predicted", "label", "label_weights", "mask", "scale", "sums",
               "weight_gradient", "bias_gradient", "hidden_bias_gradient")  # fmt: skip
    types = {**dict.fromkeys(numbers, "*fp32"), "hidden": f"*{kind}", "num_rows": "i32",
             "hidden_gradient": f"*{kind}", "divisor": "fp32", "clamp": "fp32"}  # fmt: skip
    hidden = torch.empty(1, 256, device="meta")
    settings = triton_layers._head_settings(hidden, hidden)
    yield Kernel(triton_layers._head, types, settings, kind)
    for passes in (1, triton_layers.HEAD_PASSES):
        flags = {"HAS_MASK": False, "HAS_SCALE": kind == "fp16", "HAS_RELU": True}
        constants = {**settings, **flags, "PASSES": passes}
        yield Kernel(triton_layers._head_with_loss, types, constants, kind)
    types = {**dict.fromkeys(("values", "gradients", "broken", "squares", "lr"), "*fp32"),
             "lowered": f"*{kind}", "places": "*i32", "num_values": "i32",
             "eps": "fp32"}  # fmt: skip
    for adagrad in (False, True):
        constants = {"LR_ON_DEVICE": True, "ADAGRAD": adagrad,
                     "BLOCK": triton_layers.UPDATED_NUMBERS}  # fmt: skip
        yield Kernel(triton_layers._update, types, constants, kind)


def kernels(shape):
    """All kernels as a shape of the benchmark wants them."""
    dim, widest = SHAPES[shape]
    for kind, precision in (("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
        yield from interaction(kind, precision, dim)
    yield from rows(dim)
    yield from loss_and_batches()
    for kind in ("bf16", "fp16"):
        yield from layers(kind, widest)


def compiled(shape, capability, only=""):
    """The code of all kernels, or of one."""
    for one in kernels(shape):
        if only in ("", one.name):
            yield compile_kernel(one, capability)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--shape", choices=tuple(SHAPES), default="A")
    flag("--capability", type=int, choices=CAPABILITIES, default=90)
    flag("--only", default="", help="a kernel's name")
    flag("--code", action="store_true", help="print the machine code too")
    options = parser.parse_args()
    for code in compiled(options.shape, options.capability, options.only):
        print(code.line(), *([code.text] if options.code else []), sep="\n", flush=True)


if __name__ == "__main__":
    main()
