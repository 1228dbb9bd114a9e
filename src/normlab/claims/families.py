"""Runs that several arguments have in common, so that each is trained once: bases by scale, arms, rates and seeds."""

from __future__ import annotations

from typing import Any, Literal

from normlab.claims.base import Scale
from normlab.config import DataConfig, LSTMConfig, MLPConfig, OptimConfig, RunConfig, TrainingConfig

__all__ = ["CHAR_LSTM", "LSTM_RATES", "MLP_RATES", "TUNING_SEEDS", "VERDICT_SEEDS", "char_mlp", "norm_arm"]

TUNING_SEEDS = (101, 102)
VERDICT_SEEDS = (1, 2, 3, 4, 5, 6, 7, 8)
"""Eight: what two cores do in an hour at the small scale; the verdict says how many more it would need."""

CHAR_LSTM: dict[Scale, RunConfig] = {
    # ptb_char: the text of Cooijmans et al. 2016 and Laurent et al. 2017, the same bytes everywhere (pydocs differs
    # between versions of Python).
    "small": RunConfig(
        model=LSTMConfig(norm="none", width=128),
        data=DataConfig(corpus="ptb_char", tokens="char", batch_size=32, length=50),
        optim=OptimConfig(name="adam", clip=1.0),
        training=TrainingConfig(
            steps=300, valid_every=50, checkpoint_every=100, activations_every=0, accelerator="cpu"
        ),
    ),
    # The published sizes.
    "full": RunConfig(
        model=LSTMConfig(norm="none", width=1000),
        data=DataConfig(corpus="ptb_char", tokens="char", batch_size=64, length=100),
        optim=OptimConfig(name="adam", clip=1.0),
        training=TrainingConfig(
            steps=10_000, valid_every=500, checkpoint_every=500, activations_every=0, accelerator="gpu"
        ),
    ),
}
"""Characters with one LSTM layer, stateless windows: the loss at length 50 (small) or 100 (full), state restarted."""

LSTM_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""Half a decade apart around the published 2e-3, upwards because 300 steps want more than 10,000."""


def norm_arm(norm: str, **options: Any) -> dict[str, Any]:
    """The arm that has `norm` at all sites that take the model's norm."""
    return {"model": {"norm": norm, "norm_options": options}}


def char_mlp(activation: Literal["relu", "sigmoid"]) -> dict[Scale, RunConfig]:
    """Characters predicted from the last few by two hidden layers (Bengio et al. 2003), on the text of `CHAR_LSTM`."""
    return {
        "small": RunConfig(
            model=MLPConfig(norm="none", width=128, embedding_width=16, context=8, activation=activation),
            data=DataConfig(corpus="ptb_char", tokens="char", batch_size=32, length=50),
            optim=OptimConfig(name="adam", clip=1.0),
            training=TrainingConfig(
                steps=300,
                valid_every=50,
                valid_batches=20,
                checkpoint_every=100,
                activations_every=0,
                accelerator="cpu",
            ),
        ),
        "full": RunConfig(
            model=MLPConfig(norm="none", width=1024, embedding_width=64, context=16, activation=activation),
            data=DataConfig(corpus="ptb_char", tokens="char", batch_size=64, length=100),
            optim=OptimConfig(name="adam", clip=1.0),
            training=TrainingConfig(
                steps=10_000, valid_every=500, checkpoint_every=500, activations_every=0, accelerator="gpu"
            ),
        ),
    }


MLP_RATES = (3e-3, 1e-2, 3e-2, 1e-1)
"""Half a decade apart; on seed 201, which nothing else uses, the arms did best at 1e-2 or 3e-2."""
