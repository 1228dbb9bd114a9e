"""Embedding, normalized LSTM (or GRU or RNN), head: a language model or a classifier of whole texts.

Shape suffixes: B batch, T time, E embedding, P output features of the recurrence, V vocabulary, C classes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from normlab.config import InputError, LSTMConfig
from normlab.models.gru import GRU
from normlab.models.linear import Linear
from normlab.models.lstm import LSTM
from normlab.models.output import ModelOutput
from normlab.models.recurrent import Recurrent, RecurrentState
from normlab.models.rnn import RNN

CELLS: dict[str, Any] = {
    "lstm": LSTM,
    "gru": GRU,
    "rnn_tanh": partial(RNN, nonlinearity="tanh"),
    "rnn_relu": partial(RNN, nonlinearity="relu"),
}


class LSTMModel(nn.Module):
    """An LSTM, or another recurrence, over tokens.

    Args:
        config: the architecture.
        vocab_size: number of symbols V.
        classes: number of classes C; None makes a language model.
        length: training length in tokens: unless `norm_options.max_steps` says another, the number of time steps with
            stored statistics of their own.

    Raises:
        InputError: bidirectional language model; tied embeddings in a classifier.
    """

    def __init__(self, config: LSTMConfig, vocab_size: int, *, classes: int | None, length: int) -> None:
        super().__init__()
        if classes is None and config.bidirectional:
            raise InputError(
                "a bidirectional model sees the tokens it should predict; "
                "set model.bidirectional=false for language modelling"
            )
        if classes is not None and config.tie_embeddings:
            raise InputError("a classifier's head is no embedding; set model.tie_embeddings=false for classification")
        self.config, self.classes = config, classes
        embedding_width = config.embedding_width or config.width
        self.embedding = nn.Embedding(vocab_size, embedding_width)
        # Named so whatever it is: recorded models have this name in them.
        self.lstm: Recurrent = CELLS[config.cell](
            embedding_width,
            config.width,
            config.layers,
            batch_first=True,
            dropout=config.dropout if config.layers > 1 else 0.0,
            bidirectional=config.bidirectional,
            norm=config.norm,
            norm_options=config.norm_options,
            sites=config.sites,
            causal=classes is None,
            recompute=config.recompute,
            max_steps=length,
        )
        directions = 2 if config.bidirectional else 1
        self.dropout = nn.Dropout(config.dropout)
        self.head = Linear(directions * config.width, vocab_size if classes is None else classes)
        count = directions * config.layers
        self.initial_h = nn.Parameter(torch.zeros(count, config.width)) if config.learned_state else None
        learns_c = config.learned_state and "c" in self.lstm.State.fields
        self.initial_c = nn.Parameter(torch.zeros(count, config.width)) if learns_c else None
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        width = self.config.width
        for name, parameter in self.lstm.named_parameters(recurse=False):
            if name.startswith("weight_hh") and self.config.recurrent_init == "orthogonal":
                for block in parameter.split(width):
                    nn.init.orthogonal_(block)
            elif name.startswith("bias"):
                parameter.zero_()
                if name.startswith("bias_ih") and self.config.cell == "lstm":
                    parameter[width : 2 * width] = self.config.forget_bias
        self.head.bias.zero_()
        # As a head, a tied embedding must not start with large logits.
        default = self.embedding.embedding_dim**-0.5 if self.config.tie_embeddings else 1.0
        nn.init.normal_(self.embedding.weight, std=self.config.embedding_std or default)
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(
        self, tokens_BT: Tensor, mask_BT: Tensor | None = None, state: RecurrentState | None = None
    ) -> ModelOutput:
        """Logits B x T x V and the state after the last token, or B x C and None.

        Args:
            mask_BT: True = real token; padding stands at the end of rows. None = no padding.
            state: of the text so far; None starts afresh.
        """
        if state is None:
            state = self.initial_state(len(tokens_BT))
        x_BTE = self.dropout(self.embedding(tokens_BT))
        lengths = None if mask_BT is None else mask_BT.sum(1)
        out, state = self.lstm(x_BTE, state, lengths=lengths)
        out_BTP = cast(Tensor, out)
        if self.classes is None:
            return ModelOutput(self.head(self.dropout(out_BTP)), state)
        # Outputs at padding are 0.
        mean_BP = out_BTP.mean(1) if lengths is None else out_BTP.sum(1) / lengths.clamp(min=1).unsqueeze(-1)
        return ModelOutput(self.head(self.dropout(mean_BP)), None)

    def initial_state(self, rows: int) -> RecurrentState:
        """The state of `rows` texts not begun: learned or zero, with noise in training if the config has it."""
        weight = cast(Tensor, self.lstm.weight_hh_l0)
        values: list[Tensor] = []
        for learned in (self.initial_h, self.initial_c)[: len(self.lstm.State.fields)]:
            shape = (self.lstm.num_layers * (2 if self.lstm.bidirectional else 1), rows, self.config.width)
            value = weight.new_zeros(shape) if learned is None else learned.unsqueeze(1).expand(shape)
            if self.training and self.config.state_noise:
                value = value + self.config.state_noise * torch.randn_like(value)
            values.append(value)
        return self.lstm.State.of(values, torch.zeros(rows, dtype=torch.long, device=weight.device))

    def restart(self, state: RecurrentState, fresh_B: Tensor) -> RecurrentState:
        """`state` with the rows where `fresh_B` is True put back to the initial state, at time step 0."""
        return state.restart(fresh_B, self.initial_state(len(fresh_B)))
