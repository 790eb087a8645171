"""Preparation: speed in pairs with the yardstick's parser, two processes beside one, memory, disk.

    python bench/preparation.py [--rows 10000000] [--pairs 3] [--yardstick-rows 1000000]

Prepares day files of the demo data set, which it makes first (--keep=DIR: there, or once made found
there), and tells the speed by the program's own clock. Needs Linux: memory is what /proc says.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import HEADER, finish, output, row, start  # noqa: E402
from criteo.meta_file import SPLITS  # noqa: E402

NUM_DAYS, NUM_TABLES, THREADS = 5, 26, 2
FEW_ROWS = 1_000_000  # whose memory that of more rows is held against
YARDSTICK_ROWS = 1_000_000
MAX_IND_RANGE = 10_000_000
LIMIT, PARALLEL = f"--max-ind-range={MAX_IND_RANGE}", "--dataset-multiprocessing"
PAUSE = 0.02  # seconds between looks at the memory
GB = 1e9
PREPARED = re.compile(r"^Prepared \d+ rows .* in [\d.]+ s, (\d+) rows/s", re.M)
PARSED = re.compile(r"^yardstick parse: (\d+) rows/s", re.M)
UNBACKED = re.compile(r"^Pss_(?:Anon|Shmem): +(\d+) kB", re.M)


@dataclass(frozen=True)
class Outcome:
    """What a preparation did: speed, bytes a row of text and on disk, distinct values, memory."""

    rows_per_s: float
    text_bytes: float
    disk_bytes: float
    distinct: int
    peak_gb: float  # 0: not watched


def make_days(folder: Path, num_rows: int) -> Path:
    """A folder of day files with that many rows, made if it is not in `folder`."""
    days = folder / f"days-{num_rows}"
    if not days.is_dir():
        output("data_utils.py", f"--make-demo={days}", f"--demo-rows={num_rows}",
               f"--demo-days={NUM_DAYS}")  # fmt: skip
    return days


def prepare(
    days: Path, flags: Sequence[str], num_processes: int = 1, watched: bool = False
) -> Outcome:
    """Prepare the day files in a folder beside theirs, which is removed again.

    Args:
        days: their folder.
        flags: of data_utils.py.
        num_processes: ranks of one launch, started together.
        watched: look at the memory meanwhile, which slows the program a little.
    """
    os.sync()  # what others wrote is not written out on this one's time
    with tempfile.TemporaryDirectory(dir=days.parent) as folder:
        words = ["data_utils.py", f"--data_path={days}", "--memory-map", *flags]
        words.append(f"--processed-data-file={folder}/rows")
        sizes = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
        programs = [
            start(*words, environment=sizes | {"RANK": str(rank)}, first=_keep_to_two_cores)
            for rank in range(num_processes)
        ]
        peak = watch(programs) if watched else 0
        text = "".join(finish(program) for program in programs)
        told = PREPARED.findall(text)  # by the one of them that finished the data
        assert len(told) == 1, text
        prepared = Path(folder) / "rows.prepared"
        report = json.loads((prepared / "report.json").read_text())
        on_disk = sum((prepared / f"{split}.bin").stat().st_size for split in SPLITS)
    return Outcome(
        float(told[0]),
        report["bytes_of_text"] / report["lines"],
        on_disk / report["rows_kept"],
        sum(report["distinct_values"].values()),
        peak / GB,
    )


def _keep_to_two_cores() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


def watch(programs: Sequence["subprocess.Popen[str]"]) -> int:
    """The most bytes that the programs, together, have until all have ended.

    They print less than a pipe holds, so nobody needs to read it meanwhile.
    """
    peak = 0
    while any(program.poll() is None for program in programs):
        peak = max(peak, sum(memory(program.pid) for program in programs))
        time.sleep(PAUSE)
    return peak


def memory(pid: int) -> int:
    """Bytes without a file behind them, of a process and all below it; shared ones count once."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        below = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has ended
        return 0
    children = [int(child) for child in " ".join(below).split()]
    return 1024 * sum(map(int, UNBACKED.findall(text))) + sum(map(memory, children))


def yardstick_file(days: Path, num_rows: int) -> Path:
    """The first lines of the days as a file: the yardstick holds each row as Python objects.

    All of 10 million rows would take more memory than the machine has. Its speed does not depend
    on how many they are.
    """
    path = days.parent / f"yardstick-{num_rows}"
    with open(path, "wb") as file:
        lines = (line for day in sorted(days.glob("day_*")) for line in open(day, "rb"))  # noqa: SIM115
        file.writelines(islice(lines, num_rows))
    return path


def speed_lines(days: Path, pairs: int, yardstick_rows: int) -> Iterator[str]:
    """Lines of the table: ours on 2 threads and the yardstick, in turn."""
    path = yardstick_file(days, yardstick_rows)
    ours, theirs = [], []
    for _ in range(pairs):
        ours.append(prepare(days, [LIMIT, PARALLEL]))
        text = output("bench/yardstick.py", "parse", path, f"--max-ind-range={MAX_IND_RANGE}")
        theirs.append(float(PARSED.findall(text)[0]))
    ratio = statistics.median(a.rows_per_s / b for a, b in zip(ours, theirs, strict=True))
    speed, parser = statistics.median(a.rows_per_s for a in ours), statistics.median(theirs)
    text_bytes = ours[0].text_bytes
    yield row(f"preparation, {THREADS} threads, rows/s", f"{speed:,.0f}", f"{parser:,.0f}",
              f"{ratio:.2f}", "12, aim 20")  # fmt: skip
    yield row(
        "  MB/s of text", f"{speed * text_bytes / 1e6:.0f}", f"{parser * text_bytes / 1e6:.0f}"
    )
    yield row("  bytes a row on disk", f"{ours[0].disk_bytes:.1f}", wanted="at most 100")


def process_lines(days: Path, pairs: int) -> Iterator[str]:
    """Lines of the table: one process of one thread and two of them, in turn."""
    found = [
        (prepare(days, [LIMIT]).rows_per_s, prepare(days, [LIMIT], num_processes=2).rows_per_s)
        for _ in range(pairs)
    ]
    one, two = (statistics.median(speeds) for speeds in zip(*found, strict=True))
    ratio = statistics.median(b / a for a, b in found)
    yield row("  1 process of 1 thread, rows/s", f"{one:,.0f}")
    yield row("  2 processes of 1 thread, rows/s", f"{two:,.0f}", "", f"{ratio:.2f}", "1.70")


def memory_lines(few: Path, many: Path) -> Iterator[str]:
    """Lines of the table: peak memory at few and many rows, with a bound on the tables and without.

    The ratio of a second line is to the first one.
    """
    for name, flags in ((LIMIT, [LIMIT, PARALLEL]), ("no --max-ind-range", [PARALLEL])):
        smaller = 0.0
        yield row(f"  peak memory, {name}", "")
        for days in (few, many):
            found = prepare(days, flags, watched=True)
            tables = NUM_TABLES * MAX_IND_RANGE * 4 if LIMIT in flags else 16 * found.distinct
            wanted = f"at most {2 + tables / GB:.2f} GB"
            if smaller:
                wanted = f"at most 1.10; {wanted}" if LIMIT in flags else wanted
            rows = int(days.name.removeprefix("days-"))
            what = f"    {rows:,} rows"
            ratio = f"{found.peak_gb / smaller:.2f}" if smaller else ""
            distinct = "" if LIMIT in flags else f" ({found.distinct:,} distinct values)"
            yield row(what, f"{found.peak_gb:.2f} GB", "", ratio, wanted + distinct)
            smaller = found.peak_gb


def lines(folder: Path, num_rows: int, pairs: int, yardstick_rows: int) -> Iterator[str]:
    """All lines of the table, each as soon as it is measured; day files go to `folder`."""
    few = make_days(folder, min(FEW_ROWS, num_rows // 10))
    many = make_days(folder, num_rows)
    prepare(few, [LIMIT, PARALLEL])  # numba compiles once and keeps it
    prepare(few, [PARALLEL])
    yield from speed_lines(many, pairs, yardstick_rows)
    yield from process_lines(many, pairs)
    yield from memory_lines(few, many)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000, help="to prepare, 1000 or more")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each program a line")
    parser.add_argument("--yardstick-rows", type=int, default=YARDSTICK_ROWS, help="for its parser")
    parser.add_argument("--keep", metavar="DIR", help="make the day files there, and keep them")
    options = parser.parse_args()
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        where = Path(options.keep or folder).resolve()
        where.mkdir(parents=True, exist_ok=True)
        for line in lines(where, options.rows, options.pairs, options.yardstick_rows):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
