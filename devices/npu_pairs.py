"""Which torch and torch_npu go with the CANN that is here, and the command that installs them.

npu_pairs.tsv beside this file has the pairs that Ascend documents, for each CANN the newest first
(COMPATIBILITY.en.md and the release notes of the Ascend Extension for PyTorch; docs/npu.md has the
links). test/env_npu.sh runs this module in a shell that has just sourced CANN:

    python3 -m devices.npu_pairs FOLDER...
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from common.versions import oldest, release

TABLE = Path(__file__).with_name("npu_pairs.tsv")
# Where a CANN says its version: files below its folder, in this order, and the line. Up to 8.3 some
# files have an internal number in `Version` and the usual one in `version_dir`, later ones the
# other way round. The last of version.cfg's numbers is the usual one.
VERSION_LINES = (
    ("*-linux/ascend_toolkit_install.info", r"^version=(.+)$"),
    ("ascend_nnae_install.info", r"^version=(.+)$"),
    ("share/info/runtime/version.info", r"^Version=(.+)$"),
    ("opp/version.info", r"^version_dir=(\d.*)$"),
    ("opp/version.info", r"^Version=(.+)$"),
    ("version.cfg", r"^toolkit_running_version=\[(?:.*:)?(.+)\]$"),
)
FOLDERS = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")  # set_env.sh sets them
FIRST_CANN_WITH_NUMPY_2 = (9, 0)  # by its installation guide
LAST_CANN_THAT_NUMPY_2_BREAKS = (8, 2)  # reported: AclSetCompileopt, error code 500001


@dataclass(frozen=True)
class Pair:
    """A torch, the torch_npu that is built for it, and the CANN that they go with."""

    cann: str
    torch: str
    torch_npu: str

    @property
    def fits(self) -> bool:
        """Whether this program runs with the pair's torch."""
        return release(self.torch) >= release(oldest("torch"))


@dataclass(frozen=True)
class Installed:
    """Versions of what is installed here; an empty one is not installed, or not known.

    Attributes:
        cann: such as 8.5.0 or 8.3.RC1.
        torch: such as 2.9.0+cpu.
        torch_npu: such as 2.9.0.post2.
        numpy: such as 1.26.4.
    """

    cann: str
    torch: str
    torch_npu: str
    numpy: str

    @classmethod
    def find(cls, *folders: str) -> Installed:
        """Look at this Python's packages, and for CANN in the environment's folders, then these."""
        places = [*(os.environ.get(name, "") for name in FOLDERS), *folders]
        cann = next(filter(None, (cann_version(Path(one)) for one in places if one)), "")
        return cls(cann, *map(package_version, ("torch", "torch_npu", "numpy")))

    @property
    def torch_differs(self) -> str:
        """Why torch_npu does not go with this torch; empty if it does, or is not installed."""
        wants = ".".join(map(str, release(self.torch_npu)[:3]))
        if not self.torch_npu or release(self.torch_npu)[:3] == release(self.torch)[:3]:
            return ""
        return (
            f"torch_npu {self.torch_npu} and torch {self.torch} do not go together: expected torch"
            f" {wants}; `source test/env_npu.sh` names the pair that goes with CANN"
        )

    @property
    def pair(self) -> str:
        """`known` if the table has this torch, torch_npu and CANN together, else `unknown`."""
        if self.pair_is_known:
            return "known"
        return f"unknown ({self.advice()[0]})"

    @property
    def pair_is_known(self) -> bool:
        """Whether the table has this torch, torch_npu and CANN together."""
        return Pair(self.cann, self.torch.partition("+")[0], self.torch_npu) in known_pairs()

    @property
    def cann_is_too_old(self) -> str:
        """Why no torch that this program runs with goes with the CANN; empty if one may."""
        first = min(release(pair.cann) for pair in known_pairs() if pair.fits)
        if not self.cann or release(self.cann) >= first:
            return ""
        best, pairs = recommended(), pairs_of(self.cann)
        goes = f"it goes with {_listed(pairs)}" if pairs else "no torch_npu for it is known here"
        return (
            f"CANN {self.cann} is too old: {goes}; this program wants torch {oldest('torch')} or"
            f" newer: expected CANN {_dotted(first)} or newer, best {best.cann}, with"
            f" {_listed([best])}"
        )

    @property
    def numpy_is_too_new(self) -> str:
        """Why the CANN breaks with this numpy; empty if it does not, or is not known to."""
        breaks = () < release(self.cann)[:2] <= LAST_CANN_THAT_NUMPY_2_BREAKS
        if breaks and release(self.numpy) >= (2,):
            return (
                f"numpy {self.numpy} and CANN {self.cann} do not go together: expected numpy 1,"
                " which CANN's compiler of operators asks for: pip install 'numpy<2'"
            )
        return ""

    def advice(self) -> list[str]:
        """What to tell somebody who has just sourced CANN, in lines."""
        if not self.cann:
            return ["CANN does not say its version: docs/npu.md has the pairs of each version"]
        if self.cann_is_too_old:
            return [self.cann_is_too_old]
        pairs = [pair for pair in pairs_of(self.cann) if pair.fits]
        if not pairs:
            newest = known_pairs()[0].cann
            return [f"CANN {self.cann}: no pair is known; the newest CANN in the table is {newest}"]
        of = "" if pairs[0].cann == self.cann else f" is not in the table; CANN {pairs[0].cann}"
        older = _listed([pair for pair in pairs_of(self.cann) if not pair.fits])
        too_old = f"; too old for this program: {older}" if older else ""
        lines = [f"CANN {self.cann}{of} goes with {_listed(pairs)}{too_old}"]
        if self.numpy_is_too_new:
            lines.append(self.numpy_is_too_new)
        elif release(self.cann) < FIRST_CANN_WITH_NUMPY_2 and release(self.numpy) >= (2,):
            lines.append(
                f"numpy {self.numpy}: the guide of CANN {self.cann} asks for numpy 1 (Python 3.13:"
                " 2); if operators fail: pip install 'numpy<2'"
            )
        here = f"installed: torch {self.torch or 'none'}, torch_npu {self.torch_npu or 'none'}"
        if self.pair_is_known:
            return [*lines, f"{here}: pair known"]
        return [*lines, f"{here}: pair unknown; this installs one: {install_command(pairs[0])}"]


def known_pairs() -> list[Pair]:
    """All lines of the table: newest CANN first, and for each the newest torch first."""
    _, *lines = TABLE.read_text().splitlines()
    return [Pair(*line.split("\t")) for line in lines]


def pairs_of(cann: str) -> list[Pair]:
    """The pairs that go with a CANN, of whatever torch; if it has none, those of its release."""
    pairs = known_pairs()
    same = [pair for pair in pairs if pair.cann == cann]
    return same or [pair for pair in pairs if release(pair.cann)[:2] == release(cann)[:2]]


def recommended() -> Pair:
    """The pair of requirements-npu.txt."""
    text = (TABLE.parent.parent / "requirements-npu.txt").read_text()
    return next(pair for pair in known_pairs() if f"\ntorch-npu=={pair.torch_npu}\n" in text)


def cann_version(folder: Path) -> str:
    """The version of the CANN in a folder, such as 8.5.0 or 8.3.RC1; empty if it does not say."""
    for name, line in VERSION_LINES:
        for path in sorted(folder.glob(name)):
            found = re.search(line, path.read_text(errors="replace"), re.M)
            if found:
                return found[1].strip()
    # the folder itself: /usr/local/Ascend/cann-8.5.0, /usr/local/Ascend/ascend-toolkit/8.2.RC1
    named = re.fullmatch(r"(?:cann-)?(\d+\.\d.*)", folder.resolve().name)
    return named[1] if named else ""


def install_command(pair: Pair) -> str:
    """The command that installs a pair into this Python.

    On x86_64 pip would take the torch for CUDA, of several GB, which most versions of torch_npu
    refuse. uv knows where the one for the CPU is.
    """
    packages = f"torch=={pair.torch} torch-npu=={pair.torch_npu}"
    python = sys.executable
    if platform.machine() != "x86_64":
        return f"{python} -m pip install {packages}"
    uv = f"{python} -m uv pip install --python {python} --torch-backend=cpu {packages}"
    return f"{python} -m pip install uv && {uv}"


def package_version(name: str) -> str:
    """The version of a package that is installed; empty if none is."""
    from importlib import metadata  # Python 3.7 has none

    try:
        return metadata.version(name) or ""
    except metadata.PackageNotFoundError:
        return ""


def _listed(pairs: list[Pair]) -> str:
    """`torch 2.9.0 (torch_npu 2.9.0.post8 or 2.9.0.post6), torch 2.7.1 (...)`."""
    by_torch: dict[str, list[str]] = {}
    for pair in pairs:
        by_torch.setdefault(pair.torch, []).append(pair.torch_npu)
    return ", ".join(f"torch {one} (torch_npu {' or '.join(of)})" for one, of in by_torch.items())


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


if __name__ == "__main__":
    here = Installed.find(*sys.argv[1:])
    print(*here.advice(), sep="\n", file=sys.stderr)
    sys.exit(bool(here.cann_is_too_old))
