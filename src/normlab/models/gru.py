"""`normlab.GRU`: torch.nn.GRU with a norm at two named sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from normlab.config import LSTMSites, NormOptions
from normlab.models.recurrent import Backend, HiddenState, Recurrent
from normlab.recurrence import fast_cells, reference
from normlab.recurrence.reference import Weights


class GRU(Recurrent, nn.GRU):
    """torch.nn.GRU (constructor, call, defaults, parameter names) with a norm on W_x x and on W_h h.

    Each norm stands over the three gates at once and has no bias: bias_ih and bias_hh follow it, and in n the reset
    gate acts on the normalized product with its bias, as in torch:

        n = tanh(N(W_x x)_n + b_in + r * (N(W_h h)_n + b_hn))

    The state it returns is a `HiddenState`. All else is as in `normlab.LSTM`.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype: as torch.nn.GRU.
        sites: as `normlab.LSTM`, but a GRU has no c: `cell` stays at its default.
        norm, norm_options, causal, max_steps: as `normlab.LSTM`.
        backend: as `normlab.LSTM`; on a CPU "fast" needs a C compiler.
        recompute: as `normlab.LSTM`, on the plain loop.

    Raises:
        InputError: as `normlab.LSTM`; a site at the cell.
    """

    State = HiddenState
    gates = 3
    fast = fast_cells

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
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
        return reference.gru_layer if self.backend == "reference" else fast_cells.gru_layer

    def _weights(self, suffix: str) -> Weights:
        biases = (getattr(self, f"bias_{kind}_{suffix}") if self.bias else None for kind in ("ih", "hh"))
        bias, hidden_bias = biases
        return Weights(
            getattr(self, f"weight_ih_{suffix}"), getattr(self, f"weight_hh_{suffix}"), bias, None, hidden_bias
        )
