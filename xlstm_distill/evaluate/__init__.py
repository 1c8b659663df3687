"""Evaluation: benchmarks, fidelity to the teacher, Win-and-Tie.

wintie    alpha*, coverage, recovery, exact
tasks     request sets: multiple choice, bits per byte
fidelity  KL, agreement and perplexity by position, with paired intervals
branches  students of which a part is silenced, for fidelity
compare   result files of teacher, students and control, side by side
"""

from .branches import branches
from .compare import Comparison, compare
from .fidelity import Fidelity, Interval, fidelity, paired_bootstrap
from .tasks import (
    DEFAULT_TASKS,
    evaluate,
    load_task,
    passages,
    questions,
    read_results,
    write_results,
)
from .wintie import WinTie, split_groups, win_and_tie

__all__ = [
    "DEFAULT_TASKS",
    "Comparison",
    "Fidelity",
    "Interval",
    "WinTie",
    "branches",
    "compare",
    "evaluate",
    "fidelity",
    "load_task",
    "paired_bootstrap",
    "passages",
    "questions",
    "read_results",
    "split_groups",
    "win_and_tie",
    "write_results",
]
