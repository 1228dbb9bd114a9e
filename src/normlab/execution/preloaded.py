"""What the server of workers imports before the first is forked from it: all that a run needs, and from which commit.

What a study began with is what all its runs are trained with, and what they record, whatever becomes of the files.
"""

import importlib

from normlab.config import available_norms, available_probes
from normlab.machine.imports import without_collecting
from normlab.records.environment import code_commit

MODULES = (
    "normlab.execution.jobs",
    "normlab.training.run",
    "normlab.training.probing",
    *(f"normlab.norms.{name}" for name in available_norms()),
    *(f"normlab.probes.{name}" for name in available_probes()),
)

with without_collecting():
    for module in MODULES:
        importlib.import_module(module)
code_commit()
