"""What is known of a run at its end, for the page of --report."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from reporting.history import History
from reporting.memory_use import MemoryUse
from reporting.phase_table import Row
from reporting.records import EvaluationRecord
from reporting.run_facts import RunFacts
from reporting.score_curves import ScoreCurves


@dataclass
class Collected:
    """What is known of a run at its end.

    Attributes:
        facts: what was known before its first step.
        history: log lines and evaluations by step.
        began: seconds since the epoch (1970).
        seconds: how long it took, after data was prepared.
        is_training: whether it has trained, or evaluated only.
        first_step: steps that were done when it began.
        is_history_known: whether the history holds steps before first_step.
        last_evaluation: the last one.
        curves: those of its scores; None: there are none.
        phases: the rows of --enable-profiling's table.
        memory: at the end.
        error: what has ended it, if it has not ended by itself.
    """

    facts: RunFacts = field(default_factory=RunFacts)
    history: History = field(default_factory=History)
    began: float = 0.0
    seconds: float = 0.0
    is_training: bool = False
    first_step: int = 0
    is_history_known: bool = False
    last_evaluation: EvaluationRecord | None = None
    curves: ScoreCurves | None = None
    phases: Sequence[Row] = ()
    memory: MemoryUse | None = None
    error: str = ""
