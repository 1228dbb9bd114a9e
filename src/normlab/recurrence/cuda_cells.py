"""GRU and RNN on a GPU as one autograd function over the sequence; equal to reference.py within rounding.

As cuda.py does it for the LSTM, whose graphs, statistics and precision these share. The input site stands before the
loop, as in fast_cells.py. A time step is a matrix product (cuBLAS) and one kernel (triton_cells.py).

Memory, in multiples of B x T x H, beside what the input site keeps: an RNN keeps h alone from forward to backward (1),
and 1 more where hidden_to_hidden is normalized; a GRU 5 (3 gates, n's part of the product, h), and 3 more. The
normalized input lies where h or the gates come to lie. Under autocast h in bfloat16 is half a one more. While backward
runs it takes 2 to 4 more for an RNN, 7 to 13 for a GRU.

Shape suffixes: B batch, T time, H hidden, G gates (3H, H).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from normlab.recurrence import cuda
from normlab.recurrence.cuda import BATCH, NONE, ROWS
from normlab.recurrence.graphs import Lease, Tape, needed_again, one_at_a_time
from normlab.recurrence.once import differentiated_once

if TYPE_CHECKING:
    from normlab.recurrence.fast import _Site

__all__ = ["Recurrence", "failure"]

TANH, RELU = range(2)  # as in kernels.c


def failure(device: torch.device) -> str:
    """Why nothing runs here; empty if small layers do. Says so in the log, once."""
    return cuda.failure(device, _try_out)


def _kernels() -> Any:
    return importlib.import_module("normlab.recurrence.triton_cells")


def _try_out(device: torch.device) -> None:
    for kind in (ROWS, BATCH):
        site = cuda._Fixed(kind, 1, True, 1e-5, 0)
        shape = _Shape(device, 0, 1, 1, 16, torch.float32, torch.float32, True, False, "none", site)
        for tape in (_TAPES[cell](shape) for cell in ("gru", "tanh")):
            tape.launch_forward()
            tape.launch_backward(tape.new_gradients())
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Shape(NamedTuple):
    """What a sequence's memory and launches depend on: two calls of equal shape can replay the same graph."""

    device: torch.device
    stream: int
    length: int
    rows: int
    hidden: int
    dtype: torch.dtype
    product_dtype: torch.dtype
    kept: bool
    masked: bool
    precision: str
    site: cuda._Fixed


class _Tape(Tape):
    """The memory of a layer over the sequence.

    Attributes:
        gates_per_unit: entries of the product with h for each hidden unit.
        input: T x B x G; N(W_x x) + b, until the results of the same time step take its place.
        weight, bias: of the product with h, once it is normalized; ones and zeros where there is none.
        states: (T + 1) x B x H, beginning with the one before the first time step.
        low_states, low_weight_GH: in the dtype of the products; the same tensor as `states` where that is `dtype`.
    """

    gates_per_unit: ClassVar[int]
    input: Tensor

    def __init__(self, shape: _Shape) -> None:
        length, rows, hidden, features = shape.length, shape.rows, shape.hidden, self.gates_per_unit * shape.hidden
        self.shape = shape
        self.mask_TB = self.buffer(length, rows, dtype=torch.uint8) if shape.masked else None
        self.count_T = self.buffer(length) if shape.masked else None
        self.site = cuda._Statistics(shape.site, shape, features, length if shape.kept else 0)
        self.weight, self.bias = self.buffer(features), self.buffer(features)
        self.states = self.buffer(length + 1, rows, hidden)
        lowers = shape.product_dtype != shape.dtype
        self.low_states = torch.empty_like(self.states, dtype=shape.product_dtype) if lowers else self.states
        self.low_weight_GH = self.buffer(features, hidden, dtype=shape.product_dtype)
        self.product = self.buffer(rows, features)

    def buffer(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        """New memory, in the dtype of the states if no other is asked for."""
        return torch.empty(size, dtype=dtype or self.shape.dtype, device=self.shape.device)

    def load(self, site: _Site, mask_TB: Tensor | None, count_T: Tensor | None, *tensors: Any) -> None:
        """Copy everything in: `tensors` are projected_TBG, weight_GH, bias_G, h_BH, and weight and bias of the site."""
        projected_TBG, weight_GH, bias_G, h_BH, weight_G, site_bias_G = tensors
        pairs = [(self.input, projected_TBG), (self.low_weight_GH, weight_GH), (self.states[0], h_BH)]
        if self.low_states is not self.states:
            pairs.append((self.low_states[0], h_BH))
        if self.mask_TB is not None:
            pairs += [(self.mask_TB, mask_TB), (self.count_T, count_T)]
        if self.site.stored_mean is not None:
            pairs += [(self.site.stored_mean, site.stored_mean), (self.site.stored_scale, site.stored_scale)]
        self.weight.fill_(1) if weight_G is None else self.weight.copy_(weight_G)
        self.bias.zero_()
        for value in (bias_G, site_bias_G):
            if value is not None:
                self.bias += value
        for own, value in pairs:
            own.copy_(value)

    def steps(self) -> tuple[Any, Any]:
        """The kernels of a time step, forward and backward."""
        raise NotImplementedError

    def own(self) -> tuple[tuple[Tensor, ...], dict[str, int]]:
        """What this kind's kernels take beside what all of them take."""
        raise NotImplementedError

    def launch_forward(self) -> None:
        shape, site = self.shape, self.site
        grid, tile = cuda._tile(shape, [shape.site])
        buffers, constants = self.own()
        lowers = self.low_states is not self.states
        arguments = (
            *(shape.rows, shape.hidden, self.mask_TB, self.count_T, self.product, self.weight, self.bias),
            *(site.arguments, site.normalized, self.states, self.low_states if lowers else None, *buffers),
        )
        constants |= {"site": shape.site[:4], "MASKED": shape.masked, "KEPT": shape.kept, **tile}
        step = self.steps()[0][grid]
        weight_HG = self.low_weight_GH.t()
        for time in range(shape.length):
            cuda._multiply(self.low_states[time], weight_HG, self.product)
            step(time, *arguments, **constants)

    def new_gradients(self) -> _Gradients:
        return _Gradients(self)

    def launch_backward(self, gradients: _Gradients) -> None:
        shape, site = self.shape, self.site
        grid, tile = cuda._tile(shape, [shape.site])
        buffers, constants = self.own()
        arguments = (
            *(shape.rows, shape.hidden, self.mask_TB, self.count_T, self.weight),
            *(site.arguments, site.normalized, self.states),
            *(gradients.d_output, gradients.d_next, gradients.d_h, gradients.d_input, gradients.d_product, *buffers),
        )
        constants |= {"site": shape.site[:4], "MASKED": shape.masked, **tile}
        step = self.steps()[1][grid]
        gradients.d_next.zero_()
        gradients.d_h.zero_()
        d_product = gradients.of_product
        for time in reversed(range(shape.length)):
            step(time, *arguments, **constants)
            cuda._multiply(d_product[time], self.low_weight_GH, gradients.d_next)

    def d_normalized(self, d_input: Tensor) -> Tensor:
        """T x B x G; the gradient of the product with h, once it is normalized and has weight and bias."""
        return d_input


class _GRUTape(_Tape):
    """Attributes:
    gates: T x B x 3H; r, z and n.
    inner: n's part of the product with h, once it is normalized.
    """

    gates_per_unit = 3

    def __init__(self, shape: _Shape) -> None:
        super().__init__(shape)
        self.input = self.gates = self.buffer(shape.length, shape.rows, 3 * shape.hidden)
        self.inner = self.buffer(shape.length if shape.kept else 0, shape.rows, shape.hidden)

    def steps(self) -> tuple[Any, Any]:
        return _kernels().gru_forward_step, _kernels().gru_backward_step

    def own(self) -> tuple[tuple[Tensor, ...], dict[str, int]]:
        return (self.gates, self.inner), {}

    def d_normalized(self, d_input: Tensor) -> Tensor:
        hidden = self.shape.hidden
        rz, n = d_input.tensor_split([2 * hidden], -1)
        return torch.cat([rz, n * self.gates[..., :hidden]], -1)


class _RNNTape(_Tape):
    gates_per_unit = 1
    activation: ClassVar[int]

    def __init__(self, shape: _Shape) -> None:
        super().__init__(shape)
        self.input = self.states[1:]

    def steps(self) -> tuple[Any, Any]:
        return _kernels().rnn_forward_step, _kernels().rnn_backward_step

    def own(self) -> tuple[tuple[Tensor, ...], dict[str, int]]:
        return (), {"ACTIVATION": self.activation}


class _TanhTape(_RNNTape):
    activation = TANH


class _ReluTape(_RNNTape):
    activation = RELU


_TAPES: dict[str, type[_Tape]] = {"gru": _GRUTape, "tanh": _TanhTape, "relu": _ReluTape}


class _Gradients:
    """The memory of backward; `d_product` is None where it is `d_input` itself. Written anew by every backward."""

    def __init__(self, tape: _Tape) -> None:
        shape = tape.shape
        self.d_output = torch.empty_like(tape.states[1:])
        self.d_next = torch.empty_like(tape.states[0])
        self.d_h = torch.empty_like(tape.states[:2])
        self.d_input = torch.empty_like(tape.input)
        shared = tape.gates_per_unit == 1 and shape.site.kind == NONE and shape.product_dtype == shape.dtype
        self.d_product = None if shared else torch.empty_like(tape.input, dtype=shape.product_dtype)

    @property
    def of_product(self) -> Tensor:
        return self.d_input if self.d_product is None else self.d_product


class Recurrence(torch.autograd.Function):
    """Outputs T x B x H of a layer; arguments as `_Recurrence` of fast_cells.py."""

    @staticmethod
    def forward(
        ctx: Any,
        parts: tuple[str, _Site, Tensor | None, Tensor | None, bool],
        projected_TBG: Tensor,
        weight_GH: Tensor,
        bias_G: Tensor | None,
        h_BH: Tensor,
        weight_G: Tensor | None,
        site_bias_G: Tensor | None,
    ) -> Tensor:
        cell, site, mask_TB, count_T, kept = parts
        device = h_BH.device
        shape = _Shape(
            **cuda._present(device),
            length=len(projected_TBG),
            rows=h_BH.shape[0],
            hidden=h_BH.shape[1],
            dtype=weight_GH.dtype,
            product_dtype=cuda._product_dtype(weight_GH),
            kept=kept,
            masked=mask_TB is not None,
            site=cuda._fixed(site),
        )
        with cuda._plainly(device):
            lease = Lease(_TAPES[cell], shape)
            tape = lease.tape
            tape.load(site, mask_TB, count_T, projected_TBG, weight_GH, bias_G, h_BH, weight_G, site_bias_G)
            tape.forward()
            # Copies: the next replay writes the tape anew.
            site.mean, site.spread = (
                None if value is None else value.clone() for value in (tape.site.mean, tape.site.spread)
            )
            output = tape.states[1:].clone()
        if kept:
            ctx.lease = lease
            # The tape has a copy; this is only so that torch notices if it has changed.
            ctx.save_for_backward(weight_GH)
        return output

    @staticmethod
    def backward(ctx: Any, *d_results: Any) -> Any:
        _ = ctx.saved_tensors
        tape: _Tape = ctx.lease.tape
        shape, needs = tape.shape, ctx.needs_input_grad
        with torch.no_grad(), cuda._plainly(shape.device), one_at_a_time:
            gradients: _Gradients = tape.gradients or tape.new_gradients()
            gradients.d_output.copy_(d_results[0])
            tape.backward(gradients)
            d_weight_GH = None
            if needs[2]:
                d_weight_GH = cuda._weight_gradient(gradients.of_product, tape.low_states[:-1], shape.dtype)
            d_bias = d_weight = None
            if needs[3] or needs[5] or needs[6]:
                d_normalized = tape.d_normalized(gradients.d_input)
                d_bias = d_normalized.sum((0, 1))
                if needs[5] and tape.site.normalized is not None:
                    d_weight = (d_normalized * tape.site.normalized).sum((0, 1))
            # Copies: the next replay writes them anew.
            d_h = gradients.d_next + gradients.d_h[0]
            d_projected = gradients.d_input if tape.gradients is None else gradients.d_input.clone()
        # The graph lives as long as the loss does; torch itself then refuses another backward.
        if not needed_again():
            ctx.lease = None
        results = [
            *(d_projected, d_weight_GH, d_bias if needs[3] else None, d_h, d_weight),
            d_bias if needs[6] else None,
        ]
        return (None, *differentiated_once(results))
