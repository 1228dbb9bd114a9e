"""Gradient norms by layer and by time lag, of a run or of a net that was never trained.

Shape suffixes: B batch, T time, F features, H hidden.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.config import InputError, LSTMSites, SiteConfig, require_choice
from normlab.data.batches import Batch
from normlab.models.lstm_model import CELLS, LSTMModel
from normlab.models.recurrent import Recurrent, RecurrentState
from normlab.models.transformer import TransformerModel
from normlab.norms import build_norm
from normlab.probes.base import Measurement, Probe, Row, Subject, prediction_nats
from normlab.probes.sites import freeze_stored, layer_of, set_norms_training

__all__ = ["GradientFlow", "decay", "hidden_gradients"]

CLASSES = 10


@dataclass(frozen=True)
class GradientFlow(Probe):
    """Norms of d loss_T / d h_t, the loss of the last time step by the outputs of a layer at each one before it.

    Norms are taken per example and averaged; a lag is T - t. log10_decay_per_step is the slope of log10 of the norm by
    lag (least squares): below 0 gradients vanish, above they explode. Norms are in training mode, without dropout.

    On a run (language models): training windows; of a recurrence h is the last layer's, of a Transformer the outputs of
    every block; beside them the gradients of the mean loss by the parameters of each layer. Without a run: an untrained
    net with orthogonal recurrent matrices, zero biases (forget gate of an LSTM: 1) and one layer reads `length`
    standard normal numbers, and the loss is that of random classes read off its last output (after figure 1 of
    Cooijmans et al. 2016, arXiv 1603.09025).

    Args:
        batches: of a run, at its batch size.
        net: untrained: lstm, gru, rnn_tanh or rnn_relu.
        norm: untrained: at all its sites.
        length: untrained: time steps T.
        width: untrained: hidden units.
        batch: untrained: rows.
        gain: untrained: initial gains to sweep, such as "0.1,1"; empty takes the published one of the norm.
        seed: untrained: of weights and data.
    """

    runs: ClassVar[tuple[int, int | None]] = (0, 1)
    batches: int = 1
    net: str = "rnn_tanh"
    norm: str = "bn_step"
    length: int = 784
    width: int = 100
    batch: int = 32
    gain: str = "0.1"
    seed: int = 0

    def __post_init__(self) -> None:
        self.require_positive("batches", "width", "batch")
        require_choice("net", self.net, CELLS)
        if self.length < 2:
            raise InputError(f"--length of the probe {self.name} is {self.length}; it must be at least 2")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed of the probe {self.name} is {self.seed}; it must be from 0 to 2^63 - 1")
        if self._gains() != [None] and build_norm(self.norm, self.width).weight is None:
            raise InputError(f"the norm {self.norm} has no gain to set; add --gain= to the probe {self.name}")

    def require_runs(self, count: int) -> None:
        """As `Probe.require_runs`; raise `InputError` too if an option is set that would do nothing."""
        super().require_runs(count)
        for field in dataclasses.fields(self):
            if (field.name == "batches") != (count > 0) and getattr(self, field.name) != field.default:
                of = "an untrained net and does nothing with" if count else "a run and does nothing without"
                raise InputError(f"--{field.name} of the probe {self.name} is for {of} a run; leave it out")

    def measure(self, *subjects: Subject) -> Measurement:
        return self._of_run(subjects[0]) if subjects else self._untrained()

    def _of_run(self, subject: Subject) -> Measurement:
        model = subject.model
        if not subject.is_language_model or not isinstance(model, LSTMModel | TransformerModel):
            raise InputError("gradient_flow measures language models of ours: the LSTM or the Transformer, or no run")
        set_norms_training(model)
        freeze_stored(model)
        stateless = dataclasses.replace(subject.config.data, stream="windows")
        subject = dataclasses.replace(subject, config=dataclasses.replace(subject.config, data=stateless))
        batches = subject.batches("train", self.batches, train=True)
        of_model = _lstm_gradients if isinstance(model, LSTMModel) else _transformer_gradients
        by_layer_LT = torch.stack([of_model(model, batch) for batch in batches]).mean(0)  # pyright: ignore[reportArgumentType]
        top = by_layer_LT.shape[0] if isinstance(model, TransformerModel) else model.lstm.num_layers
        layers = range(top - by_layer_LT.shape[0], top)
        rows = [row for layer, norms_T in zip(layers, by_layer_LT, strict=True) for row in _lag_rows(norms_T, layer)]
        summary = decay(by_layer_LT[0])
        if isinstance(model, TransformerModel):
            total = by_layer_LT.square().sum(-1).sqrt()
            summary |= {f"block_gradient_norm.{layer}": float(value) for layer, value in enumerate(total)}
        by_parameters = _parameter_gradients(subject, batches[0])
        summary |= {f"parameter_gradient_norm.{layer}": norm for layer, norm in by_parameters.items()}
        rows += [{"kind": "parameters", "layer": k, "gradient_norm": norm} for k, norm in by_parameters.items()]
        return Measurement(summary, rows)

    def _untrained(self) -> Measurement:
        summary: dict[str, float] = {}
        rows: list[Row] = []
        for gain in self._gains():
            torch.manual_seed(self.seed)
            cell = self._cell(gain)
            x_TBF = torch.randn(self.length, self.batch, 1)
            head = nn.Linear(self.width, CLASSES)
            labels_B = torch.randint(CLASSES, (self.batch,))
            norms_T = hidden_gradients(
                cell, x_TBF, None, lambda h, head=head, y=labels_B: F.cross_entropy(head(h), y, reduction="sum")
            )
            suffix = "" if gain is None else f".gain_{gain:g}"
            summary |= {f"{name}{suffix}": value for name, value in decay(norms_T).items()}
            rows += [{**row, "gain": gain} for row in _lag_rows(norms_T, 0)]
        return Measurement(summary, rows)

    def _cell(self, gain: float | None) -> Recurrent:
        site = SiteConfig(gain=gain)
        sites = LSTMSites(site, site, site) if self.net == "lstm" else LSTMSites(site, site)
        cell = CELLS[self.net](1, self.width, norm=self.norm, sites=sites, max_steps=self.length)
        with torch.no_grad():
            for name, parameter in cell.named_parameters(recurse=False):
                if name.startswith("weight_hh"):
                    for block in parameter.split(self.width):
                        nn.init.orthogonal_(block)
                elif name.startswith("bias"):
                    parameter.zero_()
            if self.net == "lstm":
                cast(Tensor, cell.bias_ih_l0)[self.width : 2 * self.width] = 1
        return cell

    def _gains(self) -> list[float | None]:
        if not self.gain.strip():
            return [None]
        try:
            gains = [float(part) for part in self.gain.split(",")]
        except ValueError:
            gains = [math.nan]  # refused below
        if not all(math.isfinite(gain) for gain in gains):
            raise InputError(f"--gain of the probe {self.name} is {self.gain!r}; give numbers, such as 0.1,1")
        return [*gains]


def hidden_gradients(
    cell: Recurrent, x_TBF: Tensor, state: RecurrentState | None, loss_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Mean over rows of |d loss / d h_t|, T, for the last layer's h of every time step.

    Args:
        cell: its stored values stay as they are from here on.
        state: before the first time step.
        loss_of: takes the last layer's last h, B x H, and gives the loss, summed over rows.
    """
    freeze_stored(cell)  # or each call would count as a sequence of its own
    states: list[Tensor] = []
    for x_BF in x_TBF:
        # One time step at a time, so that every h has a place in the graph.
        step = x_BF.unsqueeze(1) if cell.batch_first else x_BF.unsqueeze(0)
        _, state = cell(step, state)
        assert state is not None
        # A HiddenState is h itself; what `tensors` makes of it is not what the next step starts from.
        states.append(state if isinstance(state, Tensor) else state.tensors[0])
    gradients = torch.autograd.grad(loss_of(states[-1][-1]), states)
    return torch.stack([gradient[-1].double().norm(dim=-1).mean() for gradient in gradients])


def _lstm_gradients(model: LSTMModel, batch: Batch) -> Tensor:
    assert batch.targets_BT is not None
    targets_B = batch.targets_BT[:, -1]
    x_TBF = model.embedding(batch.tokens_BT).transpose(0, 1)
    state = model.initial_state(len(targets_B))
    return hidden_gradients(
        model.lstm, x_TBF, state, lambda h: F.cross_entropy(model.head(h), targets_B, reduction="sum")
    ).unsqueeze(0)


def _transformer_gradients(model: TransformerModel, batch: Batch) -> Tensor:
    """Layers x T."""
    assert batch.targets_BT is not None
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, y_BTF: Tensor) -> None:
        outputs.append(y_BTF)

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    logits = model(batch.tokens_BT).logits[:, -1]
    for hook in hooks:
        hook.remove()
    gradients = torch.autograd.grad(F.cross_entropy(logits, batch.targets_BT[:, -1], reduction="sum"), outputs)
    return torch.stack([gradient.double().norm(dim=-1).mean(0) for gradient in gradients])


def _parameter_gradients(subject: Subject, batch: Batch) -> dict[int, float]:
    """Norm of the gradient of the mean loss by the parameters of each layer."""
    named = dict(subject.model.named_parameters())
    loss = prediction_nats(subject.model(*batch.model_inputs()).logits, batch).mean()
    squares: dict[int, float] = {}
    for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True):
        own = re.search(r"_l(\d+)(?:_reverse)?$", name)  # torch's names in a recurrent module
        layer = int(own[1]) if own else layer_of(name)
        if layer >= 0 and gradient is not None:
            squares[layer] = squares.get(layer, 0.0) + float(gradient.double().square().sum())
    return {layer: math.sqrt(square) for layer, square in sorted(squares.items())}


def _lag_rows(norms_T: Tensor, layer: int) -> list[Row]:
    last = len(norms_T) - 1
    return [
        {"kind": "lag", "layer": layer, "lag": last - t, "gradient_norm": norm}
        for t, norm in enumerate(norms_T.tolist())
    ]


def decay(norms_T: Tensor) -> dict[str, float]:
    """Ends, ratio and slope of the norms at every time step."""
    norms_T = norms_T.cpu()
    first, last = float(norms_T[0]), float(norms_T[-1])
    lag_T = torch.arange(len(norms_T), dtype=torch.float64).flip(0)
    alive = norms_T > 0  # not underflown
    lag, level = lag_T[alive], norms_T[alive].log10()
    deviation = lag - lag.mean()
    return {
        "gradient_norm_first": first,
        "gradient_norm_last": last,
        "gradient_ratio": first / last if last else math.nan,
        "log10_decay_per_step": float((deviation * level).sum() / deviation.square().sum()),
    }
