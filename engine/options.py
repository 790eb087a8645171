"""Flags of the loss, the training, its reports and its files; others are beside their readers.

The original's names and defaults are kept. docs/flags.md is written from all of them.
"""

import argparse
from collections.abc import Callable
from typing import Any

from common.errors import UserError
from common.flags import dashed_floats, number_in, true_or_false
from engine.architecture import add_clamp_option
from engine.onnx_export import ONNX_FILE
from engine.quantization import add_quantization_options
from reporting.mlperf_submission import add_submission_options
from reporting.profiling import PROFILED_STEPS

PERFORMANCE_LINES = 11  # log lines after which --performance stops; the first is warm-up


def add_loss_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the loss."""
    flag = parser.add_argument_group("Loss").add_argument
    flag(
        "--loss-function",
        choices=("mse", "bce", "wbce"),
        default="mse",
        help="mean squared error, binary cross-entropy, or that with a weight a label",
    )
    flag(
        "--loss-weights",
        type=dashed_floats,
        default="1.0-1.0",
        help="with wbce: the weights of label 0 and label 1",
    )
    add_clamp_option(flag)
    flag(
        "--round-targets",
        type=true_or_false,
        default=False,
        help="random data: targets are 0 or 1",
    )


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose the data, and those of random and synthetic data."""
    flag = parser.add_argument_group("Data").add_argument
    flag(
        "--data-generation",
        choices=("random", "synthetic", "dataset"),
        default="random",
        help="where rows come from; --data_path implies dataset",
    )
    flag("--num-workers", type=number_in(int, 0), default=0, help="processes that load batches")
    flag(
        "--test-num-workers",
        type=number_in(int, -1),
        default=-1,
        help="the same in evaluations; -1: as many",
    )
    flag(
        "--eval-split",
        choices=("test", "val"),
        default="test",
        help="which half of the data's last part evaluates",
    )
    _add_random_data_options(flag)


def _add_random_data_options(flag: Callable[..., Any]) -> None:
    flag("--data-size", type=number_in(int, 1), default=1, help="random data: rows of an epoch")
    flag(
        "--num-batches",
        type=number_in(int, 0),
        default=0,
        help="> 0: that many full batches of random data, at most that many of a data set",
    )
    flag(
        "--num-indices-per-lookup",
        type=number_in(int, 1),
        default=10,
        help="random data: maximum indices per bag",
    )
    flag(
        "--num-indices-per-lookup-fixed",
        type=true_or_false,
        default=False,
        help="each bag has that maximum",
    )
    flag(
        "--rand-data-dist",
        choices=("uniform", "gaussian"),
        default="uniform",
        help="random data: distribution of indices",
    )
    flag("--rand-data-min", type=float, default=0, help="gaussian: lowest index")
    flag("--rand-data-max", type=float, default=1, help="gaussian: highest index")
    flag(
        "--rand-data-mu",
        type=float,
        default=-1,
        help="gaussian: mean; -1: the middle of lowest and highest",
    )
    flag(
        "--rand-data-sigma",
        type=number_in(float, 0),
        default=1,
        help="gaussian: standard deviation",
    )
    flag(
        "--data-trace-file",
        default="./input/dist_emb_j.log",
        help="synthetic data: profile of a trace; j becomes the table's number",
    )
    flag(
        "--data-trace-enable-padding",
        type=true_or_false,
        default=False,
        help="synthetic data: pad the profile's first distance",
    )


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of steps and of the optimiser."""
    flag = parser.add_argument_group("Training").add_argument
    flag(
        "--mini-batch-size",
        type=number_in(int, 1),
        default=1,
        help="rows a step, over all ranks",
    )
    flag(
        "--test-mini-batch-size",
        type=int,
        default=-1,
        help="rows of a batch in evaluations, over all ranks; -1: as in training",
    )
    flag("--nepochs", type=number_in(int, 1), default=1, help="passes over the training data")
    flag("--learning-rate", type=number_in(float, 0), default=0.01, help="learning rate")
    flag(
        "--optimizer",
        choices=("sgd", "adagrad", "rwsadagrad"),
        default="sgd",
        help="rwsadagrad: Adagrad with one number a row of a table",
    )
    _add_update_options(flag)


def _add_update_options(flag: Callable[..., Any]) -> None:
    flag(
        "--lr-num-warmup-steps",
        type=number_in(int, 0),
        default=0,
        help="steps of linear warm-up",
    )
    flag(
        "--lr-decay-start-step",
        type=number_in(int, 0),
        default=0,
        help="first step of the decay, a polynomial of power 2",
    )
    flag(
        "--lr-num-decay-steps",
        type=number_in(int, 0),
        default=0,
        help="steps of decay; 0: none",
    )
    flag(
        "--mlperf-grad-accum-iter",
        type=number_in(int, 1),
        default=1,
        help="batches whose gradients make one update",
    )
    flag(
        "--on-nan",
        choices=("stop", "skip"),
        default="stop",
        help="a batch whose loss is not finite ends training, or is skipped, for which each step"
        " waits for its loss: it then changes nothing, and a line tells of it",
    )
    flag(
        "--sync-dense-params",
        type=true_or_false,
        default=True,
        help="kept for compatibility: MLPs are always synchronised",
    )
    flag(
        "--print-precision",
        type=number_in(int, 0, 16),
        default=5,
        help="digits that --debug-mode prints",
    )


def add_reporting_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of log lines, evaluations and profiles."""
    flag = parser.add_argument_group("Reporting").add_argument
    flag("--print-freq", type=number_in(int, 1), default=1, help="steps between log lines")
    flag(
        "--test-freq",
        type=int,
        default=-1,
        help="> 0: steps between evaluations; one more follows an epoch's last step",
    )
    flag(
        "--patience",
        type=number_in(int, 0),
        default=0,
        metavar="N",
        help="stop after N evaluations in a row without a better AUC (without --mlperf-logging:"
        " accuracy); 0: never",
    )
    flag("--print-time", action="store_true", help="measure ms/it; else -1.00 is printed")
    flag("--print-wall-time", action="store_true", help="the time of day at each log line")
    flag(
        "--debug-mode",
        action="store_true",
        help="print model, data and parameters before and after training",
    )
    flag(
        "--enable-profiling",
        action="store_true",
        help=f"write a Chrome trace and a table of the phases of {PROFILED_STEPS} steps",
    )
    flag(
        "--plot-compute-graph",
        action="store_true",
        help="draw tables, layers and ranks into dlrm_s_pytorch_graph.svg; --dry-run: only that",
    )
    flag("--tensor-board-filename", default="run_kaggle_pt", help="TensorBoard folder; empty: none")
    flag(
        "--metrics-file",
        default="",
        metavar="FILE",
        help="append a line of JSON for each log line, each evaluation and the end",
    )
    flag(
        "--report",
        default="",
        metavar="FILE.html",
        help="write a page about the run when it ends: outcome, curves, last evaluation, data,"
        " machine, flags",
    )
    flag(
        "--performance",
        action="store_true",
        help=f"measure speed: stop after {PERFORMANCE_LINES} log lines, no evaluation",
    )


def add_model_file_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of model files, inference and export."""
    flag = parser.add_argument_group("Model files, inference, export").add_argument
    flag(
        "--save-model",
        default="",
        metavar="PATH",
        help="write the best model; the last one if no evaluation chose one",
    )
    flag(
        "--load-model",
        default="",
        metavar="PATH",
        help="continue from this model file, or evaluate it",
    )
    flag("--inference-only", action="store_true", help="evaluate the model of --load-model, stop")
    add_quantization_options(flag)
    flag(
        "--save-onnx",
        action="store_true",
        help="write the model as it is at the end as ONNX, for onnxruntime and others",
    )
    flag(
        "--onnx-file",
        default=ONNX_FILE,
        metavar="PATH",
        help="where --save-onnx writes (an error without it); weights above 2 GB go to PATH.data",
    )


def add_mlperf_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of MLPerf's runs."""
    flag = parser.add_argument_group("MLPerf").add_argument
    flag(
        "--mlperf-logging",
        action="store_true",
        help="all metrics in evaluations, the best model by AUC, and MLPerf's events of a training,"
        " :::MLLOG lines that end in run_stop: success at a threshold, else aborted with a reason"
        " (--performance: always). --inference-only and --dry-run train nothing and write none."
        " cache_clear is false: the rules ask for the line, and no cache is cleared",
    )
    flag(
        "--mlperf-acc-threshold",
        type=number_in(float, 0, 1),
        default=0.0,
        help="stop at this accuracy; 0: never",
    )
    flag(
        "--mlperf-auc-threshold",
        type=number_in(float, 0, 1),
        default=0.0,
        help="stop at this AUC; 0: never",
    )
    add_submission_options(flag)
    flag(
        "--mlperf-bin-shuffle",
        action="store_true",
        help="shuffle whole batches, anew each epoch",
    )


def check_together(options: argparse.Namespace) -> None:
    """Raise a UserError for a mistake in the flags of this module that no flag's type can see."""
    test_batch, threshold = options.test_mini_batch_size, options.loss_threshold
    weights = "-".join(map(str, options.loss_weights))
    problems = (
        (options.use_npu and options.use_gpu, "--use-npu and --use-gpu: give one of them"),
        (
            not 0 <= threshold < 0.5,
            f"--loss-threshold={threshold}: expected 0, or a number in (0, 0.5)",
        ),
        (
            len(options.loss_weights) != 2,
            f"--loss-weights={weights}: expected two numbers, as in 1.0-3.5",
        ),
        (
            test_batch < 1 and test_batch != -1,
            f"--test-mini-batch-size={test_batch}: expected at least 1, or -1",
        ),
        (
            options.arch_mlp_top[-1] != 1,
            f"--arch-mlp-top ends in {options.arch_mlp_top[-1]}: expected 1, the click probability",
        ),
    )
    for is_problem, message in (*problems, *_problems_of_patience(options)):
        if is_problem:
            raise UserError(message)


def _problems_of_patience(options: argparse.Namespace) -> tuple[tuple[bool, str], ...]:
    given = f"--patience={options.patience}"
    asks = options.patience > 0 and not options.inference_only
    return (
        (
            asks and options.performance,
            f"{given} and --performance: a measurement of speed evaluates nothing: leave one out",
        ),
        (
            asks and options.test_freq <= 0,
            f"{given} counts evaluations, and this run has none: give --test-freq=N too, the steps"
            " between them",
        ),
    )


def evaluation_batch_size(options: argparse.Namespace) -> int:
    """Rows of an evaluation batch, over all ranks."""
    same = options.test_mini_batch_size < 0
    size: int = options.mini_batch_size if same else options.test_mini_batch_size
    return size
