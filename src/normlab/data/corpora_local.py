"""Named corpora from the user's own folder of files, `NORMLAB_DATA/<folder>/`, in their usual published layouts.

A reader returns the official splits; the validation splits that do not exist are made later, the same way for files
and hub. Text of word-level corpora is brought to one form, a line without outer spaces and a newline, so that both
sources give the same characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from normlab.config import InputError
from normlab.data.files import read_rows, read_text, table_rows
from normlab.data.splits import Split

__all__ = ["FOLDERS", "READERS", "TREC_CLASSES", "strip_post", "tidy_lines"]

Splits = dict[str, Split]
TREC_CLASSES = ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")


def tidy_lines(text: str) -> str:
    """Lines without outer spaces, each ended by one newline."""
    return "".join(line.strip() + "\n" for line in text.removesuffix("\n").split("\n"))


def _find(folder: Path, *names: str) -> Path:
    """The first of `names` in `folder`, plain or gzipped."""
    for name in names:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise InputError(f"{folder} has no {' or '.join(names)} (plain or .gz)")


def _ptb(folder: Path) -> Splits:
    return {
        name: Split((tidy_lines(read_text(_find(folder, f"ptb.{name}.txt"))),)) for name in ("train", "valid", "test")
    }


def _ptb_char(folder: Path) -> Splits:
    try:
        return {
            # Every second byte separates two symbols, and "_" stands for the space.
            name: Split((read_text(_find(folder, f"ptb.char.{name}.txt"))[::2].replace("_", " "),))
            for name in ("train", "valid", "test")
        }
    except InputError:
        return _ptb(folder)


def _wikitext(folder: Path) -> Splits:
    return {
        name: Split((tidy_lines(read_text(_find(folder, f"wiki.{name}.tokens"))),))
        for name in ("train", "valid", "test")
    }


def _text8_prefix(folder: Path) -> Splits:
    return {"all": Split((read_text(_find(folder, "text8_prefix.txt")),))}


def _labelled(rows: list[tuple[str, int]]) -> Split:
    return Split(tuple(text for text, _ in rows), tuple(label for _, label in rows))


def _sst2(folder: Path) -> Splits:
    return {
        name: _labelled([(row[0].strip(), int(row[1])) for row in table_rows(_find(folder, file), "\t", quoted=False)])
        for name, file in (("train", "train.tsv"), ("valid", "dev.tsv"), ("test", "test.tsv"))
    }


def _sst2_glue(folder: Path) -> Splits:
    splits = {}
    for name, file in (("train", "glue_train.tsv"), ("test", "glue_dev_872.tsv")):
        rows = list(table_rows(_find(folder, file), "\t", quoted=False))[1:]  # a header line
        splits[name] = _labelled([(row[0].strip(), int(row[1])) for row in rows])
    return splits


def _imdb(folder: Path) -> Splits:
    return {
        name: _labelled([(row["text"], int(row["label"])) for row in read_rows(_find(folder, f"{name}.csv"))])
        for name in ("train", "test")
    }


def _ag_news(folder: Path) -> Splits:
    files = {"train": _find(folder, "train.csv", "train_subset.csv"), "test": _find(folder, "test.csv")}
    return {
        name: _labelled([(f"{row[1]} {row[2]}", int(row[0]) - 1) for row in table_rows(path, ",")])
        for name, path in files.items()
    }


def _trec(folder: Path) -> Splits:
    splits = {}
    for name in ("train", "test"):
        lines = read_text(_find(folder, f"{name}.txt")).strip().split("\n")
        parts = [line.split(" ", 1) for line in lines]
        splits[name] = _labelled([(text.strip(), TREC_CLASSES.index(tag.split(":")[0])) for tag, text in parts])
    return splits


_QUOTE = re.compile(r"(writes in|writes:|wrote:|says:|said:|^In article|^Quoted from|^\||^>)")


def strip_post(text: str) -> str:
    """A news post without header, signature and quoted lines, as scikit-learn's `remove=` does it.

    Headers name the class; the copy on the hub went through the same.
    """
    lines = text.partition("\n\n")[2].strip().split("\n")
    rules = [number for number, line in enumerate(lines) if line.strip().strip("-") == ""]
    if rules and rules[-1] > 0:
        lines = lines[: rules[-1]]
    return "\n".join(line for line in lines if not _QUOTE.search(line)).strip()


def _newsgroups(folder: Path) -> Splits:
    rows = {name: read_rows(_find(folder, f"{name}.jsonl")) for name in ("train", "test")}
    classes = sorted({row["label"] for row in rows["train"]})
    return {
        name: _labelled([(strip_post(row["text"]), classes.index(row["label"])) for row in part])
        for name, part in rows.items()
    }


def _wic(folder: Path) -> Splits:
    splits = {}
    for name, file in (("train", "train"), ("valid", "dev"), ("test", "test")):
        rows = list(table_rows(_find(folder, f"{file}.data.txt"), "\t", quoted=False))
        gold = read_text(_find(folder, f"{file}.gold.txt")).split()
        texts = tuple("\t".join((row[0], row[2], row[3].strip(), row[4].strip())) for row in rows)
        splits[name] = Split(texts, tuple(int(mark == "T") for mark in gold))
    return splits


def _multi30k(folder: Path) -> Splits:
    splits = {}
    for name, file in (("train", "train"), ("valid", "val"), ("test", "test_2016_flickr")):
        sides = [read_text(_find(folder, f"{file}.{side}")).removesuffix("\n").split("\n") for side in ("en", "de")]
        pairs = zip(*sides, strict=True)
        splits[name] = Split(tuple(f"{source.strip()}\t{target.strip()}" for source, target in pairs))
    return splits


def _tatoeba(folder: Path) -> Splits:
    return {"all": Split(tuple(read_text(_find(folder, "deu.txt")).removesuffix("\n").split("\n")))}


FOLDERS: Mapping[str, str] = {"ptb_char": "ptb", "sst2_glue": "sst2"}
"""Folder of a corpus whose folder has another name than itself."""

READERS: Mapping[str, Callable[[Path], Splits]] = {
    "ptb": _ptb,
    "ptb_char": _ptb_char,
    "wikitext-2": _wikitext,
    "wikitext-103": _wikitext,
    "text8-prefix": _text8_prefix,
    "sst2": _sst2,
    "sst2_glue": _sst2_glue,
    "imdb": _imdb,
    "ag_news": _ag_news,
    "trec": _trec,
    "20newsgroups": _newsgroups,
    "wic": _wic,
    "multi30k": _multi30k,
    "tatoeba-de-en": _tatoeba,
}
