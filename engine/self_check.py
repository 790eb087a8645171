"""--self-check runs the whole program on a small job, on the device that is asked for.

The check prints the versions of the device and its libraries, trains 20 steps, evaluates, saves and
loads, and compares the losses with the CPU's. A bug report needs just these lines.
"""

import argparse
import contextlib
import io
import math
import platform
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import EXIT_TERMINATED, TerminatedError, UserError
from criteo.demo import Demo, make_demo
from devices.find import versions
from ranks.collectives import numbers_from_first, text_from_first
from ranks.process import Process, joined
from ranks.watch import says_that_a_rank_has_gone
from reporting.results import LogSummary, summarise

STEPS = 20
FLAGS = (
    "--data-set=terabyte --max-ind-range=1000 --memory-map --data-randomize=none"
    " --data-sub-sample-rate=0 --arch-sparse-feature-size=16 --arch-mlp-bot=13-64-16"
    " --arch-mlp-top=64-32-1 --mini-batch-size=512 --test-mini-batch-size=512 --loss-function=bce"
    f" --nepochs=1 --num-batches={STEPS} --print-freq=1 --print-time --test-freq={STEPS}"
    " --mlperf-logging --mlperf-events=false --lr-num-warmup-steps=0 --lr-num-decay-steps=0"
    " --tensor-board-filename="
).split()
NUM_ROWS = 16_000  # rows of three days; the first two have the rows of all steps
# flags that the check takes from the command line; all others are its own
TAKEN = (
    "optimizer", "arch_interaction_op", "weighted_pooling", "num_workers", "amp", "fused_optimizer",
    "one_lookup", "static_shapes", "pin_memory", "copy_stream", "jit_compile", "dist_backend",
    "local_rank", "mlperf_grad_accum_iter", "triton", "sum_equal_rows", "qr_threshold",
    "qr_operation", "qr_collisions", "md_threshold", "md_temperature",
)  # fmt: skip
OF_A_CARD = ("use_npu", "use_gpu", "tf32", "cuda_graphs")  # refused on the CPU
SWITCHES = (*OF_A_CARD, "arch_interaction_itself", "qr_flag", "md_flag", "md_round_dims")
RATE = {"sgd": 0.5, "adagrad": 0.01, "rwsadagrad": 0.01}
# relative difference of a loss from the CPU's in float32
TOLERANCE = {"off": 1e-3, "bf16": 5e-2, "fp16": 5e-2, "tf32": 1e-2}

Program = Callable[[Sequence[str]], int]


class _FailedError(Exception):
    """A check has failed."""


@dataclass
class SelfCheck:
    """The checks; each one uses the files and the log of those before it.

    Args:
        program: main(argv) of the program.
        process: this rank.
        options: the parsed command line.
        folder: holds data and model; the same on all ranks.

    Attributes:
        trained: the log of the training run.
    """

    program: Program
    process: Process
    options: argparse.Namespace
    folder: Path
    trained: LogSummary = field(default_factory=LogSummary)

    def checks(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """Name and function of each check, in order; the function returns its finding."""
        yield "data", self._data
        yield f"{STEPS} steps", self._steps
        yield "evaluation", self._evaluation
        yield "save", self._save
        yield "load", self._load
        yield "as on the CPU", self._as_on_the_cpu

    @property
    def _model(self) -> Path:
        return self.folder / "DLRM.pth"

    def _flags(self) -> list[str]:
        """The flags that are taken from the command line."""
        values = {name: getattr(self.options, name) for name in TAKEN}
        given = [f"--{name}={value}" for name, value in values.items() if value is not None]
        given += [f"--{name}" for name in SWITCHES if getattr(self.options, name)]
        if self.options.qr_flag and self.options.qr_operation == "concat":
            given += ["--arch-mlp-bot=13-64-32"]  # vectors of 2 D numbers
        return given

    def _run(self, *flags: str, on_cpu: bool = False) -> LogSummary:
        """Run the program and read its log, which only the first rank prints."""
        out, err = io.StringIO(), io.StringIO()
        rate = f"--learning-rate={RATE[self.options.optimizer]}"
        words = [*FLAGS, *self._flags(), rate]
        if on_cpu:
            words = [word for word in words if word.removeprefix("--") not in OF_A_CARD]
            words += ["--amp=off", "--dist-backend=gloo"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = self.program([*words, f"--data_path={self.folder / 'data'}", *flags])
        if status == EXIT_TERMINATED:
            raise TerminatedError
        if status:
            said = err.getvalue().strip() or "another rank says why"
            raise _FailedError(f"exit status {status}: {said.removeprefix('error: ')}")
        return summarise(out.getvalue())

    def _data(self) -> str:
        if self.process.is_first:
            make_demo(Demo(self.folder / "data", NUM_ROWS, num_days=3, seed=1))
        numbers_from_first(self.process, [0.0])  # the other ranks wait for the data
        return f"{NUM_ROWS} rows"

    def _steps(self) -> str:
        self.trained = self._run(f"--save-model={self._model}")
        if not self.process.is_first:
            return ""
        losses, times = self.trained.losses, self.trained.ms_per_it
        if len(losses) != STEPS or not all(map(math.isfinite, losses)):
            raise _FailedError(f"losses {losses}: expected {STEPS} finite ones")
        first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
        if last >= first:
            raise _FailedError(f"the loss went from {first:.4f} to {last:.4f}: expected it to fall")
        ms = sorted(times[1:])[len(times) // 2]
        return f"loss {first:.4f} to {last:.4f}, {ms:.2f} ms/it after a first of {times[0]:.0f} ms"

    def _evaluation(self) -> str:
        if not self.process.is_first:
            return ""
        auc = (self.trained.aucs or [math.nan])[-1]
        if not 0.5 < auc <= 1:
            raise _FailedError(f"auc {auc}: expected more than 0.5")
        return f"auc {auc:.4f}"

    def _save(self) -> str:
        numbers_from_first(self.process, [0.0])  # the other ranks wait until the file is written
        if not self._model.is_file():
            raise _FailedError("there is no model file")
        return f"{self._model.stat().st_size / 1e6:.1f} MB"

    def _load(self) -> str:
        loaded = self._run(f"--load-model={self._model}", "--inference-only")
        if self.process.is_first and loaded.aucs != self.trained.aucs:
            raise _FailedError(f"auc {loaded.aucs} of the loaded model, {self.trained.aucs} before")
        return "evaluates to the same"

    def _as_on_the_cpu(self) -> str:
        amp = self.options.amp
        if self.process.device.type == "cpu" and amp == "off":
            return "it is the CPU"
        on_cpu = self._run(on_cpu=True)
        tolerance = TOLERANCE["tf32" if amp == "off" and self.options.tf32 else amp]
        pairs = zip(self.trained.losses, on_cpu.losses, strict=True)
        largest = max((abs(one - other) / other for one, other in pairs), default=0.0)
        if largest > tolerance:
            raise _FailedError(
                f"losses differ by {largest:.1e} of the CPU's, at most {tolerance:.0e}"
                f" expected: {self.trained.losses} and {on_cpu.losses}"
            )
        return f"losses differ by at most {largest:.1e} of the CPU's"


def run_self_check(program: Program, process: Process, options: argparse.Namespace) -> int:
    """Make the checks and print PASS, or FAIL and the reason; returns the exit status, 0 or 1.

    Args:
        program: main(argv) of the program.
        process: this rank; several ranks make the checks together.
        options: the parsed command line.
    """

    def say(line: str) -> None:
        if process.is_first:
            print(line, flush=True)

    for name, version in versions(process.device).items():
        say(f"{name:14} {version}")
    say(f"{'Python':14} {platform.python_version()}, {platform.platform()}")
    say(f"{'ranks':14} {process.world_size}, {process.backend}")
    with joined(process, timeout=options.dist_timeout), _shared_folder(process) as folder:
        job = SelfCheck(program, process, options, folder)
        passed = all(_passes(name, check, say) for name, check in job.checks())
    if passed:
        say("PASS")
    return int(not passed)


def _passes(name: str, check: Callable[[], str], say: Callable[[str], None]) -> bool:
    """Make one check and print its finding; if it fails, print the reason and return False."""
    try:
        finding = check()
    except Exception as error:
        if says_that_a_rank_has_gone(error):
            return False  # that rank says why
        if not isinstance(error, (_FailedError, UserError)):
            traceback.print_exc()
        what = " ".join(str(error).split()) or type(error).__name__
        print(f"{name:14} failed\nFAIL: {name}: {what}", flush=True)
        return False
    say(f"{name:14} ok  {finding}")
    return True


@contextlib.contextmanager
def _shared_folder(process: Process) -> Iterator[Path]:
    """A new folder for all ranks of this machine, removed at the end."""
    own = tempfile.mkdtemp(prefix="dlrm_self_check_") if process.is_first else ""
    folder = Path(text_from_first(process, own))
    try:
        yield folder
    finally:
        if process.is_first:
            shutil.rmtree(folder, ignore_errors=True)
