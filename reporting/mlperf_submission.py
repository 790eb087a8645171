"""Who submits an MLPerf run, in which division and from where: the flags, and their checks.

MLPerf's lines are written by the package mlperf-logging. It is imported only if a run writes them.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.flags import true_or_false
from common.versions import problem_of_import

NO_SUBMITTER = "none (this run is no MLPerf submission)"
DIVISIONS = ("open", "closed")
STATUSES = ("onprem", "cloud", "preview", "research")


def add_submission_options(flag: Callable[..., Any]) -> None:
    """Add the flags of MLPerf's events; the submission lines' defaults are the environment's."""
    flag(
        "--mlperf-events",
        type=true_or_false,
        default=True,
        help="false: --mlperf-logging without events, for which mlperf-logging is not needed",
    )
    flag(
        "--mlperf-org",
        metavar="NAME",
        help="the submitter in MLPerf's lines; not given: $MLPERF_ORG, or one that says that the"
        " run is no submission",
    )
    flag(
        "--mlperf-division",
        choices=DIVISIONS,
        help="its division; not given: $MLPERF_DIVISION, or open. A closed one wants MLPerf's own"
        " network, with five layers in the top MLP",
    )
    flag(
        "--mlperf-status",
        choices=STATUSES,
        help="where its hardware stands; not given: $MLPERF_STATUS, or onprem",
    )
    flag(
        "--mlperf-platform",
        metavar="NAME",
        help="its hardware; not given: $MLPERF_PLATFORM, or number and kind of the devices",
    )


@dataclass(frozen=True)
class Submission:
    """What MLPerf's submission_* lines say.

    Attributes:
        org: the submitter.
        division: open or closed.
        status: onprem, cloud, preview or research.
        platform: the hardware.
    """

    org: str
    division: str
    status: str
    platform: str

    @classmethod
    def from_options(cls, options: argparse.Namespace, devices: str) -> "Submission":
        """What flags say, else the environment, else the defaults.

        Args:
            options: the parsed command line.
            devices: the platform if it is not named, as in `8 x Ascend910B3`.

        Raises:
            UserError: a name is empty, or the environment holds a word that MLPerf does not know.
        """
        return cls(
            _name(options, "org", NO_SUBMITTER),
            _word(options, "division", DIVISIONS),
            _word(options, "status", STATUSES),
            _name(options, "platform", devices),
        )


def writes_events(options: argparse.Namespace) -> bool:
    """Whether a run writes MLPerf's events: they tell of a training, which some runs have not."""
    trains = not (options.inference_only or options.self_check)
    return bool(options.mlperf_logging and options.mlperf_events and trains)


def check_submission(options: argparse.Namespace) -> None:
    """Find mistakes of MLPerf's flags before data is prepared.

    A --dry-run is checked like the run itself, although it writes no events: the scripts check
    flags and environment with one before they start the ranks.

    Raises:
        UserError: events are to be written, and mlperf-logging is missing, too old or broken, or
            flags or environment are wrong.
    """
    if not writes_events(options):
        return
    if problem := problem_of_import("mlperf-logging", _import_mlperf_logging):
        raise UserError(f"--mlperf-logging: {problem}; or give --mlperf-events=false")
    Submission.from_options(options, devices="unknown")


def _import_mlperf_logging() -> None:
    import mlperf_logging.mllog.mllog  # noqa: F401


def _name(options: argparse.Namespace, what: str, default: str) -> str:
    given: str | None = getattr(options, f"mlperf_{what}")
    if given is not None and not given.strip():
        raise UserError(f"--mlperf-{what}={given!r} is empty: expected a name, or no such flag")
    return given or os.environ.get(f"MLPERF_{what.upper()}", "").strip() or default


def _word(options: argparse.Namespace, what: str, words: tuple[str, ...]) -> str:
    """The word of a flag, which argparse has checked, or of the environment; else the first one."""
    given: str | None = getattr(options, f"mlperf_{what}")
    variable = f"MLPERF_{what.upper()}"
    word = given or os.environ.get(variable, "").strip() or words[0]
    if word not in words:
        raise UserError(
            f"{variable}={word!r} in the environment: expected {', '.join(words)}, or no such"
            " variable"
        )
    return word
