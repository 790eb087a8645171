"""Training speed on one GPU: rows a second of three models, and what a step spends its time on.

    python bench/gpu.py [--parts program,replay] [--only 2048] [--out DIR] [--data DIR]

One process measures everything with the program's own trainer, on prepared rows in the page cache
that are read again and again. A measurement that fails or hangs costs no other one (bench/guard.py
says how). docs/gpu.md says what the parts are. --device=cpu tries this program where there is no
GPU.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dlrm_s_pytorch  # noqa: E402, F401  (before torch: common/compiled.py says why)

# isort: split
import torch  # noqa: E402

from bench import gpu_trainer  # noqa: E402
from bench.common import HEADER, commit, listed, one_of  # noqa: E402
from bench.gpu_cases import (  # noqa: E402
    NUM_ROWS,
    ROWS_OF_A_LINE,
    TABLES,
    TARGETS,
    VARIANTS,
    Setting,
    Target,
    make_rows,
    threads,
)
from bench.gpu_lines import lines, verdict  # noqa: E402
from bench.gpu_roofline import (  # noqa: E402
    YARDSTICK_SECONDS,
    measure_roofline,
    measure_yardstick,
    run_yardstick,
)
from bench.gpu_trainer import Trainers  # noqa: E402
from bench.guard import (  # noqa: E402
    EXIT_NO_DEVICE,
    Measurement,
    Measuring,
    Record,
    serve,
    supervise,
    why,
)
from common.flags import number_in  # noqa: E402
from devices.find import versions  # noqa: E402

SECONDS = {  # that a part may take, the making of its trainer included
    "program": 60.0,  # the first one compiles the kernels
    "steps": 25.0,
    "replay": 25.0,
    "loader": 25.0,
    "summed": 30.0,
    "profile": 40.0,
    "variants": 60.0,
    "roofline": 20.0,
    "yardstick": YARDSTICK_SECONDS + 5,
}
DEFAULT_PARTS = "program,steps,replay,loader,summed,yardstick"
OF_A_TRAINER = {
    "program": gpu_trainer.measure_program,
    "steps": gpu_trainer.measure_steps,
    "replay": gpu_trainer.measure_replay,
    "loader": gpu_trainer.measure_loader,
    "profile": gpu_trainer.measure_profile,
}
ONLY_CUDA = ("replay", "summed")
RESULTS = "gpu.jsonl"
# torch sets these where it knows of CUDA graphs: the profiler's library may crash if it is ended
# and begun anew beside them
PROFILER = {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}


def names(setting: Setting, options: argparse.Namespace) -> Iterator[tuple[Target, str]]:
    """(target, part) of all measurements that are asked for, in their order."""
    for target in TARGETS:
        if options.only not in (0, target.case.batch):
            continue
        for part in options.parts:
            if part in ONLY_CUDA and setting.device != "cuda":
                continue  # there are no graphs, and no kernels in Triton
            yield from ((target, name) for name in (VARIANTS if part == "variants" else [part]))


def name_of(target: Target, part: str) -> str:
    """The name of a measurement."""
    return f"{target.case.name}: {part}"


def measurements(
    setting: Setting, options: argparse.Namespace, trainers: Trainers
) -> Iterator[Measurement]:
    """Those of `options.measure`, in their order."""
    for target, part in names(setting, options):
        if name_of(target, part) in options.measure:
            yield measurement(setting, target, part, trainers)


def measurement(setting: Setting, target: Target, part: str, trainers: Trainers) -> Measurement:
    """How a part of a target is measured."""

    def work() -> Record:
        if part in OF_A_TRAINER:
            return OF_A_TRAINER[part](trainers.get(target.case, setting.flags))
        if part == "summed":
            flags = (*setting.flags, "--sum-equal-rows=true")
            return gpu_trainer.measure_steps(trainers.get(target.case, flags))
        if part in VARIANTS:
            return gpu_trainer.measure_program(trainers.get(target.case, VARIANTS[part]))
        trainers.drop()
        return (measure_roofline if part == "roofline" else measure_yardstick)(setting, target.case)

    limit = SECONDS["variants" if part in VARIANTS else part]
    return Measurement(name_of(target, part), limit, work)


# ---------------------------------------------------------------- the table


def supervised(setting: Setting, options: argparse.Namespace, argv: Sequence[str]) -> None:
    """Print each measurement's lines when it is done, and keep what it found."""
    asked = {name_of(*one): one for one in names(setting, options)}
    known = earlier(setting)

    def command(left: Sequence[str]) -> list[str]:
        own = [f"--measure={json.dumps(list(left))}", f"--data={setting.folder}"]
        return [sys.executable, "-u", str(Path(__file__).resolve()), *argv, *own]

    measuring = Measuring(command, Path.cwd(), {"OMP_NUM_THREADS": str(threads()), **PROFILER})
    records = supervise(measuring, list(asked))
    for record in records:
        target, part = asked.pop(record["name"])
        known[record["name"]] = record
        keep(setting, record)
        program = known.get(name_of(target, "program"), {})
        for line in lines(target, part, record, {} if "failed" in program else program):
            print(line, flush=True)
        if "program" in options.parts and not any(one is target for one, _ in asked.values()):
            tell_verdict(target, known)


def tell_verdict(target: Target, known: dict[str, Record]) -> None:
    """Print what keeps the program from its goal, if its speed was measured."""
    found = {part: known.get(name_of(target, part), {}) for part in OF_A_TRAINER}
    speeds = {
        part: one["rows_per_second"] for part, one in found.items() if "rows_per_second" in one
    }
    if "program" in speeds:
        print(verdict(target, speeds), flush=True)


def earlier(setting: Setting) -> dict[str, Record]:
    """What earlier calls for the same commit have left in the folder of results, by name."""
    if setting.out is None or not (setting.out / RESULTS).is_file():
        return {}
    records = [json.loads(line) for line in (setting.out / RESULTS).read_text().splitlines()]
    return {one["name"]: one for one in records if one["commit"] == commit()}


def keep(setting: Setting, record: Record) -> None:
    """Append a record to the results."""
    if setting.out is not None:
        with open(setting.out / RESULTS, "a", encoding="utf-8") as file:
            file.write(json.dumps(record | {"commit": commit()}) + "\n")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    flag, number = parser.add_argument, number_in(int, 1)
    parts = listed(one_of(*SECONDS))
    flag("--parts", type=parts, default=DEFAULT_PARTS, help=f"some of {', '.join(SECONDS)}")
    flag("--only", type=int, default=0, help="one batch size")
    flag("--out", type=Path, metavar="DIR", help=f"keep results there: {RESULTS}, traces")
    flag("--data", type=Path, metavar="DIR", help="make the rows there once; default: each time")
    flag("--rows", type=number, default=NUM_ROWS, help="distinct rows")
    flag("--rows-a-line", type=number, default=ROWS_OF_A_LINE, help="rows between two log lines")
    flag("--most-table-rows", type=number, default=max(TABLES), help="larger tables are cut to it")
    flag("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this program")
    flag("--measure", type=json.loads, metavar="NAMES", help="measure these in this process")
    flag("--yardstick", metavar="TABLES", help="run the yardstick on the device with these tables")
    flag("words", nargs="*", help="the yardstick's")
    return parser.parse_args(argv)


def measure_all(options: argparse.Namespace, argv: Sequence[str], folder: Path) -> int:
    """Measure in this process what `options.measure` names, or in others all that is asked for."""
    tables = [min(rows, options.most_table_rows) for rows in TABLES]
    sizes = (options.rows, options.rows_a_line)
    setting = Setting(options.device, folder, options.out, tables, *sizes)
    if options.measure:
        torch.set_num_threads(threads())
        trainers = Trainers(setting)
        return serve(measurements(setting, options, trainers), trainers.drop)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    facts = versions(torch.device(options.device)).items()
    print(f"commit {commit()}; " + ", ".join(f"{name} {value}" for name, value in facts))
    begin = time.perf_counter()
    if make_rows(setting):
        print(f"{setting.num_rows:,} rows made in {time.perf_counter() - begin:.1f} s")
    print(HEADER, flush=True)
    supervised(setting, options, argv)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("error: bench/gpu.py: no CUDA device found (--device=cpu tries it)", file=sys.stderr)
        return 2
    if options.yardstick:
        run_yardstick(options.device, options.yardstick, options.words)
        return 0
    try:
        if options.data is not None:
            return measure_all(options, argv, options.data)
        with tempfile.TemporaryDirectory() as folder:
            return measure_all(options, argv, Path(folder))
    except OSError as error:
        print(f"error: bench/gpu.py: {why(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    exit_status = main()
    if exit_status == EXIT_NO_DEVICE:
        os._exit(exit_status)  # an exit that cleans up would wait for the card
    sys.exit(exit_status)
