"""What a corpus is once it is read, and the fixed rules that split one.

Splits never depend on a seed or on the order of the files: a text goes where its SHA-256 sends it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from normlab.config import InputError

__all__ = ["Corpus", "Split", "by_hash", "checksum", "contiguous", "count_words", "hash_fraction"]

Kind = Literal["text", "labelled", "pairs", "wic"]


@dataclass(frozen=True)
class Split:
    """One split: for kind "text" documents whose concatenation is the stream, else one text per example.

    Args:
        texts: the texts. Pairs are "source<TAB>target"; wic is "target<TAB>i-j<TAB>sentence<TAB>sentence", where i
            and j are the positions of the target among the words of each sentence.
        labels: an index into `Corpus.classes` per text, or None.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Corpus:
    """A corpus with its splits "train", "valid" and "test".

    Args:
        name: canonical name, or the path the user gave.
        kind: what a text is; decides the task.
        splits: by name.
        classes: names of the labels, or None.
        tokens: the corpus's own convention, taken by `data.tokens=auto`.
        sha256: of all texts and labels, split by split.
        source: where it came from.
        license: what is known of it.
        note: what a reader of a number must know (rows skipped, a subset, ...); may be empty.
    """

    name: str
    kind: Kind
    splits: Mapping[str, Split]
    classes: tuple[str, ...] | None
    tokens: Literal["char", "word", "bpe"]
    sha256: str
    source: str
    license: str = ""
    note: str = ""


def count_words(text: str) -> int:
    """Words by the PTB convention: pieces between white space, and one <eos> per line (blank lines too)."""
    lines = text.count("\n") + (1 if text and not text.endswith("\n") else 0)
    return len(text.split()) + lines


def hash_fraction(text: str) -> float:
    """A fixed number in [0, 1) drawn from the SHA-256 of `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def by_hash(
    texts: Sequence[str],
    labels: Sequence[int] | None,
    shares: Mapping[str, float],
    keys: Sequence[str] | None = None,
) -> dict[str, Split]:
    """Send each text to a split by the hash of its key (default: the text), so that equal keys stay together.

    Args:
        texts: in order; the order is kept within each split.
        labels: one per text, or None.
        shares: split name to expected share; they add up to 1.
        keys: one per text.
    """
    names = list(shares)
    chosen: dict[str, list[int]] = {name: [] for name in names}
    for index, key in enumerate(texts if keys is None else keys):
        fraction, bound = hash_fraction(key), 0.0
        for name in names:
            bound += shares[name]
            if fraction < bound:
                break
        chosen[name].append(index)  # the last name takes what rounding leaves
    return {
        name: Split(tuple(texts[i] for i in rows), None if labels is None else tuple(labels[i] for i in rows))
        for name, rows in chosen.items()
    }


def contiguous(text: str) -> dict[str, Split]:
    """The first 90 %, next 5 % and last 5 % of `text`, cut after a line end or space where one is near (1 %)."""
    first, second = _cut(text, 0.90), _cut(text, 0.95)
    parts = {"train": text[:first], "valid": text[first:second], "test": text[second:]}
    for name, part in parts.items():
        if not part.strip():
            raise InputError(f"a text of {len(text)} characters leaves nothing in the {name} split; give a longer text")
    return {name: Split((part,)) for name, part in parts.items()}


def _cut(text: str, share: float) -> int:
    wanted = int(len(text) * share)
    nearby = text[wanted : wanted + max(1, len(text) // 100)]
    for boundary in ("\n", " "):
        found = nearby.find(boundary)
        if found >= 0:
            return wanted + found + 1
    return wanted


def checksum(splits: Mapping[str, Split]) -> str:
    """SHA-256 over names, lengths, texts and labels of all splits."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        split = splits[name]
        _feed(digest, [name])
        _feed(digest, split.texts)
        _feed(digest, [] if split.labels is None else map(str, split.labels))
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, texts: Iterable[str]) -> None:
    # Each text is preceded by its length, so that no two corpora can run into the same bytes.
    for text in texts:
        data = text.encode()
        digest.update(b"%d:" % len(data))
        digest.update(data)
    digest.update(b";")
