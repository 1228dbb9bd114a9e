"""The LSTM recurrence on a GPU as one autograd function over the sequence; equal to reference.py within rounding.

A time step is a matrix product (cuBLAS) and one kernel (triton_kernels.py), forward and backward. Launching them takes
the CPU longer than running them takes the GPU, so they are replayed as CUDA graphs (graphs.py).

Precision: float32, float64, or autocast to bfloat16, which concerns the matrix products alone; what they sum up to,
statistics and states stay in float32. Products of float32 use TF32 only where torch is told to
(`torch.backends.cuda.matmul.allow_tf32 = True` or `torch.set_float32_matmul_precision("high")`), which it is not by
default.

Memory, in multiples of B x T x H: 11 from forward to backward, and 4 and 1 more where hidden_to_hidden and cell are
normalized: 16 with a norm at all sites. While backward runs it takes 5 to 14 more for gradients.

With `recompute` it keeps h alone (1) and c at the start of each segment, as fast.py does. Backward fills a tape for one
segment of S time steps at a time, from the last to the first: in multiples of B x S x H it takes 15 to 20, and the 5 to
14 for gradients. The recurrent products of a segment are one, as h is known. Equal segments use the same tape and
replay the same graph, one after the other, so that a sequence of any length needs no larger one. An input site that
runs by itself adds 4 x B x T x H for its result.

Forward goes through segments too, then and without gradient: 5 to 9 x B x S x H, beside the output.

Shape suffixes: B batch, T time, S time steps of a tape or segment, I input features, H hidden, G gates (4H), F features
of a site, N = S x B.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from normlab.recurrence.graphs import Lease, Tape, TapeShape, needed_again, one_at_a_time
from normlab.recurrence.once import added, differentiated_once

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
        dtype = torch.float32
        tape = _Tape(_Shape(device, 0, 2, 2, 16, dtype, dtype, True, False, False, "none", (site,) * 3))
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
    """What a tape's memory and launches depend on: two of equal shape can replay the same graph.

    Attributes:
        kept: whether there will be a backward.
        recomputed: whether h before each time step is known.
    """

    device: torch.device
    stream: int
    length: int
    rows: int
    hidden: int
    dtype: torch.dtype
    product_dtype: torch.dtype
    kept: bool
    recomputed: bool
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
    """The memory of a layer over some time steps.

    Attributes:
        input: S x B x G; what the input site gave, before its weight and bias.
        input_weight, hidden_weight, bias, cell_weight, cell_bias: ones and zeros where a site has none; `bias` is the
            sum of the layer's and the sites'.
        cells, states: (S + 1) x B x H, beginning with those before the first time step; without `kept` 2 cells. A
            recomputed tape has no `states`.
        low_states, low_weight_GH: in the dtype of the products; `low_states` is `states` where that is `dtype`. Of a
            recomputed tape S x B x H, before each time step.
        products: recurrent products, S x B x G of a recomputed tape, else 1 x B x G.
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
        self.states = None if shape.recomputed else buffer(length + 1, rows, hidden)
        if self.states is not None and shape.product_dtype == shape.dtype:
            self.low_states = self.states
        else:
            known = length if shape.recomputed else length + 1
            self.low_states = buffer(known, rows, hidden, dtype=shape.product_dtype)
        self.low_weight_GH = buffer(4 * hidden, hidden, dtype=shape.product_dtype)
        self.products = buffer(length if shape.recomputed else 1, rows, 4 * hidden)
        self.gates = buffer(held, rows, 4 * hidden)
        self.squashed = buffer(held, rows, hidden)

    def load(self, layer: _Layer, part: slice, before_SBH: Tensor, c_BH: Tensor) -> None:
        """Copy in all but the input; arguments as of `_Layer.run`."""
        pairs = [(self.low_weight_GH, layer.weight_GH), (self.cells[0], c_BH)]
        pairs.append((self.low_states[: len(before_SBH)], before_SBH))
        if self.states is not None and self.states is not self.low_states:
            pairs.append((self.states[0], before_SBH[0]))
        if self.mask_TB is not None:
            assert self.count_T is not None
            assert layer.mask_TB is not None
            assert layer.count_T is not None
            pairs += [(self.mask_TB, layer.mask_TB[part]), (self.count_T, layer.count_T[part])]
        for own, mean, scale in zip(self.sites, layer.stored[::2], layer.stored[1::2], strict=True):
            if own.stored_mean is not None and own.stored_scale is not None:
                assert mean is not None
                assert scale is not None
                cut = part if len(mean) > 1 else slice(None)
                pairs += [(own.stored_mean, mean[cut]), (own.stored_scale, scale[cut])]
        input_weight, input_bias, hidden_weight, hidden_bias, cell_weight, cell_bias = layer.affine
        for own, value, absent in (
            (self.input_weight, input_weight, 1),
            (self.hidden_weight, hidden_weight, 1),
            (self.cell_weight, cell_weight, 1),
            (self.cell_bias, cell_bias, 0),
        ):
            own.fill_(absent) if value is None else own.copy_(value)
        self.bias.zero_()
        for value in (layer.bias_G, input_bias, hidden_bias):
            if value is not None:
                self.bias += value
        for own, value in pairs:
            own.copy_(value)

    def read(self, part: slice, output_TBH: Tensor, sites: tuple[_Site, _Site, _Site]) -> Tensor:
        """Copy out h after each time step and the statistics to store; c after the last time step.

        Copies, since whoever uses the tape next writes it anew.
        """
        assert self.states is not None
        output_TBH[part] = self.states[1:]
        for site, own in zip(sites, self.sites, strict=True):
            if own.mean is not None and own.spread is not None:
                assert site.mean is not None
                assert site.spread is not None
                site.mean[part], site.spread[part] = own.mean, own.spread
        return self.cells[self.shape.length % len(self.cells)].clone()

    def launch_forward(self) -> None:
        shape = self.shape
        _, hidden, cell = self.sites
        grid, tile = _tile(shape, shape.sites[1:])
        step = _kernels().forward_step[grid]
        lowers = self.low_states is not self.states and not shape.recomputed
        arguments = (
            *(shape.rows, shape.hidden, self.mask_TB, self.count_T),
            *(self.input, self.input_weight, self.bias, self.products),
            *(self.hidden_weight, self.cell_weight, self.cell_bias),
            *(hidden.arguments, cell.arguments),
            *(self.cells, self.states, self.low_states if lowers else None, self.gates, self.squashed),
            *(hidden.normalized, cell.normalized, len(self.cells)),
        )
        constants = {"hidden_site": shape.sites[1][:4], "cell_site": shape.sites[2][:4], "MASKED": shape.masked, **tile}
        weight_HG = self.low_weight_GH.t()
        if shape.recomputed:
            _multiply(self.low_states.flatten(0, 1), weight_HG, self.products.flatten(0, 1))
        for time in range(shape.length):
            if not shape.recomputed:
                _multiply(self.low_states[time], weight_HG, self.products[0])
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
        d_product = gradients.of_product
        for time in reversed(range(shape.length)):
            step(time, *arguments, **constants)
            _multiply(d_product[time], self.low_weight_GH, gradients.d_next)


class _Passed(NamedTuple):
    """Gradients, each B x H, that a segment passes on to the one before it; None is zeros.

    Attributes:
        d_next: of the last h, by way of the product of the time step after it.
        d_h: of the last h, past padding.
        d_c: of the last c.
    """

    d_next: Tensor | None
    d_h: Tensor | None
    d_c: Tensor | None


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

    @property
    def of_product(self) -> Tensor:
        return self.d_gates if self.d_product is None else self.d_product

    def load(self, d_output: Tensor | None, passed: _Passed) -> None:
        taken = len(self.d_output) % 2
        owns = (self.d_output, self.d_next, self.d_h[taken], self.d_c[taken])
        for own, value in zip(owns, (d_output, *passed), strict=True):
            own.zero_() if value is None else own.copy_(value)

    def passed(self, masked: bool) -> _Passed:
        # Copies: whoever uses the tape next writes them anew.
        return _Passed(self.d_next.clone(), self.d_h[0].clone() if masked else None, self.d_c[0].clone())


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


def _weight_gradient(d_SBG: Tensor, x_SBI: Tensor, dtype: torch.dtype) -> Tensor:
    """G x I, in `dtype`; from the gradient of the product, and what was multiplied."""
    d_NG, x_NI = d_SBG.flatten(0, 1), x_SBI.flatten(0, 1)
    return _multiply(d_NG.t(), x_NI, x_NI.new_empty(d_NG.shape[1], x_NI.shape[1], dtype=dtype))


def _product_dtype(weight_GH: Tensor) -> torch.dtype:
    """That of the matrix products of a call."""
    kind = weight_GH.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight_GH.dtype


def _present(device: torch.device) -> dict[str, Any]:
    """What a graph captured now depends on beside its layer: fields of a shape."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return {"device": device, "stream": stream, "precision": str(torch.backends.cuda.matmul.fp32_precision)}


def _normalize_input(tape: _Tape, projected: Tensor) -> None:
    shape = tape.shape
    fixed = shape.sites[0]
    (down, across), tile = _tile(shape, [fixed])
    _kernels().normalize_input[shape.length * down, across](
        *(shape.rows, shape.hidden, tape.mask_TB, tape.count_T, projected, tape.input, tape.sites[0].arguments),
        **{"site": fixed[:4], "MASKED": shape.masked, **tile},
    )


def _normalize_input_backward(tape: _Tape, d_gates: Tensor, d_projected: Tensor) -> None:
    shape = tape.shape
    fixed = shape.sites[0]
    (down, across), tile = _tile(shape, [fixed])
    _kernels().normalize_input_backward[shape.length * down, across](
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
    tape: _Tape,
    d_gates: Tensor,
    x_SBI: Tensor,
    weight_GI: Tensor | None,
    d_x_SBI: Tensor | None,
    needs_weight: bool,
) -> Tensor | None:
    """The gradient of the input's weight; writes that of the input to `d_x_SBI`, if that is given."""
    shape = tape.shape
    if weight_GI is None:
        if d_x_SBI is not None:
            d_x_SBI.copy_(d_gates)
        return None
    if d_x_SBI is None and not needs_weight:
        return None
    dtype = shape.product_dtype
    if shape.sites[0].kind == NONE:
        d_projected = d_gates.to(dtype)
    else:
        d_projected = torch.empty_like(d_gates, dtype=dtype)
        _normalize_input_backward(tape, d_gates, d_projected)
    d_projected_NG = d_projected.flatten(0, 1)
    if d_x_SBI is not None:
        d_x_NI = d_x_SBI.flatten(0, 1)
        if d_x_SBI.dtype == shape.dtype:
            _multiply(d_projected_NG, weight_GI.to(dtype), d_x_NI)
        else:
            d_x_NI.copy_(_multiply(d_projected_NG, weight_GI.to(dtype), torch.empty_like(d_x_NI, dtype=shape.dtype)))
    if not needs_weight:
        return None
    return _weight_gradient(d_projected, x_SBI.to(dtype), shape.dtype)


def _affine_gradients(tape: _Tape, gradients: _Gradients, needs: Sequence[bool]) -> list[Tensor | None]:
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


class _Layer(NamedTuple):
    """What the tapes of a sequence's segments have in common.

    Attributes:
        x_TBI: the input; what the input site gave (T x B x G) if `weight_GI` is None.
        sites, affine, stored: of the three sites; weight and bias of each; stored mean and scale of each, (T or 1) x F.
    """

    product_dtype: torch.dtype
    sites: tuple[_Fixed, ...]
    x_TBI: Tensor
    weight_GI: Tensor | None
    weight_GH: Tensor
    bias_G: Tensor | None
    mask_TB: Tensor | None
    count_T: Tensor | None
    affine: Sequence[Tensor | None]
    stored: Sequence[Tensor | None]

    def run(
        self, part: slice, before_SBH: Tensor, c_BH: Tensor, *, kept: bool, recomputed: bool = False
    ) -> Lease[_Tape]:
        """A tape on which some time steps have run.

        Args:
            before_SBH: h before the first time step; of a recomputed tape, before each.
            c_BH: c before the first time step.
        """
        length = part.stop - part.start
        rows, hidden = c_BH.shape
        shape = _Shape(
            **_present(self.x_TBI.device),
            length=length,
            rows=rows,
            hidden=hidden,
            dtype=self.weight_GH.dtype,
            product_dtype=self.product_dtype,
            kept=kept,
            recomputed=recomputed,
            masked=self.mask_TB is not None,
            sites=tuple(site._replace(stored=min(site.stored, length)) for site in self.sites),
        )
        lease = Lease(_Tape, shape)
        lease.tape.load(self, part, before_SBH, c_BH)
        self._project(lease.tape, self.x_TBI[part])
        lease.tape.forward()
        return lease

    def _project(self, tape: _Tape, x_SBI: Tensor) -> None:
        if self.weight_GI is None:
            tape.input.copy_(x_SBI)
            return
        bare = self.sites[0].kind == NONE
        projected = tape.input if bare else torch.empty_like(tape.input)
        low_x, low_weight = x_SBI.to(self.product_dtype), self.weight_GI.to(self.product_dtype)
        _multiply(low_x.flatten(0, 1), low_weight.t(), projected.flatten(0, 1))
        if not bare:
            _normalize_input(tape, projected)

    def backward(
        self,
        tape: _Tape,
        part: slice,
        d_output_SBH: Tensor | None,
        passed: _Passed,
        d_x_SBI: Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[_Passed, list[Tensor | None]]:
        """Back through a tape's time steps.

        Args:
            part: which time steps they are.
            passed: from the segment after this one.
            d_x_SBI: where to write the gradient of the input; None if nobody needs it.
            needs: as `needs_input_grad` of `Recurrence`.

        Returns:
            What it passes on, and what it adds to the gradients of both matrices, the bias, and weight and bias of each
            site.
        """
        shape = tape.shape
        gradients: _Gradients = tape.gradients or tape.new_gradients()
        gradients.load(d_output_SBH, passed)
        tape.backward(gradients)
        d_gates = gradients.d_gates
        d_weight_GH = None
        if needs[3]:
            d_weight_GH = _weight_gradient(gradients.of_product, tape.low_states[: shape.length], shape.dtype)
        d_weight_GI = _input_gradients(tape, d_gates, self.x_TBI[part], self.weight_GI, d_x_SBI, needs[2])
        d_bias = d_gates.sum((0, 1)) if needs[4] else None
        d_affine = _affine_gradients(tape, gradients, needs[7:])
        return gradients.passed(shape.masked), [d_weight_GI, d_weight_GH, d_bias, *d_affine]


class Recurrence(torch.autograd.Function):
    """Outputs T x B x H and the last c of a layer; arguments as `_Recurrence` of fast.py, whose plan here ends
    with the segments."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: tuple[tuple[_Site, _Site, _Site], Tensor | None, Tensor | None, bool, bool, list[slice]],
        x_TBI: Tensor,
        weight_GI: Tensor | None,
        weight_GH: Tensor,
        bias_G: Tensor | None,
        h_BH: Tensor,
        c_BH: Tensor,
        *affine: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        sites, mask_TB, count_T, gradient, recompute, parts = plan
        kept = gradient and not recompute
        device, length = x_TBI.device, len(x_TBI)
        product_dtype = _product_dtype(weight_GH)
        fixed = tuple(_fixed(site) for site in sites)
        stored = [value for site in sites for value in (site.stored_mean, site.stored_scale)]
        layer = _Layer(product_dtype, fixed, x_TBI, weight_GI, weight_GH, bias_G, mask_TB, count_T, affine, stored)
        output = h_BH.new_empty(length, *h_BH.shape)
        for site in sites:
            if site.kind == BATCH:  # over the sequence, for `store`
                site.mean, site.spread = (h_BH.new_empty(length, site.features) for _ in range(2))
        h, c = h_BH, c_BH
        starts: list[Tensor] = []
        with _plainly(device):
            for part in parts:
                if gradient:
                    starts.append(c)
                lease = layer.run(part, h.unsqueeze(0), c, kept=kept)
                c = lease.tape.read(part, output, sites)
                h = output[part.stop - 1]
                ctx.lease = lease if kept else None
                # Given back before the next segment asks for one.
                del lease
        if gradient:
            ctx.plan = product_dtype, fixed, parts
            ctx.set_materialize_grads(False)
            # A kept tape has copies of most; they are saved all the same, so that torch notices if one has changed.
            ctx.save_for_backward(
                *(x_TBI, weight_GI, weight_GH, bias_G, mask_TB, count_T, *affine, *stored),
                *((None, None, None) if kept else (h_BH, output, torch.stack(starts))),
            )
        return output, c

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_last_c: Tensor | None) -> Any:
        if d_output is None and d_last_c is None:
            return (None,) * 13
        product_dtype, fixed, parts = ctx.plan
        *given, h_BH, output, starts = ctx.saved_tensors
        layer = _Layer(product_dtype, fixed, *given[:6], affine=given[6:12], stored=given[12:])
        x_TBI, needs = layer.x_TBI, ctx.needs_input_grad
        d_x = x_TBI.new_empty(x_TBI.shape) if needs[1] else None
        passed = _Passed(None, None, d_last_c)
        totals: list[Tensor | None] = [None] * 9
        with torch.no_grad(), _plainly(x_TBI.device), one_at_a_time:
            for number, part in reversed(list(enumerate(parts))):
                lease = ctx.lease
                if lease is None:
                    h_before = output[part.start - 1 : part.start] if number else h_BH.unsqueeze(0)
                    before = [h_before, output[part][:-1]]
                    lease = layer.run(part, torch.cat(before), starts[number], kept=True, recomputed=True)
                d_part, d_x_part = (None if value is None else value[part] for value in (d_output, d_x))
                passed, found = layer.backward(lease.tape, part, d_part, passed, d_x_part, needs)
                totals = [added(*both) for both in zip(totals, found, strict=True)]
                # Given back before the next segment asks for as much.
                del lease, found
        assert passed.d_next is not None
        d_h = passed.d_next if passed.d_h is None else passed.d_next + passed.d_h
        # The graph lives as long as the loss does; torch itself then refuses another backward.
        if not needed_again():
            ctx.lease = None
        results = [d_x, *totals[:3], d_h, passed.d_c, *totals[3:]]
        return (None, *differentiated_once(results))
