"""Prints the lines of requirements files that this Python does not meet.

Needs nothing but Python and pip.
"""

import gc
import os
import sys
from importlib import metadata

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")


def is_met(line):
    """Is the requirement installed, in a version that it allows, and torch importable?

    A vendor's 2.6.0a0+df5bbc0 counts as 2.6.0.
    """
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.version import Version

    requirement = Requirement(line)
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return False
    if not version:
        return False
    if requirement.name == "torch":
        try:
            import torch  # noqa: F401
        except (ImportError, OSError):
            return False
    return requirement.specifier.contains(Version(version).base_version)


def main():
    gc.disable()  # importing torch makes half a million objects; looking for garbage takes a third
    for path in sys.argv[1:]:
        with open(path) as file:
            lines = [line.partition("#")[0].strip() for line in file]
        for line in filter(None, lines):
            if not is_met(line):
                print(line)
    gc.freeze()  # Python's end would look for garbage too


if __name__ == "__main__":
    main()
