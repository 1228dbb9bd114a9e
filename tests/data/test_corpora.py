"""Named corpora: published counts, both sources alike, clear errors."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from normlab.config import DataConfig, InputError
from normlab.data import corpora, corpora_hub, corpora_local
from normlab.data.corpora import corpus_names, load_corpus, require_corpus
from normlab.data.splits import Split, by_hash, checksum, contiguous, count_words, hash_fraction

NORMLAB_DATA = os.environ.get("NORMLAB_DATA", "")


def _local(name: str) -> None:
    folder = corpora_local.FOLDERS.get(name, name)
    if not NORMLAB_DATA or not (Path(NORMLAB_DATA) / folder).is_dir():
        pytest.skip(f"NORMLAB_DATA/{folder} is not here: published counts of {name} not checked")


PUBLISHED = {
    "ptb": (42_068 + 887_521, 73_760, 82_430),
    "ptb_char": (5_017_482, 393_042, 442_423),
    "wikitext-2": (2_088_628, 217_646, 245_569),
    "sst2": (6_920, 872, 1_821),
    "sst2_glue": (67_349, 0, 872),
    "imdb": (25_000, 0, 25_000),
    "trec": (5_452, 0, 500),
    "20newsgroups": (11_314, 0, 7_532),
    "wic": (5_428, 638, 1_400),
    "multi30k": (29_000, 1_014, 1_000),
}
"""Measured as the papers do; 0: no official validation split, it is cut from the training split."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts_come_out(name: str) -> None:
    _local(name)
    corpus = load_corpus(DataConfig(corpus=name))
    assert corpus.source == "NORMLAB_DATA"

    def size(part: str) -> int:
        texts = corpus.splits[part].texts
        if corpus.kind != "text":
            return len(texts)
        return sum(map(count_words, texts)) if corpus.tokens == "word" else len("".join(texts))

    train, valid, test = PUBLISHED[name]
    measured = (size("train"), size("valid"), size("test"))
    assert measured == (train, valid, test) if valid else (measured[0] + measured[1], measured[2]) == (train, test)


@pytest.mark.parametrize("name", ["ag_news", "tatoeba-de-en", "text8-prefix"])
def test_other_local_corpora_load(name: str) -> None:
    _local(name)
    corpus = load_corpus(DataConfig(corpus=name))
    assert all(corpus.splits[part].texts for part in ("train", "valid", "test"))
    if name == "ag_news":
        assert "SUBSET" in corpus.note
        assert sum(len(corpus.splits[part].texts) for part in ("train", "valid")) == 28_421
    if name == "tatoeba-de-en":
        english = [{text.split("\t")[0] for text in corpus.splits[part].texts} for part in ("train", "valid", "test")]
        assert not english[0] & english[1]
        assert not english[0] & english[2]


def test_ptb_char_is_the_same_from_char_files_word_files_and_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _local("ptb")
    from_char_files = load_corpus(DataConfig(corpus="ptb_char"))
    (tmp_path / "ptb").mkdir()
    rows = {}
    for ours, theirs in (("train", "train"), ("valid", "validation"), ("test", "test")):
        text = (Path(NORMLAB_DATA) / "ptb" / f"ptb.{ours}.txt").read_text()
        (tmp_path / "ptb" / f"ptb.{ours}.txt.gz").write_bytes(gzip.compress(text.encode(), compresslevel=1))
        rows[theirs] = {"sentence": [line.strip() for line in text.splitlines()]}
    monkeypatch.setenv("NORMLAB_DATA", str(tmp_path))
    from_word_files = load_corpus(DataConfig(corpus="ptb_char"))
    monkeypatch.delenv("NORMLAB_DATA")
    _serve(monkeypatch, rows)
    from_hub = load_corpus(DataConfig(corpus="ptb_char"))
    assert from_char_files.sha256 == from_word_files.sha256 == from_hub.sha256
    assert len(set(from_hub.splits["train"].texts[0])) == 50
    assert from_hub.source.startswith("hub ptb-text-only/ptb_text_only")


def _serve(
    monkeypatch: pytest.MonkeyPatch, rows: dict[str, dict[str, list[Any]]], fail: list[Exception] | None = None
) -> list:
    """Let the hub answer with in-memory tables; returns the list of calls. `fail`: raised first, in order."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((*args, options["revision"]))
        if fail:
            raise fail.pop(0)
        return datasets.DatasetDict({name: datasets.Dataset.from_dict(columns) for name, columns in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(corpora_hub, "_reachable", lambda: True)
    return calls


def _allow(monkeypatch: pytest.MonkeyPatch, name: str, **counts: int) -> None:
    """Let tiny stand-ins pass the check of published counts."""
    import dataclasses

    entry = dataclasses.replace(corpora.ENTRIES[name], counts={part: (count,) for part, count in counts.items()})
    monkeypatch.setattr(corpora, "ENTRIES", {**corpora.ENTRIES, name: entry})


def test_hub_and_files_give_the_same_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"Where is town {i} ?" for i in range(40)]
    folder = tmp_path / "trec"
    folder.mkdir()
    (folder / "train.txt").write_text("".join(f"LOC:city {text}\n" for text in texts[:30]))
    (folder / "test.txt").write_text("".join(f"HUM:ind {text}\n" for text in texts[30:]))
    _allow(monkeypatch, "trec", train=30, test=10)
    monkeypatch.setenv("NORMLAB_DATA", str(tmp_path))
    local = load_corpus(DataConfig(corpus="trec"))
    monkeypatch.delenv("NORMLAB_DATA")
    rows = {
        "train": {"text": texts[:30][::-1], "coarse_label": [4] * 30},
        "test": {"text": texts[30:], "coarse_label": [3] * 10},
    }
    script = RuntimeError("Dataset scripts are no longer supported, but found trec.py")
    calls = _serve(monkeypatch, rows, fail=[script])
    hub = load_corpus(DataConfig(corpus="trec"))
    assert local.sha256 == hub.sha256
    assert local.classes == hub.classes
    assert local.source != hub.source
    assert [call[-1] for call in calls] == [None, "refs/convert/parquet"]  # the second after the script was refused


HUB_ROWS = {
    "wikitext-2": {"text": ["", " = Title = \n", " a <unk> b \n"]},
    "sst2": {"text": ["good ", "bad", "fine"], "label": [1, 0, 1]},
    "sst2_glue": {"sentence": ["good ", "bad", "fine"], "label": [1, 0, 1]},
    "imdb": {"text": ["good ", "bad", "fine"], "label": [1, 0, 1]},
    "ag_news": {"text": ["good ", "bad", "fine"], "label": [3, 0, 1]},
    "20newsgroups": {"text": ["x", "y", "z"], "label": [0, 1, 1], "label_text": ["a", "b", "b"]},
    "multi30k": {"en": ["a dog", "two", "c"], "de": ["ein Hund", "zwei", "c"]},
    "wic": {
        "word": ["board"] * 3,
        "sentence1": ["Room and board."] * 3,
        "sentence2": ["He nailed boards up."] * 3,
        "start1": [9] * 3,
        "start2": [10] * 3,
        "label": [0, 1, 0],
    },
    "text8-prefix": {"text": [" anarchism originated as a term of abuse " * 20]},
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_each_hub_form_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMLAB_DATA", raising=False)
    rows = HUB_ROWS[name]
    _serve(monkeypatch, dict.fromkeys(("train", "validation", "test"), rows))
    _allow(monkeypatch, name)
    corpus = load_corpus(DataConfig(corpus=name))
    assert corpus.source.startswith(f"hub {corpora_hub.HUB[name].id}")
    if name == "wikitext-2":
        assert corpus.splits["train"].texts == ("\n= Title =\na <unk> b\n",)
    if name == "wic":
        assert corpus.splits["test"].texts[0] == "board\t2-2\tRoom and board.\tHe nailed boards up."
    if name == "sst2":
        assert sorted(zip(corpus.splits["train"].texts, corpus.splits["train"].labels or (), strict=True)) == [
            ("bad", 0),
            ("fine", 1),
            ("good", 1),
        ]


def test_secret_labels_are_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMLAB_DATA", raising=False)
    secret = {**HUB_ROWS["wic"], "label": [-1] * 3}
    _serve(monkeypatch, {"train": HUB_ROWS["wic"], "validation": HUB_ROWS["wic"], "test": secret})
    _allow(monkeypatch, "wic")
    corpus = load_corpus(DataConfig(corpus="wic"))
    assert corpus.splits["test"].labels is None
    assert corpus.splits["valid"].labels == (0, 1, 0)


def test_a_wrong_count_names_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMLAB_DATA", raising=False)
    _serve(monkeypatch, dict.fromkeys(("train", "validation", "test"), HUB_ROWS["sst2"]))
    with pytest.raises(InputError, match=r"train split has 3 examples, not the published 6,920"):
        load_corpus(DataConfig(corpus="sst2"))


def test_an_unreachable_hub_names_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMLAB_DATA", raising=False)
    _serve(monkeypatch, {}, fail=[ConnectionError("no route")])
    with pytest.raises(InputError, match=r"(?s)no route.*NORMLAB_DATA/trec/.*CogComp/trec") as caught:
        load_corpus(DataConfig(corpus="trec"))
    assert "\n" not in str(caught.value)


def test_changed_columns_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMLAB_DATA", raising=False)
    _serve(monkeypatch, {part: {"other": ["x"]} for part in ("train", "validation", "test")})
    with pytest.raises(InputError, match="changed its columns"):
        load_corpus(DataConfig(corpus="sst2"))


@pytest.mark.parametrize("alias", sorted(corpora.ALIASES))
def test_aliases_mean_known_names(alias: str) -> None:
    assert corpora.ALIASES[alias] in corpus_names()


def test_unknown_names_list_the_right_ones() -> None:
    with pytest.raises(InputError, match=r"unknown corpus 'ptb_chr' \(did you mean 'ptb_char'\?\).*pydocs.*sst2"):
        require_corpus(DataConfig(corpus="ptb_chr"))


def test_require_corpus_loads_neither_torch_nor_datasets_and_is_fast() -> None:
    code = (
        "import sys, time; from normlab.config import DataConfig; from normlab.data.corpora import require_corpus;"
        "start = time.perf_counter(); require_corpus(DataConfig()); took = time.perf_counter() - start;"
        "assert took < 0.05, took; print({'torch', 'datasets', 'tokenizers'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


def test_a_post_loses_header_signature_and_quotes() -> None:
    post = "From: a@b\nSubject: Space\n\nJoe wrote:\n> old words\nMy own words.\n\nMore.\n--\nA. Body, NASA\n"
    assert corpora_local.strip_post(post) == "My own words.\n\nMore."
    assert corpora_local.strip_post("Subject: only a header\n") == ""


def test_hash_splits_keep_equal_texts_together_and_order_does_not_matter() -> None:
    texts = [f"text {i % 300}" for i in range(900)]
    shares = {"train": 0.8, "valid": 0.1, "test": 0.1}
    splits = by_hash(texts, list(range(900)), shares)
    assert not set(splits["train"].texts) & set(splits["test"].texts)
    assert sum(len(split.texts) for split in splits.values()) == 900
    backwards = by_hash(texts[::-1], None, shares)
    assert all(set(backwards[name].texts) == set(splits[name].texts) for name in shares)
    labels = splits["valid"].labels
    assert labels is not None
    assert all(texts[label] == text for text, label in zip(splits["valid"].texts, labels, strict=True))
    assert hash_fraction("a") == int(hashlib.sha256(b"a").hexdigest()[:16], 16) / 2**64


def test_contiguous_split_loses_nothing_and_cuts_between_lines() -> None:
    text = "".join(f"line number {i}\n" for i in range(1000))
    splits = contiguous(text)
    assert "".join(splits[name].texts[0] for name in ("train", "valid", "test")) == text
    assert all(split.texts[0].endswith("\n") for split in splits.values())
    assert abs(len(splits["train"].texts[0]) / len(text) - 0.90) < 0.01
    with pytest.raises(InputError, match="leaves nothing"):
        contiguous("ab")


def test_checksum_sees_every_text_label_and_boundary() -> None:
    base = {"train": Split(("ab", "c"), (0, 1))}
    others = [
        {"train": Split(("a", "bc"), (0, 1))},
        {"train": Split(("ab", "c"), (1, 0))},
        {"train": Split(("ab", "c"))},
        {"test": Split(("ab", "c"), (0, 1))},
    ]
    sums = {checksum(splits) for splits in [base, *others]}
    assert len(sums) == 5
    assert checksum({"train": Split(("ab", "c"), (0, 1))}) in sums


def test_words_are_counted_with_one_end_per_line() -> None:
    assert count_words("a b\n\nc\n") == 6
    assert count_words("a b") == 3
    assert count_words("") == 0
