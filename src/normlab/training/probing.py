"""Probes on finished runs: the model and the data of a run as it ended, and what a probe says of them on disk."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from normlab.config import DataConfig, InputError
from normlab.data.prepared import PreparedText, prepare
from normlab.machine.precision import cudnn_as_cublas
from normlab.probes.base import Measurement, Probe, Subject, build_probe
from normlab.records.disk import to_json, write_atomically
from normlab.records.environment import collect_environment
from normlab.records.record import FORMAT_VERSION, RunRecord
from normlab.training.faults import require_same_text
from normlab.training.module import build_model
from normlab.training.reading import read_checkpoint

__all__ = ["open_run", "run_probe"]

UNTRAINED = "untrained"
"""Folder, in that of the runs, of what probes measured without one."""


def open_run(
    run: str | Path, runs_dir: str | Path = "runs", prepare: Callable[[DataConfig], PreparedText] = prepare
) -> tuple[RunRecord, Subject]:
    """The record of a run that has ended, and its model as it was tested (on a GPU if the run may use one).

    Args:
        run: id in `runs_dir`, or the folder of the record.
        prepare: its text.

    Raises:
        InputError: no such run, no weights, it has not ended, or its text has changed.
    """
    record = RunRecord.open(run, runs_dir)
    state = record.outcome().state
    if state not in ("finished", "diverged"):
        raise InputError(f"run {record.id} has not ended ({state}); a probe measures what a run ended with")
    text = prepare(record.config.data)
    require_same_text(record, text)

    def checkpoint(name: str) -> nn.Module:
        return _weights(record, text, name)

    model = checkpoint("final")
    if record.config.training.accelerator != "cpu" and torch.cuda.is_available():
        cudnn_as_cublas()
        model.to("cuda")
    return record, Subject(record.id, record.config, text, model, checkpoint)


def _weights(record: RunRecord, text: PreparedText, name: str) -> nn.Module:
    # The random state is where training/run.py has it when it builds the model.
    with torch.random.fork_rng():
        torch.manual_seed(record.config.seed)
        model = build_model(record.config, text)
    if name == "initial":
        return model
    path = record.checkpoints / f"{name}.ckpt"
    if name == "final" and not path.exists():
        path = record.checkpoints / "best.ckpt"  # nothing was re-estimated
    try:
        stored = read_checkpoint(path, "train the run again")["state_dict"]
        own = {key.removeprefix("model."): value for key, value in stored.items() if str(key).startswith("model.")}
        model.load_state_dict(own)
    except FileNotFoundError:
        raise InputError(f"run {record.id} has no {path.name}; train it again with --output.fresh true") from None
    except (RuntimeError, AttributeError) as error:  # other shapes, or no tensors at all
        raise InputError(f"{path} is not a checkpoint of this run ({type(error).__name__}); train it again") from None
    return model


def run_probe(
    probe: str | Probe,
    runs: Sequence[str | Path] = (),
    options: Mapping[str, Any] | None = None,
    runs_dir: str | Path = "runs",
) -> dict[str, Any]:
    """Measure and write `probes/<name>.json` into the folder of the first run, in place of an earlier one.

    Several runs: `probes/<name>-<hash of their ids>.json`. Without a run: `<runs_dir>/untrained/probes/<name>-<hash of
    the options>.json`.

    Args:
        probe: its name, or the probe itself, with its options.
        options: of a probe given by name; others keep their defaults.

    Returns:
        What was written (probe, options, runs, summary, rows, environment), and `path`, where.

    Raises:
        InputError: runs or options that cannot be measured, or a folder that cannot be written.
    """
    if isinstance(probe, str):
        probe = build_probe(probe, options or {})
    probe.require_runs(len(runs))
    prepare_once = functools.cache(prepare)  # runs of one arm have one text
    opened = [open_run(run, runs_dir, prepare_once) for run in runs]
    folder = (opened[0][0].folder if opened else Path(runs_dir) / UNTRAINED) / "probes"
    with _writing(folder):  # before the measurement, which may take long
        folder.mkdir(parents=True, exist_ok=True)
    measured: Measurement = probe(*(subject for _, subject in opened))
    values: dict[str, Any] = {
        "probe": probe.name,
        "options": probe.options,
        "runs": [record.id for record, _ in opened],
        **measured._asdict(),
        "environment": {**collect_environment(), "threads": torch.get_num_threads()},
    }
    with _writing(folder):
        if opened:
            path = opened[0][0].write_probe(probe.name, values, values["runs"])
        else:
            digest = hashlib.sha256(to_json(probe.options).encode()).hexdigest()[:8]
            path = folder / f"{probe.name}-{digest}.json"
            write_atomically(path, to_json({"version": FORMAT_VERSION, **values}, indent=2) + "\n")
    return {**values, "path": str(path)}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write the measurement to {folder}: {error.strerror}") from None
