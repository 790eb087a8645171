"""Which torch and torch_npu go with the CANN that is here, and the command that installs them.

npu_pairs.tsv beside this file has the pairs that Ascend documents, for each CANN the newest first
(COMPATIBILITY.en.md of the Ascend Extension for PyTorch). test/env_npu.sh runs this file:

    python3 devices/npu_pairs.py CANN_FOLDER
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for one that runs this file

from common.versions import oldest, release

TABLE = Path(__file__).with_name("npu_pairs.tsv")
# Where CANN says its version, below its folder, and how: the first one that is there counts.
VERSION_FILES = (
    ("{arch}-linux/ascend_toolkit_install.info", r"^version=(.+)$"),
    ("{arch}-linux/ascend_nnae_install.info", r"^version=(.+)$"),
    ("version.cfg", r"^\w+_running_version=\[.*:(.+)\]$"),
)


@dataclass(frozen=True)
class Pair:
    """A torch, the torch_npu that is built for it, and the CANN that they go with."""

    cann: str
    torch: str
    torch_npu: str

    def __str__(self) -> str:
        return f"torch {self.torch} with torch_npu {self.torch_npu}"

    @property
    def fits(self) -> bool:
        """Whether this program runs with the pair's torch."""
        return release(self.torch) >= release(oldest("torch"))


@dataclass(frozen=True)
class Installed:
    """What is installed here.

    Attributes:
        cann: its version, such as 8.5.0 or 8.3.RC1; empty if unknown.
        torch: its version, such as 2.9.0+cpu; empty if it is not installed.
        torch_npu: the same.
    """

    cann: str
    torch: str
    torch_npu: str

    @classmethod
    def find(cls, folder: str | None = None) -> Installed:
        """Look into CANN's folder (default: the environment's) and at this Python's packages."""
        folder = folder or os.environ.get("ASCEND_HOME_PATH", "")
        cann = cann_version(Path(folder)) if folder else ""
        return cls(cann, *map(_package_version, ("torch", "torch_npu")))

    @property
    def pair_is_known(self) -> bool:
        """Whether the table has all three together."""
        torch = self.torch.partition("+")[0]
        return Pair(self.cann, torch, self.torch_npu) in known_pairs()


def known_pairs() -> list[Pair]:
    """All lines of the table: newest CANN first, for each the newest torch first."""
    _, *lines = TABLE.read_text().splitlines()
    return [Pair(*line.split("\t")) for line in lines]


def pairs_of(cann: str) -> list[Pair]:
    """The pairs that go with a CANN, of whatever torch; those of its release if it has none."""
    pairs = known_pairs()
    same = [pair for pair in pairs if pair.cann == cann]
    return same or [pair for pair in pairs if release(pair.cann)[:2] == release(cann)[:2]]


def cann_version(folder: Path) -> str:
    """The version of the CANN in a folder, such as 8.5.0 or 8.3.RC1; empty if it does not say."""
    for name, pattern in VERSION_FILES:
        for place in (folder, folder / "latest"):
            path = place / name.format(arch=platform.machine())
            found = path.is_file() and re.search(pattern, path.read_text(errors="replace"), re.M)
            if found:
                return found[1].strip()
    return ""


def problem_of_cann(cann: str) -> str:
    """Why no torch that this program runs with goes with a CANN; empty if one does, or may."""
    first = min(release(pair.cann)[:2] for pair in known_pairs() if pair.fits)
    if not cann or release(cann)[:2] >= first:
        return ""
    pairs = pairs_of(cann)
    goes = f"it goes with {', '.join(map(str, pairs))}" if pairs else "no pair for it is known"
    best = known_pairs()[0]
    return (
        f"CANN {cann} is too old: {goes}, and this program wants torch {oldest('torch')} or newer:"
        f" install CANN {'.'.join(map(str, first))} or newer, best {best.cann} for {best}"
    )


def install_line(pair: Pair) -> str:
    """The command that installs a pair: on x86_64 pip's torch would be the large one for CUDA."""
    packages = f"torch=={pair.torch} torch-npu=={pair.torch_npu}"
    if platform.machine() != "x86_64":
        return f"python3 -m pip install {packages}"
    return f"python3 -m pip install uv && python3 -m uv pip install --torch-backend=cpu {packages}"


def advice(found: Installed) -> list[str]:
    """What to tell somebody who has just sourced CANN."""
    if not found.cann:
        return ["CANN: its folder does not name its version: docs/npu.md has the pairs of each"]
    problem = problem_of_cann(found.cann)
    if problem:
        return [problem]
    pairs = [pair for pair in pairs_of(found.cann) if pair.fits]
    if not pairs:
        newest = known_pairs()[0].cann
        return [f"CANN {found.cann}: no pair is documented for it (the newest is {newest})"]
    of = "" if pairs[0].cann == found.cann else f" is not in the table; CANN {pairs[0].cann}"
    lines = [f"CANN {found.cann}{of} goes with {'; '.join(map(str, pairs))}"]
    here = f"torch {found.torch or 'none'}, torch_npu {found.torch_npu or 'none'}"
    if found.pair_is_known:
        return [*lines, f"installed: {here}: pair known"]
    return [*lines, f"installed: {here}: pair unknown; to install one: {install_line(pairs[0])}"]


def _package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    found_here = Installed.find(sys.argv[1])
    print(*advice(found_here), sep="\n", file=sys.stderr)
    sys.exit(bool(problem_of_cann(found_here.cann)))
