"""With what a run was made: Python, packages, device, and the program's own commit."""

import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from common.versions import REQUIREMENTS, installed_version
from devices.find import versions
from ranks.process import Process

SECONDS_FOR_GIT = 10


def versions_of_run(process: Process) -> dict[str, Any]:
    """What versions.json says; what cannot be found out is null."""
    names = re.findall(r"^[A-Za-z][\w.-]*", REQUIREMENTS.read_text(), re.M)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "packages": {name: installed_version(name) or None for name in names},
        "platform": platform.platform(),
        "ranks": process.world_size,
        "device": _device(process),
        "git": commit_of(REQUIREMENTS.parent),
    }


def _device(process: Process) -> dict[str, str] | None:
    try:
        return versions(process.device)
    except Exception:  # a driver that does not answer; the run will say more, or needs it not
        return None


def commit_of(folder: Path) -> dict[str, Any] | None:
    """The commit that a folder is a checkout of, and whether it was changed; None: nobody knows.

    A folder inside another one's checkout has no commit.
    """
    try:
        top, commit = _git(folder, "rev-parse", "--show-toplevel", "HEAD").splitlines()
        if not folder.samefile(top):
            return None
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, ValueError, subprocess.SubprocessError):  # no git, no checkout, no commit
        return None
    return {"commit": commit, "is_dirty": bool(changes)}


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words],
        capture_output=True,
        check=True,
        text=True,
        timeout=SECONDS_FOR_GIT,
    )
    return done.stdout
