"""A Transformer with a norm at each named site: causal decoder for language modelling, encoder for classification.

With pre placement, learned positions and GELU the decoder is GPT-2 (Radford et al. 2019); its modules are called

    token_embedding (wte)   position_embedding (wpe)   blocks (h)   final_norm (ln_f)   head (lm_head)
    in a block: attention_norm (ln_1)   attention.qkv (attn.c_attn)   attention.out (attn.c_proj)
                ffn_norm (ln_2)         ffn.up (mlp.c_fc)             ffn.down (mlp.c_proj)

Shapes: B batch, T time, F features, C classes, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from normlab.config import InputError, TransformerConfig
from normlab.models.attention import Context, SelfAttention, rotary_rotation, visible_keys
from normlab.models.linear import Linear
from normlab.models.output import ModelOutput
from normlab.models.sites import NormFactory

INITIAL_STD = 0.02


def ffn_hidden_width(config: TransformerConfig) -> int:
    """`config.ffn_width`, or where that is 0 the width that gives every activation about 8 F^2 weights.

    4 F for GELU, ReLU and sigmoid; for SwiGLU, which has three matrices and not two, 8/3 F rounded to a multiple
    of 8 (Shazeer 2020, arXiv 2002.05202).
    """
    if config.ffn_width:
        return config.ffn_width
    if config.activation == "swiglu":
        return max(8, 8 * round(config.width / 3))
    return 4 * config.width


class FeedForward(nn.Module):
    """down(activation(up(x))): B x T x F -> B x T x F. SwiGLU: down(silu(gate) * value), gate and value from `up`."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        hidden = ffn_hidden_width(config)
        self.activation = config.activation
        self.up = Linear(config.width, 2 * hidden if config.activation == "swiglu" else hidden)
        self.down = Linear(hidden, config.width)

    def forward(self, x_BTF: Tensor) -> Tensor:
        hidden = self.up(x_BTF)
        match self.activation:
            case "gelu":
                hidden = functional.gelu(hidden, approximate="tanh")
            case "relu":
                hidden = functional.relu(hidden)
            case "sigmoid":
                hidden = torch.sigmoid(hidden)
            case "swiglu":
                gate, value = hidden.chunk(2, dim=-1)
                hidden = functional.silu(gate) * value
        return self.down(hidden)


class Block(nn.Module):
    """Attention, then feed-forward, each with a residual connection; B x T x F -> B x T x F.

    In peri placement each site has two norms, before and after its sublayer (`attention_norm` and
    `attention_out_norm`), both as the one site says. Dropout acts on what is added to the residual stream, so after
    the peri output norm: before it, dropout would inflate the variance in training that stored statistics serve in
    evaluation (Li et al. 2018, arXiv 1801.05134).
    """

    def __init__(self, config: TransformerConfig, norms: NormFactory, *, causal: bool) -> None:
        super().__init__()
        self.placement = config.placement
        self.attention_norm = norms("attention", config.width)
        self.attention = SelfAttention(config.width, config.heads, norms, causal=causal, dropout=config.dropout)
        self.ffn_norm = norms("ffn", config.width)
        self.ffn = FeedForward(config)
        if config.placement == "peri":
            self.attention_out_norm = norms("attention", config.width)
            self.ffn_out_norm = norms("ffn", config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTF: Tensor, context: Context) -> Tensor:
        mask_BT = context.mask
        match self.placement:
            case "pre":
                x_BTF = x_BTF + self.dropout(self.attention(self.attention_norm(x_BTF, mask_BT), context))
                x_BTF = x_BTF + self.dropout(self.ffn(self.ffn_norm(x_BTF, mask_BT)))
            case "post":
                x_BTF = self.attention_norm(x_BTF + self.dropout(self.attention(x_BTF, context)), mask_BT)
                x_BTF = self.ffn_norm(x_BTF + self.dropout(self.ffn(x_BTF)), mask_BT)
            case "peri":
                attended = self.attention(self.attention_norm(x_BTF, mask_BT), context)
                x_BTF = x_BTF + self.dropout(self.attention_out_norm(attended, mask_BT))
                fed = self.ffn(self.ffn_norm(x_BTF, mask_BT))
                x_BTF = x_BTF + self.dropout(self.ffn_out_norm(fed, mask_BT))
        return x_BTF


class TransformerModel(nn.Module):
    """Tokens to logits.

    Args:
        config: architecture and norms.
        vocab_size: number of symbols V.
        classes: None for a causal language model (logits B x T x V); else the number of classes C of an encoder
            (logits B x C from the mean over the real time steps, dropout and a linear layer).
        length: training length in tokens: number of learned positions, and by default the number of distinct time
            steps of norms that keep statistics per step.

    Rows are padded on the right: column t is position t.

    Raises:
        InputError: options that do not fit each other, or (in a call) a sequence longer than the learned positions.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int, *, classes: int | None, length: int) -> None:
        super().__init__()
        if classes is not None and config.tie_embeddings:
            raise InputError("model.tie_embeddings is for language modelling; switch it off for classification")
        self.config = config
        self.causal = classes is None
        self.length = length
        norms = NormFactory(config.norm, config.sites, config.norm_options, causal=self.causal, max_steps=length)

        self.token_embedding = nn.Embedding(vocab_size, config.width)
        self.position_embedding = nn.Embedding(length, config.width) if config.positions == "learned" else None
        self.embedding_norm = norms("embedding", config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, norms, causal=self.causal) for _ in range(config.layers))
        self.final_norm = None if config.placement == "post" else norms("final", config.width)
        if classes is None:
            self.head = Linear(config.width, vocab_size, bias=False)
        else:
            self.head = Linear(config.width, classes)
        self._initialize()
        if config.tie_embeddings:
            self.head.weight = self.token_embedding.weight

    def _initialize(self) -> None:
        """As GPT-2: normal(0, 0.02), zero biases, projections into the residual stream smaller by sqrt(2 layers)."""
        residual_std = INITIAL_STD / math.sqrt(2 * self.config.layers)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                into_residual = name.endswith((".attention.out", ".ffn.down"))
                nn.init.normal_(module.weight, std=residual_std if into_residual else INITIAL_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor | None = None, state: Any | None = None) -> ModelOutput:
        """Logits of `tokens_BT`; `mask_BT` is True at real tokens. The Transformer has no state: it must be None."""
        if state is not None:
            raise InputError("the transformer carries no state from one sequence to the next; pass state=None")
        if mask_BT is not None:
            # Whatever stands in the padding (-1, -100) must not be looked up.
            tokens_BT = tokens_BT.masked_fill(~mask_BT, 0)
        x_BTF = self._embed(tokens_BT, mask_BT)
        rotation = None
        if self.config.positions == "rotary":
            rotation = rotary_rotation(tokens_BT.shape[1], self.config.width // self.config.heads, like=x_BTF)
        context = Context(mask_BT, visible_keys(mask_BT, causal=self.causal), rotation)
        for block in self.blocks:
            x_BTF = block(x_BTF, context)
        if self.final_norm is not None:
            x_BTF = self.final_norm(x_BTF, mask_BT)
        if self.causal:
            return ModelOutput(self.head(x_BTF), None)
        return ModelOutput(self.head(self.dropout(mean_over_time(x_BTF, mask_BT))), None)

    def _embed(self, tokens_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        x_BTF = self.token_embedding(tokens_BT)
        if self.position_embedding is not None:
            T = tokens_BT.shape[1]
            if self.length < T:
                raise InputError(
                    f"a sequence of {T} tokens is longer than the {self.length} learned positions; "
                    "raise data.length or use model.positions=rotary"
                )
            x_BTF = x_BTF + self.position_embedding.weight[:T]
        return self.dropout(self.embedding_norm(x_BTF, mask_BT))


def mean_over_time(x_BTF: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Mean of the real time steps, B x F; zeros for a row of nothing but padding."""
    if mask_BT is None:
        return x_BTF.mean(dim=1)
    total_BF = torch.where(mask_BT[:, :, None], x_BTF, 0.0).sum(dim=1)
    return total_BF / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
