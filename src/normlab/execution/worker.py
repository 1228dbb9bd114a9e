"""Jobs in a process of their own: python -m normlab.execution.worker JOB.yaml ..., as `LocalWorkers` starts it.

When the parent is gone, however it ended, the run is stopped as by SIGTERM: with a checkpoint, to be resumed.
"""

from __future__ import annotations

import dataclasses
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
    code, began = 0, BEGAN
    jobs, stopped = _stacked([read_job(Path(path)) for path in sys.argv[1:]])
    if stopped:
        return 143
    for job in jobs:
        try:
            if not perform(job, began):
                return 143
        except InputError as error:
            print(f"normlab: error: {printable(str(error))}", file=sys.stderr)
            code = 2
        began = time.monotonic()
    return code


def _stacked(jobs: list[Job]) -> tuple[list[Job], bool]:
    """Bring the runs of a group forward in one stack, if that is asked for or faster; returns the jobs to be performed,
    which are all of them or, where a stack would be slower, the first; and whether a signal stopped them."""
    if len(jobs) < 2 or jobs[0].stack == "never":
        return jobs, False
    from normlab.training.stacked import advance_stacked
    from normlab.training.stacked_gain import is_worth_stacking

    configs = [job.config for job in jobs if not job.is_trained()]
    if len(configs) < 2:
        return jobs, False
    try:
        if jobs[0].stack == "if faster" and not is_worth_stacking(configs):
            return jobs[:1], False
        return jobs, not advance_stacked(configs)
    except InputError as error:  # what is wrong with a run is said when it is trained by itself
        print(f"not stacked: {error}", file=sys.stderr)
        return jobs, False


def perform(job: Job, began: float = BEGAN) -> bool:
    """Train the run if it has not ended, then measure what is missing; False if it was stopped before its end.

    Args:
        began: when the worker turned to it, on the clock of `time.monotonic`.
    """
    is_whole = not job.record.metrics()
    if not job.is_trained():
        from normlab.training.run import train

        output = job.config.output
        train(dataclasses.replace(job.config, output=dataclasses.replace(output, fresh=job.is_to_be_anew())))
        if not job.is_trained():
            return False
    missing = job.missing_probes()
    if missing:
        from normlab.records.wandb_mirror import mirror_probes
        from normlab.training.probing import run_probe

        measured = job.measured()
        for name in missing:
            folders = [record.folder for record in measured]
            run_probe(name, folders, job.probes[name], job.config.output.runs_dir)
        mirror_probes(missing, measured)
    if is_whole:  # else this is the time of a part
        write_atomically(job.record.folder / JOB_FILE, to_json({"job_seconds": time.monotonic() - began}) + "\n")
    return True


def _stop_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:  # started by hand
        return
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
