"""The program's trainer in this process, and what is measured with it.

The trainer is made of the flags that a user would give, as `dlrm_s_pytorch.main` makes it; but its
tables are filled on the device, as numpy would draw them for a minute.
"""

import contextlib
import gc
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dlrm_s_pytorch as program  # before torch: common/compiled.py says why

# isort: split
import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu_cases import Setting, program_flags, threads
from bench.gpu_trace import keep_compressed, load_events, read_trace
from bench.training import Case
from checkpoints.agreement import joined_in_agreement
from checkpoints.checkpoints import NoCheckpoints
from checkpoints.run_state import RunState
from devices.memory import out_of_memory_told
from devices.threads import set_up_threads
from dlrm_data_pytorch import load_batches
from model.batch import Batch
from reporting.records import TrainingRecord
from reporting.reporter import Listeners, Reporter
from reporting.reporters import make_reporter

SERIES = 5  # of steps or of replays; the median counts
WARM_UP = 6  # steps: the fourth of a shape is recorded
BATCHES = 32  # that lie on the device and take turns
HOST_STEPS = 16  # that the host can be ahead of the device
PASSES = 4  # of the loader, after one that warms up
PROFILED = {"cuda": 20, "cpu": 2}  # steps
Found = dict[str, Any]


class FilledTables(NoCheckpoints):
    """Stands for the checkpoint that fills the tables, which are not drawn then."""

    @property
    def will_restore(self) -> bool:
        """The tables need not be drawn."""
        return True

    @torch.no_grad()
    def begin(self, run: RunState) -> bool:
        """Fill the tables on their device, with numbers distributed as initial ones are."""
        for part, rows in run.model.tables.held_parts("weight"):
            rows.uniform_(-part.matrix.bound, part.matrix.bound)
        return False  # the run is a new one


class Lines(Reporter):
    """Keeps the speed and the loss of each log line."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.losses: list[float] = []

    def training(self, record: TrainingRecord) -> None:
        """Keep them."""
        self.ms.append(record.ms_per_it)
        self.losses.append(record.loss)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """What the program prints goes nowhere: measurements print the results of this process."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def make_trainer(
    setting: Setting, case: Case, flags: tuple[str, ...], open_until: contextlib.ExitStack
) -> tuple[program.Trainer, Lines]:
    """A trainer as `dlrm_s_pytorch.run` makes it, on this one rank, and what it reports."""
    options = program.parse_options(program_flags(setting, case, flags))
    process = program.make_process(options)
    prepared = program.prepare_data(options)
    if process.device.type == "cpu":
        set_up_threads(threads())
    lines = Lines()
    reporter = Listeners(make_reporter(options, process), lines)
    open_until.enter_context(reporter)
    open_until.enter_context(joined_in_agreement(options, prepared, process))
    program.seed_everything(options)
    data = program.make_data(options, prepared, process)
    with out_of_memory_told(process.device):
        trainer = program.Trainer(options, process, data, reporter, FilledTables(reporter.say))
        trainer.begin()
    return trainer, lines


class Trained:
    """A trainer and what its measurements share; `close` gives its memory back.

    Args:
        setting: what all measurements share.
        case: the model.
        flags: those of the device.
    """

    def __init__(self, setting: Setting, case: Case, flags: tuple[str, ...]) -> None:
        self.setting, self.case = setting, case
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as undone, silent():
            undone.push(self._open)
            self.trainer, self.lines = make_trainer(setting, case, flags, self._open)
            undone.pop_all()
        self._batches: list[Batch] = []
        self._numbers = itertools.count(1)

    def close(self) -> None:
        """End the reporter and give up recorded steps."""
        with silent():
            self.trainer.step.close()
            self._open.close()

    @property
    def device(self) -> torch.device:
        """Where it trains."""
        return self.trainer.process.device

    def step(self) -> None:
        """Train on the next of the batches on the device."""
        number = next(self._numbers)
        self.trainer.train_step(self._batches[number % len(self._batches)], number)

    def warm_up(self) -> None:
        """Bring batches to the device, and train until steps are recorded."""
        if self._batches:
            return
        data = self.trainer.data.train
        whole = self.trainer.data.train.num_rows // self.case.batch  # a last, short one is padded
        numbers = range(min(BATCHES, max(1, whole)))
        self._batches = [data[number].to(self.device) for number in numbers]
        for _ in range(WARM_UP):
            self.step()
        wait(self.device)


class Trainers:
    """One trainer at a time: the tables of two would not fit many cards.

    Args:
        setting: what all measurements share.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._key: tuple[Case, tuple[str, ...]] | None = None
        self._trained: Trained | None = None

    def get(self, case: Case, flags: tuple[str, ...]) -> Trained:
        """The trainer of a case with these flags; another one is given up."""
        if self._trained is None or self._key != (case, flags):
            self.drop()
            self._trained, self._key = Trained(self._setting, case, flags), (case, flags)
        return self._trained

    def drop(self) -> None:
        """Give up the trainer, if there is one, and its memory.

        Raises:
            RuntimeError: the card refuses work.
        """
        trained, self._trained = self._trained, None
        try:
            if trained is not None:
                trained.close()
        finally:
            del trained
            gc.collect()
            if self._setting.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()


# ---------------------------------------------------------------- measurements


def wait(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def ms_of_series(device: torch.device, work: Callable[[], object], runs: int) -> list[float]:
    """Ms of a call of each of several series: by events on a GPU, else by the clock."""
    found = []
    for _ in range(SERIES):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(runs):
                work()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / runs)
        else:
            begun = time.perf_counter()
            for _ in range(runs):
                work()
            found.append(1e3 * (time.perf_counter() - begun) / runs)
    return found


def speed(case: Case, ms: list[float]) -> Found:
    """The median of some times of a step, their limits, and rows/s."""
    median = statistics.median(ms)
    limits = {"least_ms": round(min(ms), 4), "most_ms": round(max(ms), 4)}
    return {"ms": round(median, 4), "rows_per_second": round(1e3 * case.batch / median), **limits}


def measure_program(trained: Trained) -> Found:
    """The whole program, with its loader and its log: the median of its lines after the first."""
    with silent(), out_of_memory_told(trained.device):
        trained.trainer.train(lambda: None)
    ms, losses = trained.lines.ms, trained.lines.losses
    if len(ms) < 2:
        raise RuntimeError(f"{len(ms)} log lines: the rows are too few")
    return speed(trained.case, ms[1:]) | {
        "warm_up_ms": round(ms[0], 3),
        "loss": losses[-1],
        "lines": len(ms),
    }


def measure_steps(trained: Trained) -> Found:
    """Steps without the loader, on batches that lie on the device and take turns."""
    trained.warm_up()
    device, runs = trained.device, trained.setting.steps_a_line(trained.case)
    found = speed(trained.case, ms_of_series(device, trained.step, runs))
    if device.type == "cpu":
        return found
    hosts = []
    for _ in range(SERIES):
        wait(device)
        begin = time.perf_counter()
        for _ in range(HOST_STEPS):
            trained.step()
        hosts.append((time.perf_counter() - begin) / HOST_STEPS)
    wait(device)
    return found | {"host_us": round(1e6 * statistics.median(hosts), 1)}


def measure_replay(trained: Trained) -> Found:
    """Replays of the recorded step, one after the other, all on the same batch."""
    trained.warm_up()
    trained.step()  # a run that has ended has given up its recorded steps
    replays = trained.trainer.step.replays
    if len(replays) != 1:
        raise RuntimeError(f"{len(replays)} steps are recorded: --cuda-graphs records one")
    runs = trained.setting.steps_a_line(trained.case)
    return speed(trained.case, ms_of_series(trained.device, replays[0], runs))


def measure_loader(trained: Trained) -> Found:
    """The loader alone, as the trainer calls it, its copies to the device included."""
    trainer, device = trained.trainer, trained.device
    data, workers = trainer.data.train, trainer.options.num_workers
    numbers = list(range(len(data))) * (1 + PASSES)
    ends = []
    batches = load_batches(data, numbers, workers, device, trainer.execution)
    for number, _ in enumerate(batches, 1):
        if number % len(data) == 0:
            wait(device)
            ends.append(time.perf_counter())
    seconds = [end - begin for begin, end in itertools.pairwise(ends)]
    return speed(trained.case, [1e3 * one * trained.case.batch / data.num_rows for one in seconds])


def measure_profile(trained: Trained) -> Found:
    """What a trace of some steps says; the trace is kept beside the results.

    If it has no kernels of the graph, which is older than the profiler, steps are recorded anew
    under the profiler.
    """
    trained.warm_up()
    trained.step()  # a run that has ended has given up its recorded steps
    found = _profile(trained)
    if "kernels" not in found and trained.trainer.step.replays:
        trained.trainer.step.close()
        found = _profile(trained)
    return found


def _profile(trained: Trained) -> Found:
    device = trained.device
    kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    steps = PROFILED[device.type]
    wait(device)
    with profile(activities=[kind], acc_events=True) as profiler:
        for _ in range(steps):
            trained.step()
        wait(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        if trained.setting.out is not None:
            target = trained.setting.out / f"trace_{trained.case.batch}.json.gz"
            keep_compressed(trace, target)
        return read_trace(load_events(trace), steps)
