"""Losses as sums with counts, and their units."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from normlab.config import DataConfig
from normlab.data.prepared import prepare
from normlab.tasks.losses import classification_loss, language_modelling_loss
from normlab.tasks.metrics import baseline, evaluation_note, language_metrics


def test_padding_adds_nothing():
    torch.manual_seed(0)
    logits_BTV, targets_BT = torch.randn(3, 4, 5), torch.randint(5, (3, 4))
    mask_BT = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], dtype=torch.bool)
    logits_BTV[~mask_BT] = float("nan")
    losses = language_modelling_loss(logits_BTV, targets_BT, mask_BT)
    rows = [
        language_modelling_loss(logits_BTV[i : i + 1, :n], targets_BT[i : i + 1, :n], None)
        for i, n in enumerate((4, 1, 2))
    ]
    assert losses.predictions == 7
    torch.testing.assert_close(losses.nats, sum(row.nats for row in rows))
    assert losses.correct == sum(int(row.correct) for row in rows)


def test_mean_is_of_all_predictions_not_of_batch_means():
    logits_BC, labels_B = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 0, 0])
    losses = classification_loss(logits_BC, labels_B, None)
    expected = [math.log(1 + math.exp(-2)), math.log(1 + math.exp(3)), math.log(1 + math.exp(-1))]
    assert losses.mean_nats.item() == pytest.approx(sum(expected) / 3)
    assert losses.correct == 2


def test_half_precision_scores_are_summed_in_fp32():
    logits_BC = torch.zeros(4096, 2, dtype=torch.bfloat16)
    losses = classification_loss(logits_BC, torch.zeros(4096, dtype=torch.long), None)
    assert losses.nats.dtype == torch.float32
    assert losses.nats.item() == pytest.approx(4096 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("tokens", ["char", "word", "bpe"])
def test_a_uniform_model_has_the_same_bits_whatever_the_tokens(tiny_text: Path, tokens: str):
    text = prepare(DataConfig(corpus=str(tiny_text), tokens=tokens, vocabulary=0 if tokens == "char" else 300))  # pyright: ignore[reportArgumentType]
    counts = text.splits["test"].counts
    # A model that spends 2 bits per character in all, however the text is cut into tokens.
    nats_per_token = 2 * math.log(2) * counts.predicted_characters / counts.predicted_tokens
    metrics = language_metrics(text, "test", nats_per_token)
    assert metrics["bits_per_char"] == pytest.approx(2)
    assert math.log(metrics["word_perplexity"]) == pytest.approx(
        2 * math.log(2) * counts.predicted_characters / counts.predicted_words
    )


def test_unigram_baseline_is_the_entropy_of_counts(tiny_text: Path):
    text = prepare(DataConfig(corpus=str(tiny_text)))
    train, test = text.splits["train"].ids, text.splits["test"].ids
    seen = [1 + int(np.sum(train == symbol)) for symbol in range(text.vocabulary)]
    expected = -sum(math.log(seen[symbol] / sum(seen)) for symbol in test[1:]) / (len(test) - 1)
    assert baseline(text)["unigram_test_loss_nats"] == pytest.approx(expected)


def test_majority_baseline(tiny_labels: Path):
    text = prepare(DataConfig(corpus=str(tiny_labels)))
    train, test = text.splits["train"].labels, text.splits["test"].labels
    assert train is not None
    majority = int(train.sum() * 2 > len(train))
    assert baseline(text) == {"majority_test_accuracy": pytest.approx(float(np.mean(test == majority)))}


def test_evaluation_is_stated(tiny_text: Path, tiny_labels: Path):
    text = prepare(DataConfig(corpus=str(tiny_text), length=30))
    assert "windows of 30 tokens" in evaluation_note(text, "windows")
    assert "carried" in evaluation_note(text, "stateful")
    assert "whole texts" in evaluation_note(prepare(DataConfig(corpus=str(tiny_labels))), "windows")
