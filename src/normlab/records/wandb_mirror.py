"""The mirror of a run in Weights & Biases: the only importer of `wandb`.

The record on disk is the truth; nothing here can stop or slow a run. With no account, no network or a server
that does not answer, W&B records offline under `<runs_dir>/wandb/`, without a question, and `WandbMirror.where` says
how to upload. Without the package, or once W&B has failed, the mirror does nothing.
"""

from __future__ import annotations

import netrc
import os
import re
import secrets
import shlex
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from normlab.config import RunConfig, config_to_dict, model_label
from normlab.machine.terminal import printable
from normlab.records.disk import read_bytes, write_atomically
from normlab.records.environment import program

__all__ = ["WandbMirror"]

ANSWER_SECONDS = 2.0
INIT_SECONDS = 5.0
FINISH_SECONDS = 5.0


def _to_stderr(line: str) -> None:
    print(printable(line), file=sys.stderr)


class WandbMirror:
    """Sends one run to W&B; get it from `start`. Every method returns at once if there is nothing to send to."""

    def __init__(self, run: Any | None, errors: tuple[type[BaseException], ...], say: Callable[[str], None]) -> None:
        self._run = run
        self._errors = errors
        self._say = say
        self._incomplete = False
        self._folder = "" if run is None else os.path.relpath(run.settings.sync_dir)
        self._url = "" if run is None or run.offline else run.url

    @classmethod
    def start(cls, config: RunConfig, record_folder: Path, say: Callable[[str], None] = _to_stderr) -> WandbMirror:
        """Begin to mirror, or go on if `record_folder` was mirrored before (its `wandb_id` says under which id).

        Args:
            say: takes one line for the user, at most once per cause.
        """
        if config.output.wandb == "off" or (config.output.wandb == "auto" and os.getenv("WANDB_MODE") == "disabled"):
            return cls(None, (), say)
        # Crash reports go to the server too, and at exit wait 10 seconds for one that does not answer.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb
            from wandb.sdk.mailbox.mailbox import MailboxClosedError
            from wandb.sdk.mailbox.mailbox_handle import HandleAbandonedError, ServerResponseError
        except ImportError:
            say("wandb >= 0.31 is not installed: the run is recorded on disk only (or say --output.wandb off)")
            return cls(None, (), say)
        # ValueError: wandb's settings are checked by pydantic. OSError: its service process is gone (ConnectionError),
        # it timed out (TimeoutError) or the disk is full.
        # The rest are not wandb.Error: its service refused a request or is closing.
        service_errors = (HandleAbandonedError, MailboxClosedError, ServerResponseError)
        errors = (wandb.Error, OSError, ValueError, *service_errors)
        run = None
        try:
            mode, why = _mode(config.output.wandb, wandb)
            if why:
                say(f"W&B records offline: {why}")
            try:
                run = _init(wandb, config, record_folder, mode)
            except errors as error:
                if mode == "offline":
                    raise
                say(f"W&B records offline: {_one_line(error)}")
                # The service still holds the run's id.
                wandb.teardown()
                run = _init(wandb, config, record_folder, "offline")
        except errors as error:
            say(f"W&B is left out of this run: {_one_line(error)}")
        return cls(run, errors, say)

    def log(self, metrics: Mapping[str, Any], step: int, seconds: float) -> None:
        """One row: `metrics` at `step` (optimizer steps) and `seconds` (training time)."""
        self._attempt(lambda run: run.log({**metrics, "step": step, "seconds": seconds}, step=step))

    def summary(self, results: Mapping[str, Any]) -> None:
        """The final numbers."""
        self._attempt(lambda run: run.summary.update(dict(results)))

    def finish(self, exit_code: int = 0) -> None:
        """End the run; waits for uploads for at most `FINISH_SECONDS`, what is left over stays on disk."""
        self._attempt(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def where(self) -> str:
        """One line that says where to find the run in W&B or how to upload it; empty if there is nothing."""
        if self._url and not self._incomplete:
            return f"W&B: {self._url}"
        return (
            f"W&B recorded on disk; upload with: {program('wandb')} sync {shlex.quote(self._folder)}"
            if self._folder
            else ""
        )

    def _attempt(self, send: Callable[[Any], object]) -> None:
        if self._run is None:
            return
        try:
            send(self._run)
        except self._errors as error:
            self._run, self._incomplete = None, True
            self._say(f"W&B stopped recording, the run goes on: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _init(wandb: Any, config: RunConfig, record_folder: Path, mode: str) -> Any:
    output = config.output
    settings = wandb.Settings(
        silent=True,
        console="off",
        # Records are shared: no host name, user name, program path or source code leaves this machine.
        disable_git=True,
        disable_code=True,
        save_code=False,
        x_disable_machine_info=True,
        x_save_requirements=False,
        use_dot_wandb=False,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        # `make watch` shows a running run as of the last flush.
        x_transaction_log_flush_interval=5.0,
    )
    corpus = Path(config.data.corpus).stem
    tags = [config.model.norm, model_label(config.model), corpus, output.claim]
    run = wandb.init(
        project=output.project,
        entity=output.entity or None,
        id=_wandb_id(record_folder),
        name=record_folder.name,
        group=(output.claim or corpus)[:128],
        tags=[tag[:64] for tag in dict.fromkeys(tags) if tag],
        config=_shared_config(config),
        dir=output.runs_dir,
        mode=mode,
        # Offline, segments of one id become one run when they are uploaded.
        resume="allow" if mode == "online" else None,
        settings=settings,
    )
    run.define_metric("step")
    run.define_metric("seconds")
    run.define_metric("*", step_metric="step")
    return run


def _shared_config(config: RunConfig) -> dict[str, Any]:
    """The config without paths, which name users."""
    values = config_to_dict(config)
    values["output"] = {"claim": config.output.claim}
    values["data"]["corpus"] = Path(config.data.corpus).name
    return values


def _wandb_id(record_folder: Path) -> str:
    """The run's id in W&B, kept with the record: a resumed run goes on there, one trained afresh is another.

    It is part of a path and chooses the run that is written to, so that one of another form is replaced.
    """
    path, name = record_folder / "wandb_id", record_folder.name
    try:
        kept = read_bytes(path).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        kept = ""
    if not re.fullmatch(re.escape(name) + "-[0-9a-f]{6}", kept):
        kept = f"{name}-{secrets.token_hex(3)}"
        write_atomically(path, kept + "\n")
    return kept


def _mode(asked: str, wandb: Any) -> tuple[str, str]:
    """The mode, online or offline, and in one line why it is not what was asked for (empty if it is)."""
    if asked == "offline":
        return "offline", ""
    settings = wandb.setup().settings
    if asked == "auto" and settings.mode in ("offline", "dryrun"):
        return "offline", ""
    if not _has_key(settings):
        return "offline", "" if asked == "auto" else "there is no API key; log in with `wandb login`"
    if not _answers(settings.base_url):
        address = urlsplit(settings.base_url)
        # Without a name and password that may stand before the host.
        return "offline", f"{address.scheme}://{address.netloc.rpartition('@')[2]} does not answer"
    return "online", ""


def _has_key(settings: Any) -> bool:
    if settings.api_key or settings.identity_token_file:
        return True
    path = Path(os.getenv("NETRC") or "~/.netrc").expanduser()
    try:
        return netrc.netrc(path).authenticators(urlsplit(settings.base_url).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _answers(url: str) -> bool:
    """True if the server at `url` sends any HTTP answer soon; asks as wandb would, through the user's proxies."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_SECONDS):
                answered.set()
        except urllib.error.HTTPError:
            answered.set()
        except (OSError, ValueError):
            pass

    # In a thread, because looking up a name can hang for longer than any timeout that can be given.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    return answered.is_set()
