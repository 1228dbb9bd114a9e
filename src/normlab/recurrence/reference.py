"""The LSTM recurrence as a plain loop over time: the truth that faster backends are checked against.

Equations 6 to 8 of Cooijmans et al. 2016 (arXiv 1603.09025), gates in torch's order:

    [i f g o] = N(W_h h_{t-1}) + N(W_x x_t) + b        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
    h_t = sigmoid(o) tanh(N(c_t))                      the update of c itself is not normalized

Shape suffixes: B batch, T time, I input features, H hidden, G gates (4H), P output features (H, or the projection's).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.norms.base import Norm, Step
from normlab.norms.moments import Moments, Prefix


class Weights(NamedTuple):
    """Parameters of one layer and direction: G x I, G x P, G and, with torch's proj_size, P x H."""

    input: Tensor
    hidden: Tensor
    bias: Tensor | None
    projection: Tensor | None


class SiteNorms(NamedTuple):
    """The norms of one layer and direction."""

    input_to_hidden: Norm
    hidden_to_hidden: Norm
    cell: Norm


class SiteCarry(NamedTuple):
    """Running statistics of the norms of one layer and direction that pool over time; None for the others."""

    input_to_hidden: Prefix | None
    hidden_to_hidden: Prefix | None
    cell: Prefix | None


class _Site:
    """One norm inside the loop: called once per time step; keeps its carry and collects what it has to store."""

    def __init__(self, norm: Norm, step: Step, carry: Prefix | None) -> None:
        self.norm, self.step, self.carry = norm, step, carry
        self.collected: list[Moments] = []

    def __call__(self, x_BF: Tensor, keep_B1: Tensor | None, time: int) -> Tensor:
        y, statistics, self.carry = self.norm.normalize(x_BF.unsqueeze(1), keep_B1, self.step + time, self.carry)
        if statistics is not None:
            self.collected.append(statistics)
        return y.squeeze(1)

    def store(self) -> None:
        """Each norm by its own mode: one of them may be in training alone (`recompute_statistics`)."""
        if self.norm.training and self.collected:
            joined = Moments(*(torch.cat(parts) for parts in zip(*self.collected, strict=True)))
            self.norm.store(joined, self.step)


def lstm_layer(
    x_TBI: Tensor,
    mask_BT: Tensor | None,
    h_BP: Tensor,
    c_BH: Tensor,
    weights: Weights,
    norms: SiteNorms,
    step: Step = 0,
    carry: SiteCarry | None = None,
) -> tuple[Tensor, Tensor, Tensor, SiteCarry]:
    """Run one layer in one direction, and update the norms' stored values if they are in training.

    Args:
        mask_BT: True = real entry. A row keeps its state where it is False, and its output there is 0.
        h_BP: output before the first time step.
        c_BH: cell before the first time step.
        step: time step of the first column.
        carry: the norms' running statistics from the columns before.

    Returns:
        outputs T x B x P, last h, last c, carry.
    """
    carry = carry or SiteCarry(None, None, None)
    projected, statistics, input_carry = norms.input_to_hidden.normalize(
        F.linear(x_TBI, weights.input).transpose(0, 1), mask_BT, step, carry.input_to_hidden
    )
    if norms.input_to_hidden.training and statistics is not None:
        norms.input_to_hidden.store(statistics, step)
    if weights.bias is not None:
        projected = projected + weights.bias

    hidden_site = _Site(norms.hidden_to_hidden, step, carry.hidden_to_hidden)
    cell_site = _Site(norms.cell, step, carry.cell)
    hidden_PG = weights.hidden.t()
    steps = projected.unbind(1)
    masks = [None] * len(steps) if mask_BT is None else mask_BT.split(1, dim=1)
    h, c = h_BP, c_BH
    outputs: list[Tensor] = []
    for time, (input_BG, keep_B1) in enumerate(zip(steps, masks, strict=True)):
        gates_BG = hidden_site(h @ hidden_PG, keep_B1, time) + input_BG
        i, f, g, o = gates_BG.chunk(4, 1)
        new_c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        new_h = torch.sigmoid(o) * torch.tanh(cell_site(new_c, keep_B1, time))
        if weights.projection is not None:
            new_h = F.linear(new_h, weights.projection)
        if keep_B1 is None:
            h, c = new_h, new_c
        else:
            h, c = torch.where(keep_B1, new_h, h), torch.where(keep_B1, new_c, c)
        outputs.append(h)
    # A norm in evaluation gave them nothing to store.
    hidden_site.store()
    cell_site.store()
    out_TBP = torch.stack(outputs)
    if mask_BT is not None:
        out_TBP = out_TBP.masked_fill(~mask_BT.t().unsqueeze(-1), 0)
    return out_TBP, h, c, SiteCarry(input_carry, hidden_site.carry, cell_site.carry)


def reverse_valid(x_TBF: Tensor, length_B: Tensor | None) -> Tensor:
    """`x_TBF` with the first `length_B` entries of each row in reverse order; padding stays where it is."""
    if length_B is None:
        return x_TBF.flip(0)
    time_T1 = torch.arange(len(x_TBF), device=x_TBF.device).unsqueeze(1)
    index_TB = torch.where(time_T1 < length_B, length_B - 1 - time_T1, time_T1)
    return x_TBF.gather(0, index_TB.unsqueeze(-1).expand_as(x_TBF))
