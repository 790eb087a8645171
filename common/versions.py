"""The oldest Python and packages that this program runs with, checked before anything else.

So is what the packages read in the environment when they are imported.

A Python that is too old has to get through this module, so it uses nothing new.
"""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from common.environment import problem_of_threads

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
OLDEST_PYTHON = (3, 10)
MOST_OF_REASON = 200  # letters of an error: protobuf's has a page of advice
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


def oldest(package: str, requirements: Path = REQUIREMENTS) -> str:
    """The version of a package that a file of requirements asks for at least."""
    found = re.search(rf"^{package}>=([\d.]+)", requirements.read_text(), re.M)
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


def problem_of_package(package: str, requirements: Path = REQUIREMENTS) -> str:
    """What is wrong with a package; empty if it is here and new enough.

    It is not imported, which may take seconds.

    Args:
        package: its name in the requirements.
        requirements: the file that says which version is the oldest.
    """
    from importlib import util

    least, version = oldest(package, requirements), installed_version(package)
    ask = f"expected {least} or newer: {_install(requirements)}"
    if not version:  # a package that was not installed by pip may have no metadata
        return "" if util.find_spec(package) else f"{package} is not installed: {ask}"
    return f"{package} {version} is too old: {ask}" if release(version) < release(least) else ""


def problem_of_import(
    package: str, import_it: "Callable[[], object]", requirements: Path = REQUIREMENTS
) -> str:
    """What is wrong with a package that a run is going to import; empty if it can be.

    A package that is there may still fail with any error: files are missing, or it does not fit the
    packages that it imports.

    Args:
        package: its name in the requirements.
        import_it: imports all modules that the run will need of it.
        requirements: the file that says which version is the oldest.
    """
    problem = problem_of_package(package, requirements)
    if problem:
        return problem
    try:
        import_it()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:MOST_OF_REASON]}"
        # what pip already has stays, but for the package: no other torch or numpy comes with it
        anew = f"{sys.executable} -m pip uninstall -y {package} && {_install(requirements)}"
        version = installed_version(package)
        return f"{package} {version} cannot be imported ({reason}): install it anew: {anew}"
    return ""


def _install(requirements: Path) -> str:
    return f"{sys.executable} -m pip install -r {requirements}"
