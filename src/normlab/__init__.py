"""normlab: the same LSTM and the same Transformer, with the normalization of your choice at the same sites.

Everything here is imported on first use, so that `import normlab` and the checks of a config cost no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normlab.config import InputError as InputError
    from normlab.config import RunConfig as RunConfig
    from normlab.models.gru import GRU as GRU
    from normlab.models.lstm import LSTM as LSTM
    from normlab.models.rnn import RNN as RNN
    from normlab.models.swap import swap_norms as swap_norms
    from normlab.norms import build_norm as build_norm
    from normlab.norms.base import Norm as Norm
    from normlab.norms.recompute import recompute_statistics as recompute_statistics
    from normlab.records.record import RunRecord as RunRecord
    from normlab.training.datamodule import TextDataModule as TextDataModule
    from normlab.training.module import TextModule as TextModule
    from normlab.training.run import train as train

_HOMES = {
    "GRU": "normlab.models.gru",
    "InputError": "normlab.config",
    "LSTM": "normlab.models.lstm",
    "Norm": "normlab.norms.base",
    "RNN": "normlab.models.rnn",
    "RunConfig": "normlab.config",
    "RunRecord": "normlab.records.record",
    "TextDataModule": "normlab.training.datamodule",
    "TextModule": "normlab.training.module",
    "build_norm": "normlab.norms",
    "recompute_statistics": "normlab.norms.recompute",
    "swap_norms": "normlab.models.swap",
    "train": "normlab.training.run",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'normlab' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
