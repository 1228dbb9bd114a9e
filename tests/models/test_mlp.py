"""The feed-forward net: the formulas, causal, blind to padding, trains; every field of its config counts.

Shapes: B batch, T time, E embedding, F features, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tiny_training import losses_on_one_batch
from tiny_transformer import VOCABULARY, mask_of, norms_of, randomize, tokens
from torch import Tensor

from normlab.config import InputError, MLPConfig, MLPSites, NormOptions, SiteConfig, available_norms
from normlab.models.mlp import MLPModel
from normlab.norms import build_norm

OTHER_VALUES: dict[str, Any] = {
    "norm": "rms",
    "sites": MLPSites(SiteConfig(gain=0.5)),
    "norm_options": NormOptions(eps=0.1),
    "width": 16,
    "embedding_width": 3,
    "layers": 3,
    "context": 2,
    "activation": "tanh",
    "dropout": 0.5,
}
ACTIVATIONS = ("relu", "sigmoid", "tanh", "gelu")


def config(**fields: Any) -> MLPConfig:
    return MLPConfig(**{"width": 32, "embedding_width": 8, "context": 4, **fields})


def build(settings: MLPConfig, classes: int | None = None, length: int = 12) -> MLPModel:
    return MLPModel(settings, VOCABULARY, classes=classes, length=length).double()


def classifies(norm: str) -> bool:
    """Whether a text as one vector can be normalized."""
    over = build_norm(norm, 32, causal=False).shares
    return over.time == "step" or over.batch or over.features != "one"


def cases() -> list[tuple[str, int | None]]:
    """Every norm as a language model, and as a classifier if it can be one."""
    return [
        (norm, classes) for norm in available_norms() for classes in (None, 3) if classes is None or classifies(norm)
    ]


def signature(settings: MLPConfig) -> tuple[list[tuple[int, ...]], Tensor]:
    """Shapes of the parameters and the logits in training, from fixed seeds."""
    torch.manual_seed(3)
    model = build(settings)
    torch.manual_seed(4)
    return [tuple(p.shape) for p in model.parameters()], model(torch.arange(20).view(4, 5) % VOCABULARY).logits.detach()


def differ(a: MLPConfig, b: MLPConfig) -> bool:
    (a_shapes, a_logits), (b_shapes, b_logits) = signature(a), signature(b)
    return a_shapes != b_shapes or not torch.allclose(a_logits, b_logits, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(MLPConfig) if f.name != "name"])
def test_every_field_changes_something(name: str) -> None:
    assert not differ(config(), config())
    assert differ(config(), config(**{name: OTHER_VALUES[name]}))


def test_all_activations_differ() -> None:
    settings = [config(activation=activation) for activation in ACTIVATIONS]
    assert all(differ(a, b) for i, a in enumerate(settings) for b in settings[:i])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_formula(activation: str) -> None:
    """A language model position by position, a classifier text by text."""
    act = {
        "relu": lambda z: z.clamp(min=0),
        "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
        "tanh": torch.tanh,
        "gelu": lambda z: z / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
    }[activation]
    batch, mask = tokens(3, 6), mask_of([6, 2, 4], 6)
    for classes in (None, 3):
        model = build(config(norm="ln", activation=activation), classes)
        randomize(model)
        weights = dict(model.named_parameters())

        def above(x_F: Tensor, weights: dict[str, Any] = weights, act: Any = act) -> Tensor:
            for layer in ("layers.0", "layers.1"):
                z_F = weights[f"{layer}.linear.weight"] @ x_F + weights[f"{layer}.linear.bias"]
                gain, bias = weights[f"{layer}.norm.weight"], weights[f"{layer}.norm.bias"]
                x_F = act((z_F - z_F.mean()) / (z_F.var(correction=0) + 1e-5).sqrt() * gain + bias)
            return weights["head.weight"] @ x_F + weights["head.bias"]

        logits = model(batch, mask).logits
        for row, length in enumerate([6, 2, 4]):
            embedded_TE = weights["embedding.weight"][batch[row, :length]]
            if classes:
                torch.testing.assert_close(logits[row], above(embedded_TE.mean(0)))
                continue
            for t in range(length):
                known = [embedded_TE[s] if s >= 0 else torch.zeros_like(embedded_TE[0]) for s in range(t - 3, t + 1)]
                torch.testing.assert_close(logits[row, t], above(torch.cat(known)))


def reach(model: MLPModel, batch: Tensor) -> list[set[int]]:
    """By position t: the distances t - s of the positions s whose embedding moves logits t."""
    seen: list[Tensor] = []

    def enter(module: Any, inputs: Any, x_BTE: Tensor) -> Tensor:
        seen.append(x_BTE.detach().requires_grad_())
        return seen[-1]

    model.embedding.register_forward_hook(enter)
    logits_BTV = model(batch).logits
    found: list[set[int]] = []
    for t in range(batch.shape[1]):
        weighted = (logits_BTV * torch.randn_like(logits_BTV))[:, t].sum()
        (gradient_BTE,) = torch.autograd.grad(weighted, seen[-1], retain_graph=True)
        moved_T = gradient_BTE.abs().amax((0, 2)) > 0
        found.append({t - int(s) for s in moved_T.nonzero()})
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", available_norms())
def test_each_position_sees_its_context_and_nothing_later(norm: str, training: bool) -> None:
    model = build(config(norm=norm))
    randomize(model)
    model(tokens(4, 9))
    found = reach(model.train(training), tokens(4, 9))
    if build_norm(norm, 32).shares.time == "step":
        assert found == [set(range(min(t, 3) + 1)) for t in range(9)]
    else:  # inorm: all that went before, through its statistics; at the first position nothing, as its variance is 0
        assert found[0] == set()
        assert found[8] == set(range(9))
        assert all(min(distances, default=0) >= 0 for distances in found)


def test_the_causality_test_can_fail() -> None:
    model = build(config(norm="bn", norm_options=NormOptions(pool="batch_time")))
    assert min(min(distances) for distances in reach(model, tokens(4, 9))) < 0


@pytest.mark.parametrize(("norm", "classes"), cases())
def test_padding_changes_neither_logits_nor_training(norm: str, classes: int | None) -> None:
    lengths, batch, results = [4, 6, 2, 6], tokens(4, 6), []
    for T, padding in ((6, 0), (9, -100)):
        torch.manual_seed(1)
        model = build(config(norm=norm), classes)
        randomize(model)
        for module in norms_of(model):
            # Over one or two time steps a variance is near 0, and a small eps magnifies rounding by 1 / sqrt(eps).
            module.eps = 0.1
        mask = mask_of(lengths, T)
        wide = torch.cat((batch, tokens(4, T - 6)), dim=1).masked_fill(~mask, padding)
        logits = model(wide, mask).logits
        logits = logits if classes else logits[mask]
        logits.square().mean().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        evaluated = model.eval()(wide, mask).logits
        alone = [model(batch[row : row + 1, :length]).logits for row, length in enumerate(lengths)]
        together = (
            evaluated.unsqueeze(1) if classes else [evaluated[row : row + 1, :n] for row, n in enumerate(lengths)]
        )
        torch.testing.assert_close(list(together), alone, rtol=1e-9, atol=1e-9)
        results.append((logits, gradients, dict(model.named_buffers())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(("norm", "classes"), cases())
def test_a_row_of_nothing_but_padding_makes_no_nan(norm: str, classes: int | None) -> None:
    model = build(config(norm=norm), classes)
    mask = mask_of([5, 0, 3, 5], 5)
    logits = model(tokens(4, 5), mask).logits
    (logits.square() if classes else logits[mask]).sum().backward()
    assert torch.isfinite(logits).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_at_the_start_signals_keep_their_size(activation: str) -> None:
    """Without a norm, through ten layers: neither vanishing nor exploding, and a spread between texts that is left."""
    model = build(config(norm="none", activation=activation, layers=10, width=256))
    spreads = []
    for layer in model.layers:
        layer.get_submodule("norm").register_forward_hook(lambda module, inputs, z: spreads.append(z.std().item()))
    model(tokens(16, 12))
    assert all(0.2 < spread < 5 for spread in spreads)


def test_bad_use_is_one_clear_line() -> None:
    with pytest.raises(InputError, match="inorm normalizes each feature over time"):
        build(config(norm="inorm"), classes=2)
    with pytest.raises(InputError, match="carries no state"):
        build(config())(tokens(2, 3), None, torch.zeros(1))
    with pytest.raises(InputError, match=r"model\.context is 0"):
        config(context=0)
    with pytest.raises(InputError, match=r"model\.norm is bn but no site has it"):
        config(norm="bn", sites=MLPSites(SiteConfig(norm="none")))


@pytest.mark.parametrize(("norm", "classes"), cases())
def test_learns_a_tiny_batch(norm: str, classes: int | None) -> None:
    model = MLPModel(config(norm=norm), VOCABULARY, classes=classes, length=8)
    losses = losses_on_one_batch(model, tokens(6, 8), classes)
    assert losses[-1] < 0.6 * losses[0]
