"""Losses in the units that compare across tokenizations, and the plain baseline every result stands beside."""

from __future__ import annotations

import numpy as np

from normlab.data.prepared import PreparedText, bits_per_char, word_perplexity

__all__ = ["baseline", "evaluation_note", "language_metrics"]


def language_metrics(text: PreparedText, split: str, loss_nats: float) -> dict[str, float]:
    """Bits per raw character and word perplexity of a loss in nats per predicted token of `split`."""
    counts = text.splits[split].counts
    return {
        "bits_per_char": bits_per_char(loss_nats, counts.predicted_tokens, counts.predicted_characters),
        "word_perplexity": word_perplexity(loss_nats, counts.predicted_tokens, counts.predicted_words),
    }


def baseline(text: PreparedText) -> dict[str, float]:
    """What a model without context reaches on the test split.

    Classification: accuracy of the majority class of the training split. Language modelling: loss of the unigram
    distribution of the training split, with one added to every count.
    """
    train, test = text.splits["train"], text.splits["test"]
    if text.task == "classification":
        assert train.labels is not None
        majority = np.bincount(train.labels).argmax()
        return {"majority_test_accuracy": float(np.mean(test.labels == majority))}
    counts = np.bincount(train.ids, minlength=text.vocabulary) + 1.0
    nats = -np.log(counts / counts.sum())
    loss_nats = float(nats[test.ids[1:]].mean())
    converted = language_metrics(text, "test", loss_nats)
    return {"unigram_test_loss_nats": loss_nats, **{f"unigram_test_{name}": value for name, value in converted.items()}}


def evaluation_note(text: PreparedText, stream: str) -> str:
    """How losses are taken: evaluation length and whether the state is carried over."""
    if text.task == "classification":
        return f"whole texts, cut at {text.length} tokens, one prediction each"
    if stream == "stateful":
        return "one pass over contiguous rows, the state carried from chunk to chunk"
    return f"windows of {text.length} tokens, the state restarts with each"
