"""The embedded corpus."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from normlab.config import DataConfig, InputError
from normlab.data import pydocs
from normlab.data.corpora import load_corpus


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the corpus of this Python."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NORMLAB_CACHE", str(folder))
        load_corpus(DataConfig())
    return folder


@pytest.fixture
def cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NORMLAB_CACHE", str(cache))
    return pydocs.cache_file()


def test_size_split_and_source(cached: Path) -> None:
    corpus = load_corpus(DataConfig())
    sizes = {name: sum(map(len, split.texts)) for name, split in corpus.splits.items()}
    total = sum(sizes.values())
    assert 1_500_000 < total < 3_500_000
    assert 0.85 < sizes["train"] / total < 0.95
    assert min(sizes.values()) > 0.02 * total
    texts = [text for split in corpus.splits.values() for text in split.texts]
    assert len(texts) == len(set(texts))
    assert min(map(len, texts)) >= pydocs.MINIMUM_CHARACTERS
    assert corpus.source == f"embedded, Python {sys.version.split()[0]}"


def test_the_cache_is_used_and_gives_the_same(cached: Path) -> None:
    start = time.perf_counter()
    first = load_corpus(DataConfig())
    assert time.perf_counter() - start < 1.0
    stored = json.loads(cached.read_text())
    kept = next(text for text in stored["texts"] if text in first.splits["train"].texts)
    assert first.sha256 == load_corpus(DataConfig()).sha256
    assert kept.endswith("\n\n")


SOURCE = '''"""Module docstring{pad}."""
def f():
    """First line{pad}.

        indented line
    last line
    """
class C:
    """Class docstring{pad}."""
    def short(self):
        """Return self."""
    def twice(self):
        """Class docstring{pad}."""
'''


def _library(root: Path) -> Path:
    pad = " and some more prose" * 8
    (root / "pydoc_data").mkdir(parents=True)
    (root / "pydoc_data" / "topics.py").write_text(f"topics = {{'b': 'topic b{pad}', 'a': 'topic a{pad}'}}\n")
    for name in ("one.py", "test/two.py", "site-packages/three.py", "pkg/tests/four.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SOURCE.format(pad=pad) if name == "one.py" else f'"""{name}{pad}."""\n')
    (root / "broken.py").write_text("def (:\n")
    (root / "latin.py").write_bytes(b'"""\xff"""')
    (root / "half.py").write_text(f'"""half of a pair \\ud800{pad}"""\n')
    return root


def test_documents_are_cleaned_ordered_once_and_without_tests(tmp_path: Path) -> None:
    texts = pydocs.read_standard_library(_library(tmp_path))
    starts = [text.split(" and some")[0] for text in texts]
    assert starts == ["topic a", "topic b", "half of a pair ?", "Module docstring", "First line", "Class docstring"]
    assert texts[4].endswith("\n\n    indented line\nlast line\n\n")


@pytest.mark.parametrize("damage", ["", "not json", '{"sha256": "0", "texts": ["x"]}', "[]", '{"texts": 3}'])
def test_a_damaged_cache_is_built_anew(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path))
    long = [f"document {i} " + "words " * 40 for i in range(400)]
    monkeypatch.setattr(pydocs, "read_standard_library", lambda root: long)
    pydocs.cache_file().write_text(damage)
    splits = pydocs.load_pydocs()
    assert sum(len(split.texts) for split in splits.values()) == 400
    assert json.loads(pydocs.cache_file().read_text())["texts"] == long
    assert [path.name for path in tmp_path.iterdir()] == [pydocs.cache_file().name]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("NORMLAB_CACHE", str(blocked / "sub"))
    monkeypatch.setattr(pydocs, "read_standard_library", lambda root: ["words " * 40 + str(i) for i in range(400)])
    assert len(pydocs.load_pydocs()["train"].texts) > 300
    assert os.listdir(tmp_path) == ["file"]


def test_a_python_without_sources_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(pydocs, "read_standard_library", lambda root: [])
    with pytest.raises(InputError, match="no sources of its standard library"):
        pydocs.load_pydocs()
    # Nothing worth keeping: the next Python update may bring the sources.
    assert not pydocs.cache_file().exists()
