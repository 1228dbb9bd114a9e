"""GRU and RNN on a CPU as one autograd function over the sequence; equal to reference.py within rounding.

On a GPU `gru_layer` and `rnn_layer` do the same by cuda_cells.py.

As fast.py does it for the LSTM, whose sites, buffers and kernels these share. The input site stands before the loop:
its norm runs by itself over all time steps, whatever it is, on torch's own product. The loop is left with a matrix
product and one call per step, forward and backward, both in the C of kernels.c. Without a compiler the plain loop does
it all: torch operators on such buffers took 75 to 103 % of its time.

What backward keeps beside what the input site does, in multiples of B x T x H: of an RNN h alone, and 1 more where
hidden_to_hidden is normalized; of a GRU 5 (3 gates, n's part of the product, h), and 3 more.

Shape suffixes: B batch, T time, I input features, H hidden, G gates (3H, H), N = T x B.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from normlab.machine.products import Product, weight_gradient
from normlab.norms.base import Step
from normlab.norms.moments import Moments
from normlab.recurrence import cuda, cuda_cells, fast, kernels, reference
from normlab.recurrence.fast import BATCH, NONE, ROWS, never_for
from normlab.recurrence.once import differentiated_once
from normlab.recurrence.reference import Activation, SiteCarry, SiteNorms, Weights, project

__all__ = ["engine", "gru_layer", "never_for", "not_now_for", "on_kernels", "recomputes", "rnn_layer"]

Cell = Literal["gru", "tanh", "relu"]


def not_now_for(
    x_TBI: Tensor, h_BH: Tensor, weights: Weights, norms: SiteNorms, step: Step, device: torch.device | None = None
) -> str:
    """Why this call can not run here, if the layer can in principle; empty if it can.

    Args:
        device: the device asked about; None is that of `x_TBI`.
    """
    device = device or x_TBI.device
    reason = fast.not_now_for(x_TBI, h_BH, h_BH, weights, norms, step, device, cuda_cells.failure)
    return reason or ("" if cuda.takes(device) else kernels.absence(h_BH.dtype))


def on_kernels(norms: SiteNorms) -> bool:
    """Whether the C kernels serve these norms in their present mode: the only site in the loop is one."""
    return True


def recomputes(device: torch.device) -> bool:
    """Whether the layers can take for backward what forward did not keep."""
    return False


def engine(norms: SiteNorms, dtype: torch.dtype, device: torch.device | None = None) -> str:
    """What does the work of a time step of a call with gradient."""
    # The input site runs by itself.
    return fast.engine(norms._replace(input_to_hidden=norms.hidden_to_hidden), dtype, device)


def _built(like: Tensor) -> bool:
    if cuda.takes(like.device):
        return True
    # A call without gradient may be the only one: it is not worth compiling for.
    which = kernels.load if torch.is_grad_enabled() else kernels.find
    return which(like.dtype) is not None


class _Steps(fast._KernelSteps):
    """The work of a time step."""

    def __init__(self, tape: fast._Tape, cell: Cell) -> None:
        library = kernels.find(tape.output.dtype)
        assert library is not None
        super().__init__(library, tape, fast._threads(tape))
        self._cell = cell
        self._forward, self._backward = getattr(library, f"{cell}_forward"), getattr(library, f"{cell}_backward")

    def forward(self, time: int, product_BG: Tensor) -> None:
        self._forward(self._sequence, time, product_BG.data_ptr())

    def begin_backward(self, gradients: fast._Gradients) -> None:
        super().begin_backward(gradients)
        if self._cell == "gru":
            self._sequence.d_h = gradients.d_h.data_ptr()

    def backward(self, time: int, d_next_BH: Tensor | None) -> None:
        self._backward(self._sequence, time, fast._address(d_next_BH))


class _Recurrence(torch.autograd.Function):
    """Outputs T x B x H of a layer.

    Args of `apply`:
        parts: cell, hidden site (whose weight and bias are the last two arguments), mask T x B, counts T, kept.
        projected_TBG: N(W_x x) + b.
        bias_G: of a GRU's product with h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        parts: tuple[Cell, fast._Site, Tensor | None, Tensor | None, bool],
        projected_TBG: Tensor,
        weight_GH: Tensor,
        bias_G: Tensor | None,
        h_BH: Tensor,
        weight_G: Tensor | None,
        site_bias_G: Tensor | None,
    ) -> Tensor:
        cell, site, mask_TB, count_T, kept = parts
        length, rows, features = projected_TBG.shape
        held = length if kept else 1
        projected_TBG, h_BH = projected_TBG.contiguous(), h_BH.contiguous()

        def buffer(*shape: int) -> Tensor:
            return h_BH.new_empty(shape)

        if site.kind == ROWS:
            site.spread = buffer(length, rows, site.groups)
        elif site.kind == BATCH:
            site.mean, site.spread = buffer(length, features), buffer(length, features)
        if site.kind != NONE:
            site.normalized = buffer(held, rows, features)
        output = buffer(length, rows, h_BH.shape[1])
        # An RNN's only gate is h.
        gates, inner = (buffer(held, rows, features), buffer(held, *h_BH.shape)) if cell == "gru" else (output, output)
        tape = _tape(kept, mask_TB, count_T, site, projected_TBG, bias_G, h_BH, gates, inner, output)
        steps = _Steps(tape, cell)
        recurrent = Product(weight_GH, rows, length)
        h = h_BH
        for time in range(length):
            steps.forward(time, recurrent(h))
            h = output[time]
        if kept:
            ctx.fixed = (cell, (site.kind, site.features, site.groups, site.centered, site.eps))
            ctx.save_for_backward(
                *(weight_GH, bias_G, h_BH, weight_G, site_bias_G, site.stored_mean, site.stored_scale),
                *(site.normalized, site.spread, gates, inner, output, mask_TB, count_T),
            )
        return output

    @staticmethod
    def backward(ctx: Any, *d_results: Any) -> Any:
        cell, described = ctx.fixed
        weight_GH, bias_G, h_BH, *affine_and_stored = ctx.saved_tensors[:7]
        normalized, spread, gates, inner, output, mask_TB, count_T = ctx.saved_tensors[7:]
        site = fast._Site(*described, *affine_and_stored, normalized=normalized, spread=spread)
        with torch.no_grad():
            # In backward nothing reads `projected`.
            tape = _tape(True, mask_TB, count_T, site, gates, bias_G, h_BH, gates, inner, output)
            d_projected = torch.empty_like(gates)
            shared = cell != "gru" and site.kind == NONE
            gradients = fast._Gradients(
                d_results[0].contiguous(),
                d_gates=d_projected,
                d_product=d_projected if shared else torch.empty_like(gates),
                d_projected=d_projected,
                d_h=torch.zeros_like(h_BH),
                d_cell=h_BH.new_empty(0),
            )
            steps = _Steps(tape, cell)
            steps.begin_backward(gradients)
            recurrent = Product(weight_GH.t(), len(h_BH), len(output))
            d_next = None
            for time in reversed(range(len(output))):
                steps.backward(time, d_next)
                d_next = recurrent(gradients.d_product[time])
            assert d_next is not None
            d_weight_GH = None
            if ctx.needs_input_grad[2]:
                before_NH = torch.cat([h_BH.unsqueeze(0), output[:-1]]).flatten(0, 1)
                d_weight_GH = weight_gradient(gradients.d_product.flatten(0, 1), before_NH)
            totals = (gradients.d_bias, site.d_weight, site.d_bias)
            d_bias, d_weight, d_site_bias = (None if total is None else total.sum(0) for total in totals)
        results = [d_projected, d_weight_GH, d_bias, d_next + gradients.d_h, d_weight, d_site_bias]
        return (None, *differentiated_once(results))


def _tape(
    kept: bool,
    mask_TB: Tensor | None,
    count_T: Tensor | None,
    site: fast._Site,
    projected: Tensor,
    bias: Tensor | None,
    first_h: Tensor,
    gates: Tensor,
    inner: Tensor,
    output: Tensor,
) -> fast._Tape:
    """The LSTM's buffers with `inner` for c, and nothing for tanh(c)."""
    bare = fast._Site(NONE, 0)
    return fast._Tape(
        kept=kept, mask_TB=mask_TB, count_T=count_T, sites=(bare, site, bare), projected=projected, bias=bias,
        first_h=first_h, first_c=first_h, gates=gates, cell=inner, squashed=inner, output=output,
    )  # fmt: skip


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
    """As `reference.gru_layer`, which it calls where `never_for` or `not_now_for` names a reason, or to recompute.

    Raises:
        RuntimeError: differentiated twice.
    """
    # In this order: torch.compile need not look into the other.
    if recompute or not_now_for(x_TBI, h_BH, weights, norms, step) or never_for(norms, weights) or not _built(h_BH):
        return reference.gru_layer(x_TBI, mask_BT, h_BH, weights, norms, step, carry, recompute=recompute)
    return _layer("gru", x_TBI, mask_BT, h_BH, weights, norms, step, carry)


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
    """As `reference.rnn_layer`, which it calls where `never_for` or `not_now_for` names a reason, or to recompute.

    Raises:
        RuntimeError: differentiated twice.
    """
    if recompute or not_now_for(x_TBI, h_BH, weights, norms, step) or never_for(norms, weights) or not _built(h_BH):
        return reference.rnn_layer(x_TBI, mask_BT, h_BH, weights, norms, step, carry, activation, recompute=recompute)
    return _layer(activation, x_TBI, mask_BT, h_BH, weights, norms, step, carry)


def _layer(
    cell: Cell,
    x_TBI: Tensor,
    mask_BT: Tensor | None,
    h_BH: Tensor,
    weights: Weights,
    norms: SiteNorms,
    step: Step,
    carry: SiteCarry | None,
) -> tuple[Tensor, Tensor, SiteCarry]:
    length, rows = x_TBI.shape[:2]
    given = None if carry is None else carry.input_to_hidden
    projected, input_carry = project(x_TBI, mask_BT, weights.input, norms.input_to_hidden, step, given)
    if weights.bias is not None:
        projected = projected + weights.bias
    mask_TB = count_T = None
    if mask_BT is not None:
        mask_TB = mask_BT.t().contiguous()
        count_T = mask_TB.sum(1)
    norm = norms.hidden_to_hidden
    site = fast._site(norm, mask_BT, step, rows, length, h_BH)
    hidden_bias = None if weights.hidden_bias is None else weights.hidden_bias.contiguous()
    tensors = (projected.transpose(0, 1), weights.hidden, hidden_bias, h_BH, site.weight, site.bias)
    kept = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    run = cuda_cells.Recurrence.apply if cuda.takes(h_BH.device) else _Recurrence.apply
    h_TBH = run((cell, site, mask_TB, count_T, kept), *tensors)
    assert isinstance(h_TBH, Tensor)
    if site.mean is not None and site.spread is not None:
        counts = h_TBH.new_full((length,), rows) if count_T is None else count_T.to(h_TBH.dtype)
        norm.store(Moments(site.mean, site.spread, counts), step)
    out_TBH = h_TBH if mask_TB is None else h_TBH.masked_fill(~mask_TB.unsqueeze(-1), 0)
    return out_TBH, h_TBH[-1], SiteCarry(input_carry, None, None)
