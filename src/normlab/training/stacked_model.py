"""Models of one architecture as one: parameters, stored statistics and optimizer state with a leading run axis.

Products become batched products, and every other operator does the work of all runs in one call. No run sees another:
not in a gradient, not in a statistic, not when one of them is no longer a number.

Shape suffixes: R runs, B batch, T time, V vocabulary, C classes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.attention import SDPBackend, sdpa_kernel

from normlab.config import OptimConfig
from normlab.data.batches import Batch
from normlab.data.prepared import PreparedText
from normlab.models.recurrent import Recurrent
from normlab.norms.base import GatheredPenalties
from normlab.training.optim import build_optimizer

__all__ = ["RunLosses", "StackedModel", "StepNumbers"]

LARGEST_EVALUATION = 2**26
"""Scores held at once in evaluation, over all runs: 256 MiB in fp32."""


class RunLosses(NamedTuple):
    """Sums over the predictions of one batch, each R."""

    nats: Tensor
    predictions: Tensor
    correct: Tensor


class StepNumbers(NamedTuple):
    """Of one training step, each R: mean loss, penalty of the norms (None if there is none), and gradient norm before
    clipping."""

    loss_nats: Tensor
    penalty_nats: Tensor | None
    gradient_norm: Tensor


class StackedModel:
    """The models of several runs, trained together; each does what it would do by itself, within rounding.

    Args:
        models: of one architecture, on one device, each with the weights that its run begins with. They are copied.
        optim: what the runs have in common; its `lr` is not looked at.
        text: what they are trained on, for its task and its sizes.
    """

    def __init__(self, models: Sequence[nn.Module], optim: OptimConfig, text: PreparedText) -> None:
        self.optim = optim
        self.is_classifier = text.task == "classification"
        self._scores = len(text.classes) if text.classes is not None else text.vocabulary
        self._one = copy.deepcopy(models[0])  # what is computed; with whose values is said in each call
        for part in self._one.modules():
            if isinstance(part, Recurrent):
                part.backend = "reference"  # kernels do not know the run axis
        parameters, buffers = stack_module_state(list(models))
        self.parameters = cast(dict[str, nn.Parameter], parameters)
        self.buffers = dict(buffers)
        self._may_have_penalties = True  # until the first training batch shows that no norm gives any
        self._apart: list[tuple[list[int], dict[str, Tensor]]] = []
        self._build_optimizer()

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def _build_optimizer(self) -> None:
        # At rate 1: an update is proportional to the rate, so each run takes its own share of it afterwards.
        self._optimizer = build_optimizer(self._one, dataclasses.replace(self.optim, lr=1.0), self.parameters)
        self._ordered = [p for group in self._optimizer.param_groups for p in group["params"]]

    def step(self, batches: Sequence[Batch], rates: Sequence[float]) -> StepNumbers:
        """One optimizer step of each run on its batch, at its learning rate."""
        self._one.train()
        losses, penalties = self._losses(batches)
        total = losses.sum() if penalties is None else losses.sum() + penalties.sum()
        total.backward()
        for places, buffers in self._apart:  # now, because a norm may also write in its backward pass
            for name, value in buffers.items():
                self.buffers[name][places] = value
        self._apart.clear()
        norms = self._clip()
        self._update(torch.tensor(rates, dtype=norms.dtype, device=self.device))
        return StepNumbers(losses.detach(), None if penalties is None else penalties.detach(), norms)

    def _losses(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor | None]:
        """Mean loss of each run, and the penalties of its norms."""
        groups = _alike(batches, rows_alone=not self._may_have_penalties)
        if len(groups) == 1:
            return self._losses_of(_joined(batches, self.device), self.parameters, self.buffers)
        found: list[tuple[Tensor, Tensor | None]] = []
        for places in groups:
            # Indexed, they are copies: gradients flow back by themselves, stored statistics are put back.
            parameters = {name: value[places] for name, value in self.parameters.items()}
            buffers = {name: value[places] for name, value in self.buffers.items()}
            found.append(self._losses_of(_joined([batches[i] for i in places], self.device), parameters, buffers))
            self._apart.append((places, buffers))
        order = torch.tensor([place for places in groups for place in places], device=self.device).argsort()
        penalties = [penalty for _, penalty in found if penalty is not None]
        return torch.cat([loss for loss, _ in found])[order], torch.cat(penalties)[order] if penalties else None

    def _losses_of(
        self, batch: Batch, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        logits, *penalties = self._mapped(self._forward_with_penalties, 0)(
            parameters, buffers, batch.tokens_BT, batch.mask_BT
        )
        self._may_have_penalties = bool(penalties)
        losses = self._run_losses(logits, batch)
        return losses.nats / losses.predictions, penalties[0] if penalties else None

    def _forward_with_penalties(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], tokens_BT: Tensor, mask_BT: Any
    ) -> tuple[Tensor, ...]:
        with GatheredPenalties(self._one) as penalties:
            logits = self._forward(parameters, buffers, tokens_BT, mask_BT)
        total = penalties.total()
        return (logits,) if total is None else (logits, total)

    def _forward(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], tokens_BT: Tensor, mask_BT: Any
    ) -> Tensor:
        return functional_call(self._one, (dict(parameters), dict(buffers)), (tokens_BT, mask_BT)).logits

    def _mapped(
        self, forward: Callable[..., Any], batch_dim: int | None, chunk: int | None = None
    ) -> Callable[..., Any]:
        """`forward` over the runs; `batch_dim` is None if all of them see the same batch."""

        def call(parameters: Any, buffers: Any, tokens: Tensor, mask: Tensor | None) -> Any:
            dims = (0, 0, batch_dim, None if mask is None else batch_dim)
            run = torch.vmap(forward, in_dims=dims, chunk_size=chunk)
            if tokens.device.type != "cpu":
                return run(parameters, buffers, tokens, mask)
            with sdpa_kernel(SDPBackend.MATH):  # the CPU's fused attention would be called run by run
                return run(parameters, buffers, tokens, mask)

        return call

    def _run_losses(self, logits: Tensor, batch: Batch) -> RunLosses:
        """Of logits R x B x T x V or R x B x C, and a batch with as many runs or one for all."""
        targets = batch.labels_B if self.is_classifier else batch.targets_BT
        assert targets is not None
        mask = None if self.is_classifier else batch.mask_BT
        runs = len(logits)
        targets = targets.expand(logits.shape[:-1])
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        nats = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
        right = logits.detach().argmax(-1) == targets
        if mask is None:
            count = torch.full((runs,), nats[0].numel(), device=nats.device)
        else:
            nats, right = nats.where(mask, 0), right & mask
            count = mask.expand(targets.shape).flatten(1).sum(1)
        return RunLosses(nats.flatten(1).sum(1), count, right.flatten(1).sum(1))

    def _clip(self) -> Tensor:
        """Clip the gradient of each run by its norm over all parameters, as torch.nn.utils.clip_grad_norm_; returns the
        norms before."""
        grads = [p.grad for p in self._ordered if p.grad is not None]
        each = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in grads])
        norms = torch.linalg.vector_norm(each, dim=0)
        if self.optim.clip:
            scale = (self.optim.clip / (norms + 1e-6)).clamp(max=1.0)
            for grad in grads:
                grad.mul_(_along_runs(scale, grad))
        return norms

    @torch.no_grad()
    def _update(self, rates: Tensor) -> None:
        before = [p.clone() for p in self._ordered]
        self._optimizer.step()
        for p, old in zip(self._ordered, before, strict=True):
            torch.addcmul(old, p - old, _along_runs(rates, p), out=p)
        self._optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> RunLosses:
        """Losses of all runs on one batch, in evaluation mode."""
        self._one.eval()
        batch = _on(batch, self.device)
        chunk = max(1, LARGEST_EVALUATION // (batch.tokens_BT.numel() * self._scores))
        logits = self._mapped(self._forward, None, min(chunk, len(self)))(
            self.parameters, self.buffers, batch.tokens_BT, batch.mask_BT
        )
        return self._run_losses(logits, batch)

    # Out of the stack, and into it.

    @torch.no_grad()
    def write(self, place: int, model: nn.Module) -> None:
        """Give `model` the parameters and stored statistics of the run at `place`."""
        for stacked, own in ((self.parameters, model.named_parameters()), (self.buffers, model.named_buffers())):
            for name, value in own:
                value.copy_(stacked[name][place])

    def optimizer_state(self, place: int) -> dict[int, dict[str, Any]]:
        """That of the run at `place`, as the `state` of a torch optimizer over its own parameters."""
        return {
            index: {
                key: value[place].clone() if _has_run_axis(key, value) else copy.deepcopy(value)
                for key, value in self._optimizer.state[p].items()
            }
            for index, p in enumerate(self._ordered)
            if p in self._optimizer.state
        }

    def load_optimizer_states(self, states: Sequence[Mapping[int, Mapping[str, Any]]]) -> None:
        """Take those of all runs, which must have done the same number of steps."""
        for index, values in states[0].items():
            p = self._ordered[index]
            self._optimizer.state[p] = {
                key: torch.stack([state[index][key] for state in states]).to(p.device)
                if _has_run_axis(key, value)
                else copy.deepcopy(value)
                for key, value in values.items()
            }

    def keep(self, places: Sequence[int]) -> None:
        """Go on with the runs at these places alone."""
        states = [self.optimizer_state(place) for place in places]
        rows = torch.tensor(places, device=self.device)
        self.parameters = {name: nn.Parameter(value.detach()[rows]) for name, value in self.parameters.items()}
        self.buffers = {name: value[rows] for name, value in self.buffers.items()}
        self._build_optimizer()
        self.load_optimizer_states(states)


def _has_run_axis(key: str, value: Any) -> bool:
    return isinstance(value, Tensor) and key != "step"


def _along_runs(value_R: Tensor, like: Tensor) -> Tensor:
    return value_R.view(-1, *[1] * (like.ndim - 1))


def _alike(batches: Sequence[Batch], *, rows_alone: bool) -> list[list[int]]:
    """Places of batches that can be stacked: with as many rows, and where a norm gives penalties (they are means over
    time steps) with as many time steps; else shorter ones are padded."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, batch in enumerate(batches):
        rows, steps = batch.tokens_BT.shape
        groups.setdefault((rows,) if rows_alone else (rows, steps), []).append(place)
    return list(groups.values())


def _joined(batches: Sequence[Batch], device: torch.device) -> Batch:
    """Batches of as many rows with a leading run axis; shorter ones are padded to the longest."""
    longest = max(batch.tokens_BT.shape[1] for batch in batches)
    is_padded = any(batch.mask_BT is not None or batch.tokens_BT.shape[1] < longest for batch in batches)

    def stacked(values: Iterator[Any]) -> Tensor:
        found = [F.pad(value, (0, longest - value.shape[1])) if value.ndim == 2 else value for value in values]
        return torch.stack(found).to(device, non_blocking=True)

    def masks() -> Iterator[Tensor]:
        for batch in batches:
            yield torch.ones_like(batch.tokens_BT, dtype=torch.bool) if batch.mask_BT is None else batch.mask_BT

    return Batch(
        stacked(batch.tokens_BT for batch in batches),
        stacked(masks()) if is_padded else None,
        None if batches[0].targets_BT is None else stacked(batch.targets_BT for batch in batches),
        None if batches[0].labels_B is None else stacked(batch.labels_B for batch in batches),
    )


def _on(batch: Batch, device: torch.device) -> Batch:
    moved = {name: value.to(device) for name, value in batch._asdict().items() if value is not None}
    return batch._replace(**moved)
