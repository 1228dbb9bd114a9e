"""Every corpus by name or path, always with the same splits: `load_corpus(DataConfig) -> Corpus`.

A named corpus comes from `NORMLAB_DATA/<folder>/`, else from the Hugging Face hub; counts are checked against the
published ones either way. Labelled corpora are put in the order of their texts' hashes: files sorted by class come
out mixed, and both sources come out alike. A missing validation split is 10 % of the training split, chosen by the
hash of the text. Importing this module imports neither torch nor `datasets`.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from normlab.config import DataConfig, InputError, require_choice
from normlab.data.corpora_hub import HUB, installed, read_hub
from normlab.data.corpora_local import FOLDERS, READERS, TREC_CLASSES
from normlab.data.own_text import load_own_text, require_own_text
from normlab.data.pydocs import load_pydocs
from normlab.data.splits import Corpus, Kind, Split, by_hash, checksum, contiguous, count_words, hash_fraction

__all__ = ["Corpus", "Split", "corpus_names", "load_corpus", "require_corpus", "trainable_names"]

ALL = ("train", "valid", "test")


@dataclass(frozen=True)
class Entry:
    """A named corpus.

    Args:
        kind: what its texts are.
        tokens: its own convention.
        counts: per official split, the numbers allowed: words with <eos> (word streams), characters (char
            streams), else examples.
        license: what is known.
        classes: names in the order of the labels.
        note: what a reader of a number must know.
    """

    kind: Kind
    tokens: Literal["char", "word", "bpe"]
    counts: Mapping[str, tuple[int, ...]]
    license: str
    classes: tuple[str, ...] | None = None
    note: str = ""
    notes_by_size: Mapping[int, str] = field(default_factory=dict)


def _counts(*values: int) -> dict[str, tuple[int, ...]]:
    names = {1: ("all",), 2: ("train", "test"), 3: ALL}[len(values)]
    return {name: (value,) for name, value in zip(names, values, strict=True)}


SENTIMENT = ("negative", "positive")
NEWSGROUPS = (
    "alt.atheism",
    "comp.graphics",
    "comp.os.ms-windows.misc",
    "comp.sys.ibm.pc.hardware",
    "comp.sys.mac.hardware",
    "comp.windows.x",
    "misc.forsale",
    "rec.autos",
    "rec.motorcycles",
    "rec.sport.baseball",
    "rec.sport.hockey",
    "sci.crypt",
    "sci.electronics",
    "sci.med",
    "sci.space",
    "soc.religion.christian",
    "talk.politics.guns",
    "talk.politics.mideast",
    "talk.politics.misc",
    "talk.religion.misc",
)
LDC = "text copyright LDC; Mikolov's preprocessing"
HELD_OUT = "valid is 10 % of the official training split, by hash"

ENTRIES: Mapping[str, Entry] = {
    "ptb": Entry("text", "word", _counts(929_589, 73_760, 82_430), LDC),
    "ptb_char": Entry(
        "text",
        "char",
        _counts(5_017_482, 393_042, 442_423),
        LDC,
        note="no space at line ends: 442,423 test characters, where Cooijmans et al. 2016 have 446,184",
    ),
    "wikitext-2": Entry("text", "word", _counts(2_088_628, 217_646, 245_569), "CC BY-SA"),
    "wikitext-103": Entry("text", "word", _counts(103_227_021, 217_646, 245_569), "CC BY-SA"),
    "text8-prefix": Entry(
        "text", "char", _counts(6_877_825), "CC BY-SA", note="the first 6.88 % of text8, not the standard set"
    ),
    "sst2": Entry("labelled", "word", _counts(6_920, 872, 1_821), "Socher et al. 2013", SENTIMENT),
    "sst2_glue": Entry(
        "labelled",
        "word",
        _counts(67_349, 872),
        "Socher et al. 2013",
        SENTIMENT,
        f"test is GLUE's development set, whose test labels are secret; {HELD_OUT}; texts are phrases",
    ),
    "imdb": Entry("labelled", "bpe", _counts(25_000, 25_000), "none stated; Maas et al. 2011", SENTIMENT, HELD_OUT),
    "ag_news": Entry(
        "labelled",
        "bpe",
        {"train": (120_000, 28_421), "test": (7_600,)},
        "non-commercial research",
        ("World", "Sports", "Business", "Sci/Tech"),
        HELD_OUT,
        {28_421: "a SUBSET of 28,421 of the 120,000 training texts: not comparable with published accuracies"},
    ),
    "trec": Entry("labelled", "word", _counts(5_452, 500), "Li & Roth 2002", TREC_CLASSES, HELD_OUT),
    "20newsgroups": Entry(
        "labelled",
        "bpe",
        _counts(11_314, 7_532),
        "none stated",
        NEWSGROUPS,
        f"headers, signatures and quotes removed, because headers name the class; {HELD_OUT}",
    ),
    "wic": Entry("wic", "word", _counts(5_428, 638, 1_400), "CC BY-NC 4.0", ("F", "T")),
    "multi30k": Entry("pairs", "word", _counts(29_000, 1_014, 1_000), "none stated; captions of Flickr30K"),
    "tatoeba-de-en": Entry("pairs", "word", _counts(169_813), "CC BY 2.0, tatoeba.org and manythings.org/anki"),
}
EMBEDDED = "pydocs"
ALIASES = {
    "wikitext2": "wikitext-2",
    "wikitext103": "wikitext-103",
    "text8_prefix": "text8-prefix",
    "tatoeba": "tatoeba-de-en",
    "tatoeba_de_en": "tatoeba-de-en",
}
PATH_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl", ".gz")


def corpus_names() -> tuple[str, ...]:
    """Names that `data.corpus` takes; a path is the other possibility."""
    return (EMBEDDED, *ENTRIES)


def trainable_names() -> tuple[str, ...]:
    """Names of the corpora that have a training task today."""
    return (EMBEDDED, *(name for name, entry in ENTRIES.items() if entry.kind in ("text", "labelled")))


def require_corpus(data: DataConfig) -> None:
    """Raise `InputError` for a corpus that cannot exist: fast, without torch, network or reading text."""
    name = ALIASES.get(data.corpus, data.corpus)
    if name in ENTRIES:
        if _folder_of(name) is None and (name not in HUB or not installed()):
            raise InputError(f"corpus {name!r} is not here; {_hint(name)}")
    elif name != EMBEDDED:
        _require_path(data)


def _require_path(data: DataConfig) -> None:
    if os.sep not in data.corpus and Path(data.corpus).suffix not in PATH_SUFFIXES and not os.path.exists(data.corpus):
        require_choice("corpus", data.corpus, (*corpus_names(), "path/to/text"))
    require_own_text(data)


def load_corpus(data: DataConfig) -> Corpus:
    """Read, check and split the corpus `data.corpus` names."""
    require_corpus(data)
    name = ALIASES.get(data.corpus, data.corpus)
    if name == EMBEDDED:
        splits = load_pydocs()
        source = f"embedded, Python {platform.python_version()}"
        return Corpus(EMBEDDED, "text", splits, None, "char", checksum(splits), source, "PSF License")
    if name not in ENTRIES:
        return load_own_text(data)
    folder = _folder_of(name)
    if folder is not None:
        source = "NORMLAB_DATA"
        try:
            official = READERS[name](folder)
        except (ValueError, LookupError) as error:
            if isinstance(error, InputError):
                raise
            what = f"{type(error).__name__}: {error}"
            raise InputError(f"corpus {name!r}: {folder} is not in the published layout ({what:.100})") from error
    else:
        source, official = f"hub {HUB[name]}", read_hub(name, _hint(name))
    return _finish(name, official, source)


def _folder_of(name: str) -> Path | None:
    """The folder of a named corpus below NORMLAB_DATA, or None."""
    root = os.environ.get("NORMLAB_DATA")
    if not root or name not in READERS:
        return None
    folder = Path(root).expanduser() / FOLDERS.get(name, name)
    return folder if folder.is_dir() else None


def _hint(name: str) -> str:
    local = f"put its files in NORMLAB_DATA/{FOLDERS.get(name, name)}/" if name in READERS else ""
    hub = f"install datasets and connect to the hub (id {HUB[name].id})" if name in HUB else ""
    return " or ".join(part for part in (local, hub) if part)


def _finish(name: str, official: dict[str, Split], source: str) -> Corpus:
    entry = ENTRIES[name]
    _check_counts(name, entry, official, source)
    size = len(official["train"].texts) if "train" in official else 0
    note = "; ".join(part for part in (entry.note, entry.notes_by_size.get(size, "")) if part)
    if entry.kind == "text":
        splits = contiguous(official["all"].texts[0]) if "all" in official else official
    elif "all" in official:
        texts = official["all"].texts
        # One English sentence has several translations: they stay in one split.
        keys = [text.split("\t")[0] for text in texts]
        splits = by_hash(texts, None, {"train": 0.90, "valid": 0.05, "test": 0.05}, keys)
    elif entry.kind == "labelled":
        splits = {part: _in_hash_order(split) for part, split in official.items()}
        if "valid" not in splits:
            train = splits["train"]
            splits |= by_hash(train.texts, train.labels, {"valid": 0.10, "train": 0.90})
    else:
        splits = official
    splits = {part: splits[part] for part in ALL}
    return Corpus(name, entry.kind, splits, entry.classes, entry.tokens, checksum(splits), source, entry.license, note)


def _check_counts(name: str, entry: Entry, official: Mapping[str, Split], source: str) -> None:
    for part, allowed in entry.counts.items():
        texts = official[part].texts
        if entry.kind != "text":
            unit, count = "examples", len(texts)
        elif entry.tokens == "word":
            unit, count = "tokens", sum(map(count_words, texts))
        else:
            unit, count = "characters", sum(map(len, texts))
        if count not in allowed:
            expected = " or ".join(f"{value:,}" for value in allowed)
            raise InputError(
                f"corpus {name!r} from {source}: the {part} split has {count:,} {unit}, not the published {expected}; "
                "get an unchanged copy"
            )


def _in_hash_order(split: Split) -> Split:
    labels = split.labels or ()
    rows = sorted(zip(split.texts, labels, strict=True), key=lambda row: (hash_fraction(row[0]), row))
    return Split(tuple(text for text, _ in rows), tuple(label for _, label in rows))
