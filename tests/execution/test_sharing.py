"""How many workers go onto cores and GPUs, from what runs were seen to need."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from normlab.config import RunConfig, TransformerConfig
from normlab.execution import sharing
from normlab.execution.gpus import Gpu
from normlab.execution.jobs import Job
from normlab.execution.sharing import CONTEXT_MIB, CoreSharing, GpuSharing, Need, Needs
from normlab.records.record import Outcome, RunRecord

GPU = Gpu("GPU-a", "GPU-a", "NVIDIA H200", 100_000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "needs.json"


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(_run(RunConfig(), tmp_path))


def _run(config: RunConfig, folder: Path) -> RunConfig:
    return dataclasses.replace(config, output=dataclasses.replace(config.output, runs_dir=str(folder / "runs")))


def _at(config: RunConfig, **changes: object) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def _trained(job: Job, peak_mib: float) -> None:
    record = RunRecord.create(job.config)
    record.start()
    record.finish(Outcome("finished", "", 2, 0.2, {"peak_memory_mib": peak_mib}))


def test_needs_are_those_of_the_runs_most_alike(path: Path):
    lstm = RunConfig()
    needs = Needs(path, "cores")
    assert (needs.of(lstm), needs.largest()) == (None, None)
    needs.add(_at(lstm, norm="ln"), Need(300))
    needs.add(_at(lstm, norm="bn_step"), Need(500))
    needs.add(dataclasses.replace(_at(lstm, norm="ln"), seed=9), Need(200, 0.5))
    assert Needs(path, "cores").of(_at(lstm, norm="ln")) == Need(300, 0.5)
    assert needs.of(_at(lstm, norm="bn_step")) == Need(500)
    assert needs.of(_at(lstm, norm="rms")) == Need(500, 0.5), "like all norms together"
    assert needs.of(_at(lstm, width=lstm.model.width + 1)) is None
    assert Needs(path, "NVIDIA H200").largest() is None


def test_the_largest_need_is_that_of_the_study(path: Path):
    lstm, transformer = RunConfig(), RunConfig(model=TransformerConfig())
    needs = Needs(path, "cores")
    needs.add(lstm, Need(300, 0.2))
    needs.add(transformer, Need(900, 0.1))
    assert needs.largest() == Need(900, 0.2), "until the study began"
    needs.want(lstm)
    assert needs.largest() == Need(300, 0.2)
    needs.want(_at(lstm, width=7))  # nothing like it is known
    assert needs.largest() == Need(300, 0.2)
    needs.want(transformer)
    assert needs.largest() == Need(900, 0.2)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"cores": {"x": {"memory": 1}}}', '{"cores": 3}'])
def test_a_damaged_file_is_begun_anew(text: str, path: Path):
    path.write_text(text)
    needs = Needs(path, "cores")
    assert needs.largest() is None
    needs.add(RunConfig(), Need(300))
    assert needs.largest() == Need(300)


@pytest.mark.parametrize(
    ("free_mib", "peak_mib", "at_once"), [(10_000, 1000, 8), (5_000, 1000, 4), (500, 1000, 1), (None, 1000, 8)]
)
def test_as_many_workers_as_fit_into_memory(
    free_mib: float | None, peak_mib: float, at_once: int, path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sharing, "available_memory_mib", lambda: free_mib)
    said: list[str] = []
    share = CoreSharing(8, Needs(path, "cores"), said.append)
    assert share.at_once() == 8, "nothing is known yet"
    _trained(job, peak_mib)
    share.note(job)
    assert (share.at_once(), share.at_once()) == (at_once, at_once)
    assert len(said) == (at_once < 8)
    assert all(line.startswith(f"{at_once} at once: a run takes 1,000 of the ") for line in said)


def test_out_of_memory_beside_others_halves_what_is_together_down_to_one(path: Path, job: Job):
    said: list[str] = []
    share = CoreSharing(8, Needs(path, "cores"), said.append)
    assert share.lower(job, 8, is_sure=False)
    assert share.lower(job, 8, is_sure=False), "it ran beside as many, and may run again"
    assert share.at_once() == 4
    assert share.lower(job, 3, is_sure=False)
    assert share.at_once() == 1
    assert not share.lower(job, 1, is_sure=False), "alone it has nobody to blame"
    assert [line.partition(" with ")[2] for line in said] == [
        "8 at once: 4 from now on, and it runs again",
        "3 at once: 1 from now on, and it runs again",
    ]
    assert not path.exists(), "who killed it is not sure"


def test_the_next_study_knows_what_was_too_much(path: Path, job: Job, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sharing, "available_memory_mib", lambda: 10_000.0)
    CoreSharing(8, Needs(path, "cores"), lambda _: None).lower(job, 8, is_sure=True)
    assert CoreSharing(8, Needs(path, "cores"), lambda _: None).at_once() == 4


def _measure(
    job: Job, nvidia_smi: Callable[..., None], path: Path, used: int, busy: int, cores: int
) -> tuple[GpuSharing, list[str]]:
    """A first run has been looked at until its need is known, on a GPU that had 1000 MiB in use before."""
    said: list[str] = []
    nvidia_smi(loads="GPU-a, 1000, 0\n")
    share = GpuSharing([GPU], 0, Needs(path, GPU.model), cores, said.append)
    assert share.at_once() == 1, "the first is measured"
    share.needs.want(job.config)
    record = RunRecord.create(job.config)
    nvidia_smi(loads="GPU-a, 99000, 100\n")
    share.look({0: job})  # not training yet
    nvidia_smi(loads=f"GPU-a, {used}, {busy}\n")
    record.log(1, 0.1, {"train_loss_nats": 2.5})
    for _ in range(sharing.SAMPLES + 2):
        share.look({0: job})
    assert share.at_once() == 1, "it has not validated yet"
    record.log(2, 0.1, {"valid_loss_nats": 2.5})
    share.look({0: job})
    return share, said


@pytest.mark.parametrize(
    ("used", "busy", "cores", "at_once"),
    [
        (21_000, 5, 64, 4),  # by memory: 20 of 90
        (4_000, 30, 64, 3),  # by time: 0.9 / 0.3
        (4_000, 95, 64, 1),
        (4_000, 5, 6, 6),  # by cores
        (96_000, 5, 64, 1),
        (1_500, 0, 64, 64),
        (1_000, 50, 64, 2),  # nothing seen of its memory
    ],
)
def test_runs_per_gpu_are_chosen_from_a_run_alone(
    used: int,
    busy: int,
    cores: int,
    at_once: int,
    job: Job,
    path: Path,
    nvidia_smi: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sharing, "LOOK_SECONDS", 0.0)
    share, said = _measure(job, nvidia_smi, path, used, busy, cores)
    assert share.at_once() == at_once
    assert said[-1].startswith(f"{at_once} at once: on each GPU: a run takes {used - 1000:,} of 100,000 MiB and ")
    assert len(said) == 2
    # The next study begins with it.
    again = GpuSharing([GPU], 0, Needs(path, GPU.model), cores, said.append)
    assert again.at_once() == at_once


def test_a_later_kind_of_run_that_takes_more_lowers_it(
    job: Job, path: Path, tmp_path: Path, nvidia_smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sharing, "LOOK_SECONDS", 0.0)
    share, _ = _measure(job, nvidia_smi, path, 11_000, 5, 64)
    assert share.at_once() == 9
    larger = Job(_run(RunConfig(model=TransformerConfig()), tmp_path))
    share.needs.want(larger.config)
    _trained(larger, 30_000 - CONTEXT_MIB)
    share.note(larger)
    assert share.at_once() == 3


def test_a_run_too_short_for_all_looks_counts_with_those_it_had(
    job: Job, path: Path, nvidia_smi: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sharing, "LOOK_SECONDS", 0.0)
    nvidia_smi(loads="GPU-a, 0, 0\n")
    share = GpuSharing([GPU], 0, Needs(path, GPU.model), 64, lambda _: None)
    _trained(job, 2000)
    job.record.log(1, 0.1, {"train_loss_nats": 2.5})
    for used, busy in ((9_000, 10), (3_000, 50)):
        nvidia_smi(loads=f"GPU-a, {used}, {busy}\n")
        share.look({0: job})
    share.note(job)
    assert share.needs.of(job.config) == Need(9_000, 0.3)


def test_what_is_asked_for_is_not_measured(job: Job, path: Path, nvidia_smi: Callable[..., None]):
    said: list[str] = []
    share = GpuSharing([GPU], 5, Needs(path, GPU.model), 2, said.append)
    _trained(job, 90_000)
    share.look({0: job})
    share.note(job)
    assert (share.at_once(), said, path.exists()) == (5, [], False)
    assert share.lower(job, 5, is_sure=True)
    assert share.at_once() == 2


def test_where_nobody_says_how_busy_a_gpu_is_a_run_has_it_alone(path: Path, nvidia_smi: Callable[..., None]):
    said: list[str] = []
    nvidia_smi(loads="GPU-a, 1000, [N/A]\n")
    share = GpuSharing([GPU, Gpu("MIG-b")], 0, Needs(path, GPU.model), 64, said.append)
    assert (share.at_once(), share.at_once()) == (1, 1)
    assert said == ["1 at once: nvidia-smi does not say how busy the GPU is; --runs-per-gpu N takes more"]


def test_the_file_is_json_that_people_can_read(path: Path):
    Needs(path, "cores").add(RunConfig(), Need(300))
    values = json.loads(path.read_text())
    assert {tuple(need) for need in values["cores"].values()} == {("memory_mib", "utilization")}
