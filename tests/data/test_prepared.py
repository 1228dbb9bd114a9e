"""Counts of a prepared corpus, and that losses convert between tokenizations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from normlab.config import DataConfig, InputError
from normlab.data.corpora import Corpus
from normlab.data.prepared import bits_per_char, prepare, prepare_corpus, word_perplexity
from normlab.data.splits import Split, count_words
from normlab.data.tokens import Tokenizer

WORDS = "norm gain bias mean variance layer batch step the of and".split()  # noqa: SIM905 -- shorter than the list


def _text(lines: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    return "".join(" ".join(rng.choice(WORDS, int(rng.integers(1, 9)))) + "\n" for _ in range(lines))


def _stream(lines: int = 200) -> Corpus:
    splits = {name: Split((_text(lines, i), _text(3, i + 9))) for i, name in enumerate(("train", "valid", "test"))}
    return Corpus("toy", "text", splits, None, "char", "0", "here")


def _labelled(texts: tuple[str, ...]) -> Corpus:
    split = Split(texts, tuple(i % 2 for i in range(len(texts))))
    return Corpus("toy", "labelled", dict.fromkeys(("train", "valid", "test"), split), ("a", "b"), "word", "0", "here")


def _spans(tokenizer: Tokenizer, text: str) -> list[int]:
    """Raw characters of each token; white space goes with the word it stands before."""
    ids = tokenizer.encode(text)
    if tokenizer.kind == "char":
        return [1] * len(ids)
    if tokenizer.kind == "bpe":
        return [len(tokenizer.decode([i])) for i in ids]
    pieces, spans, line_start = [tokenizer.symbols[i] for i in ids], [], True
    for piece in pieces:
        spans.append(1 if piece == "<eos>" else len(piece) + (0 if line_start else 1))
        line_start = piece == "<eos>"
    return spans


@pytest.mark.parametrize("tokens", ["char", "word", "bpe"])
def test_a_model_of_characters_has_the_same_bits_in_every_tokenization(tokens: str) -> None:
    """Each character costs ln 27 nats, each token what its characters cost: bits per character are log2 27."""
    corpus = _stream()
    text = prepare_corpus(corpus, DataConfig(tokens=tokens, length=10))  # type: ignore[arg-type]
    raw = "".join(corpus.splits["valid"].texts)
    spans = _spans(text.tokenizer, raw)
    assert sum(spans) == len(raw)
    counts = text.splits["valid"].counts
    assert len(spans) == counts.tokens == counts.predicted_tokens + 1
    assert sum(spans[1:]) == counts.predicted_characters
    per_token = math.log(27) * sum(spans[1:]) / len(spans[1:])
    assert bits_per_char(per_token, counts.predicted_tokens, counts.predicted_characters) == pytest.approx(
        math.log2(27), 1e-12
    )


@pytest.mark.parametrize("tokens", ["char", "word", "bpe"])
def test_word_perplexity_is_the_same_in_every_tokenization(tokens: str) -> None:
    corpus = _stream()
    counts = prepare_corpus(corpus, DataConfig(tokens=tokens, length=10)).splits["test"].counts  # type: ignore[arg-type]
    raw = "".join(corpus.splits["test"].texts)
    assert counts.words == count_words(raw)
    nats_per_word = 4.0
    total = nats_per_word * counts.predicted_words
    perplexity = word_perplexity(total / counts.predicted_tokens, counts.predicted_tokens, counts.predicted_words)
    assert perplexity == pytest.approx(math.exp(4.0))
    assert counts.predicted_words in (counts.words, counts.words - 1)
    if tokens == "word":
        assert counts.predicted_words == counts.predicted_tokens == counts.tokens - 1


def test_characters_give_plain_bits() -> None:
    counts = prepare_corpus(_stream(), DataConfig(length=10)).splits["test"].counts
    assert bits_per_char(math.log(2), counts.predicted_tokens, counts.predicted_characters) == pytest.approx(1.0)
    assert word_perplexity(1e6, 10, 1) == math.inf


def test_the_stream_is_the_documents_joined_and_the_tokenizer_sees_the_training_split_only() -> None:
    corpus = _stream()
    extra = {**corpus.splits, "test": Split(("gain \u00e9t\u00e9 " * 20 + "\n",))}
    text = prepare_corpus(Corpus("toy", "text", extra, None, "char", "0", "here"), DataConfig(length=10))
    assert text.tokenizer.decode(text.splits["train"].ids) == "".join(corpus.splits["train"].texts)
    assert text.splits["test"].counts.unknown_tokens == 40
    assert text.splits["train"].counts.unknown_tokens == 0


def test_a_given_tokenizer_is_used() -> None:
    own = Tokenizer.fit(["abc"], "char")
    assert prepare_corpus(_stream(), DataConfig(length=10), own).tokenizer is own


def test_examples_are_cut_and_empty_ones_stand_as_one_unknown_token() -> None:
    text = prepare_corpus(_labelled(("a b c d e f", "", "a", "b c")), DataConfig(length=4))
    train = text.splits["train"]
    assert train.lengths.tolist() == [4, 1, 1, 2]
    assert train.counts.cut_texts == 1
    assert train.counts.empty_texts == 1
    assert train.counts.tokens == 9
    rows = [train.ids[start : start + size] for start, size in zip(train.starts, train.lengths, strict=True)]
    assert [text.tokenizer.decode(row) for row in rows] == ["a b c d", "<unk>", "a", "b c"]


@pytest.mark.parametrize(("corpus", "length"), [(_stream(), 100), (_labelled(("a", "b")), 400)])
def test_length_zero_takes_the_default_of_the_task(corpus: Corpus, length: int) -> None:
    assert prepare_corpus(corpus, DataConfig()).length == length


def test_what_cannot_be_trained_on_is_said() -> None:
    pairs = Corpus("toy", "pairs", _stream().splits, None, "word", "0", "here")
    with pytest.raises(InputError, match=r"'toy' \(pairs\) has no training task yet; choose from: pydocs"):
        prepare_corpus(pairs, DataConfig())
    with pytest.raises(InputError, match=r"data\.length=5000 needs at least 5001"):
        prepare_corpus(_stream(20), DataConfig(length=5000))
    with pytest.raises(InputError, match="stateful"):
        prepare_corpus(_labelled(("a", "b")), DataConfig(stream="stateful"))


def test_a_file_goes_all_the_way(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(_text(300, 1))
    text = prepare(DataConfig(corpus=str(path), tokens="word", length=20))
    assert text.task == "language_modelling"
    assert text.vocabulary == len(WORDS) + 2
    assert text.source == f"file {path}"
