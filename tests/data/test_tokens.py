"""Tokenizers."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from normlab.config import InputError
from normlab.data.tokens import EOS, UNKNOWN, Tokenizer

TEXT = "the cat sat on the mat\n\nthe caf\u00e9 cat\n" * 30
KINDS = ("char", "word", "bpe")


def _fit(kind: str, text: str = TEXT, **options: int | bool) -> Tokenizer:
    return Tokenizer.fit([text], kind, **{"lines": True, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips(kind: str, tmp_path: Path) -> None:
    tokenizer = _fit(kind)
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < tokenizer.vocabulary
    assert tokenizer.decode(ids) == TEXT
    tokenizer.save(tmp_path / "tokens.json")
    loaded = Tokenizer.load(tmp_path / "tokens.json")
    assert loaded.symbols == tokenizer.symbols
    assert np.array_equal(loaded.encode("the mat, \u00fc\n"), tokenizer.encode("the mat, \u00fc\n"))


@pytest.mark.parametrize("kind", KINDS)
def test_many_texts_are_the_single_ones_end_to_end(kind: str) -> None:
    texts = ["the cat", "", "mat\nsat", "x"]
    tokenizer = _fit(kind, lines=False)
    ids, ends = tokenizer.encode_all(texts)
    parts = np.split(ids, ends[:-1])
    assert all(np.array_equal(part, tokenizer.encode(text)) for part, text in zip(parts, texts, strict=True))
    assert len(tokenizer.encode("")) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_twice_gives_the_same_and_vocabulary_is_a_limit(kind: str) -> None:
    text = " ".join(f"word{i % 97} other{i % 13}" for i in range(3000))
    assert _fit(kind, text).symbols == _fit(kind, text).symbols
    if kind != "char":
        assert _fit(kind, text, vocabulary=300 if kind == "bpe" else 20).vocabulary == (300 if kind == "bpe" else 20)


def test_unknown_symbols_are_counted_where_they_can_be() -> None:
    for kind, unseen, count in (
        ("char", "the \u4e00 dog\n", 3),
        ("word", "the \u4e00 dog\n", 2),
        ("bpe", "\u4e00\n", 0),
    ):
        tokenizer = _fit(kind)
        assert tokenizer.unknown_count(tokenizer.encode(unseen)) == count, kind
        assert tokenizer.unknown_count(tokenizer.encode(TEXT)) == 0
    assert _fit("bpe").decode(_fit("bpe").encode("\u4e00 \U0001f600\n")) == "\u4e00 \U0001f600\n"
    assert "\N{REPLACEMENT CHARACTER}" in _fit("char").decode(_fit("char").encode("\u4e00"))


def test_words_end_each_line_in_eos_in_streams_only() -> None:
    stream = _fit("word", "a b\n\nc")
    assert [stream.symbols[i] for i in stream.encode("a b\n\nc")] == ["a", "b", EOS, EOS, "c", EOS]
    assert EOS not in _fit("word", "a b\nc", lines=False).symbols


def test_the_texts_own_unknown_word_is_the_unknown_word() -> None:
    own = _fit("word", f"a {UNKNOWN} b\n")
    assert own.symbols.count(UNKNOWN) == 1
    assert own.vocabulary == 4
    assert own.unknown_count(own.encode(f"{UNKNOWN} new a\n")) == 2
    # In characters it is five ordinary ones.
    chars = _fit("char", f"a {UNKNOWN} b\n")
    assert chars.unknown_count(chars.encode(UNKNOWN)) == 0
    assert len(chars.encode(UNKNOWN)) == 5


def test_the_vocabulary_keeps_the_most_frequent_words() -> None:
    tokenizer = _fit("word", "a a a b b c\n" * 3 + "d\n", vocabulary=4)
    assert set(tokenizer.symbols) == {"a", "b", EOS, UNKNOWN}
    assert tokenizer.unknown_count(tokenizer.encode("a b c d\n")) == 2


@pytest.mark.parametrize(("kind", "vocabulary"), [("bpe", 100), ("word", 2), ("char", 50)])
def test_impossible_vocabularies_are_refused(kind: str, vocabulary: int) -> None:
    with pytest.raises(InputError, match=r"data\.vocabulary"):
        _fit(kind, vocabulary=vocabulary)


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "char"}'])
def test_an_unreadable_file_is_said(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    path.write_text(content)
    with pytest.raises(InputError, match="not a tokenizer"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("kind", "text", "characters"),
    [
        ("char", "the cat\n", 1),
        ("word", "the cat\n", 3),
        ("word", "  the cat\n", 5),
        ("word", "\nthe cat\n", 1),
        ("word", "the", 3),
        ("char", "", 0),
    ],
)
def test_characters_of_the_first_token(kind: str, text: str, characters: int) -> None:
    assert _fit(kind).first_token_characters(text) == characters


def test_characters_of_the_first_bpe_token_are_those_it_decodes_to() -> None:
    tokenizer = _fit("bpe")
    assert tokenizer.first_token_characters(TEXT) == len(tokenizer.decode(tokenizer.encode(TEXT)[:1]))


def test_encoding_a_million_characters_is_fast() -> None:
    text = TEXT * 1000
    tokenizer = _fit("char")
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) > 1_000_000
    assert time.perf_counter() - start < 2
