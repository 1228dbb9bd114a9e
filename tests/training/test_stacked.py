"""Runs trained as one stacked model against the same runs by themselves."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from normlab.config import InputError, RunConfig, available_norms
from normlab.data.prepared import prepare
from normlab.records.record import RunRecord
from normlab.training import stacked, stacked_gain
from normlab.training.datamodule import TextDataModule, WholeRun
from normlab.training.module import TextModule
from normlab.training.optim import build_optimizer
from normlab.training.run import train
from normlab.training.stackable import Gains, may_stack, obstacle, read_gains
from normlab.training.stacked import train_stacked
from normlab.training.stacked_model import RunLosses, StackedModel

Build = Callable[..., RunConfig]
TIMED = ("seconds", "tokens_per_second", "peak_memory_mib")


def at(config: RunConfig, seed: int, rate: float, runs_dir: Path | None = None) -> RunConfig:
    output = config.output if runs_dir is None else dataclasses.replace(config.output, runs_dir=str(runs_dir))
    return dataclasses.replace(config, seed=seed, optim=dataclasses.replace(config.optim, lr=rate), output=output)


def assert_steps_agree(config: RunConfig, steps: int = 3) -> list[set[tuple[int, ...]]]:
    """In float64, where rounding decides little: losses, gradient norms, weights, stored statistics, Adam's state.

    Returns:
        The shapes of the runs' batches, by step.
    """
    text = prepare(config.data)
    configs = [at(config, 1, 3e-3), at(config, 2, 3e-2), at(config, 3, 1e-2)]
    modules: list[TextModule] = []
    batches = []
    for each in configs:
        torch.manual_seed(each.seed)
        modules.append(TextModule(each, text).double().train())
        loader = TextDataModule(each.data, each.seed, text).train_dataloader()
        batches.append([batch for batch, _ in zip(WholeRun(loader, steps), range(steps), strict=False)])
    stack = StackedModel([module.model for module in modules], config.optim, text)
    optimizers = [build_optimizer(m.model, each.optim) for m, each in zip(modules, configs, strict=True)]
    for step in range(steps):
        found = stack.step([of_run[step] for of_run in batches], [each.optim.lr for each in configs])
        for place, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            loss = module.training_step(batches[place][step], step)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(module.model.parameters(), config.optim.clip or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            penalty = 0.0 if found.penalty_nats is None else float(found.penalty_nats[place])
            assert float(found.loss_nats[place]) + penalty == pytest.approx(float(loss.detach()), rel=1e-7)
            assert float(found.gradient_norm[place]) == pytest.approx(float(norm), rel=1e-5)
    for place, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
        for name, value in module.model.named_parameters():
            torch.testing.assert_close(stack.parameters[name][place], value, rtol=1e-6, atol=1e-7)
        for name, value in module.model.named_buffers():
            torch.testing.assert_close(stack.buffers[name][place], value, rtol=1e-6, atol=1e-7)
        expected = optimizer.state_dict()["state"]
        got = stack.optimizer_state(place)
        assert got.keys() == expected.keys()
        for index, state in expected.items():
            for key, value in state.items():
                torch.testing.assert_close(got[index][key], value, rtol=1e-5, atol=1e-9)
    return [{tuple(of_run[step].tokens_BT.shape) for of_run in batches} for step in range(steps)]


def small(model: str, norm: str) -> dict[str, Any]:
    changes: dict[str, Any] = {"model": model, "model__norm": norm}
    if model == "transformer":
        changes |= {"model__layers": 1, "model__heads": 2}
    if norm == "gn":  # groups of two features give +1 and -1, however little they differ
        changes["model__norm_options__groups"] = 2
    return changes


@pytest.mark.parametrize("model", ["lstm", "transformer", "mlp"])
@pytest.mark.parametrize("norm", available_norms())
def test_every_norm_takes_the_same_steps_in_a_stack(tiny_run: Build, model: str, norm: str):
    assert_steps_agree(tiny_run(optim__weight_decay=0.1, **small(model, norm)))


@pytest.mark.parametrize("model", ["lstm", "transformer", "mlp"])
@pytest.mark.parametrize("norm", available_norms())
def test_so_does_every_norm_of_a_classifier_whose_batches_differ_in_size(
    tiny_run: Build, tiny_labels: Path, model: str, norm: str
):
    """Batches of 6 or 7 texts; the longest of them is another one in each run."""
    if (model, norm) == ("mlp", "inorm"):
        pytest.skip("this classifier refuses inorm")
    changes = {"data__corpus": str(tiny_labels), "data__length": 0, "data__batch_size": 7, **small(model, norm)}
    if model == "lstm":
        changes["model__bidirectional"] = True
    shapes = assert_steps_agree(tiny_run(**changes), steps=2)
    assert all(len({steps for _, steps in found}) > 1 for found in shapes)
    assert any(len({rows for rows, _ in found}) > 1 for found in shapes)


OPTIONS = {
    "adam with decay in the gradient": {"optim__name": "adam", "optim__weight_decay": 0.1},
    "sgd": {"optim__name": "sgd", "optim__weight_decay": 0.1},
    "no clipping": {"optim__clip": 0.0},
    "tied embeddings": {"model__tie_embeddings": True},
    "ghost batches": {"model__norm": "bn", "model__norm_options__ghost_rows": 4},
    "memory": {"model__norm": "bn_step", "model__norm_options__memory_batches": 2},
    "few steps with sets of their own": {"model__norm": "bn_step", "model__norm_options__max_steps": 5},
    "prefix": {"model": "transformer", "model__heads": 2, "model__norm": "bn", "model__norm_options__pool": "prefix"},
    "gru": {"model__cell": "gru", "model__norm": "bn_step"},
    "a sample of the text": {"data__resample": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_act_in_a_stack_as_they_do_alone(tiny_run: Build, name: str):
    assert_steps_agree(tiny_run(**{"model__norm": "ln", "optim__clip": 0.5, **OPTIONS[name]}))


def assert_same_run(got: RunRecord, expected: RunRecord, stopped_at: int = 0, rel: float = 2e-3) -> None:
    """Rows, outcome and checkpoints of a run in a stack, in float32, against those of the run by itself.

    Args:
        stopped_at: a step at which the run was stopped, which leaves a row.
    """
    rows = [row for row in got.metrics() if row["step"] != stopped_at]
    assert [row.keys() for row in rows] == [row.keys() for row in expected.metrics()]
    diverged = expected.outcome().state == "diverged"  # then rounding decides its last numbers
    for ours, theirs in zip(rows[: 2 if diverged else None], expected.metrics(), strict=not diverged):
        for name in theirs.keys() - TIMED:
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=1e-4, nan_ok=True), (name, theirs["step"])
    ours, theirs = got.outcome(), expected.outcome()
    assert (ours.state, ours.step, ours.reason.split()[:2]) == (theirs.state, theirs.step, theirs.reason.split()[:2])
    assert ours.results.keys() == theirs.results.keys()
    for name in theirs.results.keys() - TIMED:
        assert ours.results[name] == pytest.approx(theirs.results[name], rel=rel, abs=1e-4), name
    for path in expected.checkpoints.iterdir():
        stored, own = (torch.load(place, weights_only=True) for place in (expected.checkpoints / path.name, path))
        assert own["global_step"] == stored["global_step"]
        assert shape_of(torch.load(got.checkpoints / path.name, weights_only=True)) == shape_of(stored)


def shape_of(stored: Any) -> Any:
    """What stands where in a checkpoint, but for counters of validation, which nothing reads."""
    if isinstance(stored, dict):
        return {key: shape_of(value) for key, value in stored.items()}
    if isinstance(stored, list):
        return [shape_of(value) for value in stored]
    return stored.shape if isinstance(stored, torch.Tensor) else type(stored)


WHOLE = {
    # Norms without stored statistics: those of a bias that a norm takes out again wander, by rounding alone, with Adam.
    "transformer, and one diverges": (
        {
            "model": "transformer",
            "model__norm": "rms",
            "model__heads": 2,
            "model__layers": 1,
            "optim__schedule": "cosine",
            "optim__warmup_steps": 3,
        },
        {1: 1e-3, 2: 1e-2, 3: 10.0},
    ),
    "lstm classifier": ({"model__norm": "ln", "model__bidirectional": True}, {1: 3e-3, 2: 1e-2}),
    "mlp with stored statistics": ({"model": "mlp", "model__norm": "bn", "optim__name": "sgd"}, {1: 1e-2, 4: 1e-1}),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_stack_leaves_the_records_that_its_runs_leave_by_themselves(
    tiny_run: Build, tiny_labels: Path, tmp_path: Path, name: str
):
    changes, rates = WHOLE[name]
    if "classifier" in name:
        changes = {**changes, "data__corpus": str(tiny_labels), "data__length": 0, "data__batch_size": 7}
    config = tiny_run(training__steps=23, training__checkpoint_every=4, training__activations_every=7, **changes)
    alone = [train(at(config, seed, rate, tmp_path / "alone")) for seed, rate in rates.items()]
    together = train_stacked([at(config, seed, rate) for seed, rate in rates.items()])
    for place, (got, expected) in enumerate(zip(together, alone, strict=True)):
        assert_same_run(got, expected)
        fact = got.environment()["stacked"]
        assert (fact["runs"], fact["place"], fact["from_step"]) == (len(rates), place, 1)
        assert ("recurrence" in fact) == (config.model.name == "lstm")
    if "diverges" in name:
        assert [record.outcome().state for record in together] == ["finished", "finished", "diverged"]
        assert math.isfinite(float(together[0].outcome().results["test_loss_nats"]))


def test_a_stopped_stack_goes_on_in_part_stacked_in_part_by_itself(
    tiny_run: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped by a signal between two checkpoints, then at once, as by a kill: rows after the last one are lost."""
    rates = {1: 1e-3, 2: 1e-2, 3: 3e-3}
    config = tiny_run(model="transformer", model__norm="ln", model__heads=2, model__layers=1, training__steps=20)
    config = dataclasses.replace(
        config, training=dataclasses.replace(config.training, checkpoint_every=4, valid_every=7)
    )
    alone = [train(at(config, seed, rate, tmp_path / "alone")) for seed, rate in rates.items()]
    configs = [at(config, seed, rate) for seed, rate in rates.items()]
    step, taken = StackedModel.step, []

    def stopping(self: StackedModel, *args: Any) -> Any:
        taken.append(len(self))
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(taken) == 11:  # 6 steps done, and then 5 more
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(StackedModel, "step", stopping)
    stopped = train_stacked(configs)
    assert [(record.outcome().state, record.outcome().reason) for record in stopped] == [("interrupted", "SIGTERM")] * 3
    assert [record.outcome().step for record in stopped] == [6] * 3
    with pytest.raises(KeyboardInterrupt):
        train_stacked(configs)
    assert {record.outcome().state for record in stopped} == {"interrupted"}
    assert [record.environment()["stacked"]["from_step"] for record in stopped] == [6] * 3
    assert stopped[0].metrics()[-1]["step"] == 10
    first = train(configs[0])
    rest = train_stacked(configs[1:])
    assert taken[11] == 2
    assert [record.environment()["stacked"]["from_step"] for record in rest] == [8, 8]
    for got, expected in zip([first, *rest], alone, strict=True):
        assert_same_run(got, expected, stopped_at=6)


def test_a_batch_that_is_no_number_makes_a_validation_loss_infinite_as_it_does_alone(
    tiny_run: Build, monkeypatch: pytest.MonkeyPatch
):
    evaluate, seen = StackedModel.evaluate, []

    def lost(self: StackedModel, batch: Any) -> RunLosses:
        losses = evaluate(self, batch)
        if not seen:
            losses.nats[1] = math.nan
        seen.append(batch)
        return losses

    monkeypatch.setattr(StackedModel, "evaluate", lost)
    kept, diverged = (
        record.outcome() for record in train_stacked([at(tiny_run(model="mlp"), seed, 1e-3) for seed in (1, 2)])
    )
    assert len(seen) > 1, "of several batches"
    assert kept.state == "finished"
    assert (diverged.state, diverged.reason.split(" nats")[0]) == ("diverged", "validation loss inf")


def test_a_signal_in_the_last_validation_stops_a_stack(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    evaluate = StackedModel.evaluate
    config = tiny_run(model="mlp", training__valid_every=1000)

    def stopped(self: StackedModel, batch: Any) -> RunLosses:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, batch)

    monkeypatch.setattr(StackedModel, "evaluate", stopped)
    configs = [at(config, seed, 1e-3) for seed in (1, 2)]
    steps = config.training.steps
    assert [(r.outcome().reason, r.outcome().step) for r in train_stacked(configs)] == [("SIGTERM", steps)] * 2
    assert [record.outcome().state for record in train_stacked(configs)] == ["finished"] * 2


def test_a_run_that_another_process_ended_meanwhile_stays_as_it_is(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    configs = [at(tiny_run(model="mlp"), seed, 1e-3) for seed in (1, 2, 3)]
    advance = stacked._advance

    def late(*args: Any) -> bool:
        train(configs[0])
        return advance(*args)

    monkeypatch.setattr(stacked, "_advance", late)
    records = train_stacked(configs)
    assert [record.outcome().state for record in records] == ["finished"] * 3
    assert ["stacked" in record.environment() for record in records] == [False, True, True]


def test_runs_are_free_again_if_another_of_the_stack_can_not_be_claimed(
    tiny_run: Build, monkeypatch: pytest.MonkeyPatch
):
    records = [RunRecord.create(tiny_run(seed=seed)) for seed in (1, 2)]
    start = RunRecord.start

    def fails_for_the_second(record: RunRecord) -> None:
        if record.folder == records[1].folder:
            raise OSError("no space left")
        start(record)

    monkeypatch.setattr(RunRecord, "start", fails_for_the_second)
    text = prepare(records[0].config.data)
    with pytest.raises(OSError, match="no space"):
        stacked._advance(text, [(record, {}) for record in records])
    RunRecord.open(records[0].folder).start()


def test_runs_that_have_done_unlike_numbers_of_steps_are_not_stacked(tiny_run: Build):
    config = tiny_run(model="mlp")
    train(at(config, 1, 1e-3), pause_at=3)
    records = train_stacked([at(config, 1, 1e-3), at(config, 2, 1e-2)])
    assert [record.outcome().state for record in records] == ["finished", "finished"]
    assert not any("stacked" in record.environment() for record in records)


def test_what_has_no_run_axis_is_trained_one_by_one(
    tiny_run: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fails(*_: Any) -> None:
        raise RuntimeError("vmap: no rule for this operator\nmore")

    monkeypatch.setattr(StackedModel, "step", fails)
    config = tiny_run(model="mlp")
    records = train_stacked([at(config, seed, 1e-3) for seed in (1, 2)])
    assert [record.outcome().state for record in records] == ["finished", "finished"]
    said = capsys.readouterr().err
    assert "the stack failed, its runs go on one by one: RuntimeError: vmap: no rule for this operator\n" in said
    assert stacked_gain.measure_gain([at(config, seed, 1e-3) for seed in (1, 2)]) == 0.0


def test_what_is_no_number_in_one_run_reaches_no_other(tiny_run: Build):
    config = tiny_run(model__norm="bn_step", optim__clip=1.0)
    text = prepare(config.data)
    modules = [TextModule(config, text) for _ in range(3)]
    batches = list(
        zip(*(TextDataModule(config.data, seed, text).train_dataloader() for seed in (1, 2, 3)), strict=True)
    )
    whole, broken = (StackedModel([m.model for m in modules], config.optim, text) for _ in range(2))
    with torch.no_grad():
        broken.parameters["embedding.weight"][1] = math.nan
    for batch in batches[:2]:
        expected, got = (stack.step(batch, [1e-2] * 3) for stack in (whole, broken))
    assert math.isnan(float(got.loss_nats[1]))
    broken.keep([0, 2])
    whole.keep([0, 2])
    expected, got = (stack.step([batches[2][0], batches[2][2]], [1e-2] * 2) for stack in (whole, broken))
    assert torch.equal(got.loss_nats, expected.loss_nats)
    assert got.loss_nats.isfinite().all()
    for name, value in whole.parameters.items():
        assert torch.equal(broken.parameters[name], value), name
    for name, value in whole.buffers.items():
        assert torch.equal(broken.buffers[name], value), name


OBSTACLES = {
    "dropout": {"model__dropout": 0.1},
    "state_noise": {"model__state_noise": 0.1},
    "recompute": {"model__recompute": True},
    "stateful": {"data__stream": "stateful"},
    "accumulated": {"training__accumulate": 2},
    "processes": {"training__devices": 2},
    "bfloat16": {"training__precision": "bf16"},
    "stop early": {"training__early_stop": 2},
    "W&B": {"output__wandb": "offline"},
}


@pytest.mark.parametrize("said", OBSTACLES)
def test_what_cannot_be_stacked_says_why(tiny_run: Build, said: str):
    config = tiny_run(**OBSTACLES[said])
    assert said in obstacle(config)
    assert not may_stack(config, config)
    with pytest.raises(InputError, match=f"cannot be stacked: .*{said}"):
        train_stacked([config, at(config, 2, 1e-2)])


def test_runs_are_stacked_that_differ_in_seed_and_rate_alone(tiny_run: Build):
    config = tiny_run()
    assert may_stack(config, at(config, 9, 0.5, Path("elsewhere")))
    for changes in ({"model__norm": "rms"}, {"optim__weight_decay": 0.1}, {"training__steps": 11}, {"model__width": 8}):
        assert not may_stack(config, tiny_run(**changes))
        with pytest.raises(InputError, match="differ in more than seed and learning rate"):
            train_stacked([config, tiny_run(**changes)])


def test_whether_stacks_are_faster_is_measured_once(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    measured: list[int] = []

    def measure(configs: list[RunConfig]) -> float:
        measured.append(len(configs))
        return 0.5 * len(configs)

    monkeypatch.setattr(stacked_gain, "measure_gain", measure)
    config = tiny_run()
    runs = [at(config, seed, 1e-3) for seed in range(1, 9)]
    assert not stacked_gain.is_worth_stacking(runs[:2])
    assert stacked_gain.is_worth_stacking(runs[:4])
    assert stacked_gain.is_worth_stacking(runs[:8]), "no less than four"
    assert not stacked_gain.is_worth_stacking(runs[1:3])
    assert measured == [2, 4]
    gains = read_gains(config)
    assert gains.by_runs == {2: 1.0, 4: 2.0}
    monkeypatch.setattr(stacked_gain, "processor", lambda: "another machine")
    assert stacked_gain.is_worth_stacking(runs[:4])
    assert measured == [2, 4, 4]
    assert read_gains(tiny_run(model__width=8)) == Gains("", {})


def test_a_gain_is_that_of_whole_runs(tiny_run: Build, monkeypatch: pytest.MonkeyPatch):
    """A step by itself takes 1 s here, one of a stack of four 2 s, and beginning twice 8 s."""
    monkeypatch.setattr(stacked_gain, "SETUP_SECONDS", 8.0)
    monkeypatch.setattr(stacked_gain, "LONGEST_STEP_SECONDS", 1.0)
    taken = iter([1.0, 2.0, 1.5])
    monkeypatch.setattr(stacked_gain, "_seconds", lambda take_step, device: (take_step(0), next(taken))[1])
    config = tiny_run(training__steps=16)
    runs = [at(config, seed, 1e-3) for seed in range(4)]
    assert stacked_gain.measure_gain(runs) == pytest.approx(16 / (16 / 2 + 8), rel=0.1)
    assert stacked_gain.measure_gain(runs) == 0.0, "a step as long as that leaves nothing idle"
