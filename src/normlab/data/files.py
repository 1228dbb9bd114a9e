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
        if path.exists() and not path.is_file():  # a pipe or a device may never end
            raise InputError(f"cannot read {path}: it is not a plain file")
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except MemoryError:
        raise InputError(f"{path} does not fit in memory; give less text") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a sound gzip file ({error})") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise InputError(
            f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; "
            f"convert it first, e.g. with iconv -f {encoding} -t utf-8"
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
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    begun = 1
    try:
        for row in reader:
            if row:
                yield row
            begun = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{path}, row beginning in line {begun}: {error}; is a quote never closed, or not doubled inside quotes?"
        ) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .csv or .tsv file with a header line, or of a .jsonl file with one object per line."""
    suffix = stem_and_suffix(path)
    if suffix == ".jsonl":
        return list(_json_rows(path))
    rows = table_rows(path, "\t" if suffix == ".tsv" else ",")
    header = next(rows, [])
    named = []
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise InputError(
                f"{path}, row {number} has {len(row)} cells, the header has {len(header)}; "
                "quote texts that hold the delimiter"
            )
        named.append(dict(zip(header, row, strict=True)))
    return named


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: not a JSON object with named columns")
        yield row
