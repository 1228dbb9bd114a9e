"""Strict JSON, plain YAML, and files that survive a kill or a full disk: replaced whole, or appended to row by row.

"nan", "inf" and "-inf" stand for the floats of that name, which strict JSON does not have. Records and configs may come
from somebody else: reading them executes nothing and does not wait, and nothing is written through a link.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from normlab.config import InputError

__all__ = [
    "append",
    "last_rows",
    "parse_json",
    "parse_row",
    "read_bytes",
    "read_yaml",
    "require_plain_files",
    "to_json",
    "write_atomically",
]

BLOCK_BYTES = 4096
"""So much of a file of rows is read at a time, from its end: a dozen rows of a usual curve."""

MOST_YAML_NODES = 200_000
"""Of a file, with all that aliases stand for: a config has about a hundred, an architecture's some thousands."""

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
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}); the record is damaged: move its folder away") from None
    if not isinstance(values, dict):
        raise InputError(f"{where} is not a JSON object; the record is damaged: move its folder away")
    return _decode(values)


def read_bytes(path: Path) -> bytes:
    """The whole file.

    Raises:
        InputError: it is a pipe or a device, which might never end; a folder raises `OSError`, as a missing file does.
    """
    with _plain_file(path) as file:
        return file.read()


@contextmanager
def _plain_file(path: Path) -> Iterator[BinaryIO]:
    # Without O_NONBLOCK, opening a pipe that nobody writes to waits for ever.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InputError(f"{path} is not a plain file; put a copy of its content there")
        yield file


def read_yaml(path: Path) -> Any:
    """The plain values of a YAML file: it can name no Python object, and not be larger than it looks.

    Raises:
        yaml.YAMLError: it is not YAML, or of more than `MOST_YAML_NODES` values.
        UnicodeDecodeError: it is not UTF-8.
        OSError: it cannot be read.
        InputError: it is no plain file.
    """
    loader = yaml.SafeLoader(read_bytes(path).decode("utf-8"))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _yaml_nodes(node, {}) > MOST_YAML_NODES:
            raise yaml.YAMLError(f"it stands for more than {MOST_YAML_NODES:,} values")
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or contains itself") from None
    except (ValueError, TypeError) as error:  # such as a date of month 13, or a list as a key
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _yaml_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, each alias written out; `known` holds those of nodes seen before."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        known[id(node)] = 1 + sum(_yaml_nodes(part, known) for part in inner)
    return known[id(node)]


def require_plain_files(folder: Path) -> None:
    """Raise `InputError` if a link, a pipe or a device is in `folder`, or if it is a link out of the folder around it.

    A record that somebody else made must not be a way to write elsewhere, or to wait for ever.
    """
    real = Path(os.path.realpath(folder))
    if folder.is_symlink() and not real.is_relative_to(folder.parent.resolve()):
        raise InputError(f"{folder} is a link out of {folder.parent}; name the record by its own place, {real}")
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise InputError(f"{path} is a link, to {os.readlink(path)}; put a copy in its place")
        if not path.is_file() and not path.is_dir() and path.exists():
            raise InputError(f"{path} is neither a file nor a folder; remove it")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Failed writes do not say which file they were for; make them say it."""
    try:
        yield
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`: whoever reads sees the old file or the new one, also after a kill or a full disk."""
    # Not a process id: on a disk that nodes or containers share, two may have the same.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with _naming(path), temporary.open("x", encoding="utf-8") as file:  # x: not what a link of that name leads to
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, line: bytes) -> None:
    """Add `line` after the last whole line; on failure the file ends there."""
    with _naming(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
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
        InputError: a row is damaged, or the file is a pipe or a device.
    """
    where = f"a row of {path}"
    with suppress(FileNotFoundError), _plain_file(path) as file:
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
                yield parse_row(line, where)
            end = start
        if not is_torn:
            yield parse_row(begun, where)


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """A row of a curve: the JSON object in `line`, with a whole number `step` and a number `seconds`.

    Raises:
        InputError: it is none; `where` names the place.
    """
    row = parse_json(line, where)
    step, seconds = row.get("step"), row.get("seconds")
    if not (isinstance(step, int) and isinstance(seconds, int | float)):
        raise InputError(f"{where} lacks numbers step and seconds; the record is damaged: move its folder away")
    return row
