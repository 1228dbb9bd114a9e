"""One list of names: runs log what is on it and nothing else, its page is up to date, the dashboards keep to it."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from normlab.claims import available_claims, load_claim
from normlab.config import RunConfig, available_probes, config_from_dict
from normlab.dashboard import spec
from normlab.data.splits import Corpus, Split
from normlab.probes import senses
from normlab.probes.base import probe_class
from normlab.records import wandb_mirror
from normlab.records.metrics import METRICS, WHEN, find_metric
from normlab.records.record import RunRecord
from normlab.report.judged import Argument
from normlab.training.probing import run_probe
from normlab.training.run import train

EVERY_PROBE = [name for name in available_probes() if probe_class(name).runs != (2, None)]
RUNS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "recurrent": ({"name": "lstm", "norm": "bn_step"}, EVERY_PROBE),
    "penalized": ({"name": "lstm", "norm": "rbn"}, []),
    "transformer": ({"name": "transformer", "norm": "bn", "heads": 2, "layers": 1}, EVERY_PROBE),
    "feed_forward": ({"name": "mlp", "norm": "bn"}, ["activations", "discrepancy", "step_statistics"]),
    "classifier": ({"name": "lstm", "norm": "bn"}, ["discrepancy"]),
}
"""Models, and the probes that measure them."""
FEW = {"batches": 1}
OPTIONS = {
    "activations": FEW,
    "discrepancy": FEW,
    "step_statistics": FEW,
    "cost": {"steps": 1},
    "drift": FEW,
    "companions": {"draws": 2},
}
WORDS_IN_CONTEXT = [
    ("mean\t0-1\tmean of norm\tvery mean and bad", 0),
    ("layer\t1-3\ta layer is good\tthe norm of layer state", 1),
]


class Watched:
    """Stands in for a run of W&B, and notes the names that it is given."""

    offline = True
    step = 0

    def __init__(self, folder: Path, names: set[str], axes: dict[str, str]) -> None:
        self.settings = SimpleNamespace(sync_dir=str(folder))
        self.names, self.axes = names, axes
        self.summary = SimpleNamespace(update=self.names.update)

    def log(self, row: dict[str, Any], step: int) -> None:
        self.names.update(row)

    def define_metric(self, name: str, step_metric: str = "") -> None:
        self.axes[name] = step_metric

    def finish(self, exit_code: int = 0) -> None:
        pass


@dataclasses.dataclass
class Logged:
    names: set[str]
    axes: dict[str, str]


@pytest.fixture(scope="module")
def logged(tiny_text: Path, tiny_labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Logged:
    """What a run of each kind gave to W&B, in training and with every probe that can measure it."""
    runs = tmp_path_factory.mktemp("runs")
    found = Logged(set(), {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wandb_mirror, "_init", lambda *_: Watched(runs, found.names, found.axes))
        texts, labels = zip(*WORDS_IN_CONTEXT, strict=True)
        corpus = Corpus("wic", "wic", {"valid": Split(texts, labels)}, ("F", "T"), "word", "", "")
        patch.setattr(senses, "load_corpus", lambda data: corpus)
        for name, (model, probes) in RUNS.items():
            record = train(_config(model, tiny_labels if name == "classifier" else tiny_text, runs))
            _probe(probes, record)
            if name == "recurrent":
                _probe(["bias_variance"], record, train(dataclasses.replace(record.config, seed=2)))
    return found


def _config(model: dict[str, Any], text: Path, runs: Path) -> RunConfig:
    data = {"corpus": str(text), "batch_size": 8, "length": 8}
    if model["name"] == "transformer":
        data["tokens"] = "word"
    training = {"steps": 1, "valid_every": 1, "checkpoint_every": 1, "activations_every": 1, "threads": 1}
    training["recompute_batches"] = 2
    output = {"runs_dir": str(runs), "wandb": "offline", "progress": False}
    return config_from_dict({"model": {"width": 8, **model}, "data": data, "training": training, "output": output})


def _probe(probes: list[str], *records: RunRecord) -> None:
    for probe in probes:
        run_probe(probe, [record.folder for record in records], OPTIONS.get(probe, {}))
    wandb_mirror.mirror_probes(probes, records)


def test_runs_log_no_other_names(logged: Logged) -> None:
    assert {name for name in logged.names if find_metric(name) is None} == set()


def test_each_name_is_logged_by_some_run(logged: Logged) -> None:
    unused = [metric.name for metric in METRICS if not any(metric.fits(name) for name in logged.names)]
    assert unused == []


def test_what_is_not_over_steps_has_its_axis(logged: Logged) -> None:
    along = {name: re.match(r"by_([a-z_]+)/", name) for name in logged.names}
    axes = {name: logged.axes[name] for name, match in along.items() if match}
    assert axes
    assert axes == {name: match[1] for name, match in along.items() if match}


def test_each_is_said_to_be_logged_at_some_time() -> None:
    assert {metric.when for metric in METRICS} == set(WHEN)
    twice = [(metric.name, metric.when) for metric in METRICS]
    assert len(set(twice)) == len(twice)


def test_the_page_is_made_of_the_list() -> None:
    path = Path(__file__).parents[2] / "scripts" / "metrics_table.py"
    loading = importlib.util.spec_from_file_location("metrics_table", path)
    assert loading is not None
    assert loading.loader is not None
    script = importlib.util.module_from_spec(loading)
    loading.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "make metrics"


def metrics_of(values: Any) -> Iterator[str]:
    """All metrics that a spec names: what is drawn and over what."""
    if isinstance(values, list):
        for each in values:
            yield from metrics_of(each)
    elif isinstance(values, dict):
        yield from values.get("metrics", [])
        yield from [values["metricRegex"]] if "metricRegex" in values else []
        yield from [values["xAxis"]] if "metrics" in values and "xAxis" in values else []
        for each in values.values():
            yield from metrics_of(each)


def test_dashboards_show_what_runs_log(logged: Logged) -> None:
    built = spec.build([Argument(load_claim(name), None, []) for name in available_claims()], "", "normlab")
    named = {name for view in built.views.values() for name in metrics_of(spec.spec_of(view))}
    assert {"train_loss_nats", "seconds", "by_lag/gradient_flow/gradient_norm", "lag"} <= named
    assert {name for name in named if not any(re.fullmatch(name, known) for known in logged.names)} == set()
