"""Randomly initialized architectures of transformers, two layers of width 32, without dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

V, WIDTH = 50, 32
SPECIAL = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, "vocab_size": V}
LLAMA = {"num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 64}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "CausalLM",
        {
            "n_layer": 2,
            "n_embd": WIDTH,
            "n_head": 2,
            "n_positions": 32,
            "resid_pdrop": 0,
            "embd_pdrop": 0,
            "attn_pdrop": 0,
        },
    ),
    "bert": ("MaskedLM", {**LLAMA, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "llama": ("CausalLM", LLAMA),
    "t5": (
        "Seq2SeqLM",
        {"num_layers": 2, "d_model": WIDTH, "num_heads": 2, "d_kv": 16, "d_ff": 64, "dropout_rate": 0.0}
        | {"decoder_start_token_id": 0},
    ),
    "qwen3": ("CausalLM", {**LLAMA, "num_key_value_heads": 2, "head_dim": 16}),
    "gemma": ("CausalLM", {**LLAMA, "num_key_value_heads": 2, "head_dim": 16}),
    "opt": (
        "CausalLM",
        {"num_hidden_layers": 2, "hidden_size": WIDTH, "num_attention_heads": 2, "ffn_dim": 64}
        | {"word_embed_proj_dim": WIDTH, "dropout": 0.0},
    ),
}
FOUR = ("gpt2", "bert", "llama", "t5")
OWN = {"gpt2": "ln", "bert": "ln", "llama": "rms", "t5": "rms"}


def build(architecture: str, *, double: bool = False, **changes: Any) -> nn.Module:
    """In training mode, in fp32 or fp64, with gains and biases that are not 1 and 0."""
    kind, fields = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(architecture, **{**SPECIAL, **fields, **changes})
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(settings)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return (model.double() if double else model).train()


def ids(rows: int, time: int, seed: int = 0) -> Tensor:
    return torch.randint(3, V, (rows, time), generator=torch.Generator().manual_seed(seed))


def batch(architecture: str, rows: int = 4, time: int = 6, seed: int = 0) -> dict[str, Tensor]:
    """Inputs without padding; an encoder-decoder has a decoder text of one token less."""
    given = {"input_ids": ids(rows, time, seed)}
    if architecture == "t5":
        given["decoder_input_ids"] = ids(rows, time - 1, seed + 1)
    return given
