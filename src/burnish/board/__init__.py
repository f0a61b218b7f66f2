"""Every recipe on the same tasks under the same budgets: what ``burnish bench`` runs and shows.

    tasks      six transfers that every machine can run
    budgets    equal trained parameters, equal peak, equal time
    running    one recipe on one task: the search for a rate, and the seeds
    records    what came of it, a JSON document each
    page       the records as tables: means, ranks, critical differences, the frontier
"""

from .budgets import BUDGETS
from .page import page
from .records import Record, Records
from .running import run
from .tasks import TASKS, Task, task

__all__ = ["BUDGETS", "TASKS", "Record", "Records", "Task", "page", "run", "task"]
