"""The Transformer: equal to GPT-2, norms where the config puts them, trains.

Shapes: B batch, T time, F features, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from tiny_training import losses_on_one_batch
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
from torch.nn import functional

from normlab.config import InputError, SiteConfig, TransformerSites
from normlab.models.attention import Context
from normlab.models.transformer import TransformerModel


def gpt2_names(layers: int) -> dict[str, str]:
    """Our parameter names -> transformers' names."""
    names = {
        "token_embedding.weight": "transformer.wte.weight",
        "position_embedding.weight": "transformer.wpe.weight",
        "head.weight": "lm_head.weight",
    }
    modules = {"final_norm": "transformer.ln_f"}
    for i in range(layers):
        for ours, theirs in (
            ("attention_norm", "ln_1"),
            ("attention.qkv", "attn.c_attn"),
            ("attention.out", "attn.c_proj"),
            ("ffn_norm", "ln_2"),
            ("ffn.up", "mlp.c_fc"),
            ("ffn.down", "mlp.c_proj"),
        ):
            modules[f"blocks.{i}.{ours}"] = f"transformer.h.{i}.{theirs}"
    return names | {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}


@pytest.mark.parametrize("tied", [False, True])
def test_pre_ln_model_equals_gpt2(tied: bool) -> None:
    import transformers  # slow to import: only here

    theirs_config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=12, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=tied,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(theirs_config).double()
    ours = build(config(heads=4, positions="learned", activation="gelu", tie_embeddings=tied))
    randomize(theirs)

    their_parameters = dict(theirs.named_parameters(remove_duplicate=False))
    names = gpt2_names(layers=2)
    our_parameters = dict(ours.named_parameters(remove_duplicate=False))
    assert set(our_parameters) == set(names)
    with torch.no_grad():
        for name, parameter in our_parameters.items():
            value = their_parameters[names[name]]
            parameter.copy_(value if parameter.shape == value.shape and ".weight" not in name else _like(name, value))

    batch, targets = tokens(3, 9), tokens(3, 9)
    our_logits, their_logits = ours(batch).logits, theirs(batch).logits
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-10, atol=1e-10)
    for logits in (our_logits, their_logits):
        functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    for name, parameter in our_parameters.items():
        gradient = their_parameters[names[name]].grad
        assert gradient is not None
        torch.testing.assert_close(parameter.grad, _like(name, gradient), rtol=1e-9, atol=1e-11)


def _like(our_name: str, value: Tensor) -> Tensor:
    """GPT-2's Conv1D stores weights as in x out; torch.nn.Linear as out x in."""
    is_linear = any(part in our_name for part in (".qkv.", ".out.", ".up.", ".down."))
    return value.T if is_linear and our_name.endswith("weight") else value


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_none_contains_no_norm(placement: str) -> None:
    model = build(config(norm="none", sites=EVERYWHERE, placement=placement))
    assert {type(module).__module__ for module in norms_of(model)} == {"normlab.norms.none"}
    torch_norms = ("torch.nn.modules.normalization", "torch.nn.modules.batchnorm", "torch.nn.modules.instancenorm")
    assert not [module for module in model.modules() if type(module).__module__ in torch_norms]
    assert not list(model.buffers())
    F, V, layers = 32, VOCABULARY, 2
    block = (3 * F * F + 3 * F) + (F * F + F) + (4 * F * F + 4 * F) + (4 * F * F + F)
    assert sum(p.numel() for p in model.parameters()) == 2 * V * F + layers * block


def test_sites_are_counted_and_named() -> None:
    counts = {}
    for placement in PLACEMENTS:
        model = build(config(placement=placement))
        sites = [module.site for module in norms_of(model)]
        counts[placement] = {site: sites.count(site) for site in sorted(set(sites))}
    rest = {"embedding": 1, "query": 2, "key": 2}
    assert counts["pre"] == {"attention": 2, "ffn": 2, "final": 1, **rest}
    assert counts["post"] == {"attention": 2, "ffn": 2, **rest}
    assert counts["peri"] == {"attention": 4, "ffn": 4, "final": 1, **rest}


def plain_block(block: nn.Module, x_BTF: Tensor, placement: str) -> Tensor:
    """One block written out by hand: causal, LN around attention and RMSNorm around the feed-forward."""
    weights = dict(block.named_parameters())
    B, T, F = x_BTF.shape

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def ln(x: Tensor, name: str = "attention_norm") -> Tensor:
        return functional.layer_norm(x, (F,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)

    def rms(x: Tensor, name: str = "ffn_norm") -> Tensor:
        return functional.rms_norm(x, (F,), weights[f"{name}.weight"], 1e-5)

    def attention(x: Tensor) -> Tensor:
        q, k, v = (y.view(B, T, 2, F // 2).transpose(1, 2) for y in linear("attention.qkv", x).split(F, dim=-1))
        scores = q @ k.mT / math.sqrt(F // 2)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        return linear("attention.out", (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, F))

    def ffn(x: Tensor) -> Tensor:
        return linear("ffn.down", functional.relu(linear("ffn.up", x)))

    if placement == "pre":
        x_BTF = x_BTF + attention(ln(x_BTF))
        return x_BTF + ffn(rms(x_BTF))
    if placement == "post":
        x_BTF = ln(x_BTF + attention(x_BTF))
        return rms(x_BTF + ffn(x_BTF))
    x_BTF = x_BTF + ln(attention(ln(x_BTF)), "attention_out_norm")
    return x_BTF + rms(ffn(rms(x_BTF)), "ffn_out_norm")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placement_is_the_formula(placement: str) -> None:
    sites = TransformerSites(ffn=SiteConfig(norm="rms"))
    model = build(config(norm="ln", sites=sites, placement=placement, positions="learned", activation="relu"))
    randomize(model)
    batch = tokens(3, 5)
    x_BTF = model.token_embedding.weight[batch] + model.get_parameter("position_embedding.weight")[:5]
    for block in model.blocks:
        x_BTF = plain_block(block, x_BTF, placement)
    if placement == "post":
        assert model.final_norm is None
    else:
        gain, bias = model.get_parameter("final_norm.weight"), model.get_parameter("final_norm.bias")
        x_BTF = functional.layer_norm(x_BTF, (32,), gain, bias)
    torch.testing.assert_close(model(batch).logits, x_BTF @ model.head.weight.T, rtol=1e-10, atol=1e-10)


def test_rotary_takes_any_length_and_learned_positions_say_what_is_too_long() -> None:
    assert build(config(), length=4)(tokens(2, 9)).logits.shape == (2, 9, VOCABULARY)
    learned = build(config(positions="learned"), length=4)
    assert learned(tokens(2, 4)).logits.shape == (2, 4, VOCABULARY)
    with pytest.raises(InputError, match="5 tokens is longer than the 4 learned positions"):
        learned(tokens(2, 5))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dropout_acts_on_both_sublayers_alone(placement: str) -> None:
    """With everything dropped, a block is its residual path: nothing in pre and peri, the two norms in post."""
    block = build(config(placement=placement)).blocks[0]
    randomize(block)
    dropout = block.get_submodule("dropout")
    assert isinstance(dropout, nn.Dropout)
    dropout.p = 1.0
    x_BTF = torch.randn(2, 5, 32, dtype=torch.float64)
    expected = x_BTF
    if placement == "post":
        expected = block.get_submodule("ffn_norm")(block.get_submodule("attention_norm")(x_BTF))
    torch.testing.assert_close(block(x_BTF, Context(None, None, None)), expected)


def test_dropout_acts_on_embedding_and_before_the_classifier() -> None:
    model = build(config(dropout=0.5), classes=3)
    embedded = model._embed(tokens(4, 6), None)
    assert (embedded == 0).double().mean().item() == pytest.approx(0.5, abs=0.1)
    randomize(model)
    model.dropout.p = 1.0
    torch.testing.assert_close(model(tokens(4, 6)).logits, model.head.bias.expand(4, 3))


def test_no_dropout_in_evaluation() -> None:
    model = build(config(dropout=0.5)).eval()
    plain = build(config())
    plain.load_state_dict(model.state_dict())
    batch = tokens(4, 6)
    assert torch.equal(model(batch).logits, plain(batch).logits)


def test_initial_weights_are_gpt2s() -> None:
    model = build(config(width=128, layers=8, positions="learned"), length=64)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            continue
        if name.endswith("bias"):
            assert not parameter.any(), name
        else:
            into_residual = "attention.out" in name or "ffn.down" in name
            assert parameter.std().item() == pytest.approx(0.02 / (4 if into_residual else 1), rel=0.1), name


def test_activations_are_the_formulas() -> None:
    x_BTF = torch.randn(2, 3, 32, dtype=torch.float64)
    for activation in ("gelu", "relu", "sigmoid", "swiglu"):
        ffn = build(config(activation=activation)).blocks[0].get_submodule("ffn")
        randomize(ffn)
        z = ffn.get_submodule("up")(x_BTF)
        half = z.shape[-1] // 2
        hidden = {
            "gelu": lambda z=z: z / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
            "relu": lambda z=z: z.clamp(min=0),
            "sigmoid": lambda z=z: 1 / (1 + torch.exp(-z)),
            "swiglu": lambda z=z, n=half: z[..., :n] / (1 + torch.exp(-z[..., :n])) * z[..., n:],
        }[activation]()
        torch.testing.assert_close(ffn(x_BTF), ffn.get_submodule("down")(hidden))


def test_swiglu_has_about_as_many_parameters_as_gelu() -> None:
    sizes = []
    for activation in ("gelu", "swiglu"):
        model = build(config(activation=activation, width=64))
        sizes.append(sum(p.numel() for p in model.parameters()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    up = build(config(activation="swiglu", ffn_width=20)).blocks[0].get_parameter("ffn.up.weight")
    assert up.shape == (40, 32)


def test_bad_use_is_one_clear_line() -> None:
    with pytest.raises(InputError, match="tie_embeddings is for language modelling"):
        build(config(tie_embeddings=True), classes=2)
    with pytest.raises(InputError, match="carries no state"):
        build(config())(tokens(2, 3), None, torch.zeros(1))


@pytest.mark.parametrize("classes", [None, 3])
@pytest.mark.parametrize("norm", ["none", "ln", "bn_step"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_learns_a_tiny_batch(placement: str, norm: str, classes: int | None) -> None:
    model = TransformerModel(config(norm=norm, placement=placement), VOCABULARY, classes=classes, length=8)
    losses = losses_on_one_batch(model, tokens(6, 8), classes)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("norm", ["ln", "bn_step"])
def test_bf16_autocast_trains(norm: str) -> None:
    model = TransformerModel(config(norm=norm, sites=EVERYWHERE), VOCABULARY, classes=3, length=8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens(4, 8), mask_of([8, 3, 5, 8], 8)).logits
    logits.float().square().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
