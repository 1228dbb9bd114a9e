"""One engine for recurrences and running statistics through a whole run: C kernels where they are built or worth it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from normlab.config import RunConfig
from normlab.machine import c_kernels
from normlab.norms.kernels import PREFIX
from normlab.recurrence import kernels
from normlab.training import engine, stopping
from normlab.training.run import train

Build = Callable[..., RunConfig]
SHORT = "torch operators: a run this short is not worth compiling for"
INORM: dict[str, Any] = {"model": "transformer", "model__norm": "inorm", "model__layers": 1, "model__heads": 2}


def as_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_kernels, "_libraries", {})
    monkeypatch.setattr(c_kernels, "_failed", set())


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if kernels.compiler() is None:
        pytest.skip("no C compiler on this machine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    as_a_new_process(monkeypatch)


def engine_of(config: RunConfig) -> tuple[str, bool | None]:
    environment = train(config).environment()
    recurrence = environment.get("recurrence")
    return recurrence["reason"] if recurrence else environment["prefix_statistics"], environment["kernels"]


def built(tmp_path: Path) -> int:
    return len(list(tmp_path.glob("cache/normlab/*.so")))


def test_built_for_a_run_that_it_pays_for(tiny_run: Build, tmp_path: Path) -> None:
    assert engine_of(tiny_run(training__steps=2)) == (SHORT, False)
    assert built(tmp_path) == 0
    # 12 time steps, and twice as many updates of two layers: 48 per step.
    enough = int(kernels.BUILD_SECONDS / kernels.SAVED_SECONDS / 48) + 1
    longer: dict[str, Any] = {"training__accumulate": 2, "model__layers": 2, "model__width": 2}
    assert engine_of(tiny_run(**longer, training__steps=enough - 1)) == (SHORT, False)
    assert engine_of(tiny_run(**longer, training__steps=enough)) == ("C kernels", True)
    assert built(tmp_path) == 1


def test_what_is_built_already_is_used(tiny_run: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.load(torch.float32) is not None
    as_a_new_process(monkeypatch)
    assert engine_of(tiny_run(training__steps=2)) == ("C kernels", True)


def test_no_kernels_where_none_are_wanted(tiny_run: Build, tmp_path: Path) -> None:
    reasons = {"none": "every site is bare", "lrn": "lrn at hidden_to_hidden has no fast form"}
    for norm, reason in reasons.items():
        assert engine_of(tiny_run(training__steps=2, model__norm=norm)) == (reason, None)
    for norm_options in ({"model__norm": "ln"}, {"model__norm": "inorm", "model__norm_options__pool": "time"}):
        environment = train(tiny_run(model="transformer", training__steps=2, **norm_options)).environment()
        assert not {"kernels", "prefix_statistics"} & environment.keys()
    assert built(tmp_path) == 0


def test_running_statistics_are_built_for_where_it_pays(
    tiny_run: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def statistics_of(config: RunConfig) -> tuple[str, bool]:
        environment = train(config).environment()
        said = " ".join(capsys.readouterr().out.split())
        assert f"statistics over a prefix: {environment['prefix_statistics']}" in said
        return environment["prefix_statistics"], environment["kernels"]

    transformer = {**INORM, "training__steps": 4}
    assert statistics_of(tiny_run(**transformer)) == (SHORT, False)
    # Three norms of 16 features; 8 rows of 12 time steps.
    monkeypatch.setattr(engine, "SAVED_SECONDS_PER_ENTRY", PREFIX.build_seconds / (4 * 3 * 16 * 8 * 12))
    assert statistics_of(tiny_run(**transformer, seed=2)) == (SHORT, False)
    assert built(tmp_path) == 0
    monkeypatch.setattr(engine, "SAVED_SECONDS_PER_ENTRY", 1.01 * PREFIX.build_seconds / (4 * 3 * 16 * 8 * 12))
    assert statistics_of(tiny_run(**transformer, seed=3)) == ("C kernels", True)
    assert [path.name.partition("-")[0] for path in tmp_path.glob("cache/normlab/*.so")] == ["inorm"]


def test_a_recurrence_on_the_plain_loop_has_the_kernels_at_its_input_alone(tiny_run: Build, tmp_path: Path) -> None:
    """hidden_to_hidden and the cell are normalized one time step at a time."""
    config = tiny_run(training__steps=2, model__norm="inorm")
    reason = "inorm at hidden_to_hidden has no fast form"
    assert engine_of(config) == (reason, False)
    assert built(tmp_path) == 0
    inside: dict[str, Any] = {"model__sites__input_to_hidden": {"norm": "none"}}
    assert engine_of(tiny_run(training__steps=2, model__norm="inorm", **inside)) == (reason, None)


@pytest.mark.parametrize(
    ("changes", "wanted", "begins_with_kernels"),
    [({}, kernels.LSTM, False), ({}, kernels.LSTM, True), (INORM, PREFIX, False)],
)
def test_a_run_goes_on_with_the_engine_it_began_with(
    tiny_run: Build,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    changes: dict[str, Any],
    wanted: c_kernels.Kernels,
    begins_with_kernels: bool,
) -> None:
    """Whatever was built, or deleted, meanwhile."""
    config = tiny_run(**changes, training__steps=10)
    if begins_with_kernels:
        assert wanted.load(torch.float32) is not None

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 6:
                signals = [part for part in trainer.callbacks if isinstance(part, stopping.StopSignals)]  # pyright: ignore
                signals[0].received = 2

    with monkeypatch.context() as patch:
        init = pl.Trainer.__init__
        patch.setattr(pl.Trainer, "__init__", lambda self, **options: init(self, **options, callbacks=[Stop()]))
        record = train(config)
    assert record.outcome().state == "interrupted"
    if wanted is PREFIX:  # as it was recorded when there were no such kernels yet
        record.write_environment({name: value for name, value in record.environment().items() if name != "kernels"})
    as_a_new_process(monkeypatch)
    if begins_with_kernels:
        for path in tmp_path.glob("cache/normlab/*.so"):
            path.unlink()
        assert engine_of(config) == ("C kernels", True)
    else:
        assert wanted.load(torch.float32) is not None
        assert engine_of(config) == ("torch operators: as this run began", False)
