"""Which torch and torch_npu go with the CANN that is here, and the command that installs them.

npu_pairs.tsv beside this file has the pairs that Ascend documents, for each CANN the newest first
(COMPATIBILITY.en.md and the release notes of the Ascend Extension for PyTorch; docs/npu.md has the
links), and the newest Python that torch_npu has a wheel for. test/env_npu.sh runs this module in a
shell that has just sourced CANN:

    python3 -m devices.npu_pairs FOLDER...
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from common.versions import dotted, installed_version, oldest, problem_of_python, release

TABLE = Path(__file__).with_name("npu_pairs.tsv")
EXIT_CANN_TOO_OLD = 3
# Where a CANN says its version: files below its folder, in this order, and the line. Up to 8.3 some
# files have an internal number in `Version` and the usual one in `version_dir`, later ones have
# `cann` there. The last of version.cfg's numbers is the usual one.
VERSION_LINES = (
    ("*-linux/ascend_toolkit_install.info", r"(?m)^version=(\d+\.\d.*)$"),
    ("ascend_nnae_install.info", r"(?m)^version=(\d+\.\d.*)$"),
    ("share/info/runtime/version.info", r"(?m)^Version=(\d+\.\d.*)$"),
    ("opp/version.info", r"(?m)^version_dir=(\d+\.\d.*)$"),
    ("opp/version.info", r"(?ms)^Version=(\d+\.\d[^\n]*)$.*^version_dir=cann$"),
    ("version.cfg", r"(?m)^toolkit_running_version=\[(?:.*:)?(\d+\.\d.*)\]$"),
)
FOLDERS = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")  # set_env.sh sets them
FIRST_COMPATIBLE_CANN = (8, 5)  # all from here on, and their torch_npu, go together (release notes)
FIRST_CANN_WITH_NUMPY_2 = (9, 0)  # by its installation guide
LAST_CANN_THAT_NUMPY_2_BREAKS = (8, 2)  # reported: AclSetCompileopt, error code 500001
# From here on torch_npu registers settings of the allocator that torch's build for CUDA has too,
# and C++ ends the process.
FIRST_THAT_ABORTS_BESIDE_CUDA = (2, 13)


@dataclass(frozen=True)
class Pair:
    """A torch, the torch_npu that is built for it, and the CANN that they were released with."""

    cann: str
    torch: str
    torch_npu: str
    newest_python: str = ""

    @property
    def fits(self) -> bool:
        """Whether this program runs with the pair's torch."""
        return release(self.torch) >= release(oldest("torch"))

    @property
    def has_wheel(self) -> bool:
        """Whether torch_npu has a wheel for this Python."""
        return release(self.newest_python) >= sys.version_info[:2]


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
        return cls(cann, *map(installed_version, ("torch", "torch_npu", "numpy")))

    @property
    def pair_is_known(self) -> bool:
        """Whether the table has this torch, torch_npu and CANN together."""
        return self.cann in self._released_with()

    @property
    def pair(self) -> str:
        """`known` if the table has torch, torch_npu and CANN together, else `unknown (why)`."""
        if self.pair_is_known:
            return "known"
        released_with = self._released_with()
        if released_with and self.cann:
            goes = ", which Ascend calls compatible" if self._is_compatible() else ""
            return f"unknown (they were released for CANN {released_with[-1]}{goes})"
        return f"unknown ({self._about_cann()})"

    def _released_with(self) -> list[str]:
        """The CANNs for which the table has this torch and torch_npu."""
        own = self.torch.partition("+")[0], self.torch_npu.partition("+")[0]
        return [pair.cann for pair in known_pairs() if (pair.torch, pair.torch_npu) == own]

    def _is_compatible(self) -> bool:
        """Whether Ascend declares the two compatible with this CANN, or it is near enough."""
        canns = map(release, self._released_with())
        here = release(self.cann)
        return any(one[:2] == here[:2] or min(one, here) >= FIRST_COMPATIBLE_CANN for one in canns)

    # ------------------------------------------------------------ what cannot work

    @property
    def torch_differs(self) -> str:
        """Why torch_npu does not go with this torch; empty if it does, or one is not known."""
        if not self.torch_npu or not self.torch:
            return ""
        wants = dotted(release(self.torch_npu)[:3])
        if wants == dotted(release(self.torch)[:3]):
            return ""
        return (
            f"torch_npu {self.torch_npu} and torch {self.torch} do not go together: expected torch"
            f" {wants}; `source test/env_npu.sh` names the pair that goes with CANN"
        )

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
            f" newer: expected CANN {dotted(first)} or newer, best {best.cann}, with"
            f" {_listed([best])}"
        )

    @property
    def numpy_is_too_new(self) -> str:
        """Why the CANN breaks with this numpy; empty if it does not, or is not known to."""
        breaks = () < release(self.cann)[:2] <= LAST_CANN_THAT_NUMPY_2_BREAKS
        if not breaks or release(self.numpy) < (2,):
            return ""
        return (
            f"numpy {self.numpy} and CANN {self.cann} do not go together: expected numpy 1, which"
            " CANN's compiler of operators asks for: pip install 'numpy<2'"
        )

    def aborts_beside(self, cuda: str | None) -> str:
        """Why the import of torch_npu would end the process; empty if it would not.

        Args:
            cuda: the version that torch is built for (torch.version.cuda); None: for the CPU.
        """
        if not cuda or release(self.torch_npu) < FIRST_THAT_ABORTS_BESIDE_CUDA:
            return ""
        pair = Pair(self.cann, dotted(release(self.torch)[:3]), self.torch_npu)
        return (
            f"torch {self.torch} is built for CUDA {cuda}, and torch_npu {self.torch_npu} would end"
            f" the process: expected torch's build for the CPU: {install_command(pair)}"
        )

    # ------------------------------------------------------------ advice

    def advice(self) -> list[str]:
        """What to tell somebody who has just sourced CANN, in lines."""
        lines = [self._about_cann(), self._about_numpy()]
        if not self.cann_is_too_old:
            lines.append(self._about_installed())
        return [line for line in lines if line]

    def _about_cann(self) -> str:
        if not self.cann:
            return "CANN does not say its version: docs/npu.md has the pairs of each version"
        if self.cann_is_too_old:
            return self.cann_is_too_old
        pairs = [pair for pair in pairs_of(self.cann) if pair.fits]
        if not pairs:
            newest = known_pairs()[0].cann
            return f"CANN {self.cann}: no pair is known; the newest CANN in the table is {newest}"
        of = "" if pairs[0].cann == self.cann else f" is not in the table; CANN {pairs[0].cann}"
        older = _listed([pair for pair in pairs_of(self.cann) if not pair.fits])
        too_old = f"; too old for this program: {older}" if older else ""
        return f"CANN {self.cann}{of} goes with {_listed(pairs)}{too_old}"

    def _about_numpy(self) -> str:
        """Empty on Python 3.13: there is no numpy 1 for it, and CANN 8.5's guide asks for 2."""
        asks = () < release(self.cann) < FIRST_CANN_WITH_NUMPY_2 and sys.version_info < (3, 13)
        if not asks or release(self.numpy) < (2,):
            return ""
        return self.numpy_is_too_new or (
            f"numpy {self.numpy}: the guide of CANN {self.cann} asks for numpy 1; if operators"
            " fail: pip install 'numpy<2'"
        )

    def _about_installed(self) -> str:
        here = f"installed: torch {self.torch or 'none'}, torch_npu {self.torch_npu or 'none'}"
        here += f": pair {self.pair if self._released_with() else 'unknown'}"
        if self.pair_is_known or self._is_compatible():
            if platform.machine() == "x86_64" and not self.torch.endswith("+cpu"):
                own = Pair(self.cann, self.torch.partition("+")[0], self.torch_npu)
                return f"{here}; torch_npu wants torch's build for the CPU: {install_command(own)}"
            return here
        return f"{here}{self._how_to_install()}"

    def _how_to_install(self) -> str:
        if problem_of_python():
            return f"; {problem_of_python()}"
        pairs = [pair for pair in pairs_of(self.cann) if pair.fits]
        found = [pair for pair in pairs if pair.has_wheel]
        if found:
            return f"; this installs a pair: {install_command(found[0])}"
        newest = max((pair.newest_python for pair in pairs), key=release, default="")
        here = dotted(tuple(sys.version_info[:2]))
        return f"; no wheel for Python {here}: expected Python {newest} or older" if newest else ""


def has_torch_npu() -> bool:
    """Whether there is a torch_npu, and not one for a torch that is too old for this program."""
    torch = installed_version("torch")
    is_old = bool(torch) and release(torch) < release(oldest("torch"))
    return importlib.util.find_spec("torch_npu") is not None and not is_old


@functools.cache
def known_pairs() -> tuple[Pair, ...]:
    """All lines of the table: newest CANN first, and for each the newest torch first."""
    _, *lines = TABLE.read_text().splitlines()
    return tuple(Pair(*line.split("\t")) for line in lines)


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
            found = re.search(line, _text_of(path))
            if found:
                return found[1].strip()
    # the folder itself: /usr/local/Ascend/cann-8.5.0, /usr/local/Ascend/ascend-toolkit/8.2.RC1
    named = re.fullmatch(r"(?:cann-)?(\d+\.\d.*)", folder.resolve().name)
    return named[1] if named else ""


def install_command(pair: Pair) -> str:
    """The command that installs a pair into this Python.

    On x86_64 pip would take the torch for CUDA, of several GB, which most versions of torch_npu
    refuse. uv knows where the one for the CPU is, and `+cpu` keeps it from taking one for CUDA that
    is installed.
    """
    python = shlex.quote(sys.executable)
    if platform.machine() != "x86_64":
        return f"{python} -m pip install torch=={pair.torch} torch-npu=={pair.torch_npu}"
    packages = f"torch=={pair.torch}+cpu torch-npu=={pair.torch_npu}"
    uv = f"{python} -m uv pip install --python {python} --torch-backend=cpu {packages}"
    return f"{python} -m pip install uv && {uv}"


def _text_of(path: Path) -> str:
    """The file's text; empty if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _listed(pairs: list[Pair]) -> str:
    """`torch 2.9.0 (torch_npu 2.9.0.post8 or 2.9.0.post6), torch 2.7.1 (...)`."""
    by_torch: dict[str, list[str]] = {}
    for pair in pairs:
        by_torch.setdefault(pair.torch, []).append(pair.torch_npu)
    return ", ".join(f"torch {one} (torch_npu {' or '.join(of)})" for one, of in by_torch.items())


if __name__ == "__main__":
    found_here = Installed.find(*sys.argv[1:])
    print(*found_here.advice(), sep="\n", file=sys.stderr)
    sys.exit(EXIT_CANN_TOO_OLD if found_here.cann_is_too_old else 0)
