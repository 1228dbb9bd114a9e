"""W&B mirrors a run without questions, output or waits, and never stops it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from wandb_server import KEY, serving

from normlab.config import RunConfig, config_from_dict, run_id
from normlab.records import wandb_mirror
from normlab.records.disk import write_atomically
from normlab.records.record import Outcome, RunRecord
from normlab.records.wandb_mirror import WandbMirror, mirror_probes

# In processes of their own: wandb keeps its service and its settings for the life of a process.
MIRROR = """
import json, sys, time
from normlab.config import config_from_dict
from normlab.records.record import RunRecord
from normlab.records import wandb_mirror
wandb_mirror.INIT_SECONDS = 3.0
config = config_from_dict(json.loads(sys.argv[1]))
record = RunRecord.create(config)
begin = time.perf_counter()
said = []
mirror = wandb_mirror.WandbMirror.start(config, record.folder, said.append)
for step in range(3):
    mirror.log({"train_loss_nats": 3.0 - step, "grad_norm": float("nan")}, step, step * 0.5)
mirror.summary({"valid_loss_nats": 1.25})
mirror.finish()
mirror.log({"train_loss_nats": 0.0}, 9, 9.0)
imported = "wandb" in sys.modules
seconds, ended = time.perf_counter() - begin, time.time()
print(json.dumps(dict(said=said, where=mirror.where(), imported=imported, seconds=seconds, ended=ended)))
"""


def config_of(tmp_path: Path, wandb: str) -> dict[str, object]:
    return {
        "model": {"name": "lstm", "norm": "ln"},
        "output": {"runs_dir": str(tmp_path / "runs"), "wandb": wandb, "claim": "d1_steps_differ"},
    }


def mirror(tmp_path: Path, wandb: str, code: str = MIRROR, **environment: str) -> dict:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    clean |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, json.dumps(config_of(tmp_path, wandb))]
    done = subprocess.run(command, env=clean | environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # wandb prints nothing of its own.
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    values = json.loads(done.stdout)
    return values | {"exit_seconds": time.time() - values["ended"]}


def leet(tmp_path: Path, *options: str, run: Path | None = None) -> bytes:
    """A local run, the newest if none is given, as the terminal viewer of `make watch` sees it."""
    wandb = shutil.which("wandb", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert wandb is not None
    command = [wandb, "leet", "inspect", *options, "--json", str(run or tmp_path / "runs" / "wandb")]
    return subprocess.run(command, capture_output=True, check=True).stdout


def inspect(tmp_path: Path) -> dict:
    return json.loads(leet(tmp_path, "--summary"))


def local_files(tmp_path: Path) -> bytes:
    return b"".join(path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file())


def test_without_a_key_it_records_offline_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    first = mirror(tmp_path, "auto")
    assert first["said"] == []
    assert first["where"].startswith("W&B recorded on disk; upload with: ")
    assert "wandb sync runs/wandb/offline-run-" in first["where"]
    seen = inspect(tmp_path)
    assert seen["state"] == "finished"
    assert seen["project"] == "normlab"
    assert seen["name"] == run_id(config_from_dict(config_of(tmp_path, "auto")))
    assert set(seen["tags"]) == {"ln", "lstm", "pydocs", "d1_steps_differ"}
    assert seen["config"]["model"]["norm"] == "ln"
    summary = seen["summary"]
    assert (summary["step"], summary["seconds"], summary["train_loss_nats"]) == (2, 1.0, 1.0)
    assert summary["valid_loss_nats"] == 1.25
    assert b'"type":"environment"' not in leet(tmp_path), "host, user or program are on record"
    time.sleep(1.1)  # W&B names its folders by the second
    assert mirror(tmp_path, "auto")["where"] != first["where"]
    assert inspect(tmp_path)["run_id"] == seen["run_id"]


@pytest.mark.parametrize(("wandb", "environment"), [("off", {}), ("auto", {"WANDB_MODE": "disabled"})])
def test_off_does_not_import_wandb(tmp_path: Path, wandb: str, environment: dict[str, str]) -> None:
    done = mirror(tmp_path, wandb, **environment)
    assert done["said"] == []
    assert done["where"] == ""
    assert not done["imported"]
    assert not (tmp_path / "runs" / "wandb").exists()


def test_not_installed_is_said_once(tmp_path: Path) -> None:
    done = mirror(tmp_path, "auto", "import sys; sys.modules['wandb'] = None\n" + MIRROR)
    assert len(done["said"]) == 1
    assert "not installed" in done["said"][0]
    assert done["where"] == ""


def test_wandb_mode_offline_asks_no_server(tmp_path: Path) -> None:
    done = mirror(tmp_path, "auto", WANDB_MODE="offline", WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done["said"] == []
    assert "offline-run" in done["where"]


def test_refused_connections_cost_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    done = mirror(tmp_path, "online", WANDB_API_KEY=KEY, WANDB_BASE_URL=url)
    assert done["said"] == [f"W&B records offline: {url} does not answer"]
    assert "offline-run" in done["where"]
    assert KEY.encode() not in local_files(tmp_path)


@pytest.mark.parametrize("probe_fooled", [False, True])
def test_a_server_that_accepts_and_never_answers_costs_seconds(tmp_path: Path, probe_fooled: bool) -> None:
    # Fooled: the server answered when asked whether it is there, and hangs when the run begins.
    code = (
        MIRROR.replace("said = []", "said = []; wandb_mirror._answers = lambda url: True") if probe_fooled else MIRROR
    )
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1\n  login user\n  password {KEY}\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = mirror(tmp_path, "auto", code, WANDB_BASE_URL=url)
    assert len(done["said"]) == 1
    assert done["said"][0].startswith("W&B records offline: ")
    # Start, log and finish, then the end of the process, where wandb waits for its service.
    assert done["seconds"] + done["exit_seconds"] < 60  # W&B's own limits are longer
    assert "offline-run" in done["where"]
    assert KEY.encode() not in local_files(tmp_path)
    assert inspect(tmp_path)["summary"]["step"] == 2


# A server that knows just enough to begin a run, and that is gone after three rows.
DYING_SERVER = """
import http.server, json, os, threading, time

PROJECT = {"id": "p", "name": "normlab", "entity": {"id": "e", "name": "me"}}
RUN = {"id": "b", "name": "x", "displayName": "x", "description": "", "config": "{}", "project": PROJECT}


class Server(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        answer = {}
        if b"UpsertBucket" in asked:
            answer = {"data": {"upsertBucket": {"bucket": RUN, "inserted": True}}}
        elif b"RunResumeStatus" in asked:
            answer = {"data": {"model": {**PROJECT, "bucket": None}}}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["WANDB_BASE_URL"] = f"http://127.0.0.1:{server.server_port}"
"""


def test_a_server_that_dies_in_the_middle_of_a_run(tmp_path: Path) -> None:
    begun, rows_and_end = MIRROR.split("mirror.summary")
    dies = "assert mirror.where().startswith('W&B: http'), said\nserver.shutdown()\nserver.server_close()\n"
    more = "for step in range(3, 6):\n    mirror.log({'train_loss_nats': 3.0 - step}, step, step * 0.5)\nmirror.summary"
    code = DYING_SERVER + begun.replace("INIT_SECONDS = 3.0", "INIT_SECONDS = 60.0") + dies + more + rows_and_end
    done = mirror(tmp_path, "online", code, WANDB_API_KEY=KEY)
    assert done["said"] == ["W&B stopped recording, the run goes on: Timed out finishing run."]
    assert "W&B recorded on disk; upload with: " in done["where"]
    assert KEY.encode() not in local_files(tmp_path)
    assert inspect(tmp_path)["summary"]["step"] == 5, "what was sent to nobody is on disk"


def test_online_without_a_key_says_so_and_does_not_ask(tmp_path: Path) -> None:
    done = mirror(tmp_path, "online")
    assert done["said"] == ["W&B records offline: there is no API key; log in with `wandb login`"]


def test_a_disk_without_room_for_wandb_does_not_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "wandb").write_text("in the way")
    done = mirror(tmp_path, "offline")
    assert len(done["said"]) == 1
    assert done["said"][0].startswith("W&B is left out of this run: ")


class BrokenRun:
    """A W&B run whose service process has died."""

    offline = True

    def __init__(self, folder: Path) -> None:
        self.settings = type("Settings", (), {"sync_dir": str(folder)})
        self.calls = 0

    def log(self, *_: object, **__: object) -> None:
        self.calls += 1
        raise ConnectionResetError("Connection lost\nand more")


def test_an_error_is_said_once_and_then_nothing_is_sent(tmp_path: Path) -> None:
    said: list[str] = []
    run = BrokenRun(tmp_path)
    broken = WandbMirror(run, (OSError,), said.append)
    for step in range(3):
        broken.log({"loss_nats": 1.0}, step, 0.0)
    broken.summary({})
    broken.finish()
    assert said == ["W&B stopped recording, the run goes on: Connection lost"]
    assert run.calls == 1
    assert "wandb sync" in broken.where()


PROBED = """
import json, sys
from normlab.config import config_from_dict
from normlab.records.record import Outcome, RunRecord
from normlab.records import wandb_mirror
config = config_from_dict(json.loads(sys.argv[1]))
record = RunRecord.create(config)
record.start()
mirror = wandb_mirror.WandbMirror.start(config, record.folder)
for step in range(3):
    row = {"train_loss_nats": 3.0 - step}
    record.log(step, step * 0.5, row)
    mirror.log(row, step, step * 0.5)
mirror.finish()
record.finish(Outcome("finished", step=2, results={"test_loss_nats": 1.25}))
rows = [{"kind": "lag", "layer": 0, "lag": lag, "gradient_norm": 0.5**lag} for lag in range(4)]
found = {"probe": "gradient_flow", "runs": [record.id], "summary": {"gradient_ratio": 0.125}, "rows": rows}
record.write_probe("gradient_flow", found)
said = []
mirror = wandb_mirror.mirror_probes(["gradient_flow"], [record], said.append)
print(json.dumps(dict(said=said, where=mirror.where(), ended=0.0, id=(record.folder / "wandb_id").read_text().strip())))
"""


def test_what_probes_found_is_added_to_the_run(tmp_path: Path) -> None:
    done = mirror(tmp_path, "offline", PROBED)
    assert done["said"] == []
    assert done["where"].endswith("-probes")
    parts = sorted((tmp_path / "runs" / "wandb").glob("offline-run-*"))
    assert len(parts) == 2
    seen = json.loads(leet(tmp_path, "--summary", run=parts[1]))
    assert seen["run_id"] == done["id"]
    assert seen["summary"]["probe/gradient_flow/gradient_ratio"] == 0.125
    wandb = shutil.which("wandb", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert wandb is not None
    with serving() as server:
        environment = os.environ | {"HOME": str(tmp_path), "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        environment.pop("WANDB_MODE")
        command = [wandb, "sync", *map(str, parts)]
        subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=True, timeout=300)
    rows = server.rows[done["id"]]
    assert list(rows) == list(range(7)), "rows of one part stand in place of those of another"
    assert [rows[number]["train_loss_nats"] for number in range(3)] == [3.0, 2.0, 1.0]
    assert [rows[number]["lag"] for number in range(3, 7)] == [0, 1, 2, 3]
    assert [rows[number]["by_lag/gradient_flow/gradient_norm"] for number in range(3, 7)] == [1.0, 0.5, 0.25, 0.125]
    assert all("step" not in rows[number] for number in range(3, 7)), "they are not over steps"
    counted = [rows[number]["_step"] for number in range(7)]
    assert counted == sorted(set(counted)), "W&B wants each number of a row once, and rising"
    summary = server.summaries[done["id"]]
    expected = {"test_loss_nats": 1.25, "train_loss_nats": 1.0, "step": 2, "outcome": "finished"}
    assert summary.items() >= {**expected, "probe/gradient_flow/gradient_ratio": 0.125}.items()


def test_of_runs_measured_together_each_gets_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: dict[str, dict[str, object]] = {}

    class Recording(WandbMirror):
        def summary(self, results: Mapping[str, object]) -> None:
            got[self.record] = dict(results)

    def start(config: RunConfig, folder: Path, *_: object, **__: object) -> Recording:
        started = Recording(None, (), print)
        started.record = folder.name
        return started

    monkeypatch.setattr(wandb_mirror.WandbMirror, "start", start)
    records = [RunRecord.create(config_from_dict({**config_of(tmp_path, "offline"), "seed": seed})) for seed in (1, 2)]
    for record in records:
        record.start()
        record.finish(Outcome("finished"))
    ids = [record.id for record in records]
    rows = [{"run": run, "seed": 1, "variance_nats": 0.5 + number} for number, run in enumerate(ids)]
    found = {"probe": "bias_variance", "runs": ids, "summary": {"loss_variance_nats": 1.0}, "rows": rows}
    records[0].write_probe("bias_variance", found, ids)
    mirror_probes(["bias_variance"], records)
    assert {run: values["probe/bias_variance/variance_nats"] for run, values in got.items()} == dict(
        zip(ids, (0.5, 1.5), strict=True)
    )
    assert "probe/bias_variance/loss_variance_nats" not in got[ids[0]], "that is of all of them"


def test_the_agent_of_a_sweep_gives_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "ag3ntid0")
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    own = wandb_mirror._wandb_id(tmp_path)
    assert own.startswith(tmp_path.name)
    assert wandb_mirror._wandb_id(tmp_path) == own
    monkeypatch.setenv("WANDB_SWEEP_ID", "a-sweep")
    assert wandb_mirror._wandb_id(tmp_path) == "ag3ntid0"
    monkeypatch.delenv("WANDB_SWEEP_ID")
    assert wandb_mirror._wandb_id(tmp_path) == "ag3ntid0", "what is added later goes there too"


def test_a_record_moved_aside_is_the_same_run_and_the_new_one_another(tmp_path: Path) -> None:
    old = RunRecord.create(config_from_dict(config_of(tmp_path, "offline")))
    own = wandb_mirror._wandb_id(old.folder)
    old.write_probe("leak", {"probe": "leak", "runs": [old.id], "summary": {"row_leak_train": 0.5}})
    old.write_probe("bias_variance", {"runs": [old.id, "another"], "summary": {"brier": 1.0}}, [old.id, "another"])
    write_atomically(old.folder / "probes" / "notes.json", '{"version": 1}')
    aside = old.archive()
    assert wandb_mirror._wandb_id(aside.folder) == own
    assert wandb_mirror._probed(aside) == {"probe/leak/row_leak_train": 0.5}
    assert wandb_mirror._wandb_id(RunRecord.create(old.config).folder) != own
