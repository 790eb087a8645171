"""What is known of a run before its first step: flags, machine, versions, data, tables."""

import argparse
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from devices.card import device_name
from ranks.placement import LogicalTable, Placement
from ranks.process import Process

ROOT = Path(__file__).resolve().parent.parent
SECONDS_FOR_GIT = 5
_BYTES_OF_VALUE = 4  # tables are float32


@dataclass(frozen=True)
class Flag:
    """A flag of the command line, with its value and default as text."""

    name: str
    value: str
    default: str

    @property
    def is_default(self) -> bool:
        """Whether the run has the default."""
        return self.value == self.default


@dataclass(frozen=True)
class TableFacts:
    """An embedding table: its ids, numbers in a vector, bytes of its weights in all and by rank."""

    num_rows: int
    dim: int
    num_bytes: int
    bytes_on: tuple[int, ...]


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run before its first step.

    Attributes:
        flags: all flags, in the order of --help.
        machine, versions: names and values.
        data: names and values that are known of the data.
        missing: share of the lines without a value, by column of Criteo data.
        tables: all embedding tables.
        num_ranks: ranks of the run.
    """

    flags: Sequence[Flag] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, float] = field(default_factory=dict)
    tables: Sequence[TableFacts] = ()
    num_ranks: int = 1


def find_facts(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    tables: Sequence[TableFacts],
    rows: Mapping[str, int],
    process: Process,
    data_report: Mapping[str, Any],
) -> RunFacts:
    """The facts of this run; takes milliseconds.

    Args:
        parser: the parser of the command line.
        options: the parsed command line.
        tables: all embedding tables.
        rows: number of rows of each split.
        process: this rank.
        data_report: report.json of prepared data; empty for other data.
    """
    return RunFacts(
        flags=_flags(parser, options),
        machine=_machine(process),
        versions=_versions(process.device),
        data=_data(options, rows, data_report),
        missing=data_report.get("missing_rate", {}),
        tables=tables,
        num_ranks=process.world_size,
    )


def _flags(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Flag]:
    defaults, values = vars(parser.parse_args([])), vars(options)
    actions = [action for action in parser._actions if action.dest in values]
    return [
        Flag(action.option_strings[0], _text(values[action.dest]), _text(defaults[action.dest]))
        for action in actions
    ]


def _text(value: Any) -> str:
    """A flag's value as it is typed."""
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "-".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _machine(process: Process) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "System": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "CPU": _cpu_name(),
        "Cores": f"{cores} for this process; threads of torch: {torch.get_num_threads()}",
        "Memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB",
        "Device": device_name(process.device),
        "Ranks": str(process.world_size),
    }
    if process.world_size > 1:
        facts["Backend"] = process.backend
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _versions(device: torch.device) -> dict[str, str]:
    facts = {
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    if device.type == "npu":
        import torch_npu

        facts["torch_npu"] = str(torch_npu.__version__)
    elif device.type == "cuda":
        facts["CUDA"] = str(torch.version.cuda)
    if commit := _commit():
        facts["This program"] = f"commit {commit}"
    return facts


def _commit() -> str:
    """The program's git commit, with `-dirty` if files have changed; empty if it has none."""
    if not (ROOT / ".git").exists():  # it may lie in the repository of something else
        return ""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_FOR_GIT)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _data(
    options: argparse.Namespace, rows: Mapping[str, int], report: Mapping[str, Any]
) -> dict[str, str]:
    kind = options.data_generation
    facts = {"Rows from": "Criteo's format, prepared" if kind == "dataset" else f"{kind} data"}
    rows = report.get("rows", rows)  # of all splits
    facts |= {f"Rows, {split}": f"{count:,}" for split, count in rows.items()}
    if kind != "dataset":
        most = options.num_indices_per_lookup
        number = "" if options.num_indices_per_lookup_fixed else "at most "
        facts["Ids of a bag"] = f"{number}{most:,}"
    if report:
        bad = sum(report["bad_lines"].values())
        facts |= {
            "Lines of text": f"{report['lines']:,}, {bad:,} of them bad",
            "Size of the text": f"{report['bytes_of_text'] / 1e9:,.3f} GB",
            "Label 1, of the lines": f"{100 * report['label_rate']:.3f} %",
            "Label 1, of the rows kept": f"{100 * report['label_rate_kept']:.3f} %",
        }
    return facts


def facts_of_tables(tables: Sequence[LogicalTable], placement: Placement) -> list[TableFacts]:
    """The facts of a model's tables, whose rows are placed on ranks."""
    found = []
    for number, table in enumerate(tables):
        parts = [part for part in placement.parts if part.matrix.table == number]
        bytes_on = tuple(
            sum(_BYTES_OF_VALUE * part.num_values for part in parts if part.is_on(rank))
            for rank in range(placement.world_size)
        )
        num_bytes = _BYTES_OF_VALUE * table.num_values
        found.append(TableFacts(table.num_rows, table.dim, num_bytes, bytes_on))
    return found
