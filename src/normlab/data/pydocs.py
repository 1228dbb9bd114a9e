"""The embedded corpus `pydocs`: English prose that every Python carries.

Documents are the reference topics of `pydoc_data.topics` and the docstrings of the standard library. Sources
are parsed with `ast`; nothing is imported. Documents are in a fixed order (topics by name, then files by path,
then position), each once, and split 90/5/5 by the hash of their text.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import platform
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from normlab.config import InputError
from normlab.data.splits import Split, by_hash

__all__ = ["MINIMUM_CHARACTERS", "cache_file", "load_pydocs", "read_standard_library"]

MINIMUM_CHARACTERS = 100
"""Shorter docstrings ("Return self.") are left out: little prose, and near-copies would leak between splits."""

FORMAT = 1
"""Part of the cache's name; raise it when the rules of this file change."""

LEFT_OUT = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "__pycache__", "lib-dynload")
)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def load_pydocs() -> dict[str, Split]:
    """The three splits, from the cache if it is sound, else from the sources (and then cached if that is possible)."""
    path = cache_file()
    cached = _read_cache(path)
    texts = read_standard_library(Path(sysconfig.get_path("stdlib"))) if cached is None else cached
    splits = by_hash(texts, None, {"train": 0.90, "valid": 0.05, "test": 0.05})
    if any(sum(map(len, split.texts)) < 1000 for split in splits.values()):
        raise InputError(
            f"this Python has no sources of its standard library in {sysconfig.get_path('stdlib')}; "
            "give another corpus, e.g. --data.corpus path/to/text.txt"
        )
    if cached is None:
        _write_cache(path, texts)
    return splits


def read_standard_library(root: Path) -> list[str]:
    """All documents below `root`, each ending in a blank line, duplicates and short ones left out."""
    seen: dict[str, None] = {}
    for raw in _documents(root):
        text = inspect.cleandoc(raw).strip()
        # A docstring may hold half of a surrogate pair, which no file and no tokenizer can.
        text = text.encode("utf-8", "replace").decode("utf-8")
        if len(text) >= MINIMUM_CHARACTERS:
            seen.setdefault(text + "\n\n")
    return list(seen)


def _documents(root: Path) -> Iterator[str]:
    topics = root / "pydoc_data" / "topics.py"
    yield from _topics(topics)
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        if path == topics or LEFT_OUT.intersection(path.relative_to(root).parts[:-1]):
            continue
        tree = _parse(path)
        if tree is None:
            continue
        yield from _docstrings(tree)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings at and below a statement, in the order of the source. Expressions, most of a tree, hold none."""
    if isinstance(node, DOCUMENTED):
        yield ast.get_docstring(node, clean=False) or ""
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        inner = getattr(node, block, None)
        for child in inner if isinstance(inner, list) else ():
            yield from _docstrings(child)


def _topics(path: Path) -> Iterator[str]:
    tree = _parse(path)
    for statement in tree.body if tree is not None else ():
        # `topics = {...}` up to 3.13, possibly with an annotation.
        value = statement.value if isinstance(statement, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Dict):
            topics = ast.literal_eval(value)
            yield from (str(topics[name]) for name in sorted(topics))


def _parse(path: Path) -> ast.Module | None:
    """The syntax tree, or None for a file that is missing, unreadable or no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in other people's docstrings
            return ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return None


def cache_file() -> Path:
    """Where the documents of this very Python are cached: $NORMLAB_CACHE, else the user's cache folder."""
    folder = os.environ.get("NORMLAB_CACHE")
    if not folder:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "normlab"
    identity = f"{sys.version} {sysconfig.get_path('stdlib')} {MINIMUM_CHARACTERS} {FORMAT}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return Path(folder) / f"pydocs-{platform.python_version()}-{key}.json"


def _read_cache(path: Path) -> list[str] | None:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        texts = stored["texts"]
        sound = stored["sha256"] == _digest(texts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return texts if sound else None


def _write_cache(path: Path, texts: list[str]) -> None:
    """Write beside and rename, so that a kill leaves no half file. A cache that cannot be written is no error."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            json.dump({"sha256": _digest(texts), "texts": texts}, file)
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _digest(texts: list[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
