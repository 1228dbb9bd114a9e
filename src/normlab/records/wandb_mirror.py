"""The mirror of a run in Weights & Biases: the only importer of `wandb`.

The record on disk is the truth; nothing here can stop or slow a run. With no account, no network or a server
that does not answer, W&B records offline under `<runs_dir>/wandb/`, without a question, and `WandbMirror.where` says
how to upload. Without the package, or once W&B has failed, the mirror does nothing.
"""

from __future__ import annotations

import dataclasses
import netrc
import os
import re
import secrets
import shlex
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from normlab.config import RunConfig, config_to_dict, model_label
from normlab.machine.terminal import printable
from normlab.records.disk import read_bytes, write_atomically
from normlab.records.environment import program
from normlab.records.metrics import ALONG, probe_summary, probe_summary_of_run
from normlab.records.record import RunRecord

__all__ = ["Account", "WandbMirror", "mirror_probes"]

ANSWER_SECONDS = 2.0
INIT_SECONDS = 5.0
OFFLINE_INIT_SECONDS = 60.0
"""Of W&B's own processes on this machine alone, which many runs that begin at once keep busy."""
FINISH_SECONDS = 5.0
ROWS_APART = 10_000
"""Between the rows of different probes in W&B's own count: it wants each number once, whichever part they come in."""


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
    def start(
        cls,
        config: RunConfig,
        record_folder: Path,
        say: Callable[[str], None] = _to_stderr,
        suffix: str = "",
    ) -> WandbMirror:
        """Begin to mirror, or go on if `record_folder` was mirrored before (its `wandb_id` says under which id).

        Args:
            say: takes one line for the user, at most once per cause.
            suffix: of the folder that W&B writes to, which it else names by id and second alone.
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
                run = _init(wandb, config, record_folder, mode, suffix)
            except errors as error:
                if mode == "offline":
                    raise
                say(f"W&B records offline: {_one_line(error)}")
                # The service still holds the run's id.
                wandb.teardown()
                run = _init(wandb, config, record_folder, "offline", suffix)
        except errors as error:
            say(f"W&B is left out of this run: {_one_line(error)}")
        return cls(run, errors, say)

    def log(self, metrics: Mapping[str, Any], step: int, seconds: float) -> None:
        """One row: `metrics` at `step` (optimizer steps) and `seconds` (training time)."""
        self._attempt(lambda run: run.log({**metrics, "step": step, "seconds": seconds}, step=step))

    def log_along(self, axis: str, rows: Iterable[Mapping[str, Any]], first: int) -> None:
        """Rows over an axis other than training, such as `time_step`, which each of them holds.

        Args:
            first: number of the first one in W&B's own count of rows, which goes on from the steps of the training.
        """

        def send(run: Any) -> None:
            # By full names: which of two patterns wins is not said anywhere. The axis too, or it would be over `step`.
            run.define_metric(axis)
            known = {axis}
            for number, row in enumerate(rows, max(run.step, first)):
                for name in row.keys() - known:
                    run.define_metric(name, step_metric=axis)
                    known.add(name)
                run.log(dict(row), step=number)

        self._attempt(send)

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


def mirror_probes(
    names: Iterable[str], records: Sequence[RunRecord], say: Callable[[str], None] = _to_stderr
) -> WandbMirror | None:
    """Send what probes found on ended runs after them, to where the `output` of each says that it is mirrored.

    Args:
        names: probes whose measurement of just these runs is on disk.
        records: one run, or those that were measured together: of these each gets its own numbers.

    Returns:
        The mirror of the last run, ended; None if there was nothing to send.
    """
    mirror = None
    ids = [record.id for record in records]
    mirrored = [record for record in records if record.config.output.wandb != "off"]
    found = {name: records[0].probe(name, ids) for name in names} if mirrored else {}
    for record in mirrored if found else ():
        # Where the record is now: it may have been moved, or the run started in another folder.
        output = dataclasses.replace(record.config.output, runs_dir=str(record.folder.parent))
        config = dataclasses.replace(record.config, output=output)
        mirror = WandbMirror.start(config, record.folder, say, suffix="probes")
        outcome = record.outcome()
        # All that is known: an upload puts the summary of the last part of a run in place of those before.
        summary = _last_values(record.metrics()) | {"outcome": outcome.state, **outcome.results} | _probed(record)
        if len(records) > 1:
            for name, values in found.items():
                summary |= probe_summary_of_run(name, values["rows"], record.id)
        else:
            for place, along in enumerate(ALONG):
                if along.probe in found:
                    rows = along.rows(found[along.probe]["rows"])
                    mirror.log_along(along.axis, rows, outcome.step + 1 + place * ROWS_APART)
        mirror.summary(summary)
        mirror.finish()
    return mirror


def _last_values(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for row in rows for name, value in row.items()}


def _probed(record: RunRecord) -> dict[str, Any]:
    """Of the probes that measured this run alone."""
    summary: dict[str, Any] = {}
    for path in sorted((record.folder / "probes").glob("*.json")):
        values = record.probe(path.stem)
        if len(values.get("runs", ())) == 1:  # by its name then, which is another once the record was moved aside
            summary |= probe_summary(values["probe"], values["summary"])
    return summary


@dataclass(frozen=True)
class Account:
    """What of W&B can be used from here.

    Args:
        has_key: whether there is an API key.
        why_not: why nothing can be saved there now, in one line; empty if it can.
        server: its address.
    """

    has_key: bool
    why_not: str
    server: str

    @classmethod
    def find(cls) -> Account:
        """Asks the server, if there is a key, whether it is there."""
        import wandb

        settings = wandb.setup().settings
        return cls(_has_key(settings), _mode("online", wandb)[1], settings.base_url)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _init(wandb: Any, config: RunConfig, record_folder: Path, mode: str, suffix: str) -> Any:
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
        init_timeout=OFFLINE_INIT_SECONDS if mode == "offline" else INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
        # `make watch` shows a running run as of the last flush.
        x_transaction_log_flush_interval=5.0,
        x_sync_dir_suffix=suffix,
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
        # Offline too: when parts of one run are uploaded, each is then added to those before; else the rows of the
        # later one overwrite the first rows of the run.
        resume="allow",
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

    The agent of a sweep gives its runs ids of its own, which W&B then takes in place of any other. An id is part of a
    path and chooses the run that is written to, so that one of a form that neither has is replaced.
    """
    path = record_folder / "wandb_id"
    name = re.sub(r"\.\d+$", "", record_folder.name)  # moved aside, it is still the same run there
    try:
        kept = read_bytes(path).decode("utf-8", "replace").strip()
    except FileNotFoundError:
        kept = ""
    given = os.getenv("WANDB_RUN_ID", "") if os.getenv("WANDB_SWEEP_ID") else ""
    wanted = given or kept
    if not given and not re.fullmatch(re.escape(name) + "-[0-9a-f]{6}|[a-z0-9]{8}", kept):
        wanted = f"{name}-{secrets.token_hex(3)}"
    if wanted != kept:
        write_atomically(path, wanted + "\n")
    return wanted


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
