"""The Transformer with every norm: no leak from the future, no word from the padding.

Shapes: B batch, T time, F features, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from tiny_transformer import (
    EVERYWHERE,
    PLACEMENTS,
    VOCABULARY,
    build,
    config,
    mask_of,
    norms_of,
    randomize,
    tokens,
)
from torch import Tensor, nn

from normlab.config import InputError, NormOptions, TransformerSites, available_norms
from normlab.models.transformer import TransformerModel
from normlab.norms import build_norm


class Embedded(nn.Module):
    """The model as a function of its embeddings B x T x F; each call on a copy: training changes stored values."""

    def __init__(self, model: TransformerModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_BTF: Tensor) -> Tensor:
        model = copy.deepcopy(self.model)
        model.token_embedding.register_forward_hook(lambda *_: x_BTF)
        return model(torch.zeros(x_BTF.shape[:2], dtype=torch.long)).logits


def leak(model: TransformerModel, batch: Tensor) -> tuple[float, float]:
    """Largest gradient of logits <= t with respect to embeddings (> t, <= t), over all t."""
    x_BTF = model.token_embedding(batch).detach().requires_grad_()
    future, past = 0.0, 0.0
    for t in range(batch.shape[1] - 1):
        logits_BTV = Embedded(model)(x_BTF)
        (gradient_BTF,) = torch.autograd.grad((logits_BTV * torch.randn_like(logits_BTV))[:, : t + 1].sum(), x_BTF)
        future = max(future, gradient_BTF[:, t + 1 :].abs().max().item())
        past = max(past, gradient_BTF[:, : t + 1].abs().max().item())
    return future, past


def moved(model: TransformerModel, batch: Tensor) -> float:
    """Largest change of logits <= t when the embeddings > t are others, over all t."""
    x_BTF = model.token_embedding(batch).detach()
    before, change = Embedded(model)(x_BTF), 0.0
    for t in range(batch.shape[1] - 1):
        other = torch.cat([x_BTF[:, : t + 1], torch.randn_like(x_BTF[:, t + 1 :])], 1)
        change = max(change, (Embedded(model)(other) - before)[:, : t + 1].abs().max().item())
    return change


def pools() -> list[tuple[str, str | None]]:
    """Every norm with its default, and the causal pools of those that have a choice."""
    chosen = [(norm, pool) for norm in available_norms() for pool in ("batch", "prefix", "token")]
    return [(norm, None) for norm in available_norms()] + [(norm, pool) for norm, pool in chosen if takes(norm, pool)]


def takes(norm: str, pool: str) -> bool:
    try:
        return build_norm(norm, 8, pool=pool, **({"groups": 2} if norm == "gn" else {})).causal
    except InputError:
        return False


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("norm", "pool"), pools())
def test_decoder_is_causal(norm: str, pool: Any, training: bool) -> None:
    model = build(config(norm=norm, sites=EVERYWHERE, norm_options=NormOptions(pool=pool)))
    randomize(model)
    model(tokens(4, 7))
    future, past = leak(model.train(training), tokens(4, 7))
    assert future == 0
    assert past > 0
    assert moved(model, tokens(4, 7)) < 1e-12


@pytest.mark.parametrize(
    ("norm", "pool"), [("bn", "batch_time"), ("pnv", "batch_time"), ("inorm", "time"), ("gn", "time")]
)
def test_the_causality_tests_can_fail(norm: str, pool: Any) -> None:
    model = build(config(norm=norm, norm_options=NormOptions(pool=pool)))
    assert all(module.leaks for module in norms_of(model) if not module.identity)
    assert leak(model, tokens(4, 7))[0] > 0
    assert moved(model, tokens(4, 7)) > 1e-6
    evaluated = leak(model.eval(), tokens(4, 7))[0] > 0
    assert evaluated == any(not module.causal_in_evaluation for module in norms_of(model))


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("norm", available_norms())
def test_padding_does_not_change_the_logits(norm: str, classes: int | None) -> None:
    model = build(config(norm=norm, sites=EVERYWHERE), classes)
    randomize(model)
    for _ in range(2):
        model(tokens(4, 9))
    model.eval()
    lengths = [3, 9, 1, 6]
    batch, mask = tokens(4, 9), mask_of(lengths, 9)
    for padding in (-100, 0, VOCABULARY - 1):
        logits = model(batch.masked_fill(~mask, padding), mask).logits
        for row, length in enumerate(lengths):
            alone = model(batch[row : row + 1, :length]).logits[0]
            padded = logits[row, :length] if classes is None else logits[row]
            torch.testing.assert_close(padded, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("norm", available_norms())
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_padding_does_not_change_training(placement: str, norm: str, classes: int | None) -> None:
    """Logits, gradients and stored statistics are the same however much padding follows."""
    lengths = [4, 6, 2, 6]
    batch, results = tokens(4, 6), []
    for T in (6, 9):
        torch.manual_seed(1)
        model = build(config(norm=norm, sites=EVERYWHERE, placement=placement), classes)
        randomize(model)
        for module in norms_of(model):
            # Over one or two time steps a variance is near 0, and a small eps magnifies rounding by 1 / sqrt(eps).
            module.eps = 0.1
        wide = torch.cat((batch, tokens(4, T - 6)), dim=1)
        logits = model(wide, mask_of(lengths, T)).logits
        if classes is None:
            logits = logits[mask_of(lengths, T)]
        logits.square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((logits, gradients, dict(model.named_buffers())))
    for narrow, wide in zip(*results, strict=True):
        torch.testing.assert_close(wide, narrow, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("norm", available_norms())
def test_a_row_of_nothing_but_padding_makes_no_nan(norm: str, classes: int | None) -> None:
    model = build(config(norm=norm, sites=EVERYWHERE), classes)
    mask = mask_of([5, 0, 3, 5], 5)
    logits = model(tokens(4, 5), mask).logits
    (logits.square() if classes else logits[mask]).sum().backward()
    assert torch.isfinite(logits).all()
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    assert torch.isfinite(model.eval()(tokens(4, 5), mask).logits).all()


@pytest.mark.parametrize("norm", available_norms())
def test_one_row_and_one_step(norm: str) -> None:
    model = build(config(norm=norm))
    if not all(module.works_at_batch_1 for module in norms_of(model)):
        with pytest.raises(InputError, match="at least 2 rows"):
            model(tokens(1, 1))
        model(tokens(3, 1))
        model.eval()
    logits = model(tokens(1, 1)).logits
    logits.sum().backward()
    assert logits.shape == (1, 1, VOCABULARY)
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("norm", available_norms())
def test_norms_know_whether_the_model_is_causal(norm: str, classes: int | None) -> None:
    model = build(config(norm=norm, sites=EVERYWHERE), classes)
    expected = build_norm(norm, 32, causal=classes is None)
    assert {module.causal for module in norms_of(model)} == {expected.causal}
    assert {module.site for module in norms_of(model)} == {f.name for f in dataclasses.fields(TransformerSites)}


def test_a_step_norm_keeps_statistics_for_every_training_position() -> None:
    model = build(config(norm="bn_step"), length=12)
    for _ in range(3):
        model(tokens(4, 12))
    changed = [buffer for module in norms_of(model) for buffer in module.buffers() if buffer.shape == (13, 32)]
    assert len(changed) >= 2 * 5
    assert all(len({tuple(row.tolist()) for row in buffer[:12]}) == 12 for buffer in changed)
