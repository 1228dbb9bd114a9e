"""The LSTM recurrence on a CPU as one autograd function over the sequence; equal to reference.py within rounding.

On a GPU `lstm_layer` does the same by cuda.py.

The loop over time is left with a matrix product and one call per step, forward and backward: the C kernels of
kernels.c, or torch operators on the same buffers where they can not be built, where a call without gradient finds
nothing built, or where the sites take statistics in different directions. The products over all time steps (input
projection, gradients of both weights) are one each.

What backward keeps, in multiples of B x T x H, beside the input and the weights: 7 (4 gates, c, tanh of the cell site's
output, h), and 4, 4 and 1 more where input_to_hidden, hidden_to_hidden and cell are normalized: 16 with a norm at all
sites. Small beside it are the statistics, per time step and site: one number for each row (and group) of ln, rms and
gn, for each feature of bn and bn_step (with padding or in evaluation the stored values too). While it runs it takes 4
to 8 more for gradients.

With `recompute` it keeps h alone (1) and c at the start of each segment of `SEGMENT` time steps, whatever the norms.
Backward goes through the segments from the last to the first and fills the buffers above anew, for one segment at a
time: as h is kept, the recurrent products of a segment are one, like those with the input. Statistics are taken twice,
but stored once. An input site that runs by itself (see `lstm_layer`) adds 4 for its result.

Without gradient nothing but the output outlives a segment, in which the input's projection takes 4.

Shape suffixes: B batch, T time, S time steps of a segment, I input features, H hidden, G gates (4H), F features of a
site, K groups, N = T x B.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from normlab.machine.products import Product, input_gradient, product, weight_gradient
from normlab.norms import fused
from normlab.norms.base import Norm, Step
from normlab.norms.batch_statistics import BatchStatisticsNorm
from normlab.norms.bn import BatchNorm
from normlab.norms.bn_step import StepBatchNorm
from normlab.norms.gn import GroupNorm
from normlab.norms.ln import LayerNorm
from normlab.norms.moments import Moments, several_processes
from normlab.norms.none import NoNorm
from normlab.norms.rms import RMSNorm
from normlab.recurrence import cuda, kernels, reference
from normlab.recurrence.once import added, differentiated_once
from normlab.recurrence.reference import SEGMENT, SiteCarry, SiteNorms, Weights

__all__ = ["RECOMPUTES", "engine", "lstm_layer", "never_for", "not_now_for", "on_kernels"]

NONE, ROWS, BATCH, STORED = range(4)  # as in kernels.c
RECOMPUTES = True
"""Whether the layer can take for backward what forward did not keep."""
SMALLEST_PARALLEL = 4096
"""B x H below which a step is not worth waking a second thread for."""


def never_for(norms: SiteNorms, weights: Weights) -> str:
    """Why a layer can not run here, whatever its input; empty if it can."""
    if weights.projection is not None:
        return "proj_size is set"
    for site in ("hidden_to_hidden", "cell"):
        norm: Norm = getattr(norms, site)
        if _kind(norm) is None:
            return f"{norm.name} at {site} has no fast form{_unusual(norm)}"
    return ""


def not_now_for(
    x_TBI: Tensor,
    h_BH: Tensor,
    c_BH: Tensor,
    weights: Weights,
    norms: SiteNorms,
    step: Step,
    device: torch.device | None = None,
    gpu_failure: Callable[[torch.device], str] = cuda.failure,
) -> str:
    """Why this call can not run here, if the layer can in principle; empty if it can.

    Args:
        device: the device asked about; None is that of `x_TBI`.
        gpu_failure: why nothing runs on a GPU; empty if layers of this kind do.
    """
    if torch.compiler.is_compiling():
        return "torch.compile traces the loop"
    if not fused.applies():
        return "torch.func or forward-mode differentiation"
    device = device or x_TBI.device
    on_gpu = cuda.takes(device)
    if device.type != "cpu" and not on_gpu:
        return f"the input is neither on a CPU nor on a GPU but on {device.type}"
    parameters = [parameter for norm in norms for parameter in norm.parameters()]
    tensors = [h_BH, c_BH, *parameters, *(weight for weight in weights if weight is not None)]
    if torch.is_autocast_enabled(device.type):
        if not on_gpu:
            return "autocast is on"
        if torch.get_autocast_dtype(device.type) != torch.bfloat16:
            return "autocast is to another dtype than bfloat16"
        if {tensor.dtype for tensor in tensors} != {torch.float32}:
            return "weights and state are not all float32, under autocast"
    elif {tensor.dtype for tensor in [x_TBI, *tensors]} not in ({torch.float32}, {torch.float64}):
        return "tensors are not all float32 or all float64"
    kinds = {_kind(norm) for norm in norms}
    if on_gpu and {ROWS, BATCH} <= {_kind(norm) for norm in norms[1:]}:
        return "hidden_to_hidden and cell take statistics in different directions"
    if on_gpu and BATCH in kinds and x_TBI.shape[1] > cuda.MOST_ROWS:
        return f"a batch norm has more than {cuda.MOST_ROWS} rows"
    if several_processes() and any(norm.training and not norm.batch_independent for norm in norms):
        return "processes share statistics"
    if isinstance(step, Tensor) and (norms.hidden_to_hidden.per_step or norms.cell.per_step):
        return "rows are at time steps of their own"
    if any("normalize" in vars(norm) for norm in norms):
        return "a norm is being watched"
    if not x_TBI.numel():
        return "the input is empty"
    return gpu_failure(device) if on_gpu else ""


def on_kernels(norms: Sequence[Norm]) -> bool:
    """Whether the C kernels serve these norms in their present mode."""
    return not {ROWS, BATCH} <= {_kind(norm) for norm in norms}


def engine(norms: SiteNorms, dtype: torch.dtype, device: torch.device | None = None) -> str:
    """What does the work of a time step of a call with gradient for these norms, and why not the kernels.

    Args:
        device: None is a CPU.
    """
    if device is not None and cuda.takes(device):
        return "Triton kernels"
    if not on_kernels(norms):
        return "torch operators: the sites take statistics in different directions"
    if absence := kernels.absence(dtype):
        return f"torch operators: {absence}"
    return "C kernels" if kernels.find(dtype) is not None else "C kernels, which the first call with gradient builds"


def _kind(norm: Norm) -> int | None:
    """How the norm takes its statistics in its present mode; None if it has no fast form."""
    cls = type(norm)
    if cls is NoNorm:
        return NONE
    if cls is LayerNorm or cls is RMSNorm or (isinstance(norm, GroupNorm) and norm.pool == "token"):
        return ROWS
    if isinstance(norm, BatchNorm | StepBatchNorm) and norm.pool == "batch" and not _unusual(norm):
        return BATCH if norm.training else STORED
    return None


def _unusual(norm: Norm) -> str:
    if not isinstance(norm, BatchStatisticsNorm):
        return ""
    return (" with ghost_rows" if norm.ghost_rows is not None else "") + (
        " with memory_batches" * bool(norm.memory_batches)
    )


@dataclass
class _Site:
    """One norm over the sequence: what it is, and its buffers (None where its kind has no use for them).

    Attributes:
        stored_mean, stored_scale: (T or 1) x F; scale = 1 / sqrt(var + eps).
        mean: BATCH: T x F.
        spread: ROWS: scale, T x B x K; BATCH: biased variance, T x F.
        normalized: (T or 1) x B x F, before weight and bias.
        d_weight, d_bias: parts x F, to be summed over parts.
    """

    kind: int
    features: int
    groups: int = 1
    centered: bool = True
    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None
    stored_mean: Tensor | None = None
    stored_scale: Tensor | None = None
    mean: Tensor | None = None
    spread: Tensor | None = None
    normalized: Tensor | None = None
    d_weight: Tensor | None = None
    d_bias: Tensor | None = None

    def stored(self, time: int) -> tuple[Tensor, Tensor]:
        assert self.stored_mean is not None
        assert self.stored_scale is not None
        time = min(time, len(self.stored_mean) - 1)
        return self.stored_mean[time], self.stored_scale[time]

    def part(self, part: slice, rows: int, normalized: Tensor) -> _Site:
        """This site over some time steps; statistics without a buffer over the sequence get one for these."""
        length = part.stop - part.start

        def cut(values: Tensor | None) -> Tensor | None:
            return values if values is None or len(values) == 1 else values[part]

        mean, spread = self.mean, self.spread
        if self.kind == ROWS:
            spread = normalized.new_empty(length, rows, self.groups)
        elif self.kind == BATCH:
            mean, spread = (
                normalized.new_empty(length, self.features) if values is None else values[part]
                for values in (mean, spread)
            )
        return replace(
            self,
            stored_mean=cut(self.stored_mean),
            stored_scale=cut(self.stored_scale),
            mean=mean,
            spread=spread,
            normalized=None if self.kind == NONE else normalized,
        )


def _site(norm: Norm, mask_BT: Tensor | None, step: Step, rows: int, length: int, like: Tensor) -> _Site:
    kind = _kind(norm)
    assert kind is not None
    if kind == NONE:
        return _Site(NONE, norm.dim)
    groups = norm.groups if isinstance(norm, GroupNorm) else 1
    # Contiguous, as all that the kernels get an address of.
    weight, bias = (None if value is None else value.contiguous() for value in (norm.weight, norm.bias))
    site = _Site(kind, norm.dim, groups, type(norm) is not RMSNorm, norm.eps, weight, bias)
    if not isinstance(norm, BatchStatisticsNorm):
        return site
    if kind == BATCH:
        norm.require_rows(like.new_empty((rows, 1, norm.dim), device="meta"), rows)
    if kind == STORED or mask_BT is not None:
        mean, var = norm.stored(step, length)
        assert mean is not None
        # Copies: `store` changes the buffers before backward reads them.
        site.stored_mean = mean.detach().to(like.dtype, copy=True).view(-1, norm.dim)
        site.stored_scale = torch.rsqrt(var.detach().to(like.dtype) + norm.eps).view(-1, norm.dim)
    return site


@dataclass
class _Tape:
    """Buffers of a layer over some time steps, as `sequence` in kernels.c. With `kept` they hold all, else one."""

    kept: bool
    mask_TB: Tensor | None
    count_T: Tensor | None
    sites: tuple[_Site, _Site, _Site]
    projected: Tensor
    bias: Tensor | None
    first_h: Tensor
    first_c: Tensor
    gates: Tensor
    cell: Tensor
    squashed: Tensor
    output: Tensor


@dataclass
class _Gradients:
    d_output: Tensor
    d_gates: Tensor
    d_product: Tensor
    d_projected: Tensor
    d_h: Tensor
    d_cell: Tensor
    d_bias: Tensor | None = field(default=None)


class _KernelSteps:
    """The work of a time step in C."""

    def __init__(self, library: ctypes.CDLL, tape: _Tape, threads: int) -> None:
        self._library, self._tape = library, tape
        rows, hidden = tape.first_h.shape
        sequence = kernels.Sequence(rows=rows, hidden=hidden, threads=threads, kept=tape.kept)
        sequence.by_columns = any(site.kind == BATCH for site in tape.sites)
        for name in ("projected", "bias", "first_h", "first_c", "gates", "cell", "squashed", "output"):
            setattr(sequence, name, _address(getattr(tape, name)))
        sequence.mask, sequence.count = _address(tape.mask_TB), _address(tape.count_T)
        for name, site in zip(("input_site", "hidden_site", "cell_site"), tape.sites, strict=True):
            setattr(sequence, name, self._describe(site))
        self._sequence = sequence

    def _describe(self, site: _Site) -> kernels.Site:
        described = kernels.Site(kind=site.kind, features=site.features, groups=site.groups, centered=site.centered)
        described.eps = site.eps
        if site.stored_mean is not None and len(site.stored_mean) > 1:
            described.stored_stride = site.features
        for name in ("weight", "bias", "mean", "spread", "stored_mean", "stored_scale"):
            setattr(described, name, _address(getattr(site, name)))
        # A bare site has none; the kernels then offset this address but never read it.
        described.normalized = _address(self._tape.gates if site.normalized is None else site.normalized)
        return described

    def forward(self, time: int, product_BG: Tensor) -> None:
        self._library.forward(self._sequence, time, product_BG.data_ptr())

    def begin_backward(self, gradients: _Gradients) -> None:
        self._scratch = torch.empty_like(gradients.d_cell)
        sequence, rows, threads = self._sequence, self._sequence.rows, self._sequence.threads
        for name in ("d_output", "d_gates", "d_product", "d_projected", "d_cell"):
            setattr(sequence, name, _address(getattr(gradients, name)))
        sequence.d_gates_kept = gradients.d_gates.numel() > rows * gradients.d_gates.shape[-1]
        sequence.d_h = None if self._tape.mask_TB is None else _address(gradients.d_h)
        sequence.d_squashed = _address(self._scratch)
        if self._tape.bias is not None:
            gradients.d_bias = self._tape.bias.new_zeros(threads, len(self._tape.bias))
            sequence.d_bias = _address(gradients.d_bias)
        for name, site in zip(("input_site", "hidden_site", "cell_site"), self._tape.sites, strict=True):
            for parameter in ("weight", "bias"):
                value = getattr(site, parameter)
                if value is not None:
                    total = value.new_zeros(threads, site.features)
                    setattr(site, f"d_{parameter}", total)
                    setattr(getattr(sequence, name), f"d_{parameter}", _address(total))

    def backward(self, time: int, d_next_BH: Tensor | None) -> None:
        self._library.backward(self._sequence, time, _address(d_next_BH))


class _TorchSteps:
    """The work of a time step in torch operators."""

    def __init__(self, tape: _Tape) -> None:
        self._tape = tape
        self._counts = None if tape.count_T is None else tape.count_T.tolist()
        hidden = tape.first_h.shape[1]
        self._gate_slices = [slice(k * hidden, (k + 1) * hidden) for k in range(4)]

    def _keep(self, time: int) -> Tensor | None:
        mask_TB = self._tape.mask_TB
        return None if mask_TB is None else mask_TB[time].unsqueeze(1)

    def forward(self, time: int, product_BG: Tensor) -> None:
        tape, keep_B1 = self._tape, self._keep(time)
        now = time if tape.kept else 0
        input_site, hidden_site, cell_site = tape.sites
        h = tape.output[time - 1] if time else tape.first_h
        c = tape.cell[time - 1 if tape.kept else 0] if time else tape.first_c
        projected = tape.projected[time]
        gates, cell, squashed, output = tape.gates[now], tape.cell[now], tape.squashed[now], tape.output[time]
        if keep_B1 is not None:
            projected, c = torch.where(keep_B1, projected, 0), c.clone()
        torch.add(
            self._normalize(input_site, time, projected, keep_B1),
            self._normalize(hidden_site, time, product_BG, keep_B1),
            out=gates,
        )
        if tape.bias is not None:
            gates += tape.bias
        i, f, g, o = (gates[:, part] for part in self._gate_slices)
        gates[:, : f.shape[1] * 2].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, c, out=cell)
        cell.addcmul_(i, g)
        if keep_B1 is not None:
            torch.where(keep_B1, cell, c, out=cell)
        torch.tanh(self._normalize(cell_site, time, cell, keep_B1), out=squashed)
        torch.mul(o, squashed, out=output)
        if keep_B1 is not None:
            torch.where(keep_B1, output, h, out=output)

    def _normalize(self, site: _Site, time: int, x_BF: Tensor, keep_B1: Tensor | None) -> Tensor:
        if site.kind == NONE:
            return x_BF
        assert site.normalized is not None
        normalized = site.normalized[time if len(site.normalized) > 1 else 0]
        if site.kind == ROWS:
            assert site.spread is not None
            x_BKF, normalized_BKF = (value.unflatten(1, (site.groups, -1)) for value in (x_BF, normalized))
            if site.centered:
                torch.sub(x_BKF, x_BKF.mean(2, keepdim=True), out=normalized_BKF)
            else:
                normalized_BKF.copy_(x_BKF)
            scale_BK = torch.rsqrt(normalized_BKF.square().mean(2) + site.eps)
            site.spread[time] = scale_BK
            normalized_BKF *= scale_BK.unsqueeze(2)
        else:
            mean, scale = self._by_columns(site, time, x_BF, keep_B1)
            torch.sub(x_BF, mean, out=normalized).mul_(scale)
        if site.weight is None:
            return normalized
        return normalized * site.weight if site.bias is None else torch.addcmul(site.bias, normalized, site.weight)

    def _by_columns(self, site: _Site, time: int, x_BF: Tensor, keep_B1: Tensor | None) -> tuple[Tensor, Tensor]:
        if site.kind == STORED:
            return site.stored(time)
        assert site.mean is not None
        assert site.spread is not None
        if keep_B1 is None:
            mean = x_BF.mean(0)
            var = (x_BF - mean).square_().mean(0)
        else:
            count = self._count(time)
            mean = torch.where(keep_B1, x_BF, 0).sum(0) / max(count, 1)
            var = torch.where(keep_B1, x_BF - mean, 0).square_().sum(0) / max(count, 1)
        site.mean[time], site.spread[time] = mean, var
        return (mean, torch.rsqrt(var + site.eps)) if self._count(time) > 1 else site.stored(time)

    def _count(self, time: int) -> int:
        return len(self._tape.first_h) if self._counts is None else self._counts[time]

    def begin_backward(self, gradients: _Gradients) -> None:
        self._gradients = gradients
        if self._tape.bias is not None:
            gradients.d_bias = torch.zeros_like(self._tape.bias).unsqueeze(0)
        for site in self._tape.sites:
            site.d_weight = None if site.weight is None else torch.zeros_like(site.weight).unsqueeze(0)
            site.d_bias = None if site.bias is None else torch.zeros_like(site.bias).unsqueeze(0)

    def backward(self, time: int, d_next_BH: Tensor | None) -> None:
        tape, gradients, keep_B1 = self._tape, self._gradients, self._keep(time)
        input_site, hidden_site, cell_site = tape.sites
        i, f, g, o = (tape.gates[time, :, part] for part in self._gate_slices)
        c = tape.cell[time - 1] if time else tape.first_c
        squashed = tape.squashed[time]
        d_gates = gradients.d_gates[time if len(gradients.d_gates) > 1 else 0]
        d_i, d_f, d_g, d_o = (d_gates[:, part] for part in self._gate_slices)
        d_h = gradients.d_output[time]
        if d_next_BH is not None:
            d_h = d_h + d_next_BH
        if keep_B1 is not None:
            d_h = d_h + gradients.d_h
            gradients.d_h.copy_(d_h).masked_fill_(keep_B1, 0)
            d_h = torch.where(keep_B1, d_h, 0)
        d_tanh = d_h * o
        d_squashed = torch.addcmul(d_tanh, d_tanh * squashed, squashed, value=-1)
        d_o.copy_(_of_sigmoid(d_h * squashed, o))
        d_c = self._normalize_backward(cell_site, time, d_squashed).add_(gradients.d_cell)
        if keep_B1 is not None:
            d_c = torch.where(keep_B1, d_c, 0)
        d_i.copy_(_of_sigmoid(d_c * g, i))
        d_f.copy_(_of_sigmoid(d_c * c, f))
        d_tanh = d_c * i
        torch.addcmul(d_tanh, d_tanh * g, g, value=-1, out=d_g)
        if keep_B1 is None:
            torch.mul(d_c, f, out=gradients.d_cell)
        else:
            torch.where(keep_B1, d_c * f, gradients.d_cell, out=gradients.d_cell)
        if gradients.d_bias is not None:
            gradients.d_bias += d_gates.sum(0)
        for site, place in ((hidden_site, gradients.d_product), (input_site, gradients.d_projected)):
            if site.kind != NONE:
                d_x = self._normalize_backward(site, time, d_gates)
                place[time] = d_x if keep_B1 is None else torch.where(keep_B1, d_x, 0)

    def _normalize_backward(self, site: _Site, time: int, d_y_BF: Tensor) -> Tensor:
        if site.kind == NONE:
            return d_y_BF
        assert site.normalized is not None
        normalized = site.normalized[time]
        along_BF = d_y_BF * normalized
        if self._tape.mask_TB is not None:
            # Padding may hold anything, and 0 times it may be NaN.
            along_BF = torch.where(self._tape.mask_TB[time].unsqueeze(1), along_BF, 0)
        if site.d_weight is not None:
            site.d_weight += along_BF.sum(0)
        if site.d_bias is not None:
            site.d_bias += d_y_BF.sum(0)
        if site.kind == ROWS:
            assert site.spread is not None
            d = d_y_BF if site.weight is None else d_y_BF * site.weight
            along = along_BF if site.weight is None else along_BF * site.weight
            d_BKF, along_BKF, normalized_BKF = (v.unflatten(1, (site.groups, -1)) for v in (d, along, normalized))
            rest = torch.addcmul(d_BKF, normalized_BKF, along_BKF.mean(2, keepdim=True), value=-1)
            if site.centered:
                rest -= d_BKF.mean(2, keepdim=True)
            return rest.mul_(site.spread[time].unsqueeze(2)).flatten(1)
        count = self._count(time)
        if site.kind == STORED or count <= 1:
            scale = site.stored(time)[1]
            return d_y_BF * (scale if site.weight is None else scale * site.weight)
        assert site.spread is not None
        scale = torch.rsqrt(site.spread[time] + site.eps)
        rest = torch.addcmul(d_y_BF, normalized, along_BF.sum(0) / count, value=-1)
        return rest.sub_(d_y_BF.sum(0) / count).mul_(scale if site.weight is None else scale * site.weight)


def _of_sigmoid(d: Tensor, y: Tensor) -> Tensor:
    """The gradient of a sigmoid's input from that of its output y; changes `d`."""
    d = d.mul_(y)
    return d.addcmul_(d, y, value=-1)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _steps(tape: _Tape, gradient: bool = True) -> _KernelSteps | _TorchSteps:
    kinds = {site.kind for site in tape.sites}
    # A call without gradient may be the only one: it is not worth compiling for.
    which = kernels.load if gradient else kernels.find
    library = None if {ROWS, BATCH} <= kinds else which(tape.gates.dtype)
    if library is None:
        return _TorchSteps(tape)
    return _KernelSteps(library, tape, _threads(tape))


def _threads(tape: _Tape) -> int:
    return torch.get_num_threads() if tape.first_h.numel() >= SMALLEST_PARALLEL else 1


@dataclass
class _Layer:
    """What the tapes of a sequence's segments have in common.

    Attributes:
        x_TBI: the input; already projected (T x B x G) if `weight_GI` is None.
    """

    x_TBI: Tensor
    weight_GI: Tensor | None
    weight_GH: Tensor
    bias_G: Tensor | None
    mask_TB: Tensor | None
    count_T: Tensor | None
    sites: tuple[_Site, _Site, _Site]

    def tape(self, part: slice, h_BH: Tensor, c_BH: Tensor, output_SBH: Tensor, *, kept: bool) -> _Tape:
        """A tape of some time steps, with nothing on it but the projected input."""
        (rows, hidden), length = h_BH.shape, len(output_SBH)
        projected = self.x_TBI[part]
        if self.weight_GI is not None:
            projected = product(projected.flatten(0, 1), self.weight_GI).view(length, rows, -1)

        def buffer(features: int) -> Tensor:
            return h_BH.new_empty(length if kept else 1, rows, features)

        input_site, hidden_site, cell_site = self.sites
        return _Tape(
            kept,
            None if self.mask_TB is None else self.mask_TB[part],
            None if self.count_T is None else self.count_T[part],
            (
                input_site.part(part, rows, projected),
                hidden_site.part(part, rows, buffer(4 * hidden)),
                cell_site.part(part, rows, buffer(hidden)),
            ),
            projected,
            self.bias_G,
            h_BH,
            c_BH,
            gates=buffer(4 * hidden),
            cell=buffer(hidden),
            squashed=buffer(hidden),
            output=output_SBH,
        )

    def recomputed(self, part: slice, before_SBH: Tensor, c_BH: Tensor) -> _Tape:
        """The tape that forward did not keep, from h before each of its time steps and c before the first."""
        # An output of its own: that of forward, which comes from other products, differs by rounding and must stay.
        tape = self.tape(part, before_SBH[0], c_BH, torch.empty_like(before_SBH), kept=True)
        products = product(before_SBH.flatten(0, 1), self.weight_GH).view(*before_SBH.shape[:2], -1)
        steps = _steps(tape)
        for time, product_BG in enumerate(products):
            steps.forward(time, product_BG)
        return tape

    def d_input(self, d_projected_SBG: Tensor) -> Tensor:
        if self.weight_GI is None:
            return d_projected_SBG
        d_x_NI = input_gradient(d_projected_SBG.flatten(0, 1), self.weight_GI)
        return d_x_NI.view(*d_projected_SBG.shape[:2], -1)

    def d_parameters(
        self, part: slice, before_SBH: Tensor, tape: _Tape, gradients: _Gradients, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """What some time steps add to the gradients of both matrices, the bias, and weight and bias of each site.

        Args:
            before_SBH: h before each time step.
            needs: as `needs_input_grad` of `_Recurrence`.
        """
        x_NI, before_NH = self.x_TBI[part].flatten(0, 1), before_SBH.flatten(0, 1)
        parts = [gradients.d_bias, *(parts for site in tape.sites for parts in (site.d_weight, site.d_bias))]
        return [
            weight_gradient(gradients.d_projected.flatten(0, 1), x_NI) if needs[2] else None,
            weight_gradient(gradients.d_product.flatten(0, 1), before_NH) if needs[3] else None,
            *(None if values is None else values.sum(0) for values in parts),
        ]


class _Recurrence(torch.autograd.Function):
    """Outputs T x B x H and the last c of a layer.

    Args of `apply`:
        x_TBI, weight_GI: as in `_Layer`.
        affine: weight and bias of the three sites.
        plan: sites (whose weight and bias are those of `affine`), mask T x B, counts T; whether there will be a
            backward, and whether it recomputes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        plan: tuple[tuple[_Site, _Site, _Site], Tensor | None, Tensor | None, bool, bool],
        x_TBI: Tensor,
        weight_GI: Tensor | None,
        weight_GH: Tensor,
        bias_G: Tensor | None,
        h_BH: Tensor,
        c_BH: Tensor,
        *affine: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        sites, mask_TB, count_T, gradient, recompute = plan
        kept = gradient and not recompute
        length, rows = x_TBI.shape[:2]
        x_TBI, h_BH, c_BH = x_TBI.contiguous(), h_BH.contiguous(), c_BH.contiguous()
        output = h_BH.new_empty(length, *h_BH.shape)
        for site in sites:
            if site.kind == BATCH:  # over the sequence, for `store`
                site.mean, site.spread = (h_BH.new_empty(length, site.features) for _ in range(2))
        layer = _Layer(x_TBI, weight_GI, weight_GH, bias_G, mask_TB, count_T, sites)
        recurrent = Product(weight_GH, rows, length)
        h, c = h_BH, c_BH
        starts: list[Tensor] = []
        tape = None
        for part in _segments(length, kept):
            starts.append(c)
            tape = layer.tape(part, h, c, output[part], kept=kept)
            steps = _steps(tape, gradient)
            for time, after in enumerate(tape.output):
                steps.forward(time, recurrent(h))
                h = after
            c = tape.cell[-1]
        assert tape is not None
        if gradient:
            ctx.kept = kept
            ctx.fixed = [(site.kind, site.features, site.groups, site.centered, site.eps) for site in sites]
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(
                *(x_TBI, weight_GI, weight_GH, bias_G, h_BH, c_BH, *affine),
                *(output, mask_TB, count_T),
                *(value for site in sites for value in (site.stored_mean, site.stored_scale)),
                *((tape.gates, tape.cell, tape.squashed) if kept else (None, torch.stack(starts), None)),
                *(value for site in tape.sites for value in ((site.normalized, site.spread) if kept else (None, None))),
            )
        return output, c.clone()

    @staticmethod
    def backward(ctx: Any, *d_results: Any) -> Any:
        d_output, d_last_c = d_results
        if d_output is None and d_last_c is None:
            return (None,) * 13
        saved = list(ctx.saved_tensors)
        x_TBI, weight_GI, weight_GH, bias_G, h_BH, c_BH = saved[:6]
        affine, saved = saved[6:12], saved[12:]
        output, mask_TB, count_T = saved[:3]
        stored, saved = saved[3:9], saved[9:]
        gates, cell, squashed, *tapes = saved
        first, second, third = (
            _Site(*ctx.fixed[k], *affine[2 * k : 2 * k + 2], *stored[2 * k : 2 * k + 2]) for k in range(3)
        )
        sites = (first, second, third)
        layer = _Layer(x_TBI, weight_GI, weight_GH, bias_G, mask_TB, count_T, sites)
        whole = None
        if ctx.kept:
            for site, normalized, spread in zip(sites, tapes[::2], tapes[1::2], strict=True):
                site.normalized, site.spread = normalized, spread
            projected = gates if first.normalized is None else first.normalized
            whole = _Tape(True, mask_TB, count_T, sites, projected, bias_G, h_BH, c_BH, gates, cell, squashed, output)
        needs = ctx.needs_input_grad
        length, rows = x_TBI.shape[:2]
        with torch.no_grad():
            recurrent = Product(weight_GH.t(), rows, length)
            d_next, d_h = None, torch.zeros_like(h_BH)
            d_cell = torch.zeros_like(c_BH) if d_last_c is None else d_last_c.clone().contiguous()
            d_x: list[Tensor] = []
            totals: list[Tensor | None] = [None] * 9
            for number, part in reversed(list(enumerate(_segments(length, ctx.kept)))):
                h_before = output[part.start - 1 : part.start] if number else h_BH.unsqueeze(0)
                before_SBH = torch.cat([h_before, output[part][:-1]])
                tape = whole or layer.recomputed(part, before_SBH, cell[number])
                gradients = _begin(tape, None if d_output is None else d_output[part], d_h, d_cell)
                d_next = _through_time(tape, gradients, recurrent, d_next)
                if needs[1]:
                    d_x.append(layer.d_input(gradients.d_projected))
                found = layer.d_parameters(part, before_SBH, tape, gradients, needs)
                totals = [added(*both) for both in zip(totals, found, strict=True)]
            assert d_next is not None
        d_first_h = d_next if mask_TB is None else d_next + d_h
        d_input = None if not d_x else d_x[0] if len(d_x) == 1 else torch.cat(d_x[::-1])
        results = [d_input, *totals[:3], d_first_h, d_cell, *totals[3:]]
        return (None, *differentiated_once(results))


def _segments(length: int, kept: bool) -> list[slice]:
    span = length if kept else SEGMENT
    return [slice(start, min(start + span, length)) for start in range(0, length, span)]


def _begin(tape: _Tape, d_output: Tensor | None, d_h: Tensor, d_cell: Tensor) -> _Gradients:
    """Buffers for gradients; those of a bare site are those of the gates themselves."""
    input_site, hidden_site, _ = tape.sites
    bare = input_site.kind == NONE or hidden_site.kind == NONE
    d_gates = torch.empty_like(tape.gates if bare else tape.gates[:1])
    return _Gradients(
        torch.zeros_like(tape.output) if d_output is None else d_output.contiguous(),
        d_gates,
        d_product=d_gates if hidden_site.kind == NONE else torch.empty_like(tape.gates),
        d_projected=d_gates if input_site.kind == NONE else torch.empty_like(tape.gates),
        d_h=d_h,
        d_cell=d_cell,
    )


def _through_time(tape: _Tape, gradients: _Gradients, recurrent: Product, d_next: Tensor | None) -> Tensor:
    """Fill `gradients` from the last time step to the first; the gradient of the h before it, but for what padding
    passes on (`gradients.d_h`)."""
    steps = _steps(tape)
    steps.begin_backward(gradients)
    for time in reversed(range(len(tape.output))):
        steps.backward(time, d_next)
        d_next = recurrent(gradients.d_product[time])
    assert d_next is not None
    return d_next


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
    """As `reference.lstm_layer`, which it calls where `never_for` or `not_now_for` names a reason.

    An input site of another kind than those with a fast form runs by itself, over all time steps and before the loop.

    Args:
        recompute: keep less for backward (see above), and do forward's work a second time but for its loop.

    Raises:
        RuntimeError: differentiated twice.
    """
    # In this order: torch.compile need not look into the other.
    if not_now_for(x_TBI, h_BP, c_BH, weights, norms, step) or never_for(norms, weights):
        return reference.lstm_layer(x_TBI, mask_BT, h_BP, c_BH, weights, norms, step, carry, recompute=recompute)
    length, rows = x_TBI.shape[:2]
    mask_TB = count_T = None
    if mask_BT is not None:
        mask_TB = mask_BT.t().contiguous()
        count_T = mask_TB.sum(1)

    x, weight_GI, input_carry = x_TBI, weights.input, None
    norm = norms.input_to_hidden
    alone = _kind(norm) is None or (norm.per_step and isinstance(step, Tensor))
    if alone:
        given = None if carry is None else carry.input_to_hidden
        projected, input_carry = reference.project(
            x_TBI, mask_BT, weights.input, norm, step, given, recompute=recompute and torch.is_grad_enabled()
        )
        x, weight_GI = projected.transpose(0, 1), None
    sites = (
        _Site(NONE, norm.dim) if alone else _site(norm, mask_BT, step, rows, length, h_BP),
        _site(norms.hidden_to_hidden, mask_BT, step, rows, length, h_BP),
        _site(norms.cell, mask_BT, step, rows, length, h_BP),
    )
    affine = [value for site in sites for value in (site.weight, site.bias)]
    bias_G = None if weights.bias is None else weights.bias.contiguous()
    tensors = (x, weight_GI, weights.hidden, bias_G, h_BP, c_BH, *affine)
    gradient = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if cuda.takes(x.device):
        parts = _segments(length, gradient and not recompute)
        results = cuda.Recurrence.apply((sites, mask_TB, count_T, gradient, recompute, parts), *tensors)
    else:
        results = _Recurrence.apply((sites, mask_TB, count_T, gradient, recompute), *tensors)
    assert isinstance(results, tuple)
    h_TBH, last_c = results
    counts = h_TBH.new_full((length,), rows) if count_T is None else count_T.to(h_TBH.dtype)
    for norm, site in zip(norms, sites, strict=True):
        if site.mean is not None and site.spread is not None:
            norm.store(Moments(site.mean, site.spread, counts), step)
    out_TBH = h_TBH if mask_TB is None else h_TBH.masked_fill(~mask_TB.unsqueeze(-1), 0)
    return out_TBH, h_TBH[-1], last_c, SiteCarry(input_carry, None, None)
