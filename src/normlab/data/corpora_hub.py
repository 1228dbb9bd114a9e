"""Named corpora from the Hugging Face hub: the only importer of `datasets`, and only when one is asked for.

Each converter returns the same official splits, texts and label order as the reader of the files.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from normlab.config import InputError
from normlab.data.splits import Split

__all__ = ["HUB", "HubSource", "installed", "read_hub"]

PARQUET = "refs/convert/parquet"
"""The hub's own conversion of a dataset that still has a loading script, which `datasets` 4 and later refuse to run."""

CONNECT_SECONDS = 4.0
TEXT8_PREFIX_CHARACTERS = 6_877_825

Splits = dict[str, Split]
THREE = {"train": "train", "valid": "validation", "test": "test"}
TWO = {"train": "train", "test": "test"}


@dataclass(frozen=True)
class HubSource:
    """Where a corpus lies on the hub and how its rows become splits."""

    id: str
    convert: Callable[[Any], Splits]
    config: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        config = f", config {self.config}" if self.config else ""
        return f"{self.id}{config}" + (f"@{self.revision}" if self.revision else "")


def _column(rows: Any, name: str) -> list[Any]:
    return list(rows[name])


def _lines(column: str) -> Callable[[Any], Splits]:
    def convert(data: Any) -> Splits:
        return {
            ours: Split(("".join(line.strip() + "\n" for line in _column(data[theirs], column)),))
            for ours, theirs in THREE.items()
        }

    return convert


def _labelled(text: str, label: str, names: Mapping[str, str]) -> Callable[[Any], Splits]:
    def convert(data: Any) -> Splits:
        return {
            ours: Split(
                tuple(value.strip() for value in _column(data[theirs], text)),
                tuple(int(value) for value in _column(data[theirs], label)),
            )
            for ours, theirs in names.items()
        }

    return convert


def _joined_text8(data: Any) -> str:
    return "".join("".join(_column(data[name], "text")) for name in ("train", "validation", "test") if name in data)


def _text8_prefix(data: Any) -> Splits:
    return {"all": Split((_joined_text8(data)[:TEXT8_PREFIX_CHARACTERS],))}


def _newsgroups(data: Any) -> Splits:
    names = sorted(set(_column(data["train"], "label_text")))
    return {
        split: Split(
            tuple(text.strip() for text in _column(data[split], "text")),
            tuple(names.index(name) for name in _column(data[split], "label_text")),
        )
        for split in TWO
    }


def _wic(data: Any) -> Splits:
    return {
        ours: Split(tuple(map(_wic_text, data[theirs])), _gold(_column(data[theirs], "label")))
        for ours, theirs in THREE.items()
    }


def _wic_text(row: Mapping[str, Any]) -> str:
    """Character offsets of the target become positions among the words of the (untokenised) sentence."""
    positions = [len(row[f"sentence{n}"][: row[f"start{n}"]].split()) for n in (1, 2)]
    return "\t".join(
        (row["word"], f"{positions[0]}-{positions[1]}", row["sentence1"].strip(), row["sentence2"].strip())
    )


def _gold(labels: Iterable[int]) -> tuple[int, ...] | None:
    values = tuple(int(label) for label in labels)
    return None if min(values, default=0) < 0 else values  # -1 stands for a label that is kept secret


def _multi30k(data: Any) -> Splits:
    return {
        ours: Split(
            tuple(
                f"{source.strip()}\t{target.strip()}"
                for source, target in zip(_column(data[theirs], "en"), _column(data[theirs], "de"), strict=True)
            )
        )
        for ours, theirs in THREE.items()
    }


PTB = HubSource("ptb-text-only/ptb_text_only", _lines("sentence"), "penn_treebank", PARQUET)
HUB: Mapping[str, HubSource] = {
    "ptb": PTB,
    "ptb_char": PTB,
    "wikitext-2": HubSource("Salesforce/wikitext", _lines("text"), "wikitext-2-v1"),
    "wikitext-103": HubSource("Salesforce/wikitext", _lines("text"), "wikitext-103-v1"),
    "text8-prefix": HubSource("afmck/text8", _text8_prefix),
    "sst2": HubSource("SetFit/sst2", _labelled("text", "label", THREE)),
    # The test labels of GLUE are secret; its development set is the test split here.
    "sst2_glue": HubSource(
        "stanfordnlp/sst2", _labelled("sentence", "label", {"train": "train", "test": "validation"})
    ),
    "imdb": HubSource("stanfordnlp/imdb", _labelled("text", "label", TWO)),
    "ag_news": HubSource("fancyzhx/ag_news", _labelled("text", "label", TWO)),
    "trec": HubSource("CogComp/trec", _labelled("text", "coarse_label", TWO)),
    "20newsgroups": HubSource("SetFit/20_newsgroups", _newsgroups),
    "wic": HubSource("aps/super_glue", _wic, "wic"),
    "multi30k": HubSource("bentrevett/multi30k", _multi30k),
}


def installed() -> bool:
    """Whether the `datasets` library is there, without importing it."""
    return importlib.util.find_spec("datasets") is not None


def read_hub(name: str, hint: str) -> Splits:
    """The official splits of a named corpus, from the hub or from its local cache.

    Args:
        name: a key of `HUB`.
        hint: how else to get the corpus; ends the one line of the `InputError` when nothing can be had.
    """
    source = HUB[name]
    if not installed():
        raise InputError(f"corpus {name!r}: the datasets library is not installed; {hint}")
    _set_patience()
    import datasets

    try:
        with _quiet(datasets):
            try:
                data = datasets.load_dataset(source.id, source.config, revision=source.revision)
            except RuntimeError as error:
                if "script" not in str(error):
                    raise
                data = datasets.load_dataset(source.id, source.config, revision=PARQUET)
    except _hub_errors() as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise InputError(f"corpus {name!r}: cannot get {source} from the hub ({reason}); {hint}") from error
    try:
        return source.convert(data)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"corpus {name!r}: {source} has changed its columns ({error}); {hint}") from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """What an unknown id, no network or a broken answer can raise; the client's own errors share no base class."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub import errors

    own = [
        getattr(errors, name)
        for name in ("HTTPError", "XetDownloadError", "EntryNotFoundError")
        if hasattr(errors, name)
    ]
    return (OSError, RuntimeError, ValueError, LookupError, DatasetsError, *own)


def _set_patience() -> None:
    """Short timeouts, and offline mode (cache only) where the hub cannot be reached; set before the libraries load."""
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "4")
    os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", "10")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if "HF_HUB_OFFLINE" not in os.environ and not _reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"


def _reachable() -> bool:
    """Whether the hub (or, where one is set, the proxy in its place: not looked into) answers a connection."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _quiet(datasets: Any) -> Any:
    """No bars of the library's own between ours."""
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            datasets.utils.logging.enable_progress_bar()
