"""`normlab.RNN`: torch.nn.RNN (tanh or relu) with a norm at two named sites."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from normlab.config import LSTMSites, NormOptions
from normlab.models.recurrent import Backend, HiddenState, Recurrent
from normlab.recurrence import fast_cells, reference
from normlab.recurrence.reference import Activation


class RNN(Recurrent, nn.RNN):
    """torch.nn.RNN (constructor, call, defaults, parameter names) with a norm on W_x x and on W_h h:

        h_t = tanh or relu of N(W_x x_t) + b_ih + N(W_h h_{t-1}) + b_hh

    Neither norm has a bias. The state it returns is a `HiddenState`. All else is as in `normlab.LSTM`.

    Args:
        input_size, hidden_size, num_layers, nonlinearity, bias, batch_first, dropout, bidirectional, device, dtype:
            as torch.nn.RNN.
        sites: as `normlab.LSTM`, but an RNN has no c: `cell` stays at its default.
        norm, norm_options, causal, max_steps: as `normlab.LSTM`.
        backend: as `normlab.LSTM`; on a CPU "fast" needs a C compiler.
        recompute: as `normlab.LSTM`, on the plain loop.

    Raises:
        InputError: as `normlab.LSTM`; a site at the cell.
    """

    State = HiddenState
    gates = 1
    fast = fast_cells
    nonlinearity: Activation

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Activation = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
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
            nonlinearity=nonlinearity,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
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
        run = reference.rnn_layer if self.backend == "reference" else fast_cells.rnn_layer
        return partial(run, activation=self.nonlinearity)
