"""Recurrences as a plain loop over time: the truth that faster backends are checked against.

LSTM: equations 6 to 8 of Cooijmans et al. 2016 (arXiv 1603.09025), gates in torch's order:

    [i f g o] = N(W_h h_{t-1}) + N(W_x x_t) + b        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)
    h_t = sigmoid(o) tanh(N(c_t))                      the update of c itself is not normalized

GRU, in torch's form, where the reset gate acts on the finished product and both biases of n stand apart:

    [r z] = sigmoid(N(W_h h_{t-1}) + b_h + N(W_x x_t) + b_x)
    n = tanh(N(W_x x_t) + b_x + r (N(W_h h_{t-1}) + b_h))    h_t = (1 - z) n + z h_{t-1}

RNN: h_t = tanh or relu of N(W_h h_{t-1}) + N(W_x x_t) + b

Each N of a product stands over all gates at once, as in the LSTM.

Shape suffixes: B batch, T time, S time steps of a segment, I input features, H hidden, G gates (4H, 3H, H), P output
features (H, or the projection's).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normlab.norms.base import Norm, Step
from normlab.norms.moments import Moments, Prefix
from normlab.norms.none import NoNorm
from normlab.recurrence.recomputed import recomputed

SEGMENT = 64
"""Time steps recomputed at once. What one segment takes stands beside what all T steps keep, so it should be short; but
the products over a segment want many rows, and each segment costs some calls of its own."""

Activation = Literal["tanh", "relu"]
Cell = Callable[[Tensor, Tensor, tuple[Tensor, ...], Callable[[Tensor], Tensor]], tuple[Tensor, ...]]
"""What W_x x and W_h h give (normalized, with bias), the state before, the cell's norm -> the state after, h first."""


class Weights(NamedTuple):
    """Parameters of one layer and direction: G x I, G x P, G and, with torch's proj_size, P x H; of a GRU also G, the
    bias of the product with h."""

    input: Tensor
    hidden: Tensor
    bias: Tensor | None
    projection: Tensor | None
    hidden_bias: Tensor | None = None


class SiteNorms(NamedTuple):
    """The norms of one layer and direction; `cell` is the LSTM's alone."""

    input_to_hidden: Norm
    hidden_to_hidden: Norm
    cell: Norm = NoNorm(1)


class SiteCarry(NamedTuple):
    """Running statistics of the norms of one layer and direction that pool over time; None for the others."""

    input_to_hidden: Prefix | None
    hidden_to_hidden: Prefix | None
    cell: Prefix | None


class _Site:
    """One norm inside the loop: called once per time step; keeps its carry and collects what it has to store."""

    def __init__(self, norm: Norm, step: Step, carry: Prefix | None) -> None:
        self.norm, self.step, self.carry = norm, step, carry
        self._collected: list[Moments] = []

    def __call__(self, x_BF: Tensor, keep_B1: Tensor | None, time: int) -> Tensor:
        y, statistics, self.carry = self.norm.normalize(x_BF.unsqueeze(1), keep_B1, self.step + time, self.carry)
        if statistics is not None:
            self._collected.append(statistics)
        return y.squeeze(1)

    @property
    def collected(self) -> Moments | None:
        return _joined(self._collected) if self._collected else None


class _Segment(NamedTuple):
    """What some time steps give: outputs S x B x P, the state, and of each site statistics to store and the carry."""

    outputs: Tensor
    state: tuple[Tensor, ...]
    statistics: tuple[Moments | None, Moments | None, Moments | None]
    carry: SiteCarry


def lstm_cell(
    input_BG: Tensor, hidden_BG: Tensor, state: tuple[Tensor, ...], normalize_cell: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """h and c of the next time step; h before a projection."""
    i, f, g, o = (hidden_BG + input_BG).chunk(4, 1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(normalize_cell(c)), c


def gru_cell(
    input_BG: Tensor, hidden_BG: Tensor, state: tuple[Tensor, ...], normalize_cell: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """h of the next time step."""
    input_rz, input_n = input_BG.tensor_split([input_BG.shape[1] // 3 * 2], 1)
    hidden_rz, hidden_n = hidden_BG.tensor_split([hidden_BG.shape[1] // 3 * 2], 1)
    r, z = torch.sigmoid(input_rz + hidden_rz).chunk(2, 1)
    n = torch.tanh(input_n + r * hidden_n)
    return ((1 - z) * n + z * state[0],)


def tanh_cell(
    input_BG: Tensor, hidden_BG: Tensor, state: tuple[Tensor, ...], normalize_cell: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """h of the next time step."""
    return (torch.tanh(hidden_BG + input_BG),)


def relu_cell(
    input_BG: Tensor, hidden_BG: Tensor, state: tuple[Tensor, ...], normalize_cell: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """h of the next time step."""
    return (torch.relu(hidden_BG + input_BG),)


def lstm_layer(
    x_TBI: Tensor,
    mask_BT: Tensor | None,
    h_BP: Tensor,
    c_BH: Tensor,
    weights: Weights,
    norms: SiteNorms,
    step: Step = 0,
    carry: SiteCarry | None = None,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor, SiteCarry]:
    """Run one layer in one direction, and update the norms' stored values if they are in training.

    Args:
        mask_BT: True = real entry. A row keeps its state where it is False, and its output there is 0.
        h_BP: output before the first time step.
        c_BH: cell before the first time step.
        step: time step of the first column.
        carry: the norms' running statistics from the columns before.
        recompute: keep for backward the outputs alone, beside the input, and take all else anew, a segment of `SEGMENT`
            time steps at a time. An input site that pools over time is taken anew as a whole, and its result is kept,
            4 times as large as the outputs (GRU 3, RNN 1). torch.compile decides by itself what to keep.

    Returns:
        outputs T x B x P, last h, last c, carry.
    """
    state = (h_BP, c_BH)
    out_TBP, (h, c), carry = _loop(lstm_cell, x_TBI, mask_BT, state, weights, norms, step, carry, recompute)
    return out_TBP, h, c, carry


def gru_layer(
    x_TBI: Tensor,
    mask_BT: Tensor | None,
    h_BH: Tensor,
    weights: Weights,
    norms: SiteNorms,
    step: Step = 0,
    carry: SiteCarry | None = None,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, SiteCarry]:
    """As `lstm_layer`: outputs T x B x H, last h, carry."""
    out_TBH, (h,), carry = _loop(gru_cell, x_TBI, mask_BT, (h_BH,), weights, norms, step, carry, recompute)
    return out_TBH, h, carry


def rnn_layer(
    x_TBI: Tensor,
    mask_BT: Tensor | None,
    h_BH: Tensor,
    weights: Weights,
    norms: SiteNorms,
    step: Step = 0,
    carry: SiteCarry | None = None,
    activation: Activation = "tanh",
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, SiteCarry]:
    """As `lstm_layer`: outputs T x B x H, last h, carry."""
    cell = tanh_cell if activation == "tanh" else relu_cell
    out_TBH, (h,), carry = _loop(cell, x_TBI, mask_BT, (h_BH,), weights, norms, step, carry, recompute)
    return out_TBH, h, carry


def project(
    x_TBI: Tensor,
    mask_BT: Tensor | None,
    weight_GI: Tensor,
    norm: Norm,
    step: Step,
    carry: Prefix | None,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Prefix | None]:
    """The normalized input projection B x T x G over all time steps, and the norm's carry; stores its statistics."""
    run = recomputed(_projection, [norm]) if recompute else partial(_projection, [norm])
    projected, statistics, carry = run(x_TBI, mask_BT, weight_GI, step, carry)
    if norm.training and statistics is not None:
        norm.store(statistics, step)
    return projected, carry


def _projection(
    norms: Sequence[Norm], x_TBI: Tensor, mask_BT: Tensor | None, weight_GI: Tensor, step: Step, carry: Prefix | None
) -> tuple[Tensor, Moments | None, Prefix | None]:
    return norms[0].normalize(F.linear(x_TBI, weight_GI).transpose(0, 1), mask_BT, step, carry)


def _loop(
    cell: Cell,
    x_TBI: Tensor,
    mask_BT: Tensor | None,
    state: tuple[Tensor, ...],
    weights: Weights,
    norms: SiteNorms,
    step: Step,
    carry: SiteCarry | None,
    recompute: bool,
) -> tuple[Tensor, tuple[Tensor, ...], SiteCarry]:
    recompute = recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    now = carry or SiteCarry(None, None, None)
    x, weight_GI, input_carry = x_TBI, weights.input, None
    if recompute and norms.input_to_hidden.shares.time != "step":
        given = now.input_to_hidden
        projected, input_carry = project(x, mask_BT, weights.input, norms.input_to_hidden, step, given, recompute=True)
        x, weight_GI = projected.transpose(0, 1), None
    run: Callable[..., _Segment] = recomputed(_segment, norms) if recompute else partial(_segment, norms)
    segments: list[_Segment] = []
    span = SEGMENT if recompute else len(x)
    for start in range(0, len(x), span):
        part = slice(start, start + span)
        mask_BS = None if mask_BT is None else mask_BT[:, part]
        segment = run(cell, x[part], weight_GI, mask_BS, state, weights, step + start, now)
        state, now = segment.state, segment.carry
        segments.append(segment)
    # Each norm by its own mode: one of them may be in training alone (`recompute_statistics`). One in evaluation gave
    # nothing to store.
    for norm, found in zip(norms, zip(*(segment.statistics for segment in segments), strict=True), strict=True):
        statistics = [moments for moments in found if moments is not None]
        if norm.training and statistics:
            norm.store(_joined(statistics), step)
    out_TBP = segments[0].outputs if len(segments) == 1 else torch.cat([segment.outputs for segment in segments])
    if mask_BT is not None:
        out_TBP = out_TBP.masked_fill(~mask_BT.t().unsqueeze(-1), 0)
    return out_TBP, state, now if weight_GI is not None else now._replace(input_to_hidden=input_carry)


def _segment(
    norms: Sequence[Norm],
    cell: Cell,
    x_SBI: Tensor,
    weight_GI: Tensor | None,
    mask_BS: Tensor | None,
    state: tuple[Tensor, ...],
    weights: Weights,
    step: Step,
    carry: SiteCarry,
) -> _Segment:
    """The loop over time; `x_SBI` is already projected and normalized (S x B x G) if `weight_GI` is None."""
    projected, input_statistics, input_carry = x_SBI.transpose(0, 1), None, None
    if weight_GI is not None:
        projected, input_statistics, input_carry = _projection(
            norms, x_SBI, mask_BS, weight_GI, step, carry.input_to_hidden
        )
    if weights.bias is not None:
        projected = projected + weights.bias
    hidden_site = _Site(norms[1], step, carry.hidden_to_hidden)
    cell_site = _Site(norms[2], step, carry.cell)
    hidden_PG = weights.hidden.t()
    steps = projected.unbind(1)
    masks: list[Any] = [None] * len(steps) if mask_BS is None else list(mask_BS.split(1, dim=1))
    outputs: list[Tensor] = []
    for time, (input_BG, keep_B1) in enumerate(zip(steps, masks, strict=True)):
        hidden_BG = hidden_site(state[0] @ hidden_PG, keep_B1, time)
        if weights.hidden_bias is not None:
            hidden_BG = hidden_BG + weights.hidden_bias
        new = cell(input_BG, hidden_BG, state, partial(cell_site, keep_B1=keep_B1, time=time))
        if weights.projection is not None:
            new = (F.linear(new[0], weights.projection), *new[1:])
        if keep_B1 is not None:
            new = tuple(torch.where(keep_B1, after, before) for after, before in zip(new, state, strict=True))
        state = new
        outputs.append(state[0])
    statistics = (input_statistics, hidden_site.collected, cell_site.collected)
    return _Segment(torch.stack(outputs), state, statistics, SiteCarry(input_carry, hidden_site.carry, cell_site.carry))


def _joined(parts: list[Moments]) -> Moments:
    """Statistics of time steps that follow one another."""
    return Moments(*(torch.cat(values) for values in zip(*parts, strict=True)))


def reverse_valid(x_TBF: Tensor, length_B: Tensor | None) -> Tensor:
    """`x_TBF` with the first `length_B` entries of each row in reverse order; padding stays where it is."""
    if length_B is None:
        return x_TBF.flip(0)
    time_T1 = torch.arange(len(x_TBF), device=x_TBF.device).unsqueeze(1)
    index_TB = torch.where(time_T1 < length_B, length_B - 1 - time_T1, time_T1)
    return x_TBF.gather(0, index_TB.unsqueeze(-1).expand_as(x_TBF))
