"""Quantized inference on the CPU: its flags, and a loaded model with fewer bits a number."""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from common.errors import UserError
from devices.older_torch import int8_product, quantized_operators
from model.embedding_tables import EmbeddingTables
from model.quantized_matrix import QuantizedMatrix, bytes_of_row
from model.quantized_mlp import QuantizedMLP
from ranks.process import Process
from reporting.log_lines import size_line

NOT_QUANTIZED = 32
MLPS = ("bot_l", "top_l")


def add_quantization_options(flag: Callable[..., Any]) -> None:
    """Add the flags of quantized inference to a group, whose add_argument is `flag`."""
    flag(
        "--quantize-mlp-with-bit",
        type=int,
        choices=(8, 16, NOT_QUANTIZED),
        default=NOT_QUANTIZED,
        help="with --inference-only on the CPU: bits of the MLPs' weights (8: products of integers"
        " too)",
    )
    flag(
        "--quantize-emb-with-bit",
        type=int,
        choices=(4, 8, NOT_QUANTIZED),
        default=NOT_QUANTIZED,
        help="with --inference-only on the CPU: bits of the tables' numbers",
    )


def is_quantized(options: argparse.Namespace) -> bool:
    """Whether the flags ask for a quantized model."""
    bits = (options.quantize_emb_with_bit, options.quantize_mlp_with_bit)
    return bits != (NOT_QUANTIZED, NOT_QUANTIZED)


def mlps_take_whole_batches(options: argparse.Namespace) -> bool:
    """Whether the MLPs need a batch in one piece: the range of its numbers makes their integers."""
    return bool(options.quantize_mlp_with_bit == 8)


def check_quantization(options: argparse.Namespace) -> None:
    """Raise a UserError for flags that quantization does not go with, or a lack in this torch."""
    if not is_quantized(options):
        return
    of_tables = options.quantize_emb_with_bit != NOT_QUANTIZED
    of_mlps = options.quantize_mlp_with_bit != NOT_QUANTIZED
    tables = f"--quantize-emb-with-bit={options.quantize_emb_with_bit}"
    mlps = f"--quantize-mlp-with-bit={options.quantize_mlp_with_bit}"
    given = tables if of_tables else mlps
    problems = (
        (options.use_gpu, f"{given} is for the CPU: leave --use-gpu out"),
        (options.use_npu, f"{given} is for the CPU: leave --use-npu out"),
        (not options.inference_only, f"{given} is no training: add --inference-only"),
        (options.save_model, f"{given} does not change model files: leave --save-model out"),
        (options.save_onnx, f"{given} does not go with --save-onnx: leave one of them out"),
        (
            of_tables and (options.qr_flag or options.md_flag),
            f"{tables} does not go with compressed tables: leave it, or"
            f" {'--qr-flag' if options.qr_flag else '--md-flag'}, out",
        ),
        (
            of_mlps and options.amp != "off",
            f"{mlps} does not go with --amp={options.amp}: leave one of them out",
        ),
        (of_tables and not _has_tables(options), _lack(tables, "quantized::embedding_bag_*")),
        (mlps_take_whole_batches(options) and int8_product is None, _lack(mlps, "_int_mm")),
    )
    for is_problem, message in problems:
        if is_problem:
            raise UserError(message)


def _has_tables(options: argparse.Namespace) -> bool:
    return quantized_operators(options.quantize_emb_with_bit) is not None


def _lack(flag: str, operators: str) -> str:
    return (
        f"{flag}: torch {torch.__version__} has no {operators} here: expected a torch with these"
        " operators, as 2.6 to 2.15 have them; leave the flag out"
    )


def quantize(
    model: Any, options: argparse.Namespace, process: Process, say: Callable[[str], None]
) -> None:
    """Make the model's tables and MLPs what the flags ask for, and tell their sizes.

    All ranks call it, each for the tables that it holds.

    Args:
        model: the DLRM_Net; float32 tables that are quantized are freed.
        options: the parsed command line.
        process: this rank.
        say: prints a line.

    Raises:
        RankError: there is no memory, or a table's numbers are too large.
    """
    if not is_quantized(options):
        return
    bits = options.quantize_emb_with_bit
    if bits != NOT_QUANTIZED:
        _quantize_tables(model.emb_l, bits)
    say(size_line("embeddings", bits, *(_table_bytes(model.emb_l, k) for k in (32, bits))))
    bits = options.quantize_mlp_with_bit
    before = after = sum(parameter.nbytes for parameter in model.dense_parameters())
    if bits != NOT_QUANTIZED:
        twins = {name: QuantizedMLP(getattr(model, name), bits, process) for name in MLPS}
        for name, twin in twins.items():
            setattr(model, name, twin)
        after = sum(twin.num_bytes for twin in twins.values())
    say(size_line("MLPs", bits, before, after))


def _quantize_tables(tables: EmbeddingTables, bits: int) -> None:
    """Put quantized twins in the place of this rank's matrices, which are freed."""
    tables.replace_matrices(
        lambda matrix: QuantizedMatrix(matrix.weight, matrix.parts, bits, matrix.pooling)
    )


def _table_bytes(tables: EmbeddingTables, bits: int) -> int:
    """Bytes of the tables of all ranks with so many bits a number."""
    return sum(one.num_rows * bytes_of_row(one.dim, bits) for one in tables.all_matrices)
