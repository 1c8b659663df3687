"""Evaluation: benchmarks, fidelity to the teacher, Win-and-Tie.

results        result files, read and written
scores         scores from mappings, tables and result files
comparable     which scores may stand side by side
uncertainty    bootstrap draws, intervals, McNemar's test
noise          draws of scores, from whatever is known of their documents
wintie         alpha*, coverage, recovery, exact
compare        teacher, students and controls side by side; comparison.py is what it finds
evidence       what else is known of the models compared: needles, fidelity, gates, costs
names          names of tasks: request sets, their variants, patterns
tasks          request sets: multiple choice, bits per byte; evaluate
mmlu           MMLU's subjects and categories, read into the form of request sets
needle         needles in haystacks, made on the spot
perplexity     perplexity of text files, windows as lm-evaluation-harness cuts them
gsm8k          its questions with written answers; generation.py has them written and scored
fidelity       KL, agreement and perplexity by position, with paired intervals
divergence     tails of the KL, and KL by distance of what is needed
continuations  the teacher's likelihood of what a student writes
branches       students of which a part is silenced, for fidelity
"""

from .branches import branches
from .compare import compare
from .comparison import Comparison
from .continuations import Continuations, continuations
from .divergence import Divergence, divergence
from .fidelity import Fidelity, fidelity
from .names import DEFAULT_TASKS
from .needle import needle_grid
from .results import read_results, write_results
from .scores import scores_of
from .tasks import evaluate, load_task, passages, questions
from .uncertainty import Interval, paired_bootstrap
from .wintie import WinTie, split_groups, win_and_tie

__all__ = [
    "DEFAULT_TASKS",
    "Comparison",
    "Continuations",
    "Divergence",
    "Fidelity",
    "Interval",
    "WinTie",
    "branches",
    "compare",
    "continuations",
    "divergence",
    "evaluate",
    "fidelity",
    "load_task",
    "needle_grid",
    "paired_bootstrap",
    "passages",
    "questions",
    "read_results",
    "scores_of",
    "split_groups",
    "win_and_tie",
    "write_results",
]
