"""The user's own text: what is read, and one clear line for what cannot be."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from normlab.config import DataConfig, InputError
from normlab.data.corpora import load_corpus, require_corpus

LINES = "".join(f"This is line {i} of the text, caf\u00e9 included.\n" for i in range(200))


def _rows(count: int = 200) -> list[tuple[str, str]]:
    return [(f'text {i}, with a comma and "quotes"', ("sad", "glad")[i % 2]) for i in range(count)]


def _csv(path: Path, rows: list[tuple[str, str]], header: str = "text,label") -> Path:
    body = "".join('"{}",{}\n'.format(text.replace('"', '""'), label) for text, label in rows)
    path.write_text(f"{header}\n{body}", encoding="utf-8")
    return path


@pytest.mark.parametrize("form", ["plain", "gz", "windows"])
def test_a_text_file_is_one_stream(form: str, tmp_path: Path) -> None:
    path = tmp_path / ("own.txt.gz" if form == "gz" else "own.txt")
    data = LINES.encode()
    if form == "windows":
        data = b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n")
    path.write_bytes(gzip.compress(data) if form == "gz" else data)
    corpus = load_corpus(DataConfig(corpus=str(path)))
    assert corpus.kind == "text"
    assert "".join(corpus.splits[part].texts[0] for part in ("train", "valid", "test")) == LINES


@pytest.mark.parametrize("count", [3, 200])
def test_a_folder_is_split_by_file_only_when_there_are_many(count: int, tmp_path: Path) -> None:
    for i in range(count):
        (tmp_path / f"sub{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"sub{i % 2}" / f"{i:03}.txt").write_text(f"File {i}.\n" + LINES, encoding="utf-8")
    (tmp_path / "notes.md").write_bytes(b"\xff not read")
    corpus = load_corpus(DataConfig(corpus=str(tmp_path)))
    assert sum(len(split.texts) for split in corpus.splits.values()) == (3 if count == 3 else 200)
    together = "".join("".join(split.texts) for split in corpus.splits.values())
    assert len(together) == count * len(LINES) + sum(len(f"File {i}.\n") for i in range(count))


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "jsonl.gz"])
def test_tables_are_read_alike(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"own.{form}"
    if form == "csv":
        _csv(path, _rows(), header="review,mood")
    elif form == "tsv":
        rows = "".join('"{}"\t{}\n'.format(text.replace('"', '""'), label) for text, label in _rows())
        path.write_text("review\tmood\n" + rows)
    else:
        data = "\n".join(json.dumps({"review": text, "mood": label}) for text, label in _rows()).encode()
        path.write_bytes(gzip.compress(data) if form.endswith("gz") else data)
    corpus = load_corpus(DataConfig(corpus=str(path), text_column="review", label_column="mood"))
    assert corpus.kind == "labelled"
    assert corpus.classes == ("glad", "sad")
    found = {
        (text, corpus.classes[label])
        for split in corpus.splits.values()
        for text, label in zip(split.texts, split.labels or (), strict=True)
    }
    assert found == set(_rows())
    assert len(corpus.splits["train"].texts) > 130


def test_number_labels_are_ordered_by_value_and_empty_texts_counted(tmp_path: Path) -> None:
    rows = [(f"text {i}", str(i % 11)) for i in range(220)] + [("", "3"), ("  ", "4")]
    corpus = load_corpus(DataConfig(corpus=str(_csv(tmp_path / "own.csv", rows))))
    assert corpus.classes == tuple(map(str, range(11)))
    assert corpus.note == "2 rows with an empty text skipped"


def _write(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


BAD = {
    "empty.txt": ("", "holds no text"),
    "blank.txt": (" \n\n", "holds no text"),
    "tiny.txt": ("Hello.\n", "only 7 characters; give at least 1,000"),
    "latin.txt": (b"abc caf\xe9 " * 500, r"latin.txt is not UTF-8: byte 0xe9 at offset 7"),
    "sound.txt.gz": (b"no gzip at all", "not a sound gzip file"),
    "cut.txt.gz": (gzip.compress(LINES.encode())[:50], "not a sound gzip file"),
    "scan.pdf": ("%PDF", "neither .txt, .csv, .tsv nor .jsonl"),
    "none.csv": ("", "has no rows"),
    "header.csv": ("text,label\n", "has no rows"),
    "columns.csv": (
        "review,mood\n" + "a,b\n" * 20,
        "no column 'text'; set data.text_column to one of: 'review', 'mood'",
    ),
    "labels.csv": ("text,mood\n" + "a,b\n" * 20, "no column 'label'; set data.label_column to one of: 'text', 'mood'"),
    "few.csv": ("text,label\n" + "a,x\nb,y\n" * 4, "only 8 labelled texts; give at least 10"),
    "one.csv": ("text,label\n" + "a,x\n" * 20, "one class only"),
    "rare.csv": ("text,label\n" + "a,x\n" * 20 + "b,y\n", r"1 of 2 classes have a single text \('y'\)"),
    "gap.csv": ("text,label\n" + "a,x\n" * 4 + "b,\n" + "b,y\n" * 9, "row 5: no label in column 'label'"),
    "broken.jsonl": ('{"text": "a", "label": 1}\n{"text": \n', "line 2: not valid JSON"),
    "list.jsonl": ("[1]\n", "line 1: not a JSON object"),
    "number.jsonl": ('{"text": 3, "label": 1}\n' * 20, "row 1: 'text' is not text"),
    "nested.jsonl": ('{"text": "a", "label": [1]}\n' * 20, "row 1: 'label' must be one label"),
    "half.jsonl": ('{"text": "a \\ud800", "label": 1}\n' * 20, "half of a surrogate pair"),
    "same.csv": ("text,label\n" + "a,x\n" * 20 + "a,y\n" * 20, "no text falls in the"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_one_clear_line(name: str, tmp_path: Path) -> None:
    content, message = BAD[name]
    path = _write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        load_corpus(DataConfig(corpus=str(path)))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_paths_and_empty_folders_are_found_without_reading(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file or folder"):
        require_corpus(DataConfig(corpus=str(tmp_path / "absent.txt")))
    with pytest.raises(InputError, match=r"no file or folder absent\.csv"):
        require_corpus(DataConfig(corpus="absent.csv"))
    with pytest.raises(InputError, match=r"holds no \.txt file"):
        require_corpus(DataConfig(corpus=str(tmp_path)))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["good,pos", '"the film was great,pos', "bad,neg"], "row beginning in line 3.*a quote never closed"),
        (["good,pos", "bad, and worse,neg"], "row 3 has 3 cells, the header has 2"),
        (["good,pos", "bad"], "row 3 has 1 cells, the header has 2"),
    ],
)
def test_a_broken_table_is_not_read_as_another(tmp_path: Path, rows: list[str], said: str) -> None:
    path = tmp_path / "broken.csv"
    path.write_text("\n".join(["text,label", *rows, *["fine,pos", "bad,neg"] * 10]) + "\n")
    with pytest.raises(InputError, match=said):
        load_corpus(DataConfig(corpus=str(path)))
