"""The interface of every norm and the properties it declares.

Shape suffixes: B batch, T time, F features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from normlab.config import InputError
from normlab.norms.fused import rescale
from normlab.norms.moments import Moments, Prefix, for_statistics, several_processes

Step = int | Tensor
"""Time step of a tensor's first column: one for all rows, or a LongTensor B with one per row."""


class Shares(NamedTuple):
    """Which entries of B x T x F share the training statistic of an entry (b, t, f).

    Attributes:
        batch: all rows, and not row b alone.
        time: time step t alone ("step"), all up to t ("prefix"), or all of them ("sequence").
        features: feature f alone ("one"), those near f ("window"), those of its group ("group"), or all of them.
    """

    batch: bool = False
    time: Literal["step", "prefix", "sequence"] = "step"
    features: Literal["one", "window", "group", "all"] = "one"


class Norm(nn.Module, ABC):
    """A normalization of B x T x F tensors over some set of entries.

    Finite input up to 1e30 in magnitude gives finite output and no NaN in gradients (beyond, sums and squares leave
    fp32, as in torch's own norms).

    Declared properties (contract tests check them in both directions); an option may decide one: then it is set per
    instance.

    Attributes:
        formula: what it computes, for tables.
        paper: where it was published.
        shares: the entries that can share a training statistic (fewer in ghost batches). From it follow
            `batch_independent` and `causal`.
        scale_invariant: norm(a x) = norm(x) for a > 0 in training, up to eps.
        shift_invariant: norm(x + a) = norm(x) in training, a the same for all features and entries.
        exact_gradient: backward is the derivative of forward in training.
        needs_statistics: keeps stored values for evaluation.
        works_at_batch_1: can train on a batch of one row.
        identity: does nothing; stands at bare sites.
        has_kernels: there are C kernels that take whole sequences (norms/kernels.py).
        per_step: stores values per time step, hence needs to know the time step.
        recurrent_gain: initial gain in a recurrent cell (0.1 is published for bn_step; other batch norms follow it).
        fixed_options: arguments of a class above that are no choice here.
        site: name of the site it stands at.

    Args:
        dim: number of features F.
        affine: learn a gain (`weight`) and, with `bias`, a `bias`.
        gain: initial value of `weight`.
        eps: added to the variance, inside the root; 0 where nothing is divided by one.
    """

    formula: ClassVar[str]
    paper: ClassVar[str]
    shares: Shares = Shares()
    scale_invariant: bool
    shift_invariant: bool
    exact_gradient: ClassVar[bool] = True
    needs_statistics: ClassVar[bool] = False
    works_at_batch_1: bool = True
    identity: ClassVar[bool] = False
    has_kernels: bool = False
    per_step: ClassVar[bool] = False
    recurrent_gain: ClassVar[float] = 1.0
    fixed_options: ClassVar[frozenset[str]] = frozenset()
    site: str = ""

    weight: Tensor | None
    bias: Tensor | None
    penalties: list[Tensor] | None = None
    """Where a norm in training puts the penalty of each training statistic; None = nobody asks."""

    def __init__(
        self, dim: int, *, affine: bool = True, bias: bool = True, gain: float = 1.0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.dim, self.gain, self.eps = dim, gain, eps
        self.weight = nn.Parameter(torch.full((dim,), float(gain))) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine and bias else None

    @property
    def batch_independent(self) -> bool:
        """In training no row sees another."""
        return not self.shares.batch

    @property
    def causal(self) -> bool:
        """In training no column sees a later one."""
        return self.shares.time != "sequence"

    @property
    def causal_in_evaluation(self) -> bool:
        """In evaluation no column sees a later one: so it is wherever stored values stand in."""
        return self.causal or self.needs_statistics

    @property
    def leaks(self) -> str:
        """What of the future a norm that is not causal shows to each output; empty if it is causal."""
        if self.causal:
            return ""
        whose = "every row of the batch" if self.shares.batch else "its row"
        when = "in training" if self.causal_in_evaluation else "in training and in evaluation"
        return f"{when} each output depends on later time steps of {whose}"

    @classmethod
    def stepwise_pool(cls, pool: str | None) -> str | None:
        """The pool to use where the norm is called one time step at a time and `pool` was asked for."""
        return pool

    @abstractmethod
    def normalize(
        self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0, carry: Prefix | None = None
    ) -> tuple[Tensor, Moments | None, Prefix | None]:
        """Normalize without touching stored values.

        Args:
            mask_BT: True = real entry; None = no padding. Padding may hold anything, NaN included.
            step: time step of column 0 (int, or LongTensor B per row).
            carry: what this function returned for the columns before, if they belong to the same sequence.

        Returns:
            y B x T x F; the training statistics that `store` wants (detached; mean and var N x F, count N, N = T unless
            the norm says otherwise), None if there are none; the carry for the columns to come, None if it has none.
        """

    def store(self, statistics: Moments, step: Step = 0) -> None:
        """Take one sequence's statistics (as `normalize` gave them, joined over time) into the stored values."""

    def forward(self, x_BTF: Tensor, mask_BT: Tensor | None = None, step: Step = 0) -> Tensor:
        """Normalize B x T x F (or B x F, taken as one column); in training, update the stored values."""
        if x_BTF.ndim == 2:
            return self.forward(x_BTF.unsqueeze(1), mask_BT, step).squeeze(1)
        y, statistics, _ = self.normalize(x_BTF, mask_BT, step)
        if self.training and statistics is not None:
            self.store(statistics, step)
        return y

    def standardize(self, x: Tensor, mean: Tensor | None, var: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias, in the precision of statistics, returned in that of `x`."""
        scale = torch.rsqrt(var + self.eps)
        weight = self.weight
        # Statistics per feature are small: fold the gain into them rather than multiply the whole tensor twice.
        if weight is not None and scale.shape[-1] == self.dim:
            scale, weight = scale * weight, None
        return rescale(for_statistics(x), mean, scale, weight, self.bias).to(x.dtype)

    def gain_and_bias(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """y * weight + bias, in `dtype`."""
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(dtype)

    def require_rows(self, x_BTF: Tensor, rows: int) -> None:
        """Raise `InputError` if a training batch has fewer than 2 `rows` to take a variance over, in all processes."""
        if rows < 2 and not several_processes():
            raise InputError(
                f"{self.name} needs at least 2 rows in training and got a batch of shape {tuple(x_BTF.shape)}; "
                "raise data.batch_size or use a norm that works at batch 1, such as ln"
            )

    @property
    def name(self) -> str:
        """The norm's name: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    def extra_repr(self) -> str:
        parts = [str(self.dim)]
        parts += [f"eps={self.eps:g}"] if self.eps else []
        parts += [f"gain={self.gain:g}"] if self.weight is not None else ["affine=False"]
        parts += ["bias=False"] if self.weight is not None and self.bias is None else []
        parts += [f"site={self.site}"] if self.site else []
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Norm:
        # model.to(bfloat16) or .half() must not round stored statistics: small updates would be lost.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for key, buffer in self._buffers.items():
            old = before[key]
            if buffer is not None and old is not None and buffer.is_floating_point() and buffer.itemsize < 4:
                self._buffers[key] = old.to(buffer.device)
        return self


class GatheredPenalties:
    """While open, every norm of `model` in training gives the penalty it wants added to the loss, with gradient.

    This is the route by which a norm reaches the loss: the task opens it around a forward pass and adds `total()`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [module for module in model.modules() if isinstance(module, Norm)]
        self._terms: list[list[Tensor]] = [[] for _ in self._norms]

    def __enter__(self) -> GatheredPenalties:
        for norm, terms in zip(self._norms, self._terms, strict=True):
            norm.penalties = terms
        return self

    def __exit__(self, *exception: object) -> None:
        for norm in self._norms:
            norm.penalties = None

    def total(self) -> Tensor | None:
        """The sum over norms of the mean over each one's training statistics; None if no norm wants anything."""
        means = [torch.cat(terms).mean() for terms in self._terms if terms]
        return torch.stack(means).sum() if means else None
