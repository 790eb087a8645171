"""Which listeners a run has: the flags say what its first rank tells; the others are silent."""

import argparse
from pathlib import Path

from devices.card import device_name
from ranks.process import Process
from reporting.console import Console
from reporting.metrics_file import MetricsFile
from reporting.mlperf_log import MLPerfLog
from reporting.mlperf_submission import writes_events
from reporting.progress_bar import Bars
from reporting.report import ReportFile
from reporting.reporter import Listeners, Reporter
from reporting.tensor_board import TensorBoard


def make_reporter(options: argparse.Namespace, process: Process) -> Reporter:
    """The reporter of this rank: the first one tells, the others are silent.

    MLPerf's events come before the lines of the same fact. The page comes last: it reads the
    metrics file, and is written when the others are complete.
    """
    if not process.is_first:
        return Reporter()
    device = process.device
    console = Console(options.mlperf_logging, options.print_time, options.print_wall_time)
    listeners: list[Reporter] = [Bars()]  # a line that is printed draws them anew
    if writes_events(options):
        devices = f"{process.world_size} x {device_name(device)}"
        listeners.append(MLPerfLog(options, devices, console.say))
    listeners += [console, TensorBoard(options.tensor_board_filename, device, console.say)]
    metrics = Path(options.metrics_file) if options.metrics_file else None
    page = None
    if options.report:  # before the metrics file is appended to: it looks at what is there
        page = ReportFile(Path(options.report), metrics, device, console.say)
    if metrics:
        listeners.append(MetricsFile(metrics, device, console.say))
    return Listeners(*listeners, *([page] if page else []))
