"""`normlab.LSTM`: torch.nn.LSTM with a norm at three named sites.

Shape suffixes: B batch, T time, F features, P output features; L layers times directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from normlab.config import InputError, LSTMSites, NormOptions, require_choice
from normlab.models.sites import NormFactory
from normlab.norms.base import Norm, Step
from normlab.norms.moments import Prefix, distinct_steps, longest, several_processes
from normlab.recurrence import fast, reference
from normlab.recurrence.reference import SiteCarry, SiteNorms, Weights, reverse_valid

Carry = tuple[SiteCarry, ...]


class LSTMState(tuple[Tensor, Tensor]):
    """What an LSTM carries from one chunk of a sequence to the next; unpacks as (h, c).

    Attributes:
        step: LongTensor B, time steps consumed so far by each row.
        carry: running statistics of norms that pool over time, per layer and direction; None if there are none.
    """

    step: Tensor
    carry: Carry | None

    def __new__(cls, h: Tensor, c: Tensor, step: Tensor, carry: Carry | None = None) -> LSTMState:
        state = super().__new__(cls, (h, c))
        state.step, state.carry = step, carry
        return state

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self[0], self[1], self.step, self.carry)

    def detach(self) -> LSTMState:
        """The same values, cut off from the graph: truncated backpropagation."""
        return self._map(lambda x: x.detach())

    def to(self, device: torch.device | str) -> LSTMState:
        """The same values on another device."""
        return self._map(lambda x: x.to(device))

    def restart(self, fresh_B: Tensor, start: LSTMState) -> LSTMState:
        """This state with the rows where `fresh_B` is True put back to `start` (L x B x P), time step 0 included."""
        fresh_B11 = fresh_B[:, None, None]

        def clear(prefix: Prefix | None) -> Prefix | None:
            return prefix and Prefix(*(value.masked_fill(fresh_B11, 0) for value in prefix))

        carry = self.carry and tuple(SiteCarry(*(clear(prefix) for prefix in sites)) for sites in self.carry)
        h, c = (torch.where(fresh_B.unsqueeze(-1), new, old) for new, old in zip(start, self, strict=True))
        return LSTMState(h, c, torch.where(fresh_B, start.step, self.step), carry)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers of tensors, which `torch.load(weights_only=True)` reads."""
        carry = self.carry and [[prefix and list(prefix) for prefix in sites] for sites in self.carry]
        return {"h": self[0], "c": self[1], "step": self.step, "carry": carry}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LSTMState:
        """The inverse of `to_dict`."""
        carry = values["carry"] and tuple(
            SiteCarry(*(prefix and Prefix(*prefix) for prefix in sites)) for sites in values["carry"]
        )
        return cls(values["h"], values["c"], values["step"], carry)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> LSTMState:
        def prefix(value: Prefix | None) -> Prefix | None:
            return value and Prefix(*(fn(part) for part in value))

        carry = self.carry and tuple(SiteCarry(*(prefix(value) for value in sites)) for sites in self.carry)
        return LSTMState(fn(self[0]), fn(self[1]), fn(self.step), carry)


class LSTM(nn.LSTM):
    """torch.nn.LSTM (constructor, call, defaults, parameter names) with a norm at the sites of `LSTMSites`.

    With every site bare it equals torch.nn.LSTM with the same state_dict. The state it returns is an `LSTMState`: it
    unpacks as (h, c) and carries the time step of each row, so that norms with statistics per time step go on
    counting when the state is passed to the next call. A plain (h, c) starts at time step 0. Each layer and
    direction has norms of its own; a backward direction reads only the valid part of a row, reversed, and counts
    its own steps.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype:
            as torch.nn.LSTM.
        norm: the norm at each site that does not name another.
        norm_options: options of the norm.
        sites: what stands at each site; None puts `norm` at all of them.
        causal: outputs must not depend on later inputs, in training either. False lets statistics of the input
            projection pool over time by default (batch norms and `inorm`).
        backend: "auto" takes torch's fused kernel if every site is bare, else "fast"; "fast" (none, ln, rms, gn with
            pool="token", bn, bn_step, in float32 or float64 on a CPU, on a GPU under autocast to bfloat16 too) equals
            the plain loop within rounding and leaves to it what it can not do; "reference" is always the plain loop,
            which alone differentiates twice.
        max_steps: time steps with stored statistics of their own, for norms that keep them, unless
            `norm_options.max_steps` says another; later ones share a set (`norm_options.beyond`).

    Raises:
        InputError: unknown norm, backend or option; backend="fast" and a norm without a fast form.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        norm: str = "none",
        norm_options: NormOptions | None = None,
        sites: LSTMSites | None = None,
        causal: bool = True,
        backend: Literal["auto", "fast", "reference"] = "auto",
        max_steps: int = 512,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=proj_size,
            device=device,
            dtype=dtype,
        )
        require_choice("LSTM backend", backend, ("auto", "fast", "reference"))
        self.backend, self.causal = backend, causal
        factory = NormFactory(
            norm, sites or LSTMSites(), norm_options or NormOptions(), causal=causal, max_steps=max_steps
        )
        self.norms = nn.ModuleDict()
        for suffix in self._suffixes():
            self.norms[suffix] = nn.ModuleDict(
                {
                    "input_to_hidden": factory("input_to_hidden", 4 * hidden_size, bias=False, recurrent=True),
                    "hidden_to_hidden": factory(
                        "hidden_to_hidden", 4 * hidden_size, bias=False, recurrent=True, stepwise=True
                    ),
                    "cell": factory("cell", hidden_size, recurrent=True, stepwise=True),
                }
            )
        self.norms.to(device=device, dtype=dtype)
        every = [module for module in self.norms.modules() if isinstance(module, Norm)]
        self.bare = all(norm.identity for norm in every)
        self.counts_steps = any(norm.per_step for norm in every)
        self.mixes_rows = any(not norm.batch_independent for norm in every)
        if backend == "fast" and (obstacle := self._never_fast()):
            raise InputError(f'{obstacle}; use backend="auto", which then takes the plain loop')

    def backend_choice(self, device: str = "cpu") -> tuple[str, str]:
        """The backend that calls take under present conditions (mode, autocast, processes), and why.

        A call whose rows are at time steps of their own, for norms that count them, takes the reference all the same.

        Args:
            device: type of the device it will run on.
        """
        if self.backend == "reference":
            return "reference", "asked for"
        if self.backend == "auto" and self.bare:
            return "fused", "every site is bare"
        suffix = self._suffixes()[0]
        norms, weights = self._site_norms(suffix), self._weights(suffix)
        like, there = torch.empty(1, 1, 1, dtype=weights.hidden.dtype, device="meta"), torch.device(device)
        obstacle = fast.not_now_for(like, like, like, weights, norms, 0, there) or self._never_fast()
        return ("reference", obstacle) if obstacle else ("fast", fast.engine(norms, weights.hidden.dtype, there))

    def _never_fast(self) -> str:
        suffix = self._suffixes()[0]
        return fast.never_for(self._site_norms(suffix), self._weights(suffix))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch's own is a set of overloads)
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, LSTMState]:
        """As torch.nn.LSTM.

        Args:
            input: T x B x F (B x T x F if `batch_first`), T x F without batch, or a PackedSequence.
            hx: (h_0, c_0) or the `LSTMState` of the sequence so far; None for zeros.
            lengths: LongTensor B of valid entries per row, the rest being padding at the end, whose outputs are 0;
                None = no padding. Not with a PackedSequence or without batch.
        """
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise InputError("a PackedSequence has its own lengths; leave out `lengths`")
            return self._forward_packed(input, hx)
        if input.ndim == 2:
            if lengths is not None:
                raise InputError("`lengths` needs a batch: input of 3 dimensions")
            batch_dim = 0 if self.batch_first else 1
            state = None if hx is None else self._restate(hx, lambda x: x.unsqueeze(1), 1)
            out, state = self.forward(input.unsqueeze(batch_dim), state)
            return cast(Tensor, out).squeeze(batch_dim), self._restate(state, lambda x: x.squeeze(1), 1)
        if self.backend == "auto" and self.bare and (lengths is None or bool((lengths > 0).all())):
            return self._forward_fused(input, hx, lengths)
        if hx is not None:
            self.check_forward_args(input, (hx[0], hx[1]), None)  # pyright: ignore[reportArgumentType]
        x_TBF = input.transpose(0, 1) if self.batch_first else input
        out_TBP, state = self._forward_layers(x_TBF, hx, lengths)
        return (out_TBP.transpose(0, 1) if self.batch_first else out_TBP), state

    def _forward_packed(
        self, packed: PackedSequence, hx: tuple[Tensor, Tensor] | None
    ) -> tuple[PackedSequence, LSTMState]:
        x_TBF, lengths = pad_packed_sequence(packed)
        lengths = lengths.to(x_TBF.device)
        if self.backend == "auto" and self.bare:
            out, (h, c) = super().forward(packed, None if hx is None else (hx[0], hx[1]))
            return out, LSTMState(h, c, self._first_step(hx, x_TBF.shape[1], x_TBF.device) + lengths)
        out_TBP, state = self._forward_layers(x_TBF, hx, lengths)
        mask_TB = torch.arange(len(out_TBP), device=lengths.device).unsqueeze(1) < lengths
        if packed.sorted_indices is not None:
            out_TBP, mask_TB = out_TBP[:, packed.sorted_indices], mask_TB[:, packed.sorted_indices]
        return PackedSequence(
            out_TBP[mask_TB], packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        ), state

    def _forward_fused(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None, lengths: Tensor | None
    ) -> tuple[Tensor, LSTMState]:
        plain = None if hx is None else (hx[0], hx[1])
        time_dim = 1 if self.batch_first else 0
        rows, length = input.shape[1 - time_dim], input.shape[time_dim]
        step = self._first_step(hx, rows, input.device)
        if lengths is None:
            out, (h, c) = super().forward(input, plain)
            return out, LSTMState(h, c, step + length)
        packed = pack_padded_sequence(input, lengths.cpu(), batch_first=self.batch_first, enforce_sorted=False)
        out, (h, c) = super().forward(packed, plain)
        padded, _ = pad_packed_sequence(out, batch_first=self.batch_first, total_length=length)
        return padded, LSTMState(h, c, step + lengths)

    def _forward_layers(
        self, x_TBF: Tensor, hx: tuple[Tensor, Tensor] | None, lengths: Tensor | None
    ) -> tuple[Tensor, LSTMState]:
        own_length, rows = x_TBF.shape[:2]
        consumed = own_length if lengths is None else lengths
        if self._synchronizes() and several_processes():
            x_TBF, lengths = _to_longest(x_TBF, lengths)
        mask_BT = None
        if lengths is not None:
            mask_BT = torch.arange(len(x_TBF), device=lengths.device) < lengths.unsqueeze(1)
            x_TBF = x_TBF.masked_fill(~mask_BT.t().unsqueeze(-1), 0)
        first_step = self._first_step(hx, rows, x_TBF.device)
        step = self._shared_step(hx, first_step)
        h_LBP, c_LBH = self._zeros(x_TBF) if hx is None else (hx[0], hx[1])
        carry = hx.carry if isinstance(hx, LSTMState) else None
        last_h: list[Tensor] = []
        last_c: list[Tensor] = []
        carries: list[SiteCarry] = []
        suffixes = self._suffixes()
        lstm_layer = reference.lstm_layer if self.backend == "reference" else fast.lstm_layer
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            for direction in range(directions):
                index = layer * directions + direction
                out, h, c, site_carry = lstm_layer(
                    reverse_valid(x_TBF, lengths) if direction else x_TBF,
                    mask_BT,
                    h_LBP[index],
                    c_LBH[index],
                    self._weights(suffixes[index]),
                    self._site_norms(suffixes[index]),
                    step,
                    carry[index] if carry else None,
                )
                outputs.append(reverse_valid(out, lengths) if direction else out)
                last_h.append(h)
                last_c.append(c)
                carries.append(site_carry)
            x_TBF = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout and layer < self.num_layers - 1:
                x_TBF = F.dropout(x_TBF, self.dropout, self.training)
        kept = tuple(carries) if any(prefix for sites in carries for prefix in sites) else None
        state = LSTMState(torch.stack(last_h), torch.stack(last_c), first_step + consumed, kept)
        return x_TBF[:own_length], state

    def _synchronizes(self) -> bool:
        """Whether any of its norms, which need not be in the mode of the LSTM, takes statistics over rows now."""
        return self.mixes_rows and any(isinstance(part, Norm) and part.training for part in self.modules())

    def _first_step(self, hx: tuple[Tensor, Tensor] | None, rows: int, device: torch.device) -> Tensor:
        return hx.step if isinstance(hx, LSTMState) else torch.zeros(rows, dtype=torch.long, device=device)

    def _shared_step(self, hx: tuple[Tensor, Tensor] | None, first_step: Tensor) -> Step:
        """The rows' time step as one int where possible: that spares grouping rows, and synchronizing with a GPU."""
        if not self.counts_steps:
            return 0
        if not isinstance(hx, LSTMState) and not several_processes():
            return 0
        distinct = distinct_steps(first_step)
        return int(distinct[0]) if len(distinct) == 1 else first_step

    def _zeros(self, x_TBF: Tensor) -> tuple[Tensor, Tensor]:
        # In the precision of the weights, not of x, which autocast may have lowered.
        count, rows = len(self._suffixes()), x_TBF.shape[1]
        like = cast(Tensor, self.weight_hh_l0)
        return (
            like.new_zeros(count, rows, self.proj_size or self.hidden_size),
            like.new_zeros(count, rows, self.hidden_size),
        )

    def _suffixes(self) -> Sequence[str]:
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def _weights(self, suffix: str) -> Weights:
        bias = getattr(self, f"bias_ih_{suffix}") + getattr(self, f"bias_hh_{suffix}") if self.bias else None
        projection = getattr(self, f"weight_hr_{suffix}") if self.proj_size else None
        return Weights(getattr(self, f"weight_ih_{suffix}"), getattr(self, f"weight_hh_{suffix}"), bias, projection)

    def _site_norms(self, suffix: str) -> SiteNorms:
        norms = cast(nn.ModuleDict, self.norms[suffix])
        return SiteNorms(*(cast(Norm, norms[site]) for site in SiteNorms._fields))

    @staticmethod
    def _restate(hx: tuple[Tensor, Tensor], fn: Callable[[Tensor], Tensor], rows: int) -> LSTMState:
        """`hx` with `fn` applied to h and c: adds or removes the batch dimension."""
        if isinstance(hx, LSTMState):
            return LSTMState(fn(hx[0]), fn(hx[1]), hx.step, hx.carry)
        return LSTMState(fn(hx[0]), fn(hx[1]), torch.zeros(rows, dtype=torch.long, device=hx[0].device))


def _to_longest(x_TBF: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pad to the longest T of all processes: they share statistics at every time step, so all must take every one."""
    if lengths is None:
        lengths = torch.full((x_TBF.shape[1],), len(x_TBF), device=x_TBF.device)
    return F.pad(x_TBF, (0, 0, 0, 0, 0, longest(len(x_TBF), x_TBF.device) - len(x_TBF))), lengths
