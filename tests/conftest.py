"""Tiny texts and tiny runs that every room's tests share."""

from __future__ import annotations

import base64
import gc
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Two pytest workers on two cores: more threads only fight. Set before torch is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"
os.environ.pop("WANDB_API_KEY", None)

from normlab.config import RunConfig, config_from_dict

# Imports of torch, Lightning and transformers make no garbage, and to look for it would take a fifth of their time.
gc.disable()

WORDS = [
    "the",
    "a",
    "norm",
    "layer",
    "of",
    "batch",
    "mean",
    "and",
    "variance",
    "over",
    "time",
    "step",
    "is",
    "was",
    "not",
    "very",
    "good",
    "bad",
    "state",
    "cell",
    "gate",
]


def pytest_collection_finish() -> None:
    """From here on garbage is looked for, but less often than else, and not among all that was imported."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 20,000 characters of sentences from a small grammar of 21 words."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) + "." for _ in range(500)]
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 labelled texts of 1 to 12 words; the label says which of two words is in the text."""
    draw = random.Random(1)
    rows = ["text,label"]
    for number in range(300):
        words = draw.choices(WORDS[:10], k=draw.randint(0, 11))
        words.insert(draw.randint(0, len(words)), ("good", "bad")[number % 2])
        rows.append(f"{' '.join(words)},{('yes', 'no')[number % 2]}")
    path = tmp_path_factory.mktemp("labels") / "tiny.csv"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def files_with() -> Callable[[Path, str], list[Path]]:
    """Gives the files below a folder that hold a secret in their name or content, as it is or as HTTP sends it."""

    def search(folder: Path, secret: str) -> list[Path]:
        forms = [secret.encode(), secret.encode().hex().encode()]
        for before in ("", "api:", "user:", ":"):  # base64 without its last digits, which depend on what follows
            forms.append(base64.b64encode((before + secret).encode())[4:-4])
        found = [path for path in folder.rglob("*") if path.is_file()]
        return [path for path in found if any(form in path.name.encode() + path.read_bytes() for form in forms)]

    return search


@pytest.fixture
def tiny_run(tiny_text: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """Builds the config of a run of a second; keyword arguments are dotted fields with `__` for the dot."""

    def build(**changes: Any) -> RunConfig:
        values: dict[str, Any] = {
            "model": {"name": changes.pop("model", "lstm"), "width": 16},
            "data": {"corpus": str(tiny_text), "batch_size": 8, "length": 12},
            "training": {"steps": 10, "valid_every": 5, "checkpoint_every": 5, "activations_every": 5, "threads": 1},
            "output": {"runs_dir": str(tmp_path / "runs"), "wandb": "off", "progress": False},
        }
        for name, value in changes.items():
            *groups, field = name.split("__")
            place = values
            for group in groups:
                place = place.setdefault(group, {})
            place[field] = value
        return config_from_dict(values)

    return build


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
