"""The oldest Python and packages that this program runs with, checked before anything else.

So is what the packages read in the environment when they are imported.

A Python that is too old has to get through this module, so it uses nothing new.
"""

import functools
import re
import sys
from pathlib import Path

from common.environment import problem_of_threads

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
OLDEST_PYTHON = (3, 10)
EXIT_USER_ERROR = 2  # as in common/errors.py, which older Pythons cannot import


def demand(program: str, *packages: str) -> None:
    """End a program in one line if Python or a package is missing or too old, or threads are wrong.

    Args:
        program: `__name__` of the module that asks: a program ends with status 2.
        packages: what it cannot do without, by names in requirements.txt.

    Raises:
        ImportError: the module is imported by another program.
    """
    old_python = problem_of_python()
    problem = old_python or problem_of_threads()
    problem = problem or next(filter(None, map(problem_of_package, packages)), "")
    if not problem:
        return
    if program != "__main__":
        raise ImportError(problem)
    if old_python:
        print("error: " + problem, file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    from common.errors import report_once  # older Pythons cannot import it

    sys.exit(report_once(problem))


def problem_of_python() -> str:
    """Why this Python cannot be used; empty if it can."""
    if sys.version_info >= OLDEST_PYTHON:
        return ""
    here, least = dotted(tuple(sys.version_info[:3])), dotted(OLDEST_PYTHON)
    return f"Python {here} is too old: expected {least} or newer; this one is {sys.executable}"


@functools.cache
def _requirements() -> str:
    return REQUIREMENTS.read_text()


def oldest(package: str) -> str:
    """The version of a package that requirements.txt asks for at least."""
    found = re.search(rf"^{package}>=([\d.]+)", _requirements(), re.M)
    return found.group(1) if found else "0"


def installed_version(package: str) -> str:
    """The version of a package; empty if it is not installed, or its metadata does not say."""
    from importlib import metadata  # Python 3.7 has none

    try:
        return metadata.version(package) or ""
    except metadata.PackageNotFoundError:
        return ""


def release(version: str) -> "tuple[int, ...]":
    """The numbers of a version: (2, 13, 0) for `2.13.0+cpu`, `2.13.0.post2` and `2.13.0a0`."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else ()


def dotted(numbers: "tuple[int, ...]") -> str:
    """`2.13.0` for (2, 13, 0)."""
    return ".".join(map(str, numbers))


def problem_of_package(package: str) -> str:
    """What is wrong with a package; empty if it is here and new enough."""
    from importlib import util

    least, version = oldest(package), installed_version(package)
    ask = f"expected {least} or newer: {sys.executable} -m pip install -r {REQUIREMENTS}"
    if not version:  # a package that was not installed by pip may have no metadata
        return "" if util.find_spec(package) else f"{package} is not installed: {ask}"
    return f"{package} {version} is too old: {ask}" if release(version) < release(least) else ""
