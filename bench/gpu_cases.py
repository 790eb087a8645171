"""What is measured on a GPU: the models, their flags, their rows, and what the user asks for."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.training import Case, write_meta
from criteo.columns import FIRST_SPARSE, NUM_FIELDS, Bytes
from criteo.row_layout import Layout

NUM_ROWS = 10_000_000
CRITEO = (
    "10000000-32448-15529-7289-19879-3-6611-1384-62-10000000-1262224-284369-10-2208-10424-89-4-963"
    "-14-10000000-6919756-10000000-397757-11440-103-35"
)
TABLES = [int(rows) for rows in CRITEO.split("-")]
FAST = ("--amp=bf16", "--cuda-graphs")
VARIANTS: dict[str, tuple[str, ...]] = {
    "float32": (),
    "TF32": ("--tf32",),
    "bf16": ("--amp=bf16",),
    "fp16, graphs": ("--amp=fp16", "--cuda-graphs"),
    "bf16, graphs, no Triton": (*FAST, "--triton=false"),
    "bf16, graphs, no copy stream": (*FAST, "--copy-stream=false"),
    "bf16, graphs, equal rows summed": (*FAST, "--sum-equal-rows=true"),
    "bf16, graphs, rwsadagrad": (*FAST, "--optimizer=rwsadagrad"),
}
LINES, ROWS_OF_A_LINE = 12, 2_000_000  # log lines of a run; rows of each
LARGEST_INTEGER = 200  # of the 13 integers
ROWS_OF_A_PIECE = 250_000  # drawn and packed by a thread at a time
THREADS = 8
FOLDER = "kaggleAdDisplayChallenge_processed.prepared"


@dataclass(frozen=True)
class Target:
    """A line of the table: a model, and rows/s to reach and to aim at."""

    case: Case
    wanted: float
    aim: float


TARGETS = (
    Target(Case("32768, D 64", 32768, 64, "13-512-256-64", "512-512-256-1", 0, 0), 10e6, 20e6),
    Target(
        Case("65536, D 128", 65536, 128, "13-512-256-128", "1024-1024-512-256-1", 0, 0), 6e6, 8e6
    ),
    Target(Case("2048, D 64", 2048, 64, "13-512-256-64", "512-512-256-1", 0, 0), 4e6, 8e6),
)


@dataclass(frozen=True)
class Setting:
    """What the measurements share.

    Attributes:
        device: cuda or cpu.
        folder: of the prepared rows.
        out: of the results; None: none are kept.
        tables: rows of each table.
        num_rows: prepared.
        rows_a_line: rows between two log lines, and of a series of steps.
    """

    device: str
    folder: Path
    out: Path | None
    tables: list[int]
    num_rows: int
    rows_a_line: int

    @property
    def flags(self) -> tuple[str, ...]:
        """Those that make the device fast."""
        return FAST if self.device == "cuda" else ()

    def steps_a_line(self, case: Case) -> int:
        """Steps between two log lines, and of a series."""
        return max(1, self.rows_a_line // case.batch)


def program_flags(setting: Setting, case: Case, flags: tuple[str, ...]) -> list[str]:
    """The command line of a run of the program, as a user would give it."""
    print_freq = setting.steps_a_line(case)
    epochs = -(-LINES * print_freq * case.batch // setting.num_rows)
    return [
        f"--data_path={setting.folder}",
        "--memory-map",
        "--loss-function=bce",
        "--learning-rate=0.1",
        "--print-time",
        "--performance",
        "--tensor-board-filename=",
        f"--arch-sparse-feature-size={case.dim}",
        f"--arch-mlp-bot={case.bottom}",
        f"--arch-mlp-top={case.top}",
        f"--mini-batch-size={case.batch}",
        f"--print-freq={print_freq}",
        f"--nepochs={epochs}",
        *(["--use-gpu"] if setting.device == "cuda" else []),
        *flags,
    ]


def threads() -> int:
    """Threads of the host."""
    return min(THREADS, os.cpu_count() or 1)


def make_rows(setting: Setting) -> bool:
    """Prepared rows in the setting's folder, as the yardstick draws its own: low ids are frequent.

    Returns:
        Whether they were made; they are kept if those of an earlier call are the same.
    """
    folder = setting.folder / FOLDER
    if _are_there(folder, setting):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    largest = [1, *[LARGEST_INTEGER - 1] * (FIRST_SPARSE - 1), *(n - 1 for n in setting.tables)]
    layout = Layout.holding(largest)
    begins = range(0, setting.num_rows, ROWS_OF_A_PIECE)
    with open(folder / "train.bin", "wb") as file, ThreadPoolExecutor(threads()) as pool:
        for piece in pool.map(lambda begin: _draw(setting, layout, begin), begins):
            file.write(piece)
    write_meta(folder, layout, setting.tables, setting.num_rows)
    return True


def _are_there(folder: Path, setting: Setting) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(meta["counts"] == setting.tables and meta["rows"]["train"] == setting.num_rows)


def _draw(setting: Setting, layout: Layout, begin: int) -> Bytes:
    """The rows from `begin` on of a piece, packed; a generator of its own draws them."""
    num_rows = min(ROWS_OF_A_PIECE, setting.num_rows - begin)
    random = np.random.default_rng([0, begin])
    columns = np.empty((NUM_FIELDS, num_rows), np.int32)
    columns[0] = random.integers(0, 2, num_rows, dtype=np.int32)
    for column in range(1, FIRST_SPARSE):
        columns[column] = random.integers(0, LARGEST_INTEGER, num_rows, dtype=np.int32)
    for column, rows in enumerate(setting.tables, FIRST_SPARSE):
        drawn = random.random(num_rows)
        columns[column] = drawn * drawn * drawn * rows
    return layout.pack(columns)
