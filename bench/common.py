"""What the measurements share: programs of this repository, run apart, and lines of the table."""

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def commit() -> str:
    """The commit that is measured: $BENCH_COMMIT, else what git says, else `unknown`."""
    if given := os.environ.get("BENCH_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:  # there is no git
        return "unknown"
    return run.stdout.strip() or "unknown"


def listed(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A type for argparse that takes words joined by commas, each of which `parse` takes."""
    return lambda text: [parse(word) for word in text.split(",")]


def one_of(*words: str) -> Callable[[str], str]:
    """A type for argparse that takes one of the words; `choices` would be for a whole list."""

    def parse(text: str) -> str:
        if text not in words:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(words)}")
        return text

    return parse


def start(
    *words: object,
    environment: dict[str, str] | None = None,
    first: Callable[[], None] | None = None,
    folder: Path = ROOT,
) -> "subprocess.Popen[str]":
    """A Python program of this repository on 2 threads, in a folder.

    Args:
        words: its path in the repository, and its flags.
        environment: changes to this one's.
        first: called in its process.
        folder: where it runs.
    """
    command = [sys.executable, str(ROOT / str(words[0])), *(str(word) for word in words[1:])]
    variables = os.environ | {"OMP_NUM_THREADS": "2"} | (environment or {})
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=variables, stdout=pipe, stderr=pipe, text=True, preexec_fn=first
    )


def finish(program: "subprocess.Popen[str]", most_seconds: float | None = None) -> str:
    """What it has printed when it ends; ends this program too if it fails, or lasts too long."""
    try:
        text, errors = program.communicate(timeout=most_seconds)
    except subprocess.TimeoutExpired:
        program.kill()
        raise SystemExit(f"{program.args} took longer than {most_seconds:g} s") from None
    if program.returncode:
        command = " ".join(str(word) for word in program.args)  # type: ignore[union-attr]
        raise SystemExit(f"{command} ended with {program.returncode}: {errors.strip()}")
    return text


def run_ranks(
    ranks: int, *words: object, environment: dict[str, str] | None = None, root: Path = ROOT
) -> None:
    """Run a program of this repository on so many ranks; ends this program too if it fails.

    Args:
        ranks: how many.
        words: its path in the repository, and its flags.
        environment: changes to this one's.
        root: the checkout.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    program = [str(root / str(words[0])), *(str(word) for word in words[1:])]
    variables = os.environ | (environment or {})
    command = [sys.executable, *launcher, *program]
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{ranks} ranks ended with {done.returncode}: {done.stderr[-2000:]}")


def output(*words: object, root: Path = ROOT) -> str:
    """What a program of this repository, or of another checkout, prints."""
    return finish(start(root / str(words[0]), *words[1:], folder=root))


def row(what: str, ours: str, yardstick: str = "", ratio: str = "", wanted: str = "") -> str:
    """A line of the table."""
    return f"{what:<38} {ours:>16} {yardstick:>12} {ratio:>7}  {wanted}".rstrip()


HEADER = row("", "ours", "yardstick", "ratio", "at least")
