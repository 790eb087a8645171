"""Kills runs at random and lets them resume: python test/kill_campaign.py 200

Each kill is SIGKILL, at a random moment of a run or inside a random write, sync or rename of its
checkpoints; of several ranks it takes one or all. The run that resumes has to print the lines of a
run that nobody has killed and to end with the same model file, byte for byte. The table says how
many did, and how many steps they had to train again.
"""

import argparse
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dlrm_s_pytorch  # noqa: E402
from checkpoints.folder import VOCABULARY  # noqa: E402

MODEL = (
    "--arch-sparse-feature-size=8 --arch-mlp-bot=13-32-8 --arch-mlp-top=32-1 --loss-function=bce"
    " --learning-rate=0.1 --mini-batch-size=64 --test-mini-batch-size=512 --mlperf-logging"
    " --mlperf-events=false --tensor-board-filename= --print-freq=1 --test-freq=9 --keep=2"
    " --dist-timeout=30"  # of ranks that wait for one that was killed before they have met
).split()
RANDOM = (
    "--arch-embedding-size=300-200-50-1000 --data-size=1500 --num-indices-per-lookup=4"
    " --round-targets=true"
).split()
SYSTEM_CALLS = ("write", "fsync", "rename", "mkdir")  # of a save
SECONDS_TO_END, SECONDS_FOR_SURVIVORS = 45, 90


@dataclass
class Case:
    """A kind of run that is killed.

    Attributes:
        name: as the table has it.
        flags: beside those of MODEL.
        ranks: processes.
        every: steps between checkpoints.
        criteo: it trains on the golden text, prepared under this name; empty: on random data.
    """

    name: str
    flags: list[str]
    ranks: int
    every: int
    criteo: str = ""
    lines: list[str] = field(default_factory=list)
    model: bytes = b""
    seconds: float = 0.0


CASES = [
    Case("adagrad, mapped, accumulated", ["--optimizer=adagrad", "--memory-map",
         "--mlperf-grad-accum-iter=3"], 1, 5, "mapped"),
    Case("rwsadagrad, mapped, 4 ranks", ["--optimizer=rwsadagrad", "--memory-map"], 4, 9, "mapped"),
    Case("adagrad, random data", ["--optimizer=adagrad", "--nepochs=2", *RANDOM], 1, 5),
    Case("sgd, in memory", ["--optimizer=sgd"], 1, 7, "memory"),
    Case("rwsadagrad, flat, 2 workers", ["--optimizer=rwsadagrad", "--mlperf-bin-loader",
         "--mlperf-bin-shuffle", "--num-workers=2"], 1, 10, "flat"),
    Case("sgd, random data, 4 ranks", ["--optimizer=sgd", "--nepochs=2", *RANDOM], 4, 6),
]  # fmt: skip


class Campaign:
    """Runs, kills and compares, in a folder of its own.

    Args:
        folder: an empty folder.
        seed: of all that is random.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self._data = folder / "data"
        shutil.copytree(ROOT / "test" / "golden" / "data" / "kaggle", self._data)

    def prepare(self, case: Case) -> None:
        """Run a case as nobody disturbs it."""
        if case.lines:
            return
        self.clear()
        run = self.start(case)
        began = time.monotonic()
        assert run.wait() == [0] * case.ranks, run.said()
        case.seconds, case.lines = time.monotonic() - began, compared(run.said())
        case.model = self._model.read_bytes()

    def kill_at_random(self, case: Case) -> tuple[str, int]:
        """Kill a run once; returns (what differs, steps trained again)."""
        self.prepare(case)
        while True:
            self.clear()
            run = self._start_and_kill(case)
            if -signal.SIGKILL in run.wait():  # else it has ended before its kill came
                return self.resume_and_compare(case, run)

    def _start_and_kill(self, case: Case) -> "Run":
        """Start a run that is killed unless it ends before."""
        if self._random.random() < 0.5:
            seconds = self._random.uniform(0, 1.05 * case.seconds)
            run = self.start(case)
            time.sleep(seconds)
            victims = self._random.choice([run.ranks, [self._random.choice(run.ranks)]])
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
        else:
            number, victim = self._random.randint(1, 60), self._random.randrange(case.ranks)
            run = self.start(case, lambda rank: die_in_call(number if rank == victim else 0))
        return run

    def resume_and_compare(self, case: Case, run: "Run") -> tuple[str, int]:
        """Resume a run that was killed; returns (what differs, steps trained again)."""
        before = compared(run.said(), whole_lines=True)
        resumed = self.start(case, flags=["--resume"])
        statuses = resumed.wait()
        text = resumed.said()
        if statuses != [0] * case.ranks:
            return f"the resumed run ended with {statuses}: {text}", 0
        after = compared(text)
        trouble = ""
        if before != case.lines[: len(before)]:
            trouble = f"lines before the kill differ: {first_difference(before, case.lines)}"
        elif after != case.lines[len(case.lines) - len(after) :]:
            tail = case.lines[len(case.lines) - len(after) :]
            trouble = f"lines after it differ: {first_difference(after, tail)}"
        elif self._model.read_bytes() != case.model:
            trouble = "the model files differ"
        elif left := sorted(
            path.name
            for path in self._checkpoints.iterdir()
            if "." in path.name and path.name != VOCABULARY
        ):
            trouble = f"left in the folder: {left}"
        again = len(before) + len(after) - len(case.lines)
        return trouble, sum(line.startswith("Finished") for line in before[len(before) - again :])

    def start(
        self,
        case: Case,
        prepare_rank: Callable[[int], None] = lambda rank: None,
        flags: Sequence[str] = (),
    ) -> "Run":
        """Start a case's ranks, forked from this process, which has imported all and no threads."""
        words = [*MODEL, *case.flags, f"--checkpoint-dir={self._checkpoints}", *flags]
        words += [f"--save-every={case.every}", f"--save-model={self._model}"]
        if case.criteo:
            processed = self._folder / case.criteo
            words += [f"--data_path={self._data}", f"--processed-data-file={processed}"]
        return Run(self._folder / "log", case.ranks, words, prepare_rank)

    def clear(self) -> None:
        """Forget the last run."""
        shutil.rmtree(self._checkpoints, ignore_errors=True)
        self._model.unlink(missing_ok=True)

    @property
    def _checkpoints(self) -> Path:
        return self._folder / "checkpoints"

    @property
    def _model(self) -> Path:
        return self._folder / "model.pth"


class Run:
    """Ranks of the program, forked from this process.

    Args:
        log: where their output goes.
        num_ranks: how many they are.
        words: the command line.
        prepare_rank: called in each rank with its number.

    Attributes:
        ranks: their process numbers.
    """

    def __init__(
        self, log: Path, num_ranks: int, words: list[str], prepare_rank: Callable[[int], None]
    ) -> None:
        self._log = log
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        log.write_bytes(b"")
        settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        settings |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        self.ranks = []
        for rank in range(num_ranks):
            process = os.fork()
            if process == 0:
                os.environ |= settings | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                _be_rank(log, words, rank, prepare_rank)
            self.ranks.append(process)

    def wait(self) -> list[int]:
        """The exit statuses of all ranks, -9 for one that was killed.

        Ranks that wait for one that was killed before they have met are ended as launchers do it.
        """
        began, found, has_asked = time.monotonic(), dict[int, int](), False
        while len(found) < len(self.ranks):
            for process in self.ranks:
                if process not in found and (done := os.waitpid(process, os.WNOHANG))[0]:
                    found[process] = os.waitstatus_to_exitcode(done[1])
            seconds = time.monotonic() - began
            left = [process for process in self.ranks if process not in found]
            if found and left and seconds > SECONDS_TO_END and not has_asked:
                has_asked = True
                self._signal(left, signal.SIGTERM)
            if seconds > SECONDS_FOR_SURVIVORS:
                self._signal(left, signal.SIGKILL)
                raise AssertionError(f"a rank hangs: {self.said()}")
            time.sleep(0.005)
        return [found[process] for process in self.ranks]

    def _signal(self, processes: Sequence[int], number: signal.Signals) -> None:
        for process in processes:
            os.kill(process, number)

    def said(self) -> str:
        """All output of all ranks."""
        return self._log.read_text()


def _be_rank(log: Path, words: list[str], rank: int, prepare_rank: Callable[[int], None]) -> None:
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        prepare_rank(rank)
        status = dlrm_s_pytorch.main(words)
        sys.stdout.flush()
    finally:
        os._exit(status)


def die_in_call(number: int) -> None:
    """Let this process die inside the n-th of its SYSTEM_CALLS from now on; 0: let it live.

    A write is cut off in its middle; other calls die before or after they have done their work.
    """
    calls = 0

    def dying(call: Callable[..., object], name: str) -> Callable[..., object]:
        def count_and_call(*args: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                if name == "write":
                    content = memoryview(args[1]).cast("B")  # type: ignore[call-overload]
                    call(args[0], content[: len(content) // 2])
                elif number % 2:
                    with contextlib.suppress(OSError):  # a folder that is there already
                        call(*args, **options)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return count_and_call

    if number:
        for name in SYSTEM_CALLS:
            setattr(os, name, dying(getattr(os, name), name))


def compared(text: str, whole_lines: bool = False) -> list[str]:
    """The lines that two runs have in common.

    Args:
        text: what a run printed.
        whole_lines: leave the last line out if it has no end: its process was killed.
    """
    lines = text.split("\n")[: -1 if whole_lines else None]
    return [line for line in lines if re.match(r"Finished|Testing|recall|log loss", line)]


def first_difference(some: Sequence[str], others: Sequence[str]) -> str:
    """The first pair of lines that are not the same."""
    pairs = ((one, other) for one, other in zip(some, others, strict=False) if one != other)
    return str(next(pairs, "their number"))


@contextlib.contextmanager
def campaign(seed: int) -> Iterator[Campaign]:
    """A campaign in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as name:
        yield Campaign(Path(name), seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign and print its table; the status is 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kills", type=int, help="how many kills")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of all that is random")
    options = parser.parse_args(argv)
    print(f"{options.kills} kills, seed {options.seed}", flush=True)
    results: dict[str, list[tuple[str, int]]] = {case.name: [] for case in CASES}
    with campaign(options.seed) as runs:
        for number in range(options.kills):
            case = CASES[number % len(CASES)]
            results[case.name].append(runs.kill_at_random(case))
            if trouble := results[case.name][-1][0]:
                print(f"kill {number + 1}, {case.name}: {trouble}", flush=True)
    print(f"{'run':32} {'kills':>6} {'equal':>6} {'steps again: median':>20} {'most':>6}")
    for name, found in results.items():
        if found:
            again = [steps for _, steps in found]
            equal = sum(not trouble for trouble, _ in found)
            middle = statistics.median(again)
            print(f"{name:32} {len(found):6} {equal:6} {middle:20g} {max(again):6}")
    all_found = [trouble for found in results.values() for trouble, _ in found]
    print(f"{all_found.count('')} of {len(all_found)} runs ended as if nobody had killed them")
    return int(any(all_found))


if __name__ == "__main__":
    sys.exit(main())
