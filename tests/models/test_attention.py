"""Self-attention: rotary positions, norms on queries and keys, padding.

Shapes: B batch, T time, N heads, D head width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from tiny_transformer import (
    BARE,
    build,
    config,
    mask_of,
    randomize,
    tokens,
)
from torch import Tensor
from torch.nn import functional

from normlab.config import SiteConfig
from normlab.models.attention import Context, rotary_rotation, rotate, visible_keys


def turned(x_BTD: Tensor) -> Tensor:
    """Rotary positions as complex numbers: features i and i + D/2 are one number, turned by t * 10000^(-2i/D)."""
    T, D = x_BTD.shape[-2:]
    z = torch.complex(x_BTD[..., : D // 2], x_BTD[..., D // 2 :])
    angle = torch.tensor([[t * 10000 ** (-2 * i / D) for i in range(D // 2)] for t in range(T)], dtype=torch.float64)
    z = z * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), dim=-1)


def test_rotary_is_the_complex_rotation() -> None:
    x_BNTD = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    rotation = rotary_rotation(7, 8, like=x_BNTD)
    torch.testing.assert_close(rotate(x_BNTD, rotation), turned(x_BNTD))


def test_rotary_scores_depend_on_relative_positions_only() -> None:
    q_D, k_D = torch.randn(2, 8, dtype=torch.float64)
    rotation = rotary_rotation(9, 8, like=q_D)
    scores_TT = rotate(q_D.expand(1, 1, 9, 8), rotation)[0, 0] @ rotate(k_D.expand(1, 1, 9, 8), rotation)[0, 0].T
    for offset in range(-8, 9):
        diagonal = scores_TT.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores_TT[0].std() > 0.01


def test_rotary_angles_stay_exact_in_bf16() -> None:
    cos, _ = rotary_rotation(600, 8, like=torch.zeros(1, dtype=torch.bfloat16))
    torch.testing.assert_close(cos[:, 0], torch.cos(torch.arange(600, dtype=torch.float32)))


def test_padding_on_the_left_is_not_attended_to() -> None:
    model = build(config(norm="none")).eval()
    randomize(model)
    batch, mask = tokens(2, 6), mask_of([6, 4], 6).flip(1)
    torch.testing.assert_close(model(batch, mask).logits[1, 2:], model(batch[1:, 2:]).logits[0])


def test_a_step_norm_on_queries_sees_each_head_as_a_row_and_each_position_as_a_step() -> None:
    model = build(config(norm="bn_step", sites=dataclasses.replace(BARE, query=SiteConfig())), classes=3)
    attention = model.blocks[0].get_submodule("attention")
    calls: list[Any] = []
    attention.get_submodule("query_norm").register_forward_hook(lambda _m, inputs, _y: calls.append(inputs))
    batch, mask = tokens(3, 5), mask_of([5, 2, 4], 5)
    model(batch, mask)
    (x, head_mask), *_ = calls
    qkv = attention.get_submodule("qkv")(model.token_embedding(batch))
    heads = torch.stack([qkv[b, :, 16 * n : 16 * n + 16] for b in range(3) for n in (0, 1)])
    torch.testing.assert_close(x[head_mask], heads[head_mask])
    assert head_mask.tolist() == mask[[0, 0, 1, 1, 2, 2]].tolist()


def test_query_and_key_norms_come_before_the_rotation() -> None:
    """An elementwise gain commutes with no rotation, so the order shows in the scores."""
    sites = dataclasses.replace(BARE, query=SiteConfig(norm="rms"), key=SiteConfig(norm="ln"))
    model = build(config(sites=sites, layers=1, heads=1), classes=3)
    randomize(model)
    batch = tokens(2, 6)
    x_BTF = model.token_embedding.weight[batch]
    attention = model.blocks[0].get_submodule("attention")
    q, k, v = attention.get_submodule("qkv")(x_BTF).split(32, dim=-1)
    q = functional.rms_norm(q, (32,), attention.get_parameter("query_norm.weight"), 1e-5)
    gain, bias = attention.get_parameter("key_norm.weight"), attention.get_parameter("key_norm.bias")
    k = functional.layer_norm(k, (32,), gain, bias)
    q, k = turned(q), turned(k)
    attended = attention.get_submodule("out")((q @ k.mT / math.sqrt(32)).softmax(-1) @ v)
    block = model.blocks[0]
    x_BTF = x_BTF + attended
    x_BTF = x_BTF + block.get_submodule("ffn")(x_BTF)
    torch.testing.assert_close(model(batch).logits, model.head(x_BTF.mean(dim=1)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
def test_every_query_sees_a_key_and_real_queries_see_real_keys_only(causal: bool) -> None:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    visible = visible_keys(mask, causal=causal)
    assert visible is not None
    visible = visible.expand(3, 1, 4, 4)[:, 0]
    assert visible.any(dim=-1).all()
    for b, query, key in ((b, q, k) for b in range(3) for q in range(4) for k in range(4) if mask[b, q]):
        assert visible[b, query, key] == (mask[b, key] and (key <= query or not causal))
    assert visible_keys(None, causal=causal) is None


def test_dropout_acts_on_attention_weights_in_training_only() -> None:
    """Values are constant, so what a head gives is the sum of its weights: a multiple of 1 / (1 - p) / T."""
    attention = build(config(heads=1, dropout=0.5), classes=3).blocks[0].get_submodule("attention")
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.zero_()
        attention.get_parameter("qkv.bias")[64:] = 1.0
        attention.get_parameter("out.weight").copy_(torch.eye(32))
    x_BTF = torch.randn(2, 10, 32, dtype=torch.float64)
    kept = attention(x_BTF, Context(None, None, None)) * 5
    torch.testing.assert_close(kept, kept.round())
    assert kept.std() > 0.5
    torch.testing.assert_close(attention.eval()(x_BTF, Context(None, None, None)), torch.ones_like(x_BTF))
