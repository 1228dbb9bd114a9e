"""Time and memory of a training step.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from normlab.data.batches import Batch
from normlab.models.recurrent import Recurrent
from normlab.norms.base import GatheredPenalties
from normlab.probes.base import Measurement, Probe, Row, Subject, prediction_nats
from normlab.probes.sites import on_reference
from normlab.recurrence import graphs

__all__ = ["Cost", "SavedBytes"]


class SavedBytes:
    """Counts what is kept for backward while the context is open: each storage once, `apart` left out.

    `bytes` is complete once it is closed.
    """

    def __init__(self, apart: list[Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in apart}
        self._kept: list[Tensor] = []
        self.bytes = 0
        self._leased = graphs.leased_bytes()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._kept.append(tensor.detach())  # so that no other storage takes its address
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)
        self.bytes += graphs.leased_bytes() - self._leased
        self._kept.clear()


@dataclass(frozen=True)
class Cost(Probe):
    """Seconds and bytes of one training step: forward, backward and the optimizer (AdamW), in fp32.

    seconds_per_step is the median after one step to warm up. On a CPU peak_bytes is what a step holds at the end of
    its forward pass (parameters, gradients, optimizer state, buffers, and saved_bytes for backward); on a GPU the
    most that was allocated. The recurrence's backend stands in the rows; seconds_per_step_reference is that of the
    plain loop.

    Args:
        steps: timed.
    """

    timed: ClassVar[bool] = True
    steps: int = 5

    def __post_init__(self) -> None:
        self.require_positive("steps")

    def measure(self, subject: Subject) -> Measurement:
        model = subject.model.train()
        parameters, buffers = list(model.parameters()), list(model.buffers())
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0)
        on_gpu = subject.device.type == "cuda"
        if on_gpu:
            # What training or another model left behind is none of this one's.
            graphs.release()
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
        taken = subject.batches("train", self.steps + 1, train=True)
        batches = list(itertools.islice(itertools.cycle(taken), self.steps + 1))
        rows = self._timed_steps(subject, model, optimizer, batches)
        allocated = torch.cuda.max_memory_allocated() if on_gpu else 0
        # Counted in a step of its own: counting takes time.
        with SavedBytes([*parameters, *buffers]) as counted:
            loss = prediction_nats(model(*taken[0].model_inputs()).logits, taken[0]).mean()
        saved = counted.bytes
        del loss
        own, states = _bytes(parameters), [v for s in optimizer.state.values() for v in s.values()]
        peak = 2 * own + _bytes(buffers) + _bytes([v for v in states if isinstance(v, Tensor)]) + saved
        summary = {
            "seconds_per_step": _median_seconds(rows),
            "peak_bytes": allocated or peak,
            "saved_bytes": saved,
            "parameter_bytes": own,
            "buffer_bytes": _bytes(buffers),
        }
        if any(isinstance(part, Recurrent) for part in model.modules()):
            with on_reference(model):
                loop = self._timed_steps(subject, model, optimizer, batches)
            summary["seconds_per_step_reference"] = _median_seconds(loop)
            rows += loop
        return Measurement(summary, rows)

    def _timed_steps(
        self, subject: Subject, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Batch]
    ) -> list[Row]:
        on_gpu = subject.device.type == "cuda"
        backend = _backend(model, subject.device)
        rows: list[Row] = []
        for step, batch in enumerate(batches):
            if on_gpu:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            with GatheredPenalties(model) as penalties:
                output = model(*batch.model_inputs())
            total = penalties.total()
            loss = prediction_nats(output.logits, batch).mean()
            (loss if total is None else loss + total).backward()
            optimizer.step()
            optimizer.zero_grad()
            if on_gpu:
                torch.cuda.synchronize()
            if step:
                rows.append({"step": step - 1, "seconds": time.perf_counter() - begin, "backend": backend})
        return rows


def _median_seconds(rows: Sequence[Row]) -> float:
    return statistics.median(float(row["seconds"]) for row in rows)  # pyright: ignore[reportArgumentType]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _backend(model: nn.Module, device: torch.device) -> str:
    """Of the recurrence; empty if there is none."""
    found = [part.backend_choice(device.type)[0] for part in model.modules() if isinstance(part, Recurrent)]
    return found[0] if found else ""
