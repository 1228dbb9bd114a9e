"""Strict JSON and files that survive a kill or a full disk: replaced whole, or appended to row by row.

"nan", "inf" and "-inf" stand for the floats of that name, which strict JSON does not have.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normlab.config import InputError

__all__ = ["append", "last_rows", "parse_json", "to_json", "write_atomically"]

BLOCK_BYTES = 4096
"""So much of a file of rows is read at a time, from its end: a dozen rows of a usual curve."""

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def to_json(values: Mapping[str, Any], indent: int | None = None) -> str:
    """`values` as strict JSON; a number of another library (NumPy, a tensor of one element) becomes a float."""
    return json.dumps(_encode(values), indent=indent, allow_nan=False)


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _encode(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_decode(inner) for inner in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
        InputError: it is none; `where` names the place.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); the record is damaged: move its folder away") from None
    if not isinstance(values, dict):
        raise InputError(f"{where} is not a JSON object; the record is damaged: move its folder away")
    return _decode(values)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Failed writes do not say which file they were for; make them say it."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: whoever reads sees the old file or the new one, also after a kill or a full disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with _naming(path), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, line: bytes) -> None:
    """Add `line` after the last whole line; on failure the file ends there."""
    with _naming(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            end = os.fstat(file).st_size
            if end and os.pread(file, 1, end - 1) != b"\n":
                end = os.pread(file, end, 0).rfind(b"\n") + 1
                os.ftruncate(file, end)
            written = os.write(file, line)
            if written < len(line):
                # A disk that fills up in the middle of a row takes its first part without an error.
                os.ftruncate(file, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(file)


def last_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a curve (`step`, `seconds` and metrics), newest first; no more of the file is read than is asked for.

    A torn last row is left out; a file that is not there has no rows.

    Raises:
        InputError: a row is damaged.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        begun = b""  # the end of a row whose beginning is in the block before
        is_torn = True  # what comes after the last line end is no row yet
        while end:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            begun, *lines = (file.read(end - start) + begun).split(b"\n")
            if lines and is_torn:
                lines.pop()
                is_torn = False
            for line in reversed(lines):
                yield _row(line, path)
            end = start
        if not is_torn:
            yield _row(begun, path)


def _row(line: bytes, path: Path) -> dict[str, Any]:
    row = parse_json(line, f"a row of {path}")
    if not ("step" in row and "seconds" in row):
        raise InputError(f"a row of {path} has no step or seconds; move the record's folder away")
    return row
