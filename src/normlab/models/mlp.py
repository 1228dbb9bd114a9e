"""A feed-forward net with a norm before each activation: a language model of the last few tokens, or a classifier.

As a language model it is that of Bengio et al. 2003 (JMLR 3, without its direct connections): at every position the
embeddings of the last `context` tokens, joined, are what the layers see. As a classifier it is a deep averaging network
(Iyyer et al. 2015, ACL): the layers see the mean of the text's embeddings.

Shape suffixes: B batch, T time, E embedding, F features, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from normlab.config import InputError, MLPConfig
from normlab.models.linear import Linear
from normlab.models.output import ModelOutput
from normlab.models.sites import NormFactory
from normlab.models.transformer import mean_over_time
from normlab.norms.base import Norm

__all__ = ["HiddenLayer", "MLPModel"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": partial(functional.gelu, approximate="tanh"),
}


class HiddenLayer(nn.Module):
    """activation(norm(linear(x))): B x T x F or B x F."""

    def __init__(self, config: MLPConfig, inputs: int, norm: Norm) -> None:
        super().__init__()
        # The bias stays in every arm; a norm that subtracts a mean over other entries makes it do nothing.
        self.linear = Linear(inputs, config.width)
        self.norm = norm
        self.activation = ACTIVATIONS[config.activation]
        self.dropout = nn.Dropout(config.dropout)
        # He et al. 2015 for ReLU, Glorot & Bengio 2010 for the others, by torch's table; GELU as ReLU.
        gain = nn.init.calculate_gain("relu" if config.activation == "gelu" else config.activation)
        nn.init.normal_(self.linear.weight, std=gain * inputs**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, mask_BT: Tensor | None) -> Tensor:
        return self.dropout(self.activation(self.norm(self.linear(x), mask_BT)))


class MLPModel(nn.Module):
    """Tokens to logits.

    Args:
        config: architecture and norm.
        vocab_size: number of symbols V.
        classes: None for a language model (logits B x T x V); else the number of classes C (logits B x C).
        length: training length in tokens: unless `norm_options.max_steps` says another, the number of time steps with
            stored statistics of their own.

    Rows are padded on the right.

    Raises:
        InputError: a classifier whose norm pools over time alone.
    """

    def __init__(self, config: MLPConfig, vocab_size: int, *, classes: int | None, length: int) -> None:
        super().__init__()
        self.config, self.causal = config, classes is None
        norms = NormFactory(config.norm, config.sites, config.norm_options, causal=self.causal, max_steps=length)
        self.embedding = nn.Embedding(vocab_size, config.embedding_width)
        self.dropout = nn.Dropout(config.dropout)
        joined = config.embedding_width * (config.context if self.causal else 1)
        inputs = [joined, *[config.width] * (config.layers - 1)]
        self.layers = nn.ModuleList(HiddenLayer(config, size, norms("hidden", config.width)) for size in inputs)
        self.head = Linear(config.width, vocab_size if classes is None else classes)
        nn.init.normal_(self.head.weight, std=config.width**-0.5)
        nn.init.zeros_(self.head.bias)
        if not self.causal:
            self._require_more_than_time()

    def _require_more_than_time(self) -> None:
        for norm in [part for part in self.modules() if isinstance(part, Norm)]:
            over = norm.shares
            if over.time != "step" and over.features == "one" and not over.batch:
                raise InputError(
                    f"{norm.name} normalizes each feature over time, and the layers of this classifier see a text as "
                    "one vector: every output would be 0; use another norm, or --model lstm or transformer"
                )

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor | None = None, state: Any | None = None) -> ModelOutput:
        """Logits of `tokens_BT`; `mask_BT` is True at real tokens. There is no state: it must be None."""
        if state is not None:
            raise InputError("the mlp carries no state from one sequence to the next; pass state=None")
        if mask_BT is not None:
            # Whatever stands in the padding (-1, -100) must not be looked up.
            tokens_BT = tokens_BT.masked_fill(~mask_BT, 0)
        x_BTE = self.dropout(self.embedding(tokens_BT))
        if self.causal:
            x = self._joined(x_BTE)
        else:
            x, mask_BT = mean_over_time(x_BTE, mask_BT), None
        for layer in self.layers:
            x = layer(x, mask_BT)
        return ModelOutput(self.head(x), None)

    def _joined(self, x_BTE: Tensor) -> Tensor:
        """B x T x (context E): the embeddings up to each position, oldest first; zeros before the start."""
        T, before = x_BTE.shape[1], self.config.context - 1
        padded = functional.pad(x_BTE, (0, 0, before, 0))
        return torch.cat([padded[:, start : start + T] for start in range(self.config.context)], dim=-1)
