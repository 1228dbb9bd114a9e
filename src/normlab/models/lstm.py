"""`normlab.LSTM`: torch.nn.LSTM with a norm at three named sites.

Shape suffixes: B batch; L layers times directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from torch import Tensor, nn

from normlab.config import LSTMSites, NormOptions
from normlab.models.recurrent import Backend, Carry, Recurrent, RecurrentState
from normlab.recurrence import fast, reference


class LSTMState(RecurrentState, tuple[Tensor, Tensor]):
    """The state of an LSTM: unpacks as (h, c)."""

    fields = ("h", "c")

    def __new__(cls, h: Tensor, c: Tensor, step: Tensor, carry: Carry | None = None) -> Self:
        state = super().__new__(cls, (h, c))
        state.step, state.carry = step, carry
        return state

    def __getnewargs__(self) -> tuple[Any, ...]:
        return (self[0], self[1], self.step, self.carry)

    @classmethod
    def of(cls, tensors: Sequence[Tensor], step: Tensor, carry: Carry | None = None) -> Self:
        h, c = tensors
        return cls(h, c, step, carry)

    @classmethod
    def tensors_of(cls, plain: Any) -> tuple[Tensor, ...]:
        return (plain[0], plain[1])


class LSTM(Recurrent, nn.LSTM):
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
        backend: "auto" takes torch's fused kernel if every site is bare (on a GPU not under autocast to bfloat16, which
            that would take for one to float16), else "fast"; "fast" (none, ln, rms, gn with pool="token", bn, bn_step,
            in float32 or float64 on a CPU, on a GPU under autocast to bfloat16 too) equals the plain loop within
            rounding and leaves to it what it can not do; "reference" is always the plain loop, which alone
            differentiates twice.
        recompute: save memory in training on long sequences: backward takes gates and normalized values anew, a segment
            of the sequence at a time, and little more than the outputs is kept (recurrence/fast.py says how much).
            "auto" then never takes torch's fused kernel, which keeps everything.
        max_steps: time steps with stored statistics of their own, for norms that keep them, unless
            `norm_options.max_steps` says another; later ones share a set (`norm_options.beyond`).

    Raises:
        InputError: unknown norm, backend or option; backend="fast" and a norm without a fast form.
    """

    State = LSTMState
    gates = 4
    fast = fast

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
        backend: Backend = "auto",
        recompute: bool = False,
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
        self._install(
            norm,
            norm_options,
            sites,
            causal=causal,
            backend=backend,
            recompute=recompute,
            max_steps=max_steps,
            device=device,
            dtype=dtype,
        )

    def _layer(self) -> Callable[..., Any]:
        return reference.lstm_layer if self.backend == "reference" else fast.lstm_layer
