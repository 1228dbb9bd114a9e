"""Tiny models on tiny texts, as subjects of probes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from normlab.config import RunConfig
from normlab.data.prepared import prepare
from normlab.data.splits import Corpus, Split
from normlab.probes import senses
from normlab.probes.base import Subject
from normlab.training.module import build_model

WIC_PAIRS = [
    ("state\t1-0\tthe state of time\tstate of the batch", 1),
    ("mean\t0-1\tmean of norm\tvery mean and bad", 0),
    ("layer\t1-3\ta layer is good\tthe norm of layer state", 1),
    ("aloft\t0-1\taloft of\ta aloft norm", 0),
    ("gate\t2-1\tstep and gate\tthe gate was not very good", 0),
]


@pytest.fixture
def subject(tiny_run: Callable[..., RunConfig]) -> Callable[..., Subject]:
    """Builds the subject of an untrained run whose gains and stored statistics are no longer at their first values."""

    def build(**changes: Any) -> Subject:
        config = tiny_run(**changes)
        text = prepare(config.data)

        def checkpoint(name: str) -> torch.nn.Module:
            torch.manual_seed(zlib.crc32(name.encode()))
            model = build_model(config, text)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
                for buffer in model.buffers():
                    if buffer.is_floating_point():
                        buffer += 0.1 * torch.rand_like(buffer)
            return model

        return Subject("run", config, text, checkpoint("final"), checkpoint)

    return build


@pytest.fixture
def wic(monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Word-in-Context in five pairs, in place of the real one."""
    texts, labels = zip(*WIC_PAIRS, strict=True)
    corpus = Corpus("wic", "wic", {"valid": Split(texts, labels)}, ("F", "T"), "word", "", "")
    monkeypatch.setattr(senses, "load_corpus", lambda data: corpus)
    return corpus
