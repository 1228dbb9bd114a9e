"""A worker that trains nothing: it writes the record that its job would have had, at once. No torch.

In `<runs_dir>/orders.json`, by arm's norm: "fail" (each time), "fail once", "no memory twice" (in tuning), "die"
(killed), "wait" (until stopped), "diverge", "diverge at 1" (seed 1 alone), "nothing" (ends well and leaves nothing),
"slowly" (half a second a run); for jobs that measure runs together: "fail together", "fail together once". Each start
is a line of `<runs_dir>/starts`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from normlab.execution.jobs import read_job
from normlab.records.record import Outcome, RunRecord

job = read_job(Path(sys.argv[1]))
config = job.config
runs = Path(config.output.runs_dir)
orders = json.loads((runs / "orders.json").read_text()) if (runs / "orders.json").exists() else {}
with (runs / "starts").open("a") as file:
    file.write(f"{job.id} {os.environ['OMP_NUM_THREADS']}\n")
tries = (runs / "starts").read_text().count(job.id)
order = orders.get(config.model.norm, "")
if order == "fail" or (order == "fail once" and tries == 1):
    print("normlab: error: the disk is full", file=sys.stderr)
    sys.exit(2)
if order == "no memory twice" and config.seed == 7 and tries <= 2:
    print("normlab: error: out of memory; lower data.batch_size (now 4)", file=sys.stderr)
    sys.exit(2)
if order == "nothing":
    sys.exit(0)
if order == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if job.seeds:
    if order == "fail together" or (order == "fail together once" and tries == 1):
        print("normlab: error: no weights", file=sys.stderr)
        sys.exit(2)
    measured = job.measured()
    ids = [each.id for each in measured]
    for name, options in job.probes.items():
        rows = [{"run": each.id, "variance_nats": len(ids) + each.config.seed / 100} for each in measured]
        measured[0].write_probe(name, {"options": dict(options), "runs": ids, "rows": rows}, ids)
    sys.exit(0)
record = RunRecord.create(config)
record.start()
if order == "wait":
    signal.signal(signal.SIGTERM, lambda *_: (record.finish(Outcome("interrupted", "SIGTERM", step=1)), sys.exit(143)))
    record.log(1, 0.1, {"train_loss_nats": 2.5})
    time.sleep(600)
# The best rate is 1e-2; ln is better by 0.5.
loss = abs(config.optim.lr - 1e-2) + (config.model.norm != "ln") * 0.5 + config.seed / 1000
for step in (1, 2):
    time.sleep(0.25 * (order == "slowly"))
    record.log(step, step * 0.1, {"valid_loss_nats": loss + 1 - step / 2, "train_loss_nats": loss})
record.write_environment({"machine": "test", "git": {"commit": "abc", "dirty": False}})
if order == "diverge" or (order == "diverge at 1" and config.seed == 1):
    record.finish(Outcome("diverged", "loss", 2, 0.2, {"unigram_test_loss_nats": 3.0}))
else:
    results = {"valid_loss_nats": loss, "test_loss_nats": loss, "unigram_test_loss_nats": 3.0}
    for name, options in job.probes.items():
        record.write_probe(name, {"options": options, "summary": {"discrepancy_mean": loss}})
    record.finish(Outcome("finished", "", 2, 0.2, results))
