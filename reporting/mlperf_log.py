"""MLPerf's log of a training: `:::MLLOG` lines on stdout, beside the program's own lines.

The rules of MLPerf Training 2.1 for the benchmark dlrm say which keys there are and in which order;
mlperf_logging.compliance_checker checks them.
"""

import argparse
import contextlib
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from common.errors import TerminatedError, UserError
from common.termination import held_back
from reporting.log_lines import StepPosition
from reporting.mlperf_submission import Submission
from reporting.records import EvaluationRecord
from reporting.reporter import Reporter

# not resolved: it has to begin like the names of files in tracebacks, from which it is cut
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class MLPerfLog(Reporter):
    """Writes MLPerf's events.

    They begin when it is made, which is after data is prepared (MLPerf does not time that), and end
    in one run_stop. Its status is `success` if the run reached a threshold from fresh weights, else
    `aborted`, with a reason. It is written when the evaluation that reached the threshold is done:
    before the model is saved, which is no part of the training that MLPerf times.

    Args:
        options: the parsed command line.
        devices: number and kind of the devices, as in `8 x Ascend910B3`.
        write: prints a line.

    Raises:
        UserError: MLPerf's flags or their environment are wrong.
    """

    def __init__(
        self, options: argparse.Namespace, devices: str, write: Callable[[str], None]
    ) -> None:
        from mlperf_logging.mllog.mllog import MLLogger

        self._options = options
        self._open: list[tuple[str, dict[str, Any]]] = []  # intervals that have not ended
        self._continued_from = "a model file (--load-model)" if options.load_model else ""
        self._has_reached, self._end = False, threading.Lock()  # who ends the run takes it
        self._stopped_because = ""
        # the frame two calls up is the method below that has something to tell
        self._mllog = MLLogger(_logger_to(write), default_stack_offset=2, root_dir=re.escape(ROOT))
        self._start("init")
        submission = Submission.from_options(options, devices)
        self._event("submission_benchmark", "dlrm")
        self._event("submission_org", submission.org)
        self._event("submission_division", submission.division)
        self._event("submission_status", submission.status)
        self._event("submission_platform", submission.platform)
        # The rules ask for this line. It says no, because no cache of the system is emptied here.
        self._event("cache_clear", False)

    def note_continued(self, what: str) -> None:
        """Note that the weights are not fresh: the run can be no success for MLPerf."""
        self._continued_from = what

    def note_stopped(self, why: str) -> None:
        """Note the reason, for the end of the log."""
        self._stopped_because = why

    def begin_run(
        self, num_train: int, num_test: int, bottom: Sequence[int], top: Sequence[int]
    ) -> None:
        """Write how the model is trained, and that its training begins."""
        self._event("seed", self._options.numpy_rand_seed)
        self._event("train_samples", num_train)
        self._event("eval_samples", num_test)
        for key, value in _hyperparameters(self._options).items():
            self._event(key, value)
        for part in _parts(len(bottom) - 1, len(top) - 1):
            self._event("weights_initialization", None, tensor=part)
        self._stop()
        self._start("run")

    def begin_epoch(self, where: StepPosition, num_rows: int, num_done: int) -> None:
        """End the epoch before, and begin one, a block of its own; MLPerf counts from 1."""
        self._stop_inside_run()
        self._start("block", first_epoch_num=where.epoch + 1, epoch_count=1)
        self._start("epoch", epoch_num=where.epoch + 1)

    def begin_evaluation(self, where: StepPosition, num_rows: int) -> None:
        """Write that an evaluation begins after so many epochs, as a fraction."""
        self._start("eval", epoch_num=where.epochs)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Write the AUC, if there is one, and end the run if a threshold is reached."""
        auc = record.metrics.auc
        if not math.isnan(auc):
            self._event("eval_accuracy", auc, epoch_num=record.where.epochs)
        self._stop()
        pairs = zip(self._thresholds(), (record.best_accuracy, record.best_auc), strict=True)
        self._has_reached = any(0 < threshold <= value for threshold, value in pairs)
        if self._has_reached:
            self.end_run()

    def end_run(self, error: BaseException | None = None) -> None:
        """End the log, unless it has ended; the thread of ends_on_signals may do it too.

        Args:
            error: what ended the run. It is on its way to the user, so an output that cannot be
                written is no second error.
        """
        with held_back():
            if self._end.acquire(blocking=False):
                self._end_run(error)

    def _end_run(self, error: BaseException | None) -> None:
        reason = self._why_aborted(error)
        status = {"status": "aborted", "reason": reason} if reason else {"status": "success"}
        with contextlib.suppress(*[OSError] if error else []):
            self._stop_inside_run()
            if not self._open:  # it failed before it was to begin
                self._open.append(("run", {}))
            self._stop(**status)

    def _why_aborted(self, error: BaseException | None) -> str:
        """Why the run is no success; empty if it is one.

        The word `auc` stands in none of these reasons: scripts look for the lines that have it.
        """
        options = self._options
        if error is not None:
            return _first_line(error)
        if self._continued_from:
            return f"the run was continued from {self._continued_from}"
        if options.performance:
            return "--performance measures speed only"
        if self._has_reached:
            return ""
        if self._stopped_because:
            return self._stopped_because
        if not any(self._thresholds()):
            return "no threshold was given"
        return f"no threshold was reached in {options.nepochs} epoch(s)"

    def _thresholds(self) -> tuple[float, float]:
        """Accuracy and AUC that end the run; 0: none does."""
        return self._options.mlperf_acc_threshold, self._options.mlperf_auc_threshold

    def _event(self, key: str, value: object, **metadata: object) -> None:
        self._mllog.event(key, value, metadata)

    def _start(self, name: str, **metadata: object) -> None:
        self._open.append((name, metadata))
        self._mllog.start(f"{name}_start", None, metadata)

    def _stop(self, **more: object) -> None:
        """End the interval that was begun last."""
        name, metadata = self._open.pop()
        self._mllog.end(f"{name}_stop", None, metadata | more)

    def _stop_inside_run(self) -> None:
        """End the intervals inside the run, or before it all."""
        while self._open and self._open[-1][0] != "run":
            self._stop()


class _Handler(logging.Handler):
    """Hands each line of a logger to a function, which may raise an OSError."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


def _logger_to(say: Callable[[str], None]) -> logging.Logger:
    """A logger of its own: mllog's default one keeps the stdout that was there at its import."""
    logger = logging.Logger("dlrm_mllog")
    logger.addHandler(_Handler(say))
    return logger


def _hyperparameters(options: argparse.Namespace) -> dict[str, Any]:
    """How the model is trained, under MLPerf's keys.

    The dlrm rules, which train with SGD, have keys of their own for its schedule. Adagrad's keys
    are those of the later benchmark dlrm_dcnv2.
    """
    accumulate = options.mlperf_grad_accum_iter
    warm_up, start = options.lr_num_warmup_steps, options.lr_decay_start_step
    found = {
        "global_batch_size": options.mini_batch_size * accumulate,  # rows of an update
        "gradient_accumulation_steps": accumulate,
        "opt_name": options.optimizer,
        "opt_base_learning_rate": options.learning_rate,
        "opt_learning_rate_warmup_steps": warm_up,
        "lr_decay_start_steps": start,
    }
    if options.optimizer == "sgd":
        return found | {
            "sgd_opt_base_learning_rate": options.learning_rate,
            "sgd_opt_learning_rate_decay_poly_power": 2,
            "sgd_opt_learning_rate_decay_steps": options.lr_num_decay_steps,
        }
    return found | {
        "opt_adagrad_epsilon": 1e-10,
        "opt_adagrad_initial_accumulator_value": 0,
        "opt_adagrad_learning_rate_decay": 0,
        "opt_weight_decay": 0,
        "opt_learning_rate_decay_start_step": start,
        "opt_learning_rate_decay_steps": options.lr_num_decay_steps,
    }


def _parts(num_bottom: int, num_top: int) -> list[str]:
    """MLPerf's names of the parts whose weights are drawn, for MLPs of so many layers."""
    return [
        "embeddings",
        *(f"bottom_mlp_dense{layer}" for layer in range(1, num_bottom + 1)),
        *(f"top_mlp_dense{layer}" for layer in range(1, num_top + 1)),
    ]


def _first_line(error: BaseException) -> str:
    """What ended a run, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, UserError | TerminatedError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")
