"""The LightningModule: glue between a model, its task and any `pl.Trainer`.

Shapes: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from normlab.config import HuggingFaceConfig, LSTMConfig, MLPConfig, RunConfig
from normlab.data.batches import Batch
from normlab.data.prepared import PreparedText
from normlab.models.huggingface import HuggingFaceModel
from normlab.models.lstm_model import LSTMModel
from normlab.models.mlp import MLPModel
from normlab.models.output import ModelOutput
from normlab.models.recurrent import RecurrentState
from normlab.models.transformer import TransformerModel
from normlab.norms.base import GatheredPenalties
from normlab.tasks.losses import LOSSES, Losses
from normlab.tasks.metrics import language_metrics
from normlab.training.optim import build_optimizer, build_schedule

__all__ = ["TextModule", "build_model"]


def build_model(config: RunConfig, text: PreparedText) -> nn.Module:
    """The model that `config` describes, with the input and output sizes that `text` needs."""
    classes = len(text.classes) if text.classes is not None else None
    if isinstance(config.model, LSTMConfig):
        return LSTMModel(config.model, text.vocabulary, classes=classes, length=text.length)
    if isinstance(config.model, MLPConfig):
        return MLPModel(config.model, text.vocabulary, classes=classes, length=text.length)
    if isinstance(config.model, HuggingFaceConfig):
        return HuggingFaceModel(config.model, text.vocabulary, classes=classes, length=text.length)
    return TransformerModel(config.model, text.vocabulary, classes=classes, length=text.length)


class TextModule(pl.LightningModule):
    """Trains one model on one task; works in any `pl.Trainer`.

    Logs `train_loss_nats`, `gradient_norm`, `learning_rate`, `valid_*` and `test_*` (nats per prediction, bits per
    character and word perplexity, or accuracy). What is trained on is the loss plus the penalties of the norms that
    have one; `train_loss_nats` is the loss alone, which compares between norms, and `penalty_nats` the sum of the
    penalties. Gradients are clipped here, by `config.optim.clip`, so that the norm before clipping can be logged: leave
    the Trainer's own `gradient_clip_val` unset.

    Args:
        config: the run.
        text: the prepared text, for its sizes and for the counts that convert losses between units.

    Attributes:
        evaluated_split: what the batches of an evaluation come from: names its metrics and converts their units.
        statistics: "running" names the metrics of an evaluation `test_running_*`, for one with the running averages
            where there is another with re-estimated statistics.
    """

    def __init__(self, config: RunConfig, text: PreparedText) -> None:
        super().__init__()
        self.config = config
        self.text = text
        self.model = build_model(config, text)
        self.loss = LOSSES[text.task]
        self.carries_state = text.task == "language_modelling" and config.data.stream == "stateful"
        self.carried: RecurrentState | None = None
        self.evaluated_split = "valid"
        self.statistics: Literal["", "running"] = ""
        self.last_loss_nats = torch.tensor(0.0)
        self._micro_losses: list[Tensor] = []
        self._micro_penalties: list[Tensor] = []
        self._has_penalties = True  # until the first training batch shows that no norm gives any
        # Left to itself the metric drops what is no number, and a split with one lost batch would have a fine loss.
        self.nats = MeanMetric(nan_strategy=float("inf")).set_dtype(torch.float64)
        self.accuracy = MeanMetric().set_dtype(torch.float64)

    def outputs(self, batch: Batch) -> ModelOutput:
        """What the model says of one batch; in a stateful stream the recurrent state goes on from the batch before."""
        state = self.carried
        if state is not None and batch.fresh_B is not None and bool(batch.fresh_B.any()):
            state = cast(LSTMModel, self.model).restart(state, batch.fresh_B)
        output = self.model(batch.tokens_BT, batch.mask_BT, state)
        if self.carries_state:
            self.carried = output.state.detach()
        return output

    def losses(self, batch: Batch) -> Losses:
        """Loss sums of one batch, taken through the model by `outputs`."""
        output = self.outputs(batch)
        targets = batch.labels_B if self.text.task == "classification" else batch.targets_BT
        assert targets is not None
        return self.loss(output.logits, targets, batch.mask_BT)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        penalty = None
        if self._has_penalties:
            with GatheredPenalties(self.model) as penalties:
                loss = self.losses(batch).mean_nats
            penalty = penalties.total()
            self._has_penalties = penalty is not None or not self.model.training
        else:
            loss = self.losses(batch).mean_nats
        self._micro_losses.append(loss.detach())
        if penalty is None:
            return loss
        self._micro_penalties.append(penalty.detach())
        return loss + penalty

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        # Called once per optimizer step: the loss of the step is the mean over its micro-batches.
        self.last_loss_nats = torch.stack(self._micro_losses).mean()
        self._micro_losses.clear()
        self.log("train_loss_nats", self.last_loss_nats, prog_bar=True)
        if self._micro_penalties:
            self.log("penalty_nats", torch.stack(self._micro_penalties).mean())
            self._micro_penalties.clear()
        limit = self.config.optim.clip or float("inf")
        self.log("gradient_norm", torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self.log("learning_rate", optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, self.config.optim)
        scheduler = build_schedule(optimizer, self.config.optim, self.config.training.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # Evaluation: sums over the whole split, so that the grouping into batches does not matter.

    def on_validation_epoch_start(self) -> None:
        self._begin_evaluation()

    def on_test_epoch_start(self) -> None:
        self.evaluated_split = "test"
        self._begin_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation()

    def on_test_epoch_end(self) -> None:
        self._end_evaluation()
        self.evaluated_split = "valid"

    def _begin_evaluation(self) -> None:
        # The training stream goes on where it was once the evaluation is over.
        self._training_state, self.carried = self.carried, None
        self.nats.reset()
        self.accuracy.reset()

    def _evaluate(self, batch: Batch) -> None:
        losses = self.losses(batch)
        self.nats.update(losses.mean_nats.double(), losses.predictions)
        self.accuracy.update(losses.correct / losses.predictions, losses.predictions)

    def _end_evaluation(self) -> None:
        self.carried = self._training_state
        metrics = self.evaluation_metrics(float(self.nats.compute()), float(self.accuracy.compute()))
        exact = {name: torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()}
        self.log_dict(exact, prog_bar=self.evaluated_split == "valid")

    def evaluation_metrics(self, loss_nats: float, accuracy: float) -> dict[str, float]:
        """What an evaluation of `evaluated_split` logs, by name, of its mean loss and its share of right predictions
        (which is shown of a classifier alone)."""
        split = self.evaluated_split
        metrics = {"loss_nats": loss_nats}
        if self.text.task == "classification":
            metrics["accuracy"] = accuracy
        else:
            metrics |= language_metrics(self.text, split, loss_nats)
        prefix = f"{split}_{self.statistics}" if self.statistics else split
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    # What a checkpoint needs beside weights and optimizer for a resumed run to be the same run.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["normlab_random_state"] = torch.get_rng_state()
        if self.device.type == "cuda":  # asking CUDA on behalf of a run on a CPU would take memory on the GPU
            checkpoint["normlab_cuda_random_state"] = torch.cuda.get_rng_state(self.device)
        if self.carried is not None:
            checkpoint["normlab_carried_state"] = self.carried.to_dict()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        if "normlab_carried_state" in checkpoint:
            state_class = cast(LSTMModel, self.model).lstm.State
            self.carried = state_class.from_dict(checkpoint["normlab_carried_state"]).to(self.device)
        self._random_states = {key: value for key, value in checkpoint.items() if key.endswith("random_state")}

    def on_train_start(self) -> None:
        # Restored last, after Lightning has drawn whatever it draws while setting up.
        states = self.__dict__.pop("_random_states", {})
        if "normlab_random_state" in states:
            torch.set_rng_state(states["normlab_random_state"].cpu())
        if "normlab_cuda_random_state" in states and self.device.type == "cuda":
            torch.cuda.set_rng_state(states["normlab_cuda_random_state"].cpu(), self.device)
