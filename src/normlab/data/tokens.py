"""Tokenizers: characters, words (PTB convention) and byte-pair encoding; the only importer of `tokenizers`.

Symbols are learned from the training split alone. No vocabulary holds a padding symbol: padded positions carry id 0
and are marked by the batch's mask, so a language model never spreads probability over padding.

- char: one symbol per character of the training text, in code point order, and `<unk>` last. `<unk>` is always
  reserved (looking at the other splits to see whether it is needed would be peeking); it is never a target in
  training, so a trained model gives it next to no probability and bits per character are not affected.
- word: pieces between white space, most frequent first. In a stream each line ends in one `<eos>` (blank lines too),
  which gives the published counts of PTB and WikiText. If the text writes `<unk>` itself, that is the unknown word,
  else one is reserved.
- bpe: byte-level (all 256 bytes are in the vocabulary, so nothing is unknown), learned and applied line by line.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from normlab.config import InputError

__all__ = ["BPE_VOCABULARY", "EOS", "UNKNOWN", "Encoded", "Tokenizer"]

UNKNOWN = "<unk>"
EOS = "<eos>"
BPE_VOCABULARY = 8000
_UNKNOWN_CHAR = "\N{REPLACEMENT CHARACTER}"

Kind = Literal["char", "word", "bpe"]


class Encoded(NamedTuple):
    """Ids of many texts end to end: text i is `ids[ends[i - 1] : ends[i]]`. Both int64."""

    ids: np.ndarray
    ends: np.ndarray


class Tokenizer:
    """Text to ids and back. Make one with `fit` or `load`.

    Args:
        kind: char, word or bpe.
        symbols: the vocabulary in the order of its ids (bpe: as the tokenizer model has it).
        lines: word only: end each line in `<eos>` (streams) or not (single texts).
        model: bpe only: the model as the `tokenizers` library writes it, a JSON string.
    """

    def __init__(self, kind: Kind, symbols: Sequence[str], *, lines: bool = False, model: str | None = None) -> None:
        self.kind: Kind = kind
        self.symbols = tuple(symbols)
        self.lines = lines
        self._model_json = model
        self._model: Any = None
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.unknown_id: int | None = None if kind == "bpe" else self._ids[UNKNOWN]
        if kind == "char":
            points = [ord(symbol) for symbol in self.symbols if symbol != UNKNOWN]
            # One extra entry at the end stands for every code point beyond the largest known one.
            self._by_code_point = np.full(max(points, default=0) + 2, self.unknown_id, dtype=np.int64)
            self._by_code_point[points] = [self._ids[chr(point)] for point in points]
        elif kind == "bpe":
            self._model = _library().Tokenizer.from_str(model)

    @property
    def vocabulary(self) -> int:
        """Number of symbols."""
        return len(self.symbols)

    @classmethod
    def fit(cls, texts: Iterable[str], kind: Kind, *, vocabulary: int = 0, lines: bool = False) -> Tokenizer:
        """Learn the symbols of `texts`, which must be the training split and nothing else.

        Args:
            texts: the training texts (a stream: one text).
            kind: char, word or bpe.
            vocabulary: largest number of symbols; 0 keeps all (word) or takes 8,000 (bpe).
            lines: word: end each line in `<eos>`.
        """
        if kind == "char":
            if vocabulary:
                raise InputError("data.vocabulary limits word and bpe tokens only; leave it 0 with data.tokens=char")
            return cls("char", [*sorted(set().union(*map(set, texts))), UNKNOWN])
        if kind == "word":
            return cls("word", _word_symbols(texts, vocabulary, lines), lines=lines)
        return _fit_bpe(texts, vocabulary or BPE_VOCABULARY)

    def encode(self, text: str) -> np.ndarray:
        """The ids of one text, int64."""
        return self.encode_all([text]).ids

    def encode_all(self, texts: Sequence[str]) -> Encoded:
        """The ids of many texts end to end."""
        if self.kind == "bpe":
            return self._encode_bpe(texts)
        one = self._encode_chars if self.kind == "char" else self._encode_words
        parts = [one(text) for text in texts]
        ids = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        return Encoded(ids, np.cumsum([len(part) for part in parts], dtype=np.int64))

    def _encode_chars(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        return self._by_code_point[np.minimum(points, len(self._by_code_point) - 1)]

    def _encode_words(self, text: str) -> np.ndarray:
        pieces = _words(text, self.lines)
        ids, unknown = self._ids, self.unknown_id
        return np.fromiter((ids.get(piece, unknown) for piece in pieces), dtype=np.int64, count=len(pieces))

    def _encode_bpe(self, texts: Sequence[str]) -> Encoded:
        lines = [text.splitlines(keepends=True) for text in texts]
        flat = [encoding.ids for encoding in self._model.encode_batch_fast([line for group in lines for line in group])]
        sizes = np.cumsum([0, *map(len, flat)], dtype=np.int64)
        ids = np.fromiter((i for part in flat for i in part), dtype=np.int64, count=int(sizes[-1]))
        return Encoded(ids, sizes[np.cumsum([len(group) for group in lines], dtype=np.int64)])

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text again. Exact for bpe and for known characters; words come back with single spaces."""
        values = [int(i) for i in ids]
        if self.kind == "bpe":
            return self._model.decode(values)
        if self.kind == "char":
            return "".join(_UNKNOWN_CHAR if i == self.unknown_id else self.symbols[i] for i in values)
        if not self.lines:
            return " ".join(self.symbols[i] for i in values)
        words = " ".join("\n" if self.symbols[i] == EOS else self.symbols[i] for i in values)
        return words.replace(" \n", "\n").replace("\n ", "\n")

    def unknown_count(self, ids: np.ndarray) -> int:
        """How many ids are `<unk>`; where the text itself writes `<unk>` (PTB, WikiText) those count too."""
        return 0 if self.unknown_id is None else int(np.count_nonzero(ids == self.unknown_id))

    def first_token_characters(self, text: str) -> int:
        """Characters of `text` that its first token stands for, white space before a word included; 0 for no text."""
        if not text:
            return 0
        if self.kind == "char":
            return 1
        if self.kind == "bpe":
            line = text.splitlines(keepends=True)[0]
            return int(self._model.encode(line).offsets[0][1])
        start = len(text) - len(text.lstrip())
        if self.lines and "\n" in text[:start]:
            return text.index("\n") + 1
        words = text[start : start + 10_000].split(maxsplit=1)
        return start + (len(words[0]) if words else 0)

    def save(self, path: str | Path) -> None:
        """Write everything into one JSON file, which is there whole or not at all."""
        stored = {"kind": self.kind, "symbols": self.symbols, "lines": self.lines, "model": self._model_json}
        beside = Path(path).with_name(f".{Path(path).name}.tmp")
        beside.write_text(json.dumps(stored, ensure_ascii=False), encoding="utf-8")
        beside.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read what `save` wrote."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            if stored["kind"] not in get_args(Kind) or not all(isinstance(symbol, str) for symbol in stored["symbols"]):
                raise ValueError("its kind or symbols are others than any it saves")
            return cls(stored["kind"], stored["symbols"], lines=stored["lines"], model=stored["model"])
        except Exception as error:  # the library of byte-pair models raises plain ones
            raise InputError(f"{path} is not a tokenizer that normlab saved ({error!s:.200})") from error


def _words(text: str, lines: bool) -> list[str]:
    if not lines:
        return text.split()
    if text and not text.endswith("\n"):
        text += "\n"
    return text.replace("\n", f" {EOS} ").split()


def _word_symbols(texts: Iterable[str], vocabulary: int, lines: bool) -> list[str]:
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_words(text, lines))
    counts.setdefault(UNKNOWN, 0)
    kept = sorted(counts, key=lambda word: (-counts[word], word))
    if not vocabulary or len(kept) <= vocabulary:
        return kept
    reserved = {UNKNOWN, EOS} if lines else {UNKNOWN}
    if vocabulary <= len(reserved):
        raise InputError(f"data.vocabulary is {vocabulary}; word tokens need more than {len(reserved)} symbols")
    others = [word for word in kept if word not in reserved][: vocabulary - len(reserved)]
    return sorted([*reserved, *others], key=lambda word: (-counts[word], word))


def _library() -> Any:
    # The library warns when a process forks after it has used threads; ours never encodes after a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import tokenizers

    return tokenizers


def _fit_bpe(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    if vocabulary < 256:
        raise InputError(f"data.vocabulary is {vocabulary}; bpe needs at least 256 symbols, one per byte")
    library = _library()
    byte_level = library.pre_tokenizers.ByteLevel
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = byte_level(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=sorted(byte_level.alphabet()), show_progress=False
    )
    model.train_from_iterator((line for text in texts for line in text.splitlines(keepends=True)), trainer)
    ids = model.get_vocab()
    return Tokenizer("bpe", sorted(ids, key=ids.__getitem__), model=model.to_str())
