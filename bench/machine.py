"""The machine that is measured: processor, memory, GPU, and the versions of what drives it.

python bench/machine.py
"""

import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from bench.common import commit  # noqa: E402
from common.versions import installed_version  # noqa: E402

PACKAGES = ("triton", "numpy", "numba", "pytest", "pytest-xdist", "mlperf-logging")
CARD = "name,driver_version,memory.total,clocks.sm,clocks.mem,temperature.gpu,power.draw"
SECONDS = 20.0  # that a command of the driver or of CUDA may take


def machine() -> str:
    """The machine, the software and the commit, a line each."""
    model = re.search(r"^model name\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.M)
    memory = re.search(r"^MemTotal:\s*(\d+)", _read("/proc/meminfo"), re.M)
    gib = f", {int(memory[1]) / 2**20:.0f} GiB" if memory else ""
    name = model[1].strip() if model else platform.processor()
    return "\n".join([
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {name}, {os.cpu_count()} cores{gib}",
        f"torch {torch.__version__}, Python {platform.python_version()}, commit {commit()}",
    ])  # fmt: skip


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).is_file() else ""


def said(*command: str) -> str:
    """What a command prints, or why it prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{Path(command[0]).name}: {error}"
    return (done.stdout.strip() or done.stderr.strip()).replace("\n", "; ")


def assemblers() -> list[Path]:
    """The programs of Triton's that make machine code for a GPU."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return []
    return sorted(Path(found.origin).parent.glob("backends/nvidia/bin/ptxas*"))


def main() -> int:
    """Print all of it."""
    print(machine())
    print(", ".join(f"{name} {installed_version(name) or 'none'}" for name in PACKAGES))
    print(f"torch is built for CUDA {torch.version.cuda}")
    print(
        f"nvidia-smi ({CARD}): {said('nvidia-smi', f'--query-gpu={CARD}', '--format=csv,noheader')}"
    )
    for path in assemblers():
        print(f"{path.name}: {said(str(path), '--version').rpartition('; ')[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
