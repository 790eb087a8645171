"""What a run tells: log lines, console, metrics, phases, results."""
