"""A worker that trains nothing, slowly: a row every tenth of a second, which is its checkpoint too. No torch.

In the middle it waits until there is a file `<runs_dir>/go`. Each start is a line of `<runs_dir>/starts`, with why the
run did not end before: "never", "killed", or "SIGTERM" if it saved.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from normlab.execution.jobs import read_job
from normlab.records.record import Outcome, RunRecord

STEPS = 20
SECONDS_PER_STEP = 0.1
SECONDS_TO_SAVE = 1.0


def main() -> None:
    job = read_job(Path(sys.argv[1]))
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    record = RunRecord.create(job.config)
    with (record.folder.parent / "starts").open("a") as file:
        file.write(f"{job.id} {record.outcome().reason.split()[0]}\n")
    rows = record.metrics()
    step = rows[-1]["step"] if rows else 0
    record.start(step)
    while step < STEPS:
        time.sleep(SECONDS_PER_STEP)
        while step == STEPS // 2 and not received and not (record.folder.parent / "go").exists():
            time.sleep(0.02)
        if received:
            time.sleep(SECONDS_TO_SAVE)
            record.finish(Outcome("interrupted", "SIGTERM", step))
            sys.exit(143)
        step += 1
        record.log(step, step * SECONDS_PER_STEP, {"valid_loss_nats": 1.0, "train_loss_nats": 1.0})
    record.write_environment({"machine": "test", "git": {"commit": "abc", "dirty": False}})
    loss = (job.config.model.norm != "ln") * 0.5 + job.config.seed / 1000
    results = {"valid_loss_nats": loss, "test_loss_nats": loss, "unigram_test_loss_nats": 3.0}
    record.finish(Outcome("finished", "", STEPS, STEPS * SECONDS_PER_STEP, results))


if __name__ == "__main__":
    main()
