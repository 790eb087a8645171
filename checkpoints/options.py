"""The flags of checkpoints, and what is checked of them before anything else happens."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from checkpoints.shard_file import problem_of_safetensors
from common.errors import UserError
from common.flags import number_in

NEWEST = "newest in --checkpoint-dir"  # --resume without a path; no path has this name


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of checkpoints."""
    flag = parser.add_argument_group("Checkpoints").add_argument
    flag(
        "--checkpoint-dir",
        default="",
        metavar="DIR",
        help="keep checkpoints of the whole run there, one at the end and one if SIGTERM or Ctrl-C"
        " ends it",
    )
    flag(
        "--save-every",
        type=number_in(int, 0),
        default=0,
        metavar="N",
        help="steps between checkpoints; 0: none on the way",
    )
    flag(
        "--save-minutes",
        type=number_in(float, 0),
        default=0.0,
        metavar="M",
        help="minutes between checkpoints; 0: none on the way",
    )
    flag(
        "--export-checkpoint",
        default="",
        metavar="DIR",
        help="make the model file of --save-model from a checkpoint, or from the newest one in DIR;"
        " nothing is trained",
    )
    flag("--keep", type=number_in(int, 1), default=2, metavar="K", help="checkpoints that stay")
    flag(
        "--resume",
        nargs="?",
        const=NEWEST,
        default="",
        metavar="PATH",
        help="go on from a checkpoint, exactly; without a path from the newest one in"
        " --checkpoint-dir, if it has one",
    )


@dataclass(frozen=True)
class CheckpointOptions:
    """The flags of checkpoints as a record.

    Attributes:
        folder: of --checkpoint-dir; None: no checkpoints.
        every: steps between checkpoints; 0: none on the way.
        minutes: minutes between checkpoints; 0: none on the way.
        keep: checkpoints that stay.
        resumes: go on from a checkpoint.
        resume_from: which one; None: the newest one in the folder.
    """

    folder: Path | None
    every: int
    minutes: float
    keep: int
    resumes: bool
    resume_from: Path | None

    @classmethod
    def from_options(cls, options: argparse.Namespace) -> "CheckpointOptions":
        """The flags of `add_checkpoint_options`.

        Raises:
            UserError: they contradict one another or other flags, or a package is missing.
        """
        _check(options)
        has_path = options.resume not in ("", NEWEST)
        return cls(
            folder=Path(options.checkpoint_dir) if options.checkpoint_dir else None,
            every=options.save_every,
            minutes=options.save_minutes,
            keep=options.keep,
            resumes=bool(options.resume),
            resume_from=Path(options.resume) if has_path else None,
        )


def _check(options: argparse.Namespace) -> None:
    resume = f"--resume={options.resume}" if options.resume != NEWEST else "--resume"
    without_folder = not options.checkpoint_dir
    every, minutes = options.save_every, options.save_minutes
    problems = (
        (
            every and without_folder,
            f"--save-every={every}: give --checkpoint-dir too, where checkpoints go",
        ),
        (
            minutes and without_folder,
            f"--save-minutes={minutes:g}: give --checkpoint-dir too, where checkpoints go",
        ),
        (
            options.resume == NEWEST and without_folder,
            "--resume: give --checkpoint-dir too, or the checkpoint as --resume=PATH",
        ),
        (
            options.resume and options.load_model,
            f"{resume} and --load-model={options.load_model}: give one of them; a checkpoint is"
            " the whole run, a model file the model",
        ),
        (
            (options.resume or options.checkpoint_dir) and options.inference_only,
            "--inference-only trains nothing, so it takes neither --checkpoint-dir nor --resume:"
            " --export-checkpoint makes a model file of a checkpoint, for --load-model",
        ),
    )
    for is_problem, message in problems:
        if is_problem:
            raise UserError(message)
    if options.resume or options.checkpoint_dir:
        problem = problem_of_safetensors()
        if problem:
            raise UserError(f"--checkpoint-dir and --resume: {problem}")
