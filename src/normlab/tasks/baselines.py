"""What a model without context would reach: every result stands beside it."""

from __future__ import annotations

import numpy as np

from normlab.data.prepared import PreparedText

__all__ = ["baseline"]


def baseline(text: PreparedText) -> dict[str, float]:
    """The plain baseline of the task on the test split.

    Classification: accuracy of the majority class of the training split. Language modelling: loss of the unigram
    distribution of the training split, with one added to every count.
    """
    train, test = text.splits["train"], text.splits["test"]
    if text.task == "classification":
        majority = np.bincount(np.asarray(train.labels)).argmax()
        return {"majority_test_accuracy": float(np.mean(np.asarray(test.labels) == majority))}
    counts = np.bincount(train.tokens, minlength=text.vocabulary_size) + 1.0
    nats = -np.log(counts / counts.sum())
    loss_nats = float(nats[test.tokens[1:]].mean())
    converted = text.converted("test", loss_nats)
    return {"unigram_test_loss_nats": loss_nats, **{f"unigram_test_{name}": value for name, value in converted.items()}}
