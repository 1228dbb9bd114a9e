"""The benchmarks run, their peers are the same mathematics, and the pages say what the results say."""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import pytest
import torch

import normlab
from normlab.config import RunConfig
from normlab.execution.engine import Ended
from normlab.execution.jobs import Job
from normlab.records import environment
from normlab.records.record import Outcome, RunRecord

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def scripts() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(ROOT / "scripts"))
    names = ("benchmarking", "bench_recurrence", "bench_transformer", "bench_runs", "peer_lstms", "recurrence_profile")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(ROOT / "scripts"))


def test_pages_say_what_the_results_say(scripts: dict[str, ModuleType]):
    recurrence, transformer = scripts["bench_recurrence"], scripts["bench_transformer"]
    block, read = scripts["benchmarking"].block, scripts["benchmarking"].read_json
    page, found = (ROOT / "docs" / "speed.md").read_text(), read(recurrence.RESULT)
    assert block((ROOT / "README.md").read_text(), "bench") == recurrence.ratios_block(found["table"])
    assert block(page, "cells") == recurrence.ratios_block(found["cells"])
    assert block(page, "profile") == recurrence.profile_block(found["profile"])
    assert block(page, "transformer") == transformer.page_block(read(transformer.RESULT))
    runs = scripts["bench_runs"]
    assert block(runs.PAGE.read_text(), "runs") == runs.page_block(read(runs.RESULT))
    assert recurrence.FIGURE.exists()
    assert found["sweep"]["rows"]


@pytest.mark.parametrize("norm", ["ln", "bn_step"])
def test_the_scripted_peer_is_the_same_lstm(scripts: dict[str, ModuleType], norm: str):
    torch.manual_seed(0)
    lstm = normlab.LSTM(5, 4, norm=norm, backend="reference", dtype=torch.float64)
    x_TBI = torch.randn(6, 7, 5, dtype=torch.float64)
    peer = scripts["peer_lstms"].peer(lstm, norm, 6, "jit")
    found = []
    for module, weight in ((lstm, "weight_hh_l0"), (peer, "cell.weight_GH")):
        out = module(x_TBI)[0]
        (grad,) = torch.autograd.grad(out.square().sum(), [dict(module.named_parameters())[weight]])
        found.append((out.detach(), grad))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-9)


def test_a_small_run(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    bench = scripts["bench_recurrence"]
    monkeypatch.setattr(bench, "LENGTHS", (2, 3))
    monkeypatch.setattr(bench, "HIDDENS", (4, 8))
    monkeypatch.setattr(bench, "CELL_SHAPES", ((3, 4, 8),))
    result = tmp_path / "bench.json"
    threads, released = torch.get_num_threads(), []
    monkeypatch.setattr(bench.graphs, "release", lambda: released.append(True))
    try:
        bench.main(
            ["--shapes", "3,4,8", "--seconds", "0", "--devices", "cpu", "--result", str(result), "--threads", "1"]
        )
    finally:
        torch.set_num_threads(threads)
    assert len(released) == 1 + 4 + 2  # each shape of table, sweep, cells begins without the graphs of another
    found = json.loads(result.read_text())
    kinds = {(row["norm"], row["backend"]) for row in found["table"]["rows"]}
    assert {("none", "fast"), ("ln", "fast"), ("ln", "eager"), ("bn_step", "jit")} <= kinds
    kinds = {(row["cell"], row["norm"], row["backend"]) for row in found["cells"]["rows"]}
    assert kinds == set(product(("gru", "tanh rnn"), ("ln", "bn_step"), ("fast", "eager")))
    rows = found["table"]["rows"] + found["cells"]["rows"]
    assert all(row["ratio"] > 0 and row["pairs"] == 3 for row in rows)
    for row in found["profile"]["rows"]:
        assert sum(row["parts"].values()) == pytest.approx(row["seconds_with_clocks"], rel=0.01)
        assert all(row["parts"][part] > 0 for part in ("recurrent products", "input products", "weight gradients"))
    assert result.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "torch.jit loop" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "whole"),
    [(["--table", "--shapes", "2,3,4", "3,3,4"], []), (["--table", "--cells", "--shapes", "2,3,4"], ["table"])],
)
def test_an_interrupted_run_is_one_line_and_leaves_whole_parts(
    scripts: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys,
    flags: list[str],
    whole: list[str],
):
    bench, result = scripts["bench_recurrence"], tmp_path / "bench.json"
    flags = [*flags, "--norms", "ln", "--backends", "fast", "--seconds", "0", "--devices", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench_recurrence.py", *flags, "--result", str(result)])
    measured = bench.measured

    def interrupted(shape: tuple[int, int, int], *rest: object):
        if shape == (3, 3, 4):
            raise KeyboardInterrupt
        return measured(shape, *rest)

    monkeypatch.setattr(bench, "measured", interrupted)
    monkeypatch.setattr(bench, "CELL_SHAPES", ((3, 3, 4),))
    assert scripts["benchmarking"].guarded(bench.main) == 130
    printed = capsys.readouterr()
    assert "2 x 3 x 4" in printed.out
    assert printed.err == "interrupted; nothing unfinished was written\n"
    assert list(tmp_path.iterdir()) == [result] * bool(whole)
    assert [part for part in bench.PARTS_OF_RESULT if part in bench.earlier(result)] == whole


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"table": []}', '{"cells": {"rows": [{"device": "cpu", "norm": "ln", "backend": "fast"}]}}']
)
def test_a_result_that_is_none_is_one_line_and_stays(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys, content: str
):
    bench, result = scripts["bench_recurrence"], tmp_path / "bench.json"
    result.write_text(content)
    monkeypatch.setattr(sys, "argv", ["bench_recurrence.py", "--write", "--result", str(result)])
    assert scripts["benchmarking"].guarded(bench.main) == 2
    error = capsys.readouterr().err
    assert "move it away" in error
    assert error.count("\n") == 1
    assert result.read_text() == content


def test_a_peer_that_fails_is_left_out_and_half_precision_is_said(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
):
    class Failing(torch.nn.Module):
        def forward(self, x_TBI: torch.Tensor) -> None:
            raise RuntimeError("no fuser\nhere")

    def failing(lstm: torch.nn.Module, norm: str, *_: object) -> torch.nn.Module:
        if norm == "bn_step":
            raise RuntimeError("no script\nhere")
        return Failing()

    bench, result = scripts["bench_recurrence"], tmp_path / "bench.json"
    monkeypatch.setattr(bench, "peer", failing)
    monkeypatch.setattr(bench, "in_half", lambda *_: True)
    bench.main(["--table", "--shapes", "2,3,4", "--seconds", "0", "--devices", "cpu", "--result", str(result)])
    found = json.loads(result.read_text())["table"]
    kinds = {(row["norm"], row["backend"]) for row in found["rows"]}
    assert {("none", "torch-bf16"), ("none", "fast"), ("ln", "fast")} <= kinds
    assert not any(backend == "jit" for _, backend in kinds)
    assert all(row["base_precision"] == "fp16" for row in found["rows"])
    assert "torch's own in fp16" in bench.ratios_block(found)
    assert capsys.readouterr().err.splitlines() == [
        f"{norm}: torch.jit loop is left out, it fails: RuntimeError: no {what} here"
        for norm, what in (("ln", "fuser"), ("bn_step", "script"))
    ]
    flags = ["--table", "--shapes", "2,3,4", "--backends", "jit", "--devices", "cpu", "--result", str(result)]
    with pytest.raises(bench.InputError, match="none of jit is there or works"):
        bench.main([*flags, "--norms", "ln"])
    assert json.loads(result.read_text())["table"] == found


def test_on_a_gpu_the_plain_loop_is_no_fast_layer(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch):
    bench = scripts["bench_recurrence"]
    there = SimpleNamespace(shape=(2, 3, 4), device=torch.device("cuda"))
    layer = SimpleNamespace(backend_choice=lambda device: ("reference", "Triton is not installed"))
    monkeypatch.setitem(bench.CELLS, "lstm", (None, lambda *_, **__: layer))
    with pytest.raises(bench.InputError, match=r"the reference here \(Triton is not installed\)"):
        bench.variant("ln", "fast", there, "fp32", "lstm")
    assert bench.variant("ln", "eager", there, "fp32", "lstm")[1] == "reference: Triton is not installed"


def test_parts_of_one_measurement_are_of_one_commit(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch):
    """What the first part writes makes the checkout a changed one."""
    asked: list[str] = []

    def git(folder: Path, *arguments: str) -> str:
        asked.append(arguments[0])
        return f"# branch.oid {len(asked)}"

    monkeypatch.setattr(environment, "_ask_git", git)
    environment._git.cache_clear()
    parts = [scripts["benchmarking"].Conditions("bench.py", [], ["one"]).as_dict() for _ in range(2)]
    environment._git.cache_clear()
    assert [part["git"] for part in parts] == [{"commit": "2", "dirty": False}] * 2
    assert [part["machine"] for part in parts] == ["one"] * 2
    assert asked == ["ls-files", "status"]


def test_a_block_is_filled_between_its_markers(scripts: dict[str, ModuleType]):
    page = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb <!-- y: begin -->\n<!-- y: end -->\n"
    new = scripts["benchmarking"].filled(page, "x", "| new |")
    assert new == page.replace("old", "| new |")
    assert scripts["benchmarking"].block(new, "x") == "| new |"


def test_a_small_run_of_the_transformers(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    bench = scripts["bench_transformer"]
    for name, value in (("ROWS", 2), ("LENGTH", 8), ("WIDTH", 16), ("LAYERS", 1)):
        monkeypatch.setattr(bench, name, value)
    result = tmp_path / "bench.json"
    threads = torch.get_num_threads()
    try:
        bench.main(["--norms", "bn", "--seconds", "0", "--result", str(result), "--threads", "1"])
    finally:
        torch.set_num_threads(threads)
    rows = json.loads(result.read_text())["rows"]
    assert {(row["task"], row["variant"]) for row in rows} == {
        (task, variant) for task in bench.TASKS for variant in ("bn", bench.TORCH_PRODUCTS)
    }


class InstantEngine:
    """Does each job in no time; remembers how many workers there were, with how many jobs each."""

    waves: ClassVar[list[tuple[int, list[int]]]] = []

    def __init__(self, size: int, *_: object, fails: str = "") -> None:
        self.size, self.fails, self.jobs, self.together = size, fails, [], False

    def __enter__(self) -> InstantEngine:
        return self

    def __exit__(self, *_: object) -> None: ...

    def start(self, groups: list[list[Job]]) -> None:
        self.waves.append((self.size, [len(group) for group in groups]))
        self.jobs = [job for group in groups for job in group]
        self.together = len(groups[0]) > 1

    def ended(self) -> list[Ended]:
        over, self.jobs = self.jobs, []
        for job in over:
            if not self.fails:
                record = RunRecord.create(job.config)
                record.start()
                if self.together:
                    record.write_environment({"stacked": 3})
                record.finish(Outcome("finished"))
        return [Ended(job, self.fails) for job in over]


def test_runs_per_hour_of_each_way(scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    bench = scripts["bench_runs"]
    ways = {"alone": bench.Way(InstantEngine), "stacked 3": bench.Way(InstantEngine, together=3)}
    monkeypatch.setattr(bench, "WAYS", ways)
    monkeypatch.setattr(bench, "available_cores", lambda: 2)
    monkeypatch.setattr(InstantEngine, "waves", [])
    all_families = bench.families
    monkeypatch.setattr(bench, "families", lambda *how: dict([*all_families(*how).items()][:2]))
    result = tmp_path / "bench.json"
    bench.main(["--at-once", "1", "2", "4", "--seconds", "0", "--result", str(result)])
    found = json.loads(result.read_text())
    families = list(bench.families(2, "cpu", tmp_path))
    assert [(row["family"], row["way"], row["at_once"], row["threads"], row["waves"]) for row in found["rows"]] == [
        (family, *rest)
        for family in families
        for rest in (("alone", 1, 2, 3), ("alone", 2, 1, 3), ("alone", 4, 1, 3), ("stacked 3", 2, 1, 3))
    ]
    waves = InstantEngine.waves[2 * len(families) :]  # without those that warm up
    assert waves[:4] == [(1, [1]), (2, [1, 1]), (4, [1] * 4), (2, [3, 3])]
    assert len(waves) == 3 * len(found["rows"])
    lines = bench.page_block(found).splitlines()
    assert lines[0] == "| run | each is | 1 x 2 | 2 x 1 | 4 x 1 |"
    hourly = f"{found['rows'][3]['runs_per_hour']:,.0f}"
    assert lines[3] == f"| {families[0]} | stacked 3 | – | {hourly} | – |"


def test_runs_that_were_not_stacked_do_not_count_as_such(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    class Singly(InstantEngine):
        def start(self, groups: list[list[Job]]) -> None:
            super().start(groups)
            self.together = False

    bench = scripts["bench_runs"]
    monkeypatch.setattr(bench, "WAYS", {"stacked 3": bench.Way(Singly, together=3)})
    monkeypatch.setattr(bench, "available_cores", lambda: 2)
    with pytest.raises(bench.InputError, match="not stacked"):
        bench.main(["--quick", "--result", str(tmp_path / "bench.json")])


def test_a_run_that_fails_ends_the_measurement(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
):
    bench, result = scripts["bench_runs"], tmp_path / "bench.json"
    fails = functools.partial(InstantEngine, fails="the disk is full")
    monkeypatch.setattr(bench, "WAYS", {"alone": bench.Way(fails)})
    monkeypatch.setattr(sys, "argv", ["bench_runs.py", "--quick", "--result", str(result)])
    assert scripts["benchmarking"].guarded(bench.main) == 2
    error = capsys.readouterr().err
    assert "the disk is full" in error
    assert error.count("\n") == 1
    assert not result.exists()


def test_a_wave_of_real_runs(scripts: dict[str, ModuleType], tiny_run: Callable[..., RunConfig]):
    bench = scripts["bench_runs"]
    number, seconds = bench.wave(bench.WAYS["a Python for each"], tiny_run(training__steps=2), 1, [])
    assert number == 1
    assert seconds > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--at-once", "0"], "must be at least 1"),
        (["--ways", "threads"], "invalid choice: 'threads'"),
        (["--quick"], "give it a --result of its own"),
        (["--ways", "a Python for each", "--at-once", "999"], "alone; add it to --at-once"),
        (["--write", "--result", "/nowhere/x.json"], "there is no x.json yet"),
        (["--device", "cuda", "--result", "/nowhere/x.json"], "name no GPU here"),
    ],
)
def test_a_wrong_flag_of_the_runs_is_one_line(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys, flags: list[str], said: str
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["bench_runs.py", *flags])
    assert scripts["benchmarking"].guarded(scripts["bench_runs"].main) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shapes", "3,4"], "'3,4' is not B,T,H"),
        (["--norms", "lm"], "invalid choice: 'lm'"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--write", "--result", "/nowhere/x.json"], "there is no x.json yet"),
    ],
)
def test_a_wrong_flag_is_one_line(
    scripts: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, capsys, flags: list[str], said: str
):
    monkeypatch.setattr(sys, "argv", ["bench_recurrence.py", *flags])
    assert scripts["benchmarking"].guarded(scripts["bench_recurrence"].main) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
