"""Tables and figures with printed numbers, ours beside: ``lightning reproduce NAME``.

A `Plan` (plan.py) says what stands where, and which run of ours gives it; the printed numbers are csv
files (numbers.py). `tables` and `figures` are those of the paper. `run_all` does the runs (runs.py) and
`Reproduction` is the table (report.py). Only a run imports torch and Lightning.

A further table is a module with its plan, a csv of its printed numbers, and its row here.
"""

from tasks.reproduce.figures import FIGURES
from tasks.reproduce.plan import Plan
from tasks.reproduce.tables import TABLES

__all__ = ["PLANS"]

PLANS: dict[str, Plan] = {plan.name: plan for plan in (*TABLES, *FIGURES)}
"""By the names of the command line, in the paper's order."""
