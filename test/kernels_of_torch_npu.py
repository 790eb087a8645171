"""Writes columns of operators.tsv: for which operators of torch torch_npu has kernels.

    pip download --no-deps --dest .wheels torch-npu==2.13.0
    python test/kernels_of_torch_npu.py .wheels/torch_npu-2.13.0-*.whl

It needs gcc, no NPU and no CANN, and a Python that has torch of the wheel's release; from 2.13 on
one that is built for the CPU, because beside one built for CUDA the import of torch_npu ends the
process ("Duplicated key"). torch_npu is imported beside empty libraries that take CANN's place, and
torch's dispatcher is asked what each operator does with tensors on an NPU:

    kernel      torch_npu has a kernel of its own
    default     one piece of code for all devices, made of operators that the device has
    composite   made of other operators, also for the gradient
    fallback    torch_npu copies the tensors to the CPU, computes there, and copies the result back
    -           this release of torch has no such operator
"""

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata, util
from pathlib import Path

from tables_of_torch_npu import numbers_of, read, text_of, version_of

TABLE = Path(__file__).with_name("operators.tsv")
ABSENT = "-"
# torch's words, as _dispatch_dump_table prints them
KINDS = {
    "kernel": "kernel",
    "default backend kernel": "default",
    "math kernel": "composite",
    "backend fallback": "fallback",
}
TOOLS = ("gcc", "ldd")
PYTHON_S_OWN = re.compile(r"_?Py[A-Z_]")  # names that the Python which runs has
NOT_FOUND = re.compile(r"(lib\w+\.so[.\d]*)(?: => not found|: cannot open shared object)")


def why_not(wheel: Path) -> str:
    """Why this Python cannot import the wheel; empty if it can."""
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return f"{missing[0]} is not installed, and makes what takes CANN's place"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if f"-{python}-" not in wheel.name or platform.machine() not in wheel.name:
        return f"{wheel.name} is for another Python or machine: {python}, {platform.machine()} here"
    try:
        torch = metadata.version("torch").partition("+")[0]
    except metadata.PackageNotFoundError:
        torch = "none"
    if numbers_of(torch) != numbers_of(version_of(wheel))[:3]:
        return f"{wheel.name} goes with another torch: found {torch}"
    return ""


def kinds_of(wheel: Path) -> dict[str, str]:
    """{operator of torch: one of KINDS}.

    Raises:
        RuntimeError: torch_npu could not be imported.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder / "site")
        stubs, result = folder / "stubs", folder / "kinds.tsv"
        stubs.mkdir()
        _make_stubs(folder / "site" / "torch_npu", stubs)
        error = _import_and_ask(folder / "site", stubs, result)
        while (found := NOT_FOUND.search(error)) and not (stubs / found[1]).exists():
            _make_library(stubs / found[1], [])  # one that torch_npu opens by its name
            error = _import_and_ask(folder / "site", stubs, result)
        if error:
            lines = error.splitlines()  # C++ gives its reason first, Python last
            reason = next((line.strip() for line in lines if "what(): " in line), lines[-1])
            raise RuntimeError(f"{wheel.name} is not imported: {reason}")
        return dict(line.split("\t") for line in result.read_text().splitlines())


def _make_stubs(package: Path, stubs: Path) -> None:
    """Libraries that have the names and the symbols which the package's own ones do not find."""
    torch = Path(util.find_spec("torch").origin).parent / "lib"
    settings = os.environ | {"LD_LIBRARY_PATH": str(torch), "LC_ALL": "C"}
    libraries, symbols = set(), set()
    for own in (*package.glob("_C*.so"), *package.glob("lib/*.so")):
        done = subprocess.run(["ldd", "-r", own], capture_output=True, text=True, env=settings)
        libraries |= set(NOT_FOUND.findall(done.stdout))
        symbols |= set(re.findall(r"undefined symbol: (\w+)", done.stdout + done.stderr))
    symbols = {symbol for symbol in symbols if not PYTHON_S_OWN.match(symbol)}
    for library in libraries:  # symbols are looked up in all of them
        _make_library(stubs / library, sorted(symbols) if library == min(libraries) else [])


def _make_library(path: Path, symbols: list[str]) -> None:
    """A library with functions that return 0, and zeros for C++'s descriptions of types."""
    lines = [
        f"char {symbol}[4096];"
        if symbol.startswith("_ZT")
        else f"void *{symbol}(void) {{return 0;}}"
        for symbol in symbols
    ]
    command = ["gcc", "-shared", "-fPIC", "-fno-builtin", "-w", "-xc", "-o", path, "-"]
    subprocess.run(command, input="\n".join(lines), text=True, check=True)


def _import_and_ask(site: Path, stubs: Path, result: Path) -> str:
    """Let a new process write the operators to the file `result`; returns what went wrong."""
    settings = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(site), str(Path(__file__).parent)]),
        "LD_LIBRARY_PATH": str(stubs),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "CUDA_VISIBLE_DEVICES": "",  # torch_npu refuses a torch that sees a GPU
    }
    code = f"import kernels_of_torch_npu; kernels_of_torch_npu.write_kinds({str(result)!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=settings, cwd=site)
    return "" if done.returncode == 0 else done.stderr.strip() or f"status {done.returncode}"


def write_kinds(result: str) -> None:
    """Import torch_npu and write a line for each operator of torch's own: name, tab, kind."""
    import torch

    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    importlib.import_module("torch_npu")  # it adds operators to aten
    with open(result, "w") as file:
        for name in names:
            table = torch._C._dispatch_dump_table(name)
            found = re.search(r"^PrivateUse1: .*\[(.*)\]$", table, re.M)
            print(name.removeprefix("aten::"), KINDS[found[1]], sep="\t", file=file)


def main(wheels: list[Path]) -> int:
    reasons = [reason for reason in map(why_not, wheels) if reason]
    if reasons:
        print(reasons[0], file=sys.stderr)
        return 2
    columns = read(TABLE)
    try:
        columns |= {version_of(wheel): kinds_of(wheel) for wheel in wheels}
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    names = sorted(set().union(*columns.values()))
    TABLE.write_text(text_of(columns, names, ABSENT))
    return 0


if __name__ == "__main__":
    sys.exit(main([Path(path) for path in sys.argv[1:]]))
