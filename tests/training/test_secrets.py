"""The key to a W&B account is used and never written: not to a record, a job file, W&B's own logs or the terminal."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

KEY = "5ec2e7" + "0123456789abcdef" * 2 + "5e"
OTHER_KEY = KEY[::-1]
PASSWORD = "pa55-of-the-proxy"

# Online, and offline once the server has refused; and a job file of a worker that has the same surroundings.
RUN = """
import sys
from pathlib import Path
from normlab.__main__ import main, parse_run
from normlab.execution.jobs import Job, write_job
assert main(["train", *sys.argv[1:]]) == 0
write_job(Path("runs/.study/job.yaml"), Job(parse_run(sys.argv[1:])))
"""


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers, so that W&B goes on and sends its key, and lets nobody in."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.asked.append(self.headers.get("Authorization", ""))
        self.send_response(401)
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Address of a server, and what it was sent as authorization."""
    asked: list[str] = []
    handler = type("Handler", (Refusing,), {"asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}", asked
        serving.shutdown()
        thread.join()


@pytest.mark.slow
def test_the_key_is_in_no_file_and_no_line(
    tiny_text: Path,
    tmp_path: Path,
    server: tuple[str, list[str]],
    files_with: Callable[[Path, str], list[Path]],
) -> None:
    url, asked = server
    home = tmp_path / "home"
    home.mkdir()
    work = tmp_path / "work"
    (work / "runs" / ".study").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"HOME": str(home), "NETRC": str(home / "netrc"), "WANDB_BASE_URL": url}
    environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    environment["WANDB_API_KEY"] = KEY
    (home / "netrc").write_text(f"machine 127.0.0.1\n  login user\n  password {OTHER_KEY}\n")
    (home / "netrc").chmod(0o600)
    flags = (
        f"--data {tiny_text} --model.width 8 --data.batch_size 8 --data.length 6 --training.steps 2 "
        "--training.valid_every 2 --training.activations_every 0 --training.threads 1 --output.progress false "
        "--output.wandb online"
    )
    command = [sys.executable, "-c", RUN, *flags.split()]
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert any(asked), "the key was not even sent"
    assert len(list((work / "runs" / "wandb").glob("offline-run-*"))) == 1
    for key in (KEY, OTHER_KEY):
        assert files_with(work, key) == []
        assert key not in done.stdout + done.stderr
    (work / "leak").write_text(asked[0])
    assert files_with(work, KEY) == [work / "leak"], "the search would not have found it"


def test_a_password_in_the_servers_address_is_not_printed(tmp_path: Path) -> None:
    from normlab.records import wandb_mirror

    class Wandb:
        @staticmethod
        def setup() -> object:
            settings = {"mode": "online", "api_key": KEY, "base_url": f"http://user:{PASSWORD}@127.0.0.1:9"}
            return type("Setup", (), {"settings": type("Settings", (), settings)})

    assert wandb_mirror._mode("online", Wandb) == ("offline", "http://127.0.0.1:9 does not answer")
