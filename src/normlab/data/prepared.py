"""A corpus turned into ids and counts: what training needs, torch-free. Also how losses convert between tokenizations.

What is counted, exactly. A stream of N tokens has N - 1 predicted ones: the first is given. The characters and words
that those N - 1 tokens stand for are counted in the *raw* text, whatever the tokenizer made of it:

- `predicted_characters`: all characters but those of the first token;
- `predicted_words`: all words (white-space words and one <eos> per line) but the first if the first token ends it.

Total nats over a split are divided by these, so bits per character and word perplexity compare across tokenizers up
to that one first token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from normlab.config import DataConfig, InputError
from normlab.data.corpora import load_corpus, trainable_names
from normlab.data.splits import Corpus, count_words
from normlab.data.tokens import Tokenizer

__all__ = [
    "EncodedSplit",
    "PreparedText",
    "SplitCounts",
    "bits_per_char",
    "prepare",
    "prepare_corpus",
    "word_perplexity",
]

LENGTHS = {"language_modelling": 100, "classification": 400}

Task = Literal["language_modelling", "classification"]


@dataclass(frozen=True)
class SplitCounts:
    """Sizes of one split.

    Args:
        texts: documents or examples.
        tokens: ids, before texts are cut.
        predicted_tokens: tokens - 1 of a stream; 0 in classification.
        characters: of the raw text.
        predicted_characters: raw characters of the predicted tokens; 0 in classification.
        words: white-space words of the raw text, with one <eos> per line in a stream.
        predicted_words: words of the predicted tokens; 0 in classification.
        unknown_tokens: ids that are `<unk>`, be it the text's own or a symbol unseen in training.
        cut_texts: examples longer than the length, cut to it; 0 in language modelling.
        empty_texts: examples without a token, which stand as one token of id 0 (bpe) or `<unk>`.
    """

    texts: int
    tokens: int
    predicted_tokens: int
    characters: int
    predicted_characters: int
    words: int
    predicted_words: int
    unknown_tokens: int
    cut_texts: int
    empty_texts: int


@dataclass(frozen=True)
class EncodedSplit:
    """Ids of one split.

    Args:
        ids: int64, all texts end to end (a stream is one text).
        starts: int64, first id of each text.
        lengths: int64, ids of each text, at least 1 and, in classification, at most `PreparedText.length`.
        labels: int64 per text, or None in language modelling.
        counts: sizes.
    """

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray | None
    counts: SplitCounts


@dataclass(frozen=True)
class PreparedText:
    """A corpus ready for training.

    Args:
        task: follows from the kind of the corpus.
        tokenizer: fitted on the training split.
        classes: names of the labels; None in language modelling.
        splits: train, valid, test.
        length: tokens per window, or longest text; `data.length` or the task's default.
        name: of the corpus.
        sha256: of the corpus's texts and labels.
        source: where the corpus came from.
        license: what is known of it.
        note: what a reader of a number must know; may be empty.
    """

    task: Task
    tokenizer: Tokenizer
    classes: tuple[str, ...] | None
    splits: dict[str, EncodedSplit]
    length: int
    name: str
    sha256: str
    source: str
    license: str
    note: str

    @property
    def vocabulary(self) -> int:
        """Number of symbols."""
        return self.tokenizer.vocabulary


def prepare(data: DataConfig, tokenizer: Tokenizer | None = None) -> PreparedText:
    """Load the corpus, fit a tokenizer on its training split (unless one is given) and encode all splits.

    Args:
        data: which text, which tokens, which length.
        tokenizer: a fitted one, e.g. loaded from a record.
    """
    return prepare_corpus(load_corpus(data), data, tokenizer)


def prepare_corpus(corpus: Corpus, data: DataConfig, tokenizer: Tokenizer | None = None) -> PreparedText:
    """`prepare` for a corpus that is already loaded."""
    if corpus.kind not in ("text", "labelled"):
        raise InputError(
            f"corpus {corpus.name!r} ({corpus.kind}) has no training task yet; "
            f"choose from: {', '.join(trainable_names())}"
        )
    task: Task = "language_modelling" if corpus.kind == "text" else "classification"
    stream = task == "language_modelling"
    if data.stream == "stateful" and not stream:
        raise InputError(f"data.stream=stateful carries a state along one text; {corpus.name!r} is for classification")
    length = data.length or LENGTHS[task]
    texts = {name: ("".join(split.texts),) if stream else split.texts for name, split in corpus.splits.items()}
    if tokenizer is None:
        kind = corpus.tokens if data.tokens == "auto" else data.tokens
        tokenizer = Tokenizer.fit(texts["train"], kind, vocabulary=data.vocabulary, lines=stream)
    splits = {}
    for name, split in corpus.splits.items():
        if stream:
            splits[name] = _stream(texts[name][0], len(split.texts), tokenizer)
            _require_length(corpus.name, name, int(splits[name].lengths[0]), length)
        else:
            splits[name] = _examples(texts[name], split.labels or (), tokenizer, length)
    return PreparedText(
        task,
        tokenizer,
        corpus.classes,
        splits,
        length,
        corpus.name,
        corpus.sha256,
        corpus.source,
        corpus.license,
        corpus.note,
    )


def _require_length(corpus: str, split: str, tokens: int, length: int) -> None:
    # Validation and test may be shorter than a window, which is then padded; one prediction they must hold.
    needed = length + 1 if split == "train" else 2
    if tokens < needed:
        raise InputError(
            f"the {split} split of {corpus!r} has {tokens} tokens, but data.length={length} needs at least {needed}; "
            "set a smaller data.length or give a longer text"
        )


def _stream(text: str, documents: int, tokenizer: Tokenizer) -> EncodedSplit:
    ids = tokenizer.encode(text)
    given = tokenizer.first_token_characters(text)
    words = count_words(text)
    ends_a_word = given > 0 and (text[:given].endswith("\n") or text[given : given + 1].isspace() or given == len(text))
    counts = SplitCounts(
        texts=documents,
        tokens=len(ids),
        predicted_tokens=max(0, len(ids) - 1),
        characters=len(text),
        predicted_characters=len(text) - given,
        words=words,
        predicted_words=words - int(ends_a_word),
        unknown_tokens=tokenizer.unknown_count(ids),
        cut_texts=0,
        empty_texts=0,
    )
    return EncodedSplit(ids, np.zeros(1, dtype=np.int64), np.array([len(ids)], dtype=np.int64), None, counts)


def _examples(texts: tuple[str, ...], labels: tuple[int, ...], tokenizer: Tokenizer, length: int) -> EncodedSplit:
    ids, ends = tokenizer.encode_all(texts)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    lengths = ends - starts
    empty = lengths == 0
    counts = SplitCounts(
        texts=len(texts),
        tokens=len(ids),
        predicted_tokens=0,
        characters=sum(map(len, texts)),
        predicted_characters=0,
        words=sum(len(text.split()) for text in texts),
        predicted_words=0,
        unknown_tokens=tokenizer.unknown_count(ids),
        cut_texts=int(np.count_nonzero(lengths > length)),
        empty_texts=int(np.count_nonzero(empty)),
    )
    if empty.any():
        # A row of length 0 has no mean over time; it becomes one token, which all empty texts share.
        starts[empty] = len(ids)
        lengths[empty] = 1
        ids = np.append(ids, tokenizer.unknown_id or 0)
    return EncodedSplit(ids, starts, np.minimum(lengths, length), np.array(labels, dtype=np.int64), counts)


def bits_per_char(loss_nats_per_token: float, predicted_tokens: int, predicted_characters: int) -> float:
    """Bits per raw character from the mean loss in nats per predicted token."""
    return loss_nats_per_token * predicted_tokens / predicted_characters / math.log(2)


def word_perplexity(loss_nats_per_token: float, predicted_tokens: int, predicted_words: int) -> float:
    """exp(total nats / words), words by the PTB convention; infinity where that overflows."""
    exponent = loss_nats_per_token * predicted_tokens / predicted_words
    return math.exp(exponent) if exponent < 700 else math.inf
