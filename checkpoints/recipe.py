"""What a run trains, as far as flags and data decide it: a run that goes on must train the same."""

import argparse
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from checkpoints.json_values import as_json, readable, shown
from common.errors import UserError
from criteo.prepared import Prepared

# These flags change nothing that is trained, or say what is compared apart from them: where data
# lies (its rows are compared). All others must stay, those of later versions too.
FREE = frozenset(
    {
        # where things are
        "data_path", "raw_data_file", "processed_data_file", "save_model", "load_model",
        "onnx_file", "checkpoint_dir", "tensor_board_filename", "export_checkpoint", "run_dir",
        "flags_file", "metrics_file", "report",
        # how long, and what is told on the way
        "nepochs", "test_freq", "patience", "test_mini_batch_size", "test_num_workers",
        "num_workers",
        "print_freq", "print_time", "print_wall_time", "print_precision", "debug_mode",
        "enable_profiling", "plot_compute_graph", "performance", "dry_run", "self_check",
        "mlperf_logging", "mlperf_acc_threshold", "mlperf_auc_threshold", "save_onnx",
        "mlperf_events", "mlperf_org", "mlperf_division", "mlperf_status", "mlperf_platform",
        "inference_only", "predict_file", "scores_file", "vocabulary_file",
        "quantize_mlp_with_bit", "quantize_emb_with_bit",
        # checkpoints
        "save_every", "save_minutes", "keep", "resume", "on_nan",
        # devices and ranks
        "sharding", "card_memory", "print_plan",
        "use_npu", "use_gpu", "local_rank", "dist_backend", "dist_timeout", "world_size",
        "sync_dense_params", "fused_optimizer", "one_lookup", "static_shapes", "pin_memory",
        "copy_stream", "jit_compile", "cuda_graphs", "tf32", "triton", "sum_equal_rows",
        # what data is prepared with, when it has been prepared
        "dataset_multiprocessing", "max_bad_lines", "data_set",
    }
)  # fmt: skip
# what runs did that had no such flags yet
BEFORE = {"exchange_type": "float32", "initial_values": "original"}
ROWS_COMPARED = 1000  # first and last training rows
Recipe = tuple[Mapping[str, Any], Mapping[str, Any]]  # flags_of, facts_of
MOST_SHOWN = 100  # numbers of a flag in a message


def flags_of(options: argparse.Namespace) -> dict[str, Any]:
    """The flags that decide what is trained, as JSON."""
    return {
        name: as_json(value) for name, value in sorted(vars(options).items()) if name not in FREE
    }


def facts_of(prepared: Prepared | None) -> dict[str, Any]:
    """Facts by which Criteo data is known again, wherever it lies; other data has none."""
    if prepared is None:
        return {}
    rows = prepared.rows("train")
    ends = np.concatenate([rows[:ROWS_COMPARED], rows[-ROWS_COMPARED:]])
    return {
        "rows of each part": list(prepared.rows_per_part),
        "rows of each table": list(prepared.counts),
        "checksum of the first and last rows": zlib.crc32(prepared.layout.unpack(ends).tobytes()),
    }


def check_same(where: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a UserError that names each flag that is another one than in the checkpoint.

    Args:
        where: what the message begins with.
        then: the checkpoint's flags.
        now: those of this run.
    """
    then = {name: value for name, value in BEFORE.items() if name in now} | dict(then)
    different = [
        f"--{readable(name).replace('_', '-')} was {_then_and_now(name, then, now, ', is ')}"
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name) and name not in FREE
    ]
    if different:
        raise UserError(
            f"{where}: {'; '.join(different)}: flags that change what is trained have to stay;"
            " give those it had, or start anew with another --checkpoint-dir"
        )


def check_same_data(where: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a UserError if the training data is other data than the checkpoint's."""
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            both = _then_and_now(name, then, now, " then, ")
            raise UserError(
                f"{where} was made with other training data ({readable(name)}: {both} now):"
                " give the data it had"
            )


def _then_and_now(name: str, then: Mapping[str, Any], now: Mapping[str, Any], link: str) -> str:
    return f"{as_text(then.get(name))}{link}{as_text(now.get(name))}"


def as_text(value: Any) -> str:
    """A value as flags have it; one of a checkpoint may be anything."""
    if value in (None, ""):
        return "not given"
    if isinstance(value, list) and len(value) <= MOST_SHOWN:
        return "-".join(shown(number) for number in value)
    return readable(value) if isinstance(value, str) else shown(value)
