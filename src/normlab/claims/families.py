"""Runs that several arguments have in common, so that each is trained once: bases by scale, arms, rates and seeds."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from normlab.claims.base import Scale
from normlab.config import (
    DataConfig,
    LSTMConfig,
    MLPConfig,
    OptimConfig,
    RunConfig,
    TrainingConfig,
    TransformerConfig,
)

__all__ = [
    "CHAR_LSTM",
    "FIVE_SEEDS",
    "LSTM_RATES",
    "MLP_RATES",
    "MLP_VERDICT_SEEDS",
    "ONE_TUNING_SEED",
    "SST2_LSTM",
    "TRANSFORMER_RATES",
    "TUNING_SEEDS",
    "VERDICT_SEEDS",
    "WORD_TRANSFORMER",
    "char_mlp",
    "char_transformer",
    "norm_arm",
    "norm_arms",
    "sst2_transformer",
]

TUNING_SEEDS = (101, 102)
VERDICT_SEEDS = (1, 2, 3, 4, 5, 6)
"""Six: one more than an interval needs at least (`stats.effects`); the verdict says how many more it would need."""

_SMALL = TrainingConfig(
    # A validation of a twelfth to a third of the split every 25 steps: fine steps for the arguments about speed.
    steps=300,
    valid_every=25,
    valid_batches=8,
    checkpoint_every=100,
    activations_every=0,
    accelerator="cpu",
)
_FULL = TrainingConfig(
    steps=10_000, valid_every=250, valid_batches=0, checkpoint_every=500, activations_every=0, accelerator="gpu"
)

CHAR_LSTM: dict[Scale, RunConfig] = {
    # ptb_char: the text of Cooijmans et al. 2016 and Laurent et al. 2017, the same bytes everywhere (pydocs differs
    # between versions of Python).
    "small": RunConfig(
        model=LSTMConfig(norm="none", width=128),
        data=DataConfig(corpus="ptb_char", tokens="char", batch_size=32, length=50),
        optim=OptimConfig(name="adam", clip=1.0),
        training=_SMALL,
    ),
    # The published sizes.
    "full": RunConfig(
        model=LSTMConfig(norm="none", width=1000),
        data=DataConfig(corpus="ptb_char", tokens="char", batch_size=64, length=100),
        optim=OptimConfig(name="adam", clip=1.0),
        training=_FULL,
    ),
}
"""Characters with one LSTM layer, stateless windows: the loss at length 50 (small) or 100 (full), state restarted."""

SST2_LSTM: dict[Scale, RunConfig] = {
    "small": RunConfig(
        model=LSTMConfig(norm="none", width=64, embedding_std=0.06, bidirectional=True, dropout=0.5),
        data=DataConfig(corpus="sst2", tokens="word", vocabulary=8000, batch_size=32),
        optim=OptimConfig(name="adam", clip=1.0),
        training=_SMALL,
    ),
    "full": RunConfig(
        model=LSTMConfig(norm="none", width=512, embedding_std=0.06, bidirectional=True, dropout=0.5),
        data=DataConfig(corpus="sst2", tokens="word", vocabulary=16_000, batch_size=32),
        optim=OptimConfig(name="adam", clip=1.0),
        training=dataclasses.replace(_FULL, steps=3_000, valid_every=100),
    ),
}
"""Sentences with one bidirectional LSTM layer over words; whole sentences, each from a fresh state."""

LSTM_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
"""Half a decade apart. The last was added when the first three had been run on the tuning seeds: batch norms liked the
largest best, and an arm must not be held back by the end of the sweep."""

TRANSFORMER_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ONE_TUNING_SEED = TUNING_SEEDS[:1]
FIVE_SEEDS = VERDICT_SEEDS[:5]
"""For the arguments about Transformers, which have up to seven arms in four settings."""


def char_transformer(placement: Literal["pre", "post"]) -> dict[Scale, RunConfig]:
    """Characters with a decoder; a window sees nothing before its beginning.

    Small: pydocs, which everybody has and whose valid and test parts are read in seconds.
    """
    return {
        "small": RunConfig(
            model=TransformerConfig(norm="none", width=64, layers=2, heads=4, placement=placement),
            data=DataConfig(corpus="pydocs", tokens="char", batch_size=32, length=64),
            optim=OptimConfig(name="adamw", weight_decay=0.1, schedule="cosine", warmup_steps=30, clip=1.0),
            training=_SMALL,
        ),
        "full": RunConfig(
            model=TransformerConfig(norm="none", width=256, layers=6, heads=8, dropout=0.1, placement=placement),
            data=DataConfig(corpus="ptb_char", tokens="char", batch_size=64, length=256),
            optim=OptimConfig(name="adamw", weight_decay=0.1, schedule="cosine", warmup_steps=400, clip=1.0),
            training=_FULL,
        ),
    }


def sst2_transformer(placement: Literal["pre", "post"]) -> dict[Scale, RunConfig]:
    """Sentences with an encoder over words."""
    return {
        "small": RunConfig(
            model=TransformerConfig(norm="none", width=64, layers=2, heads=4, dropout=0.3, placement=placement),
            data=DataConfig(corpus="sst2", tokens="word", vocabulary=8000, batch_size=32),
            optim=OptimConfig(name="adamw", weight_decay=0.1, schedule="linear", warmup_steps=30, clip=1.0),
            training=_SMALL,
        ),
        "full": RunConfig(
            model=TransformerConfig(norm="none", width=256, layers=6, heads=8, dropout=0.3, placement=placement),
            data=DataConfig(corpus="sst2", tokens="word", vocabulary=16_000, batch_size=32),
            optim=OptimConfig(name="adamw", weight_decay=0.1, schedule="linear", warmup_steps=200, clip=1.0),
            training=dataclasses.replace(_FULL, steps=3_000, valid_every=100),
        ),
    }


WORD_TRANSFORMER: dict[Scale, RunConfig] = {
    "small": RunConfig(
        model=TransformerConfig(norm="none", width=64, layers=2, heads=4),
        data=DataConfig(corpus="ptb", tokens="word", batch_size=16, length=32),
        optim=OptimConfig(name="adamw", weight_decay=0.1, schedule="cosine", warmup_steps=30, clip=1.0),
        training=_SMALL,
    ),
    "full": RunConfig(
        model=TransformerConfig(norm="none", width=256, layers=6, heads=8, dropout=0.1),
        data=DataConfig(corpus="wikitext-2", tokens="word", batch_size=32, length=128),
        optim=OptimConfig(name="adamw", weight_decay=0.1, schedule="cosine", warmup_steps=400, clip=1.0),
        training=_FULL,
    ),
}
"""Words with a decoder, placement pre."""


def norm_arm(norm: str, **options: Any) -> dict[str, Any]:
    """The arm that has `norm` at all sites that take the model's norm."""
    return {"model": {"norm": norm, "norm_options": options}}


def norm_arms(*norms: str) -> dict[str, dict[str, Any]]:
    """An arm of each norm without options, by its name."""
    return {norm: norm_arm(norm) for norm in norms}


def char_mlp(activation: Literal["relu", "sigmoid"]) -> dict[Scale, RunConfig]:
    """Characters predicted from the last few by two hidden layers (Bengio et al. 2003), on the text of `CHAR_LSTM`."""
    return {
        "small": RunConfig(
            model=MLPConfig(norm="none", width=128, embedding_width=16, context=8, activation=activation),
            data=DataConfig(corpus="ptb_char", tokens="char", batch_size=32, length=50),
            optim=OptimConfig(name="adam", clip=1.0),
            training=_SMALL,
        ),
        "full": RunConfig(
            model=MLPConfig(norm="none", width=1024, embedding_width=64, context=16, activation=activation),
            data=DataConfig(corpus="ptb_char", tokens="char", batch_size=64, length=100),
            optim=OptimConfig(name="adam", clip=1.0),
            training=_FULL,
        ),
    }


MLP_VERDICT_SEEDS = (2, 3, 4, 5, 6, 7)
"""Without 1, which was used to time the runs before the rules were written."""

MLP_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
"""Half a decade apart; on seed 201, which nothing else uses, the arms did best at 1e-2 or 3e-2."""
