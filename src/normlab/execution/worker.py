"""Jobs in a process of their own: python -m normlab.execution.worker JOB.yaml ..., as `LocalWorkers` starts it.

When the parent is gone, however it ended, the run is stopped as by SIGTERM: with a checkpoint, to be resumed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path

from normlab.config import InputError
from normlab.execution.jobs import JOB_FILE, Job, read_job
from normlab.machine.terminal import printable
from normlab.records.disk import to_json, write_atomically

__all__ = ["main", "perform"]

BEGAN = time.monotonic()


def main() -> int:
    """Exit code: 0 all done, 2 with a line on standard error for what a user can mend, 143 stopped before the end."""
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    code = 0
    for path in sys.argv[1:]:
        try:
            if not perform(read_job(Path(path))):
                return 143
        except InputError as error:
            print(f"normlab: error: {printable(str(error))}", file=sys.stderr)
            code = 2
    return code


def perform(job: Job) -> bool:
    """Train the run if it has not ended, then measure what is missing; False if it was stopped before its end."""
    is_whole = not job.record.metrics()
    if not job.is_trained():
        from normlab.training.run import train

        train(job.config)
        if not job.is_trained():
            return False
    missing = job.missing_probes()
    if missing:
        from normlab.training.probing import run_probe

        for name in missing:
            folders = [record.folder for record in job.measured()]
            run_probe(name, folders, job.probes[name], job.config.output.runs_dir)
    if is_whole:  # else this is the time of a part
        write_atomically(job.record.folder / JOB_FILE, to_json({"job_seconds": time.monotonic() - BEGAN}) + "\n")
    return True


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:  # started by hand
        return
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
