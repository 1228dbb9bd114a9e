"""What `normlab.LSTM`, `GRU` and `RNN` share: torch's module with norms at named sites, and the state it carries.

Shape suffixes: B batch, T time, F features, P output features; L layers times directions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from normlab.config import InputError, LSTMSites, NormOptions, require_choice, without_cell
from normlab.models.sites import NormFactory
from normlab.norms.base import Norm, Step
from normlab.norms.moments import Prefix, distinct_steps, longest, several_processes
from normlab.recurrence.reference import SiteCarry, SiteNorms, Weights, reverse_valid

Backend = Literal["auto", "fast", "reference"]
Carry = tuple[SiteCarry, ...]


class RecurrentState:
    """What a recurrent module carries from one chunk of a sequence to the next, beside being torch's own state.

    Attributes:
        fields: names of its tensors, each L x B x its features.
        step: LongTensor B, time steps consumed so far by each row.
        carry: running statistics of norms that pool over time, per layer and direction; None if there are none.
    """

    fields: ClassVar[tuple[str, ...]]
    step: Tensor
    carry: Carry | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor], step: Tensor, carry: Carry | None = None) -> Self:
        """The state of these `fields`."""
        raise NotImplementedError

    @classmethod
    def tensors_of(cls, plain: Any) -> tuple[Tensor, ...]:
        """The tensors of a state, this one or torch's."""
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its values, in the order of `fields`."""
        return self.tensors_of(self)

    def detach(self) -> Self:
        """The same values, cut off from the graph: truncated backpropagation."""
        return self._map(lambda x: x.detach())

    def to(self, device: torch.device | str) -> Self:
        """The same values on another device."""
        return self._map(lambda x: x.to(device))

    def restart(self, fresh_B: Tensor, start: Self) -> Self:
        """This state with the rows where `fresh_B` is True put back to `start` (L x B x P), time step 0 included."""
        fresh_B11 = fresh_B[:, None, None]

        def clear(prefix: Prefix | None) -> Prefix | None:
            return prefix and Prefix(*(value.masked_fill(fresh_B11, 0) for value in prefix))

        carry = self.carry and tuple(SiteCarry(*(clear(prefix) for prefix in sites)) for sites in self.carry)
        both = zip(start.tensors, self.tensors, strict=True)
        values = [torch.where(fresh_B.unsqueeze(-1), new, old) for new, old in both]
        return self.of(values, torch.where(fresh_B, start.step, self.step), carry)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers of tensors, which `torch.load(weights_only=True)` reads."""
        carry = self.carry and [[prefix and list(prefix) for prefix in sites] for sites in self.carry]
        return {**dict(zip(self.fields, self.tensors, strict=True)), "step": self.step, "carry": carry}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        carry = values["carry"] and tuple(
            SiteCarry(*(prefix and Prefix(*prefix) for prefix in sites)) for sites in values["carry"]
        )
        return cls.of([values[name] for name in cls.fields], values["step"], carry)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        def prefix(value: Prefix | None) -> Prefix | None:
            return value and Prefix(*(fn(part) for part in value))

        carry = self.carry and tuple(SiteCarry(*(prefix(value) for value in sites)) for sites in self.carry)
        return self.of([fn(value) for value in self.tensors], fn(self.step), carry)


class HiddenState(RecurrentState, Tensor):
    """The h of a GRU or an RNN: a tensor (L x B x H) that carries the time step of each row as `.step`.

    What is computed from it is a plain tensor.
    """

    fields = ("h",)
    # As torch.nn.Parameter: results of operators are no states.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], step: Tensor, carry: Carry | None = None) -> Self:
        (h,) = tensors
        state = h.as_subclass(cls)
        state.step, state.carry = step, carry
        return state

    @classmethod
    def tensors_of(cls, plain: Any) -> tuple[Tensor, ...]:
        return (plain.as_subclass(Tensor),)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As torch.Tensor.to; another precision is for h alone."""
        h = self.tensors[0].to(*args, **kwargs)
        moved = self._map(lambda x: x.to(h.device))
        return self.of([h], moved.step, moved.carry)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._map(lambda x: copy.deepcopy(x, memo))


class Recurrent(nn.RNNBase):
    """Torch's recurrent module with norms at named sites; stands before torch's own class among the bases.

    Attributes:
        State: what it carries; its plain form is that of torch.
        gates: blocks of `hidden_size` rows in each weight matrix.
        fast: the module with its fast layer.
        bare: every site is bare.
        counts_steps: a norm has statistics per time step.
        mixes_rows: in training a row sees others.
    """

    State: ClassVar[type[Any]]
    gates: ClassVar[int]
    fast: ClassVar[ModuleType]

    def _install(
        self,
        norm: str,
        norm_options: NormOptions | None,
        sites: LSTMSites | None,
        *,
        causal: bool,
        backend: Backend,
        recompute: bool,
        max_steps: int,
        device: Any,
        dtype: Any,
    ) -> None:
        """Build the norms, when torch's constructor has built the rest; arguments as those of `normlab.LSTM`."""
        kind = type(self).__name__
        require_choice(f"{kind} backend", backend, ("auto", "fast", "reference"))
        self.backend, self.causal, self.recompute = backend, causal, recompute
        sites = sites or LSTMSites()
        has_cell = "c" in self.State.fields
        factory = NormFactory(
            norm,
            sites if has_cell else without_cell(sites, kind),
            norm_options or NormOptions(),
            causal=causal,
            max_steps=max_steps,
        )
        width = self.gates * self.hidden_size
        self.norms = nn.ModuleDict()
        for suffix in self._suffixes():
            norms = {
                "input_to_hidden": factory("input_to_hidden", width, bias=False, recurrent=True),
                "hidden_to_hidden": factory("hidden_to_hidden", width, bias=False, recurrent=True, stepwise=True),
            }
            if has_cell:
                norms["cell"] = factory("cell", self.hidden_size, recurrent=True, stepwise=True)
            self.norms[suffix] = nn.ModuleDict(norms)
        self.norms.to(device=device, dtype=dtype)
        every = [module for module in self.norms.modules() if isinstance(module, Norm)]
        self.bare = all(norm.identity for norm in every)
        self.counts_steps = any(norm.per_step for norm in every)
        self.mixes_rows = any(not norm.batch_independent for norm in every)
        obstacle = self._never_fast()
        if backend == "fast" and obstacle:
            raise InputError(f'{obstacle}; use backend="auto", which then takes the plain loop')

    def _layer(self) -> Callable[..., Any]:
        """The function that runs one layer in one direction, on the backend that was asked for.

        It takes x T x B x F, mask, the tensors of the state, weights, norms, step, carry and `recompute`; it returns
        outputs, the tensors of the state after, and carry.
        """
        raise NotImplementedError

    def backend_choice(self, device: str = "cpu") -> tuple[str, str]:
        """The backend that calls take under present conditions (mode, autocast, processes), and why.

        A call whose rows are at time steps of their own, for norms that count them, takes the reference all the same.

        Args:
            device: type of the device it will run on.
        """
        if self.backend == "reference":
            return "reference", "asked for"
        there = torch.device(device)
        if self._fused(there):
            return "fused", "every site is bare"
        suffix = self._suffixes()[0]
        norms, weights = self._site_norms(suffix), self._weights(suffix)
        like = torch.empty(1, 1, 1, dtype=weights.hidden.dtype, device="meta")
        state = [like] * len(self.State.fields)
        obstacle = self._never_fast() or self.fast.not_now_for(like, *state, weights, norms, 0, there)
        return ("reference", obstacle) if obstacle else ("fast", self.fast.engine(norms, weights.hidden.dtype, there))

    def stepwise_norms(self) -> list[Norm]:
        """The norms that are called one time step at a time."""
        return [norm for suffix in self._suffixes() for norm in self._site_norms(suffix)[1:]]

    def uses_kernels(self) -> bool:
        """Whether the C kernels serve its norms, where its backend is "fast"."""
        return self.fast.on_kernels(self._site_norms(self._suffixes()[0]))

    def _fused(self, device: torch.device) -> bool:
        """Whether torch's own layer takes a call."""
        if self.backend != "auto" or not self.bare or self.recompute:
            return False
        # Under autocast to bfloat16 torch's own would run in float16 there, whose gradients nothing scales.
        is_half = device.type == "cuda" and torch.is_autocast_enabled("cuda")
        return not is_half or torch.get_autocast_dtype("cuda") != torch.bfloat16

    def _never_fast(self) -> str:
        if self.recompute and not self.fast.RECOMPUTES:
            return f"recompute is set, for which a normlab.{type(self).__name__} has no fast form"
        suffix = self._suffixes()[0]
        return self.fast.never_for(self._site_norms(suffix), self._weights(suffix))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (torch's own is a set of overloads)
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, RecurrentState]:
        """As torch's own.

        Args:
            input: T x B x F (B x T x F if `batch_first`), T x F without batch, or a PackedSequence.
            hx: the initial state as torch takes it, or the `State` of the sequence so far; None for zeros.
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
        if self._fused(input.device) and (lengths is None or bool((lengths > 0).all())):
            return self._forward_fused(input, hx, lengths)
        if hx is not None:
            self.check_forward_args(input, self._plain(hx), None)
        x_TBF = input.transpose(0, 1) if self.batch_first else input
        out_TBP, state = self._forward_layers(x_TBF, hx, lengths)
        return (out_TBP.transpose(0, 1) if self.batch_first else out_TBP), state

    def _forward_packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, RecurrentState]:
        x_TBF, lengths = pad_packed_sequence(packed)
        lengths = lengths.to(x_TBF.device)
        if self._fused(x_TBF.device):
            out, last = super().forward(packed, self._plain(hx))
            return out, self._state(last, self._first_step(hx, x_TBF.shape[1], x_TBF.device) + lengths)
        out_TBP, state = self._forward_layers(x_TBF, hx, lengths)
        mask_TB = torch.arange(len(out_TBP), device=lengths.device).unsqueeze(1) < lengths
        if packed.sorted_indices is not None:
            out_TBP, mask_TB = out_TBP[:, packed.sorted_indices], mask_TB[:, packed.sorted_indices]
        return PackedSequence(
            out_TBP[mask_TB], packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices
        ), state

    def _forward_fused(self, input: Tensor, hx: Any, lengths: Tensor | None) -> tuple[Tensor, RecurrentState]:
        plain = self._plain(hx)
        time_dim = 1 if self.batch_first else 0
        rows, length = input.shape[1 - time_dim], input.shape[time_dim]
        step = self._first_step(hx, rows, input.device)
        if lengths is None:
            out, last = super().forward(input, plain)
            return out, self._state(last, step + length)
        packed = pack_padded_sequence(input, lengths.cpu(), batch_first=self.batch_first, enforce_sorted=False)
        out, last = super().forward(packed, plain)
        padded, _ = pad_packed_sequence(out, batch_first=self.batch_first, total_length=length)
        return padded, self._state(last, step + lengths)

    def _forward_layers(self, x_TBF: Tensor, hx: Any, lengths: Tensor | None) -> tuple[Tensor, RecurrentState]:
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
        first = self._zeros(x_TBF) if hx is None else self.State.tensors_of(hx)
        carry = hx.carry if isinstance(hx, RecurrentState) else None
        lasts: list[tuple[Tensor, ...]] = []
        carries: list[SiteCarry] = []
        suffixes = self._suffixes()
        run_layer = self._layer()
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            outputs: list[Tensor] = []
            for direction in range(directions):
                index = layer * directions + direction
                out, *last, site_carry = run_layer(
                    reverse_valid(x_TBF, lengths) if direction else x_TBF,
                    mask_BT,
                    *(value[index] for value in first),
                    self._weights(suffixes[index]),
                    self._site_norms(suffixes[index]),
                    step,
                    carry[index] if carry else None,
                    recompute=self.recompute,
                )
                outputs.append(reverse_valid(out, lengths) if direction else out)
                lasts.append(tuple(last))
                carries.append(site_carry)
            x_TBF = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout and layer < self.num_layers - 1:
                x_TBF = F.dropout(x_TBF, self.dropout, self.training)
        kept = tuple(carries) if any(prefix for sites in carries for prefix in sites) else None
        last_L = [torch.stack(values) for values in zip(*lasts, strict=True)]
        return x_TBF[:own_length], self.State.of(last_L, first_step + consumed, kept)

    def _synchronizes(self) -> bool:
        """Whether any of its norms, which need not be in the mode of this module, takes statistics over rows now."""
        return self.mixes_rows and any(isinstance(part, Norm) and part.training for part in self.modules())

    def _first_step(self, hx: Any, rows: int, device: torch.device) -> Tensor:
        return hx.step if isinstance(hx, RecurrentState) else torch.zeros(rows, dtype=torch.long, device=device)

    def _shared_step(self, hx: Any, first_step: Tensor) -> Step:
        """The rows' time step as one int where possible: that spares grouping rows, and synchronizing with a GPU."""
        if not self.counts_steps:
            return 0
        if not isinstance(hx, RecurrentState) and not several_processes():
            return 0
        distinct = distinct_steps(first_step)
        return int(distinct[0]) if len(distinct) == 1 else first_step

    def _zeros(self, x_TBF: Tensor) -> tuple[Tensor, ...]:
        # In the precision of the weights, not of x, which autocast may have lowered.
        count, rows = len(self._suffixes()), x_TBF.shape[1]
        like = cast(Tensor, self.weight_hh_l0)
        widths = {"h": self.proj_size or self.hidden_size, "c": self.hidden_size}
        return tuple(like.new_zeros(count, rows, widths[field]) for field in self.State.fields)

    def _suffixes(self) -> Sequence[str]:
        ends = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{end}" for layer in range(self.num_layers) for end in ends]

    def _weights(self, suffix: str) -> Weights:
        bias = getattr(self, f"bias_ih_{suffix}") + getattr(self, f"bias_hh_{suffix}") if self.bias else None
        projection = getattr(self, f"weight_hr_{suffix}") if self.proj_size else None
        return Weights(getattr(self, f"weight_ih_{suffix}"), getattr(self, f"weight_hh_{suffix}"), bias, projection)

    def _site_norms(self, suffix: str) -> SiteNorms:
        return SiteNorms(**cast(Any, dict(cast(nn.ModuleDict, self.norms[suffix]).items())))

    def _plain(self, hx: Any) -> Any:
        """`hx` as torch takes it: one tensor, or a tuple of them."""
        if hx is None:
            return None
        tensors = self.State.tensors_of(hx)
        return tensors if len(tensors) > 1 else tensors[0]

    def _state(self, plain: Any, step: Tensor) -> RecurrentState:
        return self.State.of(self.State.tensors_of(plain), step)

    def _restate(self, hx: Any, fn: Callable[[Tensor], Tensor], rows: int) -> RecurrentState:
        """`hx` with `fn` applied to its tensors: adds or removes the batch dimension."""
        tensors = [fn(value) for value in self.State.tensors_of(hx)]
        carry = hx.carry if isinstance(hx, RecurrentState) else None
        return self.State.of(tensors, self._first_step(hx, rows, tensors[0].device), carry)


def _to_longest(x_TBF: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pad to the longest T of all processes: they share statistics at every time step, so all must take every one."""
    if lengths is None:
        lengths = torch.full((x_TBF.shape[1],), len(x_TBF), device=x_TBF.device)
    return F.pad(x_TBF, (0, 0, 0, 0, 0, longest(len(x_TBF), x_TBF.device) - len(x_TBF))), lengths
