"""What holds for every probe: it changes nothing, it gives the same values again, and it refuses in one line."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from normlab.config import InputError, available_probes
from normlab.data.splits import Corpus
from normlab.probes.base import Measurement, Subject, build_probe, prediction_nats, probe_class
from normlab.records.disk import to_json

MODELS = {
    "lstm": {"model__norm": "bn_step", "model__dropout": 0.2, "data__tokens": "word"},
    "transformer": {"model": "transformer", "model__norm": "bn", "model__dropout": 0.2, "data__tokens": "word"},
}


def measured(name: str, subject: Subject) -> Measurement:
    """With default options, on as many copies of the run as the probe takes at least."""
    probe = build_probe(name, {})
    return probe(*[subject] * max(1, probe.runs[0]))


def training(subject: Subject, between: Callable[[], object]) -> Iterator[torch.Tensor]:
    """Losses, gradients, weights and buffers of three training steps, with something in between."""
    model = subject.model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in subject.batches("train", 3, train=True):
        loss = prediction_nats(model(*batch.model_inputs()).logits, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        between()
        optimizer.step()
        yield loss.detach()
        yield from (p.grad.clone() for p in model.parameters() if p.grad is not None)
    yield from model.state_dict().values()
    yield torch.get_rng_state()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", available_probes())
def test_training_is_bit_identical_with_and_without(
    name: str, model: str, subject: Callable[..., Subject], wic: Corpus
) -> None:
    with_probe = subject(data__length=6, **MODELS[model])
    without = dataclasses.replace(with_probe, model=copy.deepcopy(with_probe.model))
    found: list[Measurement] = []
    torch.manual_seed(0)
    probed = list(training(with_probe, lambda: found.append(measured(name, with_probe))))
    assert all(part.training for part in with_probe.model.modules())
    torch.manual_seed(0)
    plain = list(training(without, lambda: None))
    assert len(probed) == len(plain)
    assert all(torch.equal(a, b) for a, b in zip(probed, plain, strict=True))
    assert all(measurement.summary and measurement.rows for measurement in found)


@pytest.mark.parametrize("name", available_probes())
def test_the_same_again_and_all_of_it_fit_for_the_record(
    name: str, subject: Callable[..., Subject], wic: Corpus
) -> None:
    of = subject(data__length=6, **MODELS["lstm"])
    torch.manual_seed(1)
    first = measured(name, of)
    torch.manual_seed(2)
    again = measured(name, of)
    if not probe_class(name).timed:
        assert to_json(first._asdict()) == to_json(again._asdict())
    assert all(isinstance(value, int | float) for value in first.summary.values())
    assert any(math.isfinite(value) for value in first.summary.values())


def test_every_probe_says_what_it_is_in_one_line() -> None:
    for name in available_probes():
        first = (probe_class(name).__doc__ or "").partition("\n")[0]
        assert first.endswith((".", ":")), name
        assert build_probe(name, {}).name == name


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("activation", {}, "did you mean 'activations'"),
        ("drift", {"frist": "best"}, "did you mean 'first'"),
        ("drift", {"first": "lats"}, "unknown checkpoint 'lats'"),
        ("activations", {"batches": 0}, "--batches of the probe activations is 0"),
        ("step_statistics", {"tolerance": 0.0}, "--tolerance"),
        ("companions", {"draws": 1}, "at least 2"),
        ("companions", {"examples": -1}, ">= 0"),
        ("leak", {"rows": 1}, "at least 2"),
        ("senses", {"pairs": -1}, ">= 0"),
        ("gradient_flow", {"gain": "0.1;1"}, "give numbers"),
        ("gradient_flow", {"net": "elman"}, "unknown net"),
        ("gradient_flow", {"length": 1}, "at least 2"),
        ("gradient_flow", {"gain": "0.1,nan"}, "give numbers"),
        ("gradient_flow", {"seed": 2**63}, r"it must be from 0 to 2\^63 - 1"),
        ("gradient_flow", {"seed": -1}, "it must be from 0"),
        ("gradient_flow", {"norm": "none"}, "has no gain to set"),
        ("discrepancy", {"statistics": "old"}, "unknown statistics"),
    ],
)
def test_wrong_options_get_one_line(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        build_probe(name, options)
    assert "\n" not in str(error.value)


def test_wrong_runs_get_one_line(subject: Callable[..., Subject], tiny_labels: Any, tmp_path: Path) -> None:
    text = subject()
    with pytest.raises(InputError, match="takes 2 or more"):
        build_probe("bias_variance", {})(text)
    with pytest.raises(InputError, match=r"takes 1 run\(s\), not 2"):
        build_probe("sphere", {})(text, text)
    classifier = subject(data__corpus=str(tiny_labels))
    for name in ("gradient_flow", "by_length"):
        with pytest.raises(InputError, match="language models"):
            build_probe(name, {})(classifier)
    with pytest.raises(InputError, match="lower --longest"):
        build_probe("by_length", {"longest": 1000})(text)
    for name in ("activations", "by_length", "sphere"):
        with pytest.raises(InputError, match="unknown split 'dev'"):
            build_probe(name, {"split": "dev"})(text)
    for other in ({"model__norm": "rms"}, {"data__tokens": "word"}, {"data__batch_size": 4}, {"data__length": 6}):
        with pytest.raises(InputError, match=r"more than seed and data\.corpus"):
            build_probe("bias_variance", {})(text, subject(**other))
    another = tmp_path / "another.txt"
    another.write_text("to be or not to be\n" * 200, encoding="utf-8")
    with pytest.raises(InputError, match="different test texts or symbols"):
        build_probe("bias_variance", {})(text, subject(data__corpus=str(another)))
    with pytest.raises(InputError, match="--batches of the probe gradient_flow is for a run"):
        build_probe("gradient_flow", {"batches": 2})()
    untrained = {"net": "gru", "norm": "ln", "length": 9, "width": 9, "batch": 9, "gain": "", "seed": 9}
    for name, value in untrained.items():
        with pytest.raises(InputError, match=f"--{name} of the probe gradient_flow is for an untrained net"):
            build_probe("gradient_flow", {name: value})(text)
    for options in ({"examples": 15}, {"examples": 1}):
        with pytest.raises(InputError, match="16 examples at this run's batch size"):
            build_probe("companions", options)(text)
    with pytest.raises(InputError, match="reads 1 token at a time"):
        build_probe("leak", {})(subject(data__length=1))


def test_by_length_takes_one_token_more_than_it_reads(subject: Callable[..., Subject]) -> None:
    of = subject(data__length=4)
    test = of.text.splits["test"]

    def with_tokens(count: int) -> Subject:
        splits = {"test": dataclasses.replace(test, ids=test.ids[:count])}
        return dataclasses.replace(of, text=dataclasses.replace(of.text, splits=splits))

    probe = build_probe("by_length", {"longest": 10})
    assert probe(with_tokens(41)).summary
    with pytest.raises(InputError, match=r"needs more than 10 x data\.length=4 tokens, and the test split has 40"):
        probe(with_tokens(40))


def test_a_batch_of_one_row_is_measured(subject: Callable[..., Subject], wic: Corpus) -> None:
    of = subject(model__norm="ln", data__tokens="word", data__batch_size=1, data__length=6)
    for name in available_probes():
        assert measured(name, of).summary, name


@pytest.mark.parametrize("model", ["lstm", "transformer", "mlp"])
def test_classifiers_with_padding_are_measured(
    model: str, subject: Callable[..., Subject], tiny_labels: Any, wic: Corpus
) -> None:
    of = subject(model=model, model__norm="bn_step", data__corpus=str(tiny_labels))
    for name in available_probes():
        if name not in ("gradient_flow", "by_length", "senses"):
            found = measured(name, of)
            wrong = {key: value for key, value in found.summary.items() if not math.isfinite(value)}
            assert found.summary, name
            # Each run stands for itself twice: no spread. A tiny split may be smaller than what is asked for.
            assert not wrong, (name, wrong)


def test_a_stateful_stream_is_measured(subject: Callable[..., Subject], wic: Corpus) -> None:
    of = subject(model__norm="bn_step", data__stream="stateful", data__tokens="word", data__length=6)
    for name in available_probes():
        assert measured(name, of).summary, name
