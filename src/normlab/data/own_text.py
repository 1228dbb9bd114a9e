"""The user's own text: a .txt file, a folder of .txt files, or a .csv / .tsv / .jsonl file (plain or .gz) with labels.

- .txt: one stream, split 90/5/5 in order.
- a folder: its .txt files (sub-folders too) in the order of their names. With 20 or more, each goes to a split
  whole, by the hash of its text (90/5/5); with fewer they are joined and split in order.
- a table: each row goes to a split by the hash of its text (80/10/10), so repeated texts stay together. Classes are
  the labels in sorted order. Rows whose text is empty are skipped and counted in `Corpus.note`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normlab.config import DataConfig, InputError
from normlab.data.files import read_rows, read_text, stem_and_suffix
from normlab.data.splits import Corpus, Split, by_hash, checksum, contiguous

__all__ = ["load_own_text", "require_own_text"]

TABLES = (".csv", ".tsv", ".jsonl")
MINIMUM_CHARACTERS = 1000
MINIMUM_ROWS = 10
MINIMUM_FILES_TO_HASH = 20
LICENSE = "the user's own"


def require_own_text(data: DataConfig) -> None:
    """Raise `InputError` unless the path exists and is of a known form; nothing is read."""
    path = _path(data)
    if path.is_dir():
        if not _text_files(path):
            raise InputError(f"folder {path} holds no .txt file; put text files in it or name one file")
    elif not path.exists():
        raise InputError(f"there is no file or folder {path}; give a corpus name or an existing path")
    elif stem_and_suffix(path) not in (".txt", *TABLES):
        raise InputError(f"{path} is neither .txt, .csv, .tsv nor .jsonl (each may end in .gz); rename or convert it")
    elif not path.is_file():
        raise InputError(f"{path} is a pipe or a device, not a file; give a file")


def load_own_text(data: DataConfig) -> Corpus:
    """Read, check and split the text at the path `data.corpus`."""
    require_own_text(data)
    path = _path(data)
    if stem_and_suffix(path) in TABLES and path.is_file():
        return _table(path, data)
    splits = _folder(path) if path.is_dir() else contiguous(_checked(path, read_text(path)))
    return Corpus(data.corpus, "text", splits, None, "char", checksum(splits), f"file {path}", LICENSE)


def _path(data: DataConfig) -> Path:
    try:
        path = Path(data.corpus).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long; ~ of nobody; a NUL in it
        raise InputError(f"data.corpus is {data.corpus[:80]!r}, which can be no path ({error!s:.60})") from None
    return path


def _text_files(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file() and stem_and_suffix(path) == ".txt"]
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _folder(folder: Path) -> dict[str, Split]:
    texts = [
        text if text.endswith("\n") else text + "\n" for text in map(read_text, _text_files(folder)) if text.strip()
    ]
    joined = _checked(folder, "".join(texts))
    if len(texts) < MINIMUM_FILES_TO_HASH:
        return contiguous(joined)
    splits = by_hash(texts, None, {"train": 0.90, "valid": 0.05, "test": 0.05})
    # Few files can leave a split without any, or the training split with only small ones.
    sizes = {name: sum(map(len, split.texts)) for name, split in splits.items()}
    sound = all(sizes.values()) and sizes["train"] >= 0.5 * len(joined)
    return splits if sound else contiguous(joined)


def _checked(path: Path, text: str) -> str:
    if not text.strip():
        raise InputError(f"{path} holds no text; give at least {MINIMUM_CHARACTERS:,} characters")
    if len(text) < MINIMUM_CHARACTERS:
        raise InputError(f"{path} has only {len(text)} characters; give at least {MINIMUM_CHARACTERS:,}")
    return text


def _table(path: Path, data: DataConfig) -> Corpus:
    rows = read_rows(path)
    if not rows:
        raise InputError(f"{path} has no rows; give at least {MINIMUM_ROWS} texts with labels")
    for option, column in (("text_column", data.text_column), ("label_column", data.label_column)):
        if column not in rows[0]:
            columns = ", ".join(map(repr, rows[0]))
            raise InputError(f"{path} has no column {column!r}; set data.{option} to one of: {columns}")
    texts, names = _complete_rows(path, rows, data)
    _check_classes(path, names)
    classes = _sorted_labels(set(names))
    index = {name: i for i, name in enumerate(classes)}
    splits = by_hash(texts, [index[name] for name in names], {"train": 0.8, "valid": 0.1, "test": 0.1})
    _check_splits(path, splits, classes)
    skipped = len(rows) - len(texts)
    note = f"{skipped} rows with an empty text skipped" if skipped else ""
    return Corpus(data.corpus, "labelled", splits, classes, "bpe", checksum(splits), f"file {path}", LICENSE, note)


def _complete_rows(path: Path, rows: Sequence[dict[str, Any]], data: DataConfig) -> tuple[list[str], list[str]]:
    texts, names = [], []
    for number, row in enumerate(rows, start=1):
        text, label = row.get(data.text_column), row.get(data.label_column)
        if text is None or (isinstance(text, str) and not text.strip()):
            continue
        if not isinstance(text, str):
            raise InputError(f"{path}, row {number}: {data.text_column!r} is not text but {str(text)[:40]!r}")
        if label is None or str(label).strip() == "":
            raise InputError(f"{path}, row {number}: no label in column {data.label_column!r}; fill it or drop the row")
        if isinstance(label, dict | list):
            raise InputError(f"{path}, row {number}: {data.label_column!r} must be one label, not {str(label)[:40]!r}")
        if any("\ud800" <= symbol <= "\udfff" for symbol in text):
            raise InputError(f"{path}, row {number}: the text holds half of a surrogate pair (a broken \\u escape)")
        texts.append(text)
        names.append(str(label).strip())
    return texts, names


def _check_classes(path: Path, names: Sequence[str]) -> None:
    counts = Counter(names)
    if len(names) < MINIMUM_ROWS:
        raise InputError(f"{path} has only {len(names)} labelled texts; give at least {MINIMUM_ROWS}")
    if len(counts) < 2:
        raise InputError(f"{path} has one class only ({next(iter(counts))!r}); classification needs at least 2")
    rare = sorted(name for name, count in counts.items() if count < 2)
    if rare:
        shown = ", ".join(map(repr, rare[:5]))
        raise InputError(
            f"{path}: {len(rare)} of {len(counts)} classes have a single text ({shown}); give each at least 2, "
            "or set data.label_column to the column of the labels"
        )


def _check_splits(path: Path, splits: dict[str, Split], classes: Sequence[str]) -> None:
    for name, split in splits.items():
        if not split.texts:
            raise InputError(f"{path} is so small that no text falls in the {name} split; give more rows")
    missing = sorted(set(range(len(classes))) - set(splits["train"].labels or ()))
    if missing:
        raise InputError(
            f"{path}: no text of class {classes[missing[0]]!r} falls in the training split; give more of it"
        )


def _sorted_labels(names: set[str]) -> tuple[str, ...]:
    """Numbers by value, anything else by name."""
    numbers = all(name.lstrip("-").isdecimal() for name in names)
    return tuple(sorted(names, key=int)) if numbers else tuple(sorted(names))
