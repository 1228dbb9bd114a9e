"""Reading files: UTF-8 text, plain or gzipped; rows of .csv, .tsv and .jsonl. Every fault is one clear line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from normlab.config import InputError

__all__ = ["read_rows", "read_text", "stem_and_suffix", "table_rows"]

csv.field_size_limit(2**31 - 1)  # the module's own limit of 131,072 characters is shorter than some texts


def read_text(path: Path) -> str:
    """The whole file as text, with line ends as "\\n" and without a byte order mark."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a sound gzip file ({error})") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; "
            "convert it first, e.g. with iconv -f latin1 -t utf-8"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def stem_and_suffix(path: Path) -> str:
    """The suffix in lower case, looked for under a ".gz": "x.csv.gz" gives ".csv"."""
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def table_rows(path: Path, delimiter: str, *, quoted: bool = True) -> Iterator[list[str]]:
    """Rows of a delimited file, blank lines left out."""
    # A quoted field may go over several lines, and only "\n" ends one (str.splitlines knows eight more).
    lines = io.StringIO(read_text(path), newline="")
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    try:
        for row in csv.reader(lines, delimiter=delimiter, quoting=quoting):
            if row:
                yield row
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a table: {error}") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .csv or .tsv file with a header line, or of a .jsonl file with one object per line."""
    suffix = stem_and_suffix(path)
    if suffix == ".jsonl":
        return list(_json_rows(path))
    rows = table_rows(path, "\t" if suffix == ".tsv" else ",")
    header = next(rows, [])
    return [dict(zip(header, row, strict=False)) for row in rows]


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: not a JSON object with named columns")
        yield row
