"""Tables and figures with printed numbers, ours beside: ``lightning reproduce NAME``.

A `Plan` (plan.py) says what stands where, and which run of ours gives it; the printed numbers are csv
files (numbers.py). `tables`, `figures` and `sensitivity` are those of the paper, `family` is the field's.
`run_all` does the runs (runs.py), `Reproduction` is the table (report.py), and a card (card.py) is what
can be sent of it. Only a run imports torch and Lightning.

A further table is a module with its plan, a csv of its printed numbers, and its row here.
"""

from tasks.reproduce.family import FAMILY
from tasks.reproduce.figures import FIGURES
from tasks.reproduce.plan import Plan
from tasks.reproduce.sensitivity import SENSITIVITY
from tasks.reproduce.tables import TABLES

__all__ = ["PAPER", "PLANS"]

PAPER = (*TABLES, *FIGURES, SENSITIVITY)
"""What ``lightning reproduce all`` does."""

PLANS: dict[str, Plan] = {plan.name: plan for plan in (*PAPER, FAMILY)}
"""By the names of the command line: the paper's, in its order, then further ones."""
