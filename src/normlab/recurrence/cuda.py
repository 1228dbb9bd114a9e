"""The LSTM recurrence on a GPU as one autograd function over the sequence; equal to reference.py within rounding.

A time step is a matrix product (cuBLAS) and one kernel (triton_kernels.py), forward and backward. Launching them takes
the CPU longer than running them takes the GPU, so they are replayed as CUDA graphs (graphs.py).

Precision: float32, float64, or autocast to bfloat16, which concerns the matrix products alone; what they sum up to,
statistics and states stay in float32. Products of float32 use TF32 only where torch is told to
(`torch.backends.cuda.matmul.allow_tf32 = True` or `torch.set_float32_matmul_precision("high")`), which it is not by
default.

Memory, in multiples of B x T x H: 16 from forward to backward with a norm at all sites, and 10 to 14 more while
backward runs.

Shape suffixes: B batch, T time, I input features, H hidden, G gates (4H), N = T x B.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from normlab.recurrence.graphs import Lease, Tape, TapeShape, needed_again
from normlab.recurrence.once import differentiated_once

if TYPE_CHECKING:
    from normlab.recurrence.fast import _Site

__all__ = ["MOST_ROWS", "Recurrence", "failure", "takes"]

log = logging.getLogger(__name__)

NONE, ROWS, BATCH, STORED = range(4)  # as in kernels.c
MOST_ROWS = 4096
"""Rows over which a batch norm's statistics still fit one program."""


def takes(device: torch.device) -> bool:
    """Whether layers on this device run here."""
    return device.type == "cuda"


def failure(device: torch.device, try_out: Callable[[torch.device], None] | None = None) -> str:
    """Why nothing runs here; empty if a small layer does. Says so in the log, once.

    Args:
        try_out: runs small layers on a device; None: those of an LSTM.
    """
    try_out = try_out or _try_out
    if device.type != "cuda":
        return _failure(device, try_out)
    if not torch.cuda.is_available():
        return "there is no GPU"
    index = torch.cuda.current_device() if device.index is None else device.index
    return _failure(torch.device("cuda", index), try_out)


@functools.cache
def _failure(device: torch.device, try_out: Callable[[torch.device], None]) -> str:
    try:
        with _plainly(device):
            try_out(device)
    except ImportError:
        reason = "Triton is not installed"
    except Exception as error:
        reason = f"Triton fails: {type(error).__name__}: {str(error).strip()[:200]}"
    else:
        return ""
    log.warning("normalized recurrent layers run as a plain loop, many times slower: %s", reason)
    return reason


def _kernels() -> Any:
    return importlib.import_module("normlab.recurrence.triton_kernels")


def _try_out(device: torch.device) -> None:
    for kind in (ROWS, BATCH):
        site = _Fixed(kind, 1, True, 1e-5, 0)
        tape = _Tape(_Shape(device, 0, 2, 2, 16, torch.float32, torch.float32, True, False, "none", (site,) * 3))
        tape.launch_forward()
        tape.launch_backward(tape.new_gradients())
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Fixed(NamedTuple):
    """What a kernel is compiled for, per site; `stored` counts its sets of stored values."""

    kind: int
    groups: int
    centered: bool
    eps: float
    stored: int


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
    sites: tuple[_Fixed, ...]


class _Statistics:
    """A site's statistics and what it normalized; None where its kind has no use for them."""

    def __init__(self, fixed: _Fixed, shape: TapeShape, features: int, held: int) -> None:
        def buffer(*size: int) -> Tensor:
            return torch.empty(size, dtype=shape.dtype, device=shape.device)

        self.mean = self.spread = self.stored_mean = self.stored_scale = self.normalized = None
        if fixed.kind == ROWS:
            self.spread = buffer(shape.length, shape.rows, fixed.groups)
        elif fixed.kind == BATCH:
            self.mean, self.spread = buffer(shape.length, features), buffer(shape.length, features)
        if fixed.stored:
            self.stored_mean, self.stored_scale = buffer(fixed.stored, features), buffer(fixed.stored, features)
        if fixed.kind != NONE and held:
            self.normalized = buffer(held, shape.rows, features)
        stride = features if fixed.stored > 1 else 0
        self.arguments = (self.mean, self.spread, self.stored_mean, self.stored_scale, stride)


class _Tape(Tape):
    """The memory of a layer over the sequence.

    Attributes:
        input: T x B x G; what the input site gave, before its weight and bias.
        input_weight, hidden_weight, bias, cell_weight, cell_bias: ones and zeros where a site has none; `bias` is the
            sum of the layer's and the sites'.
        cells, states: (T + 1) x B x H, beginning with those before the first time step; without `kept` 2 cells.
        low_states, low_weight: in the dtype of the products; the same tensors where that is `dtype`.
        gates, squashed: after their nonlinearities; tanh of the cell site's output.
    """

    def __init__(self, shape: _Shape) -> None:
        length, rows, hidden = shape.length, shape.rows, shape.hidden

        def buffer(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
            return torch.empty(size, dtype=dtype, device=shape.device)

        self.shape = shape
        held = length if shape.kept else 0
        self.mask_TB = buffer(length, rows, dtype=torch.uint8) if shape.masked else None
        self.count_T = buffer(length) if shape.masked else None
        input_site, hidden_site, cell_site = shape.sites
        self.sites = (
            _Statistics(input_site, shape, 4 * hidden, length),
            _Statistics(hidden_site, shape, 4 * hidden, held),
            _Statistics(cell_site, shape, hidden, held),
        )
        normalized = self.sites[0].normalized
        self.input = buffer(length, rows, 4 * hidden) if normalized is None else normalized
        self.input_weight, self.hidden_weight = buffer(4 * hidden), buffer(4 * hidden)
        self.bias, self.cell_weight, self.cell_bias = buffer(4 * hidden), buffer(hidden), buffer(hidden)
        self.cells = buffer(length + 1 if shape.kept else 2, rows, hidden)
        self.states = buffer(length + 1, rows, hidden)
        lowers = shape.product_dtype != shape.dtype
        self.low_states = buffer(length + 1, rows, hidden, dtype=shape.product_dtype) if lowers else self.states
        self.low_weight_GH = buffer(4 * hidden, hidden, dtype=shape.product_dtype)
        self.product = buffer(rows, 4 * hidden)
        self.gates = buffer(held, rows, 4 * hidden)
        self.squashed = buffer(held, rows, hidden)

    def load(self, sites: tuple[_Site, ...], mask_TB: Tensor | None, count_T: Tensor | None, *tensors: Any) -> None:
        """Copy in all but the input: `tensors` are weight_GH, bias_G, h_BH, c_BH."""
        weight_GH, bias_G, h_BH, c_BH = tensors
        input_site, hidden_site, cell_site = sites
        pairs = [(self.low_weight_GH, weight_GH), (self.states[0], h_BH), (self.cells[0], c_BH)]
        if self.low_states is not self.states:
            pairs.append((self.low_states[0], h_BH))
        if self.mask_TB is not None:
            pairs += [(self.mask_TB, mask_TB), (self.count_T, count_T)]
        for own, site in zip(self.sites, sites, strict=True):
            if own.stored_mean is not None:
                pairs += [(own.stored_mean, site.stored_mean), (own.stored_scale, site.stored_scale)]
        for own, value, absent in (
            (self.input_weight, input_site.weight, 1),
            (self.hidden_weight, hidden_site.weight, 1),
            (self.cell_weight, cell_site.weight, 1),
            (self.cell_bias, cell_site.bias, 0),
        ):
            own.fill_(absent) if value is None else own.copy_(value)
        self.bias.zero_()
        for value in (bias_G, input_site.bias, hidden_site.bias):
            if value is not None:
                self.bias += value
        for own, value in pairs:
            own.copy_(value)

    def launch_forward(self) -> None:
        shape = self.shape
        _, hidden, cell = self.sites
        grid, tile = _tile(shape, shape.sites[1:])
        step = _kernels().forward_step[grid]
        lowers = self.low_states is not self.states
        arguments = (
            *(shape.rows, shape.hidden, self.mask_TB, self.count_T),
            *(self.input, self.input_weight, self.bias, self.product),
            *(self.hidden_weight, self.cell_weight, self.cell_bias),
            *(hidden.arguments, cell.arguments),
            *(self.cells, self.states, self.low_states if lowers else None, self.gates, self.squashed),
            *(hidden.normalized, cell.normalized, len(self.cells)),
        )
        constants = {"hidden_site": shape.sites[1][:4], "cell_site": shape.sites[2][:4], "MASKED": shape.masked, **tile}
        weight_HG = self.low_weight_GH.t()
        for time in range(shape.length):
            _multiply(self.low_states[time], weight_HG, self.product)
            step(time, *arguments, KEPT=shape.kept, **constants)

    def new_gradients(self) -> _Gradients:
        return _Gradients(self)

    def launch_backward(self, gradients: _Gradients) -> None:
        shape = self.shape
        _, hidden, cell = self.sites
        grid, tile = _tile(shape, shape.sites[1:])
        step = _kernels().backward_step[grid]
        arguments = (
            *(shape.rows, shape.hidden, self.mask_TB, self.count_T),
            *(self.hidden_weight, self.cell_weight, hidden.arguments, cell.arguments),
            *(self.cells, self.gates, self.squashed, hidden.normalized, cell.normalized),
            *(gradients.d_output, gradients.d_next, gradients.d_h, gradients.d_c),
            *(gradients.d_gates, gradients.d_product, gradients.d_cell),
        )
        constants = {"hidden_site": shape.sites[1][:4], "cell_site": shape.sites[2][:4], "MASKED": shape.masked, **tile}
        d_product = gradients.d_gates if gradients.d_product is None else gradients.d_product
        gradients.d_next.zero_()
        gradients.d_h.zero_()
        for time in reversed(range(shape.length)):
            step(time, *arguments, **constants)
            _multiply(d_product[time], self.low_weight_GH, gradients.d_next)


class _Gradients:
    """The memory of backward; `d_product` is None where it is `d_gates` itself. Written anew by every backward."""

    def __init__(self, tape: _Tape) -> None:
        shape = tape.shape
        lowers = shape.product_dtype != shape.dtype
        bare = shape.sites[1].kind == NONE and not lowers
        self.d_output = torch.empty_like(tape.squashed)
        self.d_next = torch.empty_like(tape.cells[0])
        self.d_h, self.d_c = torch.empty_like(tape.cells[:2]), torch.empty_like(tape.cells[:2])
        self.d_gates = torch.empty_like(tape.gates)
        self.d_product = None if bare else torch.empty_like(tape.gates, dtype=shape.product_dtype)
        self.d_cell = None if shape.sites[2].kind == NONE else torch.empty_like(tape.squashed)

    def load(self, d_output: Tensor | None, d_last_c: Tensor | None) -> None:
        length = len(self.d_output)
        for own, value in ((self.d_output, d_output), (self.d_c[length % 2], d_last_c)):
            own.zero_() if value is None else own.copy_(value)


def _tile(shape: TapeShape, sites: Iterable[_Fixed]) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid down and across a B x H state, and what the kernels are told of their tile."""
    power = _kernels().triton.next_power_of_2
    if any(site.kind == BATCH for site in sites):
        down = power(shape.rows)
        # 8 neighbouring float32 are what a GPU reads at once.
        across = max(1, min(8, MOST_ROWS // down))
    else:
        down, across = 1, power(shape.hidden)
    # About 4 entries of each gate per thread.
    warps = min(16, max(1, down * across // 128))
    return (-(-shape.rows // down), -(-shape.hidden // across)), {"R": down, "U": across, "num_warps": warps}


def _multiply(x_NI: Tensor, weight_IO: Tensor, out_NO: Tensor) -> Tensor:
    """x @ weight in the precision of `out_NO`, which holds the result."""
    if x_NI.dtype == out_NO.dtype:
        return torch.mm(x_NI, weight_IO, out=out_NO)
    if not x_NI.is_cuda:  # the interpreter's CPU has no such product
        return torch.mm(x_NI.to(out_NO.dtype), weight_IO.to(out_NO.dtype), out=out_NO)
    return torch.mm(x_NI, weight_IO, out_dtype=out_NO.dtype, out=out_NO)


def _normalize_input(tape: _Tape, projected: Tensor) -> None:
    shape = tape.shape
    fixed = shape.sites[0]
    (down, across), tile = _tile(shape, [fixed])
    _kernels().normalize_input[shape.length, down, across](
        *(shape.rows, shape.hidden, tape.mask_TB, tape.count_T, projected, tape.input, tape.sites[0].arguments),
        **{"site": fixed[:4], "MASKED": shape.masked, **tile},
    )


def _normalize_input_backward(tape: _Tape, d_gates: Tensor, d_projected: Tensor) -> None:
    shape = tape.shape
    fixed = shape.sites[0]
    (down, across), tile = _tile(shape, [fixed])
    _kernels().normalize_input_backward[shape.length, down, across](
        *(shape.rows, shape.hidden, tape.mask_TB, tape.count_T, d_gates, tape.input, tape.input_weight, d_projected),
        tape.sites[0].arguments,
        **{"site": fixed[:4], "MASKED": shape.masked, **tile},
    )


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """Without autocast, and with the device the current one, to which Triton launches."""
    with torch.autocast(device.type, enabled=False):
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield
        else:
            yield


def _fixed(site: _Site) -> _Fixed:
    stored = 0 if site.stored_mean is None else len(site.stored_mean)
    return _Fixed(site.kind, site.groups, site.centered, site.eps, stored)


def _input_gradients(
    tape: _Tape, d_gates: Tensor, x_TBI: Tensor, weight_GI: Tensor | None, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input and of its weight."""
    if not (needs_x or needs_weight):
        return None, None
    shape = tape.shape
    dtype = x_TBI.dtype if weight_GI is None else shape.product_dtype
    if shape.sites[0].kind == NONE:
        d_projected = d_gates.to(dtype, copy=weight_GI is None)
    else:
        d_projected = torch.empty_like(d_gates, dtype=dtype)
        _normalize_input_backward(tape, d_gates, d_projected)
    if weight_GI is None:
        return d_projected, None
    d_projected_NG, low_x = d_projected.flatten(0, 1), x_TBI.to(dtype).flatten(0, 1)
    d_x = d_weight_GI = None
    if needs_x:
        d_x = torch.empty(low_x.shape, dtype=shape.dtype, device=shape.device)
        d_x = _multiply(d_projected_NG, weight_GI.to(dtype), d_x).view_as(x_TBI).to(x_TBI.dtype)
    if needs_weight:
        d_weight_GI = torch.empty(weight_GI.shape, dtype=shape.dtype, device=shape.device)
        _multiply(d_projected_NG.t(), low_x, d_weight_GI)
    return d_x, d_weight_GI


def _affine_gradients(tape: _Tape, gradients: _Gradients, needs: tuple[bool, ...]) -> list[Tensor | None]:
    """Gradients of weight and bias of the three sites, summed over all entries."""
    d_sites = (gradients.d_gates, gradients.d_gates, gradients.d_cell)
    found: list[Tensor | None] = []
    for own, d, needs_weight, needs_bias in zip(tape.sites, d_sites, needs[::2], needs[1::2], strict=True):
        if d is None or own.normalized is None:
            found += [None, None]
            continue
        found.append((d * own.normalized).sum((0, 1)) if needs_weight else None)
        found.append(d.sum((0, 1)) if needs_bias else None)
    return found


class Recurrence(torch.autograd.Function):
    """Outputs T x B x H and the last c of a layer; arguments as `_Recurrence` of fast.py, whose plan here ends
    with whether there will be a backward."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: tuple[tuple[_Site, _Site, _Site], Tensor | None, Tensor | None, bool],
        x_TBI: Tensor,
        weight_GI: Tensor | None,
        weight_GH: Tensor,
        bias_G: Tensor | None,
        h_BH: Tensor,
        c_BH: Tensor,
        *affine: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        sites, mask_TB, count_T, kept = plan
        device, dtype = x_TBI.device, weight_GH.dtype
        autocast = torch.is_autocast_enabled(device.type)
        rows, hidden = h_BH.shape
        shape = _Shape(
            device,
            torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0,
            len(x_TBI),
            rows,
            hidden,
            dtype,
            torch.get_autocast_dtype(device.type) if autocast else dtype,
            kept,
            mask_TB is not None,
            str(torch.backends.cuda.matmul.fp32_precision),
            tuple(_fixed(site) for site in sites),
        )
        with _plainly(device):
            lease = Lease(_Tape, shape)
            tape = lease.tape
            tape.load(sites, mask_TB, count_T, weight_GH, bias_G, h_BH, c_BH)
            bare = sites[0].kind == NONE
            if weight_GI is None:
                projected = tape.input.copy_(x_TBI) if bare else x_TBI.to(dtype).contiguous()
            else:
                projected = tape.input if bare else torch.empty_like(tape.input)
                low_x, low_weight = x_TBI.to(shape.product_dtype), weight_GI.to(shape.product_dtype)
                _multiply(low_x.flatten(0, 1), low_weight.t(), projected.view(-1, projected.shape[-1]))
            if not bare:
                _normalize_input(tape, projected)
            tape.forward()
            for site, own in zip(sites, tape.sites, strict=True):
                # Stored right after the call, before another one uses the tape.
                site.mean, site.spread = own.mean, own.spread
            # Copies: the next replay writes the tape anew.
            results = tape.states[1:].clone(), tape.cells[shape.length % len(tape.cells)].clone()
        if kept:
            ctx.lease = lease
            ctx.set_materialize_grads(False)
            # weight_GH, of which the tape has a copy, only so that torch notices if it has changed.
            ctx.save_for_backward(x_TBI, weight_GI, weight_GH)
        return results

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_last_c: Tensor | None) -> Any:
        if d_output is None and d_last_c is None:
            return (None,) * 13
        x_TBI, weight_GI, _ = ctx.saved_tensors
        needs = ctx.needs_input_grad
        tape: _Tape = ctx.lease.tape
        with torch.no_grad(), _plainly(x_TBI.device):
            gradients: _Gradients = tape.gradients or tape.new_gradients()
            gradients.load(d_output, d_last_c)
            tape.backward(gradients)
            d_gates = gradients.d_gates
            d_product = d_gates if gradients.d_product is None else gradients.d_product
            d_weight_GH = None
            if needs[3]:
                d_weight_GH = torch.empty_like(tape.low_weight_GH, dtype=tape.shape.dtype)
                _multiply(d_product.flatten(0, 1).t(), tape.low_states[:-1].flatten(0, 1), d_weight_GH)
            d_x, d_weight_GI = _input_gradients(tape, d_gates, x_TBI, weight_GI, *needs[1:3])
            d_h = gradients.d_next + gradients.d_h[0] if tape.shape.masked else gradients.d_next.clone()
            d_bias = d_gates.sum((0, 1)) if needs[4] else None
            d_affine = _affine_gradients(tape, gradients, needs[7:])
            d_c = gradients.d_c[0].clone()
        # The graph lives as long as the loss does; torch itself then refuses another backward.
        if not needed_again():
            ctx.lease = None
        results = [d_x, d_weight_GI, d_weight_GH, d_bias, d_h, d_c, *d_affine]
        return (None, *differentiated_once(results))
