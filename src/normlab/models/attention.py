"""Multi-head self-attention with rotary positions and norms on queries and keys.

Shapes: B batch, T time, F features (heads x head width), N heads, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from normlab.models.linear import Linear
from normlab.models.sites import NormFactory

ROTARY_BASE = 10_000.0


class Context(NamedTuple):
    """What every block of one forward pass shares; computed once."""

    mask: Tensor | None  # B x T, True = real entry; None = no padding. For the norms.
    visible: Tensor | None  # True = this query may see this key, broadcastable to B x N x T x T. For the attention.
    rotation: tuple[Tensor, Tensor] | None  # cos and sin, T x D/2; None = no rotary positions.


def visible_keys(mask_BT: Tensor | None, *, causal: bool) -> Tensor | None:
    """Which keys each query may see, or None where `is_causal` alone says it (the fast path: no padding).

    Every query sees at least one key, so that a softmax over nothing never makes a NaN: a row of nothing but
    padding sees all of itself (encoder), a query with only padding before it sees itself (decoder). What such
    queries compute is padding too and reaches no real entry.
    """
    if mask_BT is None:
        return None
    if not causal:
        return (mask_BT | ~mask_BT.any(dim=1, keepdim=True))[:, None, None, :]
    T = mask_BT.shape[1]
    past_TT = torch.ones(T, T, dtype=torch.bool, device=mask_BT.device).tril()
    self_TT = torch.eye(T, dtype=torch.bool, device=mask_BT.device)
    return ((past_TT & mask_BT[:, None, :]) | self_TT)[:, None]


def rotary_rotation(T: int, D: int, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of the angles t * 10000^(-2i/D), each T x D/2 (Su et al. 2021, arXiv 2104.09864, equation 15).

    Computed in fp32 at least: in bf16 the positions above 256 would be rounded.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    pair = torch.arange(D // 2, device=like.device, dtype=dtype)
    time = torch.arange(T, device=like.device, dtype=dtype)
    angle_TD = time[:, None] * ROTARY_BASE ** (-2.0 * pair / D)
    return angle_TD.cos(), angle_TD.sin()


def rotate(x_BNTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn feature pairs (i, i + D/2) by their position's angle: the two halves, not interleaved (as in GPT-NeoX)."""
    cos, sin = rotation
    first, second = x_BNTD.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BNTD.dtype)


class SelfAttention(nn.Module):
    """Scaled dot-product self-attention: B x T x F -> B x T x F.

    The norms at the sites `query` and `key` see each head as a row of its own, (B * N) x T x D, so that a norm with
    statistics per time step keeps them per position, and every head shares one gain and bias of width D.
    """

    def __init__(self, width: int, heads: int, norms: NormFactory, *, causal: bool, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.dropout = dropout
        self.qkv = Linear(width, 3 * width)
        self.query_norm = norms("query", width // heads)
        self.key_norm = norms("key", width // heads)
        self.out = Linear(width, width)

    def forward(self, x_BTF: Tensor, context: Context) -> Tensor:
        B, T, F = x_BTF.shape
        qkv_BNTD = self.qkv(x_BTF).view(B, T, 3 * self.heads, F // self.heads).transpose(1, 2)
        q_BNTD, k_BNTD, v_BNTD = qkv_BNTD.chunk(3, dim=1)

        head_mask = None if context.mask is None else context.mask.repeat_interleave(self.heads, dim=0)
        q_BNTD = self.query_norm(q_BNTD.flatten(0, 1), head_mask).unflatten(0, (B, self.heads))
        k_BNTD = self.key_norm(k_BNTD.flatten(0, 1), head_mask).unflatten(0, (B, self.heads))
        if context.rotation is not None:
            q_BNTD, k_BNTD = rotate(q_BNTD, context.rotation), rotate(k_BNTD, context.rotation)

        y_BNTD = functional.scaled_dot_product_attention(
            q_BNTD,
            k_BNTD,
            v_BNTD,
            attn_mask=context.visible,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.causal and context.visible is None,
        )
        return self.out(y_BNTD.transpose(1, 2).reshape(B, T, F))
