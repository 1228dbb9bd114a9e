"""Fetch and check corpora: python scripts/fetch_data.py [NAME ...]   (all named corpora if none is given)

Each is read from NORMLAB_DATA, else fetched from the Hugging Face hub into its usual cache, checked against the
published counts, and shown with the size of its splits and its SHA-256. Exit code 2 if any could not be had.
"""

from __future__ import annotations

import sys

from normlab.config import DataConfig, InputError
from normlab.data.corpora import corpus_names, load_corpus


def main(names: list[str]) -> int:
    """Show one line per corpus; 0 if all could be had, else 2."""
    failed = 0
    for name in names or corpus_names():
        try:
            corpus = load_corpus(DataConfig(corpus=name))
        except InputError as error:
            failed += 1
            print(f"{name:14} {error}", file=sys.stderr)
            continue
        sizes = " / ".join(f"{_size(corpus.splits[part].texts, corpus.kind):,}" for part in ("train", "valid", "test"))
        unit = "characters" if corpus.kind == "text" else "examples"
        print(f"{name:14} {sizes} {unit}  sha256 {corpus.sha256[:12]}  {corpus.source}  {corpus.note}".rstrip())
    return 2 if failed else 0


def _size(texts: tuple[str, ...], kind: str) -> int:
    return sum(map(len, texts)) if kind == "text" else len(texts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
