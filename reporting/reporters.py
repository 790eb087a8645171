"""Which reporter a run has: the flags say what its first rank tells; the other ranks are silent."""

import argparse

from devices.card import device_name
from ranks.process import Process
from reporting.mlperf_log import MLPerfLog
from reporting.mlperf_submission import writes_events
from reporting.reporter import Console, Reporter


def make_reporter(options: argparse.Namespace, process: Process) -> Reporter:
    """The reporter of this rank: the first one prints, the others are silent."""
    if not process.is_first:
        return Reporter()
    if writes_events(options):
        return MLPerfLog(options, f"{process.world_size} x {device_name(process.device)}")
    return Console(options.mlperf_logging, options.print_wall_time, options.tensor_board_filename)
