"""`LSTMModel`: every field of its config counts, language models are causal, classifiers ignore padding."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from normlab.config import InputError, LSTMConfig, LSTMSites, NormOptions, SiteConfig, available_norms
from normlab.models.lstm_model import LSTMModel
from normlab.norms import norm_options
from normlab.norms.base import GatheredPenalties

VOCABULARY, LENGTH = 11, 7
SMALL = LSTMConfig(width=16)


def build(config: LSTMConfig, classes: int | None = None) -> LSTMModel:
    torch.manual_seed(0)
    return LSTMModel(config, VOCABULARY, classes=classes, length=LENGTH)


def tokens(rows: int = 4, length: int = LENGTH) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def fingerprint(config: LSTMConfig, classes: int | None) -> list[Any]:
    """Shapes, initial values and one training step's numbers."""
    model = build(config, classes)
    initial = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(1)
    loss = model(tokens()).logits.square().sum()
    loss.backward()
    grads = [round(float(p.grad.norm()), 5) for p in model.parameters() if p.grad is not None]
    shapes = {key: (tuple(value.shape), round(value.float().sum().item(), 5)) for key, value in initial.items()}
    return [shapes, round(loss.item(), 5), grads, [round(buffer.float().sum().item(), 5) for buffer in model.buffers()]]


CHANGES: dict[str, Any] = {
    "norm": "bn_step",
    "sites": LSTMSites(cell=SiteConfig(norm="none")),
    "norm_options": NormOptions(eps=0.1),
    "width": 32,
    "embedding_width": 3,
    "embedding_std": 0.06,
    "layers": 2,
    "bidirectional": True,
    "dropout": 0.5,
    "tie_embeddings": True,
    "learned_state": False,
    "state_noise": 0.3,
    "recurrent_init": "uniform",
    "forget_bias": 0.0,
    "cell": "gru",
}


FIELDS = {field.name for field in dataclasses.fields(LSTMConfig)} - {"name", "recompute"}


def test_recompute_keeps_less_and_changes_no_number() -> None:
    recomputing = dataclasses.replace(SMALL, recompute=True)
    for found, wanted in zip(fingerprint(recomputing, None), fingerprint(SMALL, None), strict=True):
        # Products over other numbers of rows may round otherwise; a dict of initial values has no such products.
        assert found == (wanted if isinstance(wanted, dict) else pytest.approx(wanted, rel=1e-5))
    kept = []
    for config in (SMALL, recomputing):
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            build(config, None)(tokens())
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0]


@pytest.mark.parametrize("field", sorted(FIELDS))
def test_no_dead_knobs(field: str) -> None:
    classes = 2 if field == "bidirectional" else None
    changed = dataclasses.replace(SMALL, **{field: CHANGES[field]})
    assert fingerprint(SMALL, classes) == fingerprint(SMALL, classes)
    assert fingerprint(changed, classes) != fingerprint(SMALL, classes)


OPTIONS: dict[str, Any] = {
    "affine": False,
    "eps": 0.1,
    "momentum": 0.5,
    "groups": 4,
    "pool": "batch_time",
    "max_steps": 2,
    "unbiased": True,
    "beyond": "last",
    "ghost_rows": 2,
    "memory_batches": 2,
    "r_max": 1.5,
    "d_max": 0.1,
    "warmup": 1,
    "ramp": 1,
    "penalty_mean": 0.5,
    "penalty_var": 0.5,
    "group_scaling": 4,
    "window": 3,
    "alpha": 0.3,
    "beta": 0.2,
    "k": 3.0,
}
"""Another value of every option than any norm's default."""

OTHERS: dict[str, Any] = {"lrn affine": True, "inorm pool": "time", "gn pool": "time"}
"""The same where a norm has another default or other choices."""

NEEDED: dict[str, dict[str, Any]] = {
    "lrn window": {"alpha": 1.0},
    "lrn beta": {"alpha": 1.0},
    "brn r_max": {"warmup": 0, "ramp": 0},
    "brn d_max": {"warmup": 0, "ramp": 0},
    "brn ramp": {"warmup": 0},
    "bn memory_batches": {"pool": "batch_time"},
    "brn memory_batches": {"pool": "batch_time"},
    "rbn memory_batches": {"pool": "batch_time"},
    "pn memory_batches": {"pool": "batch_time"},
    "pnv memory_batches": {"pool": "batch_time"},
}
"""Options that let another one act."""


def after_steps(norm: str, options: dict[str, Any], sites: LSTMSites) -> list[float]:
    """Parameters; outputs and penalties of three training batches; then outputs in evaluation and all buffers."""
    model = build(dataclasses.replace(SMALL, norm=norm, sites=sites, norm_options=NormOptions(**options)))
    numbers: list[float] = [sum(parameter.numel() for parameter in model.parameters())]
    for seed in range(3):
        batch = torch.randint(VOCABULARY, (6, LENGTH + 3), generator=torch.Generator().manual_seed(seed))
        with GatheredPenalties(model) as penalties:
            output = model(batch).logits
        output.square().sum().backward()  # pn moves a buffer of its own in backward
        total = penalties.total()
        numbers += [output.square().sum().item(), 0.0 if total is None else total.item()]
    model.eval()
    return [*numbers, model(tokens(6, LENGTH + 3)).logits.sum().item(), *(b.sum().item() for b in model.buffers())]


def test_every_norm_option_has_another_value_here() -> None:
    assert set(OPTIONS) == {field.name for field in dataclasses.fields(NormOptions)}
    taken = {option for norm in available_norms() for option in norm_options(norm)}
    assert set(OPTIONS) <= taken


@pytest.mark.parametrize(
    ("norm", "option"),
    [(norm, option) for norm in available_norms() for option in norm_options(norm) if option in OPTIONS],
)
def test_no_dead_norm_options(norm: str, option: str) -> None:
    needed = NEEDED.get(f"{norm} {option}", {})
    value = OTHERS.get(f"{norm} {option}", OPTIONS[option])
    # Memory needs time steps that are pooled or numbered, which a recurrence has in bn_step alone.
    bare = SiteConfig(norm="none")
    sites = LSTMSites(hidden_to_hidden=bare, cell=bare) if "pool" in needed else LSTMSites()
    plain, changed = after_steps(norm, needed, sites), after_steps(norm, {**needed, option: value}, sites)
    assert plain == after_steps(norm, needed, sites)
    assert changed != plain


@pytest.mark.parametrize("norm", available_norms())
@pytest.mark.parametrize("training", [True, False])
def test_language_model_is_causal(norm: str, training: bool) -> None:
    model = build(dataclasses.replace(SMALL, norm=norm, layers=2)).double()
    model(tokens())
    model.train(training)
    leaves: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[0]

    model.embedding.register_forward_hook(keep)
    logits = model(tokens()).logits
    (grad,) = torch.autograd.grad((logits * torch.randn_like(logits))[:, :3].sum(), leaves)
    assert grad[:, :3].abs().max() > 0
    assert grad[:, 3:].abs().max() == 0


@pytest.mark.parametrize("norm", available_norms())
@pytest.mark.parametrize("bidirectional", [False, True])
def test_classifier_ignores_padding(norm: str, bidirectional: bool) -> None:
    model = build(dataclasses.replace(SMALL, norm=norm, bidirectional=bidirectional), classes=3).double()
    model(tokens())
    model.eval()
    lengths = [7, 4, 1, 2]
    mask = torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)
    out = model(tokens(), mask)
    assert out.state is None
    assert out.logits.shape == (4, 3)
    for row, length in enumerate(lengths):
        alone = model(tokens()[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(out.logits[row], alone)


@pytest.mark.parametrize("norm", available_norms())
def test_language_model_carries_its_state(norm: str) -> None:
    model = build(dataclasses.replace(SMALL, norm=norm)).double()
    torch.nn.init.normal_(model.initial_h)
    model(tokens(4, 14))
    model.eval()
    whole = model(tokens(4, 14)).logits
    first = model(tokens(4, 14)[:, :5])
    second = model(tokens(4, 14)[:, 5:], None, first.state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)
    fresh = torch.tensor([False, True, False, True])
    restarted = model(tokens(4, 14)[:, 5:], None, model.restart(first.state, fresh)).logits
    torch.testing.assert_close(restarted[~fresh], whole[~fresh, 5:])
    torch.testing.assert_close(restarted[fresh], model(tokens(4, 14)[:, 5:]).logits[fresh])


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh", "rnn_relu"])
def test_another_cell_carries_its_state_and_learns_the_first(cell: str) -> None:
    # Not a batch norm, for which an h_0 that all rows share is no input: its mean over rows is taken away.
    learning = build(dataclasses.replace(SMALL, cell=cell, norm="ln"))
    assert learning.initial_c is None
    learning(tokens()).logits.square().sum().backward()
    assert learning.initial_h is not None
    assert learning.initial_h.grad is not None
    assert learning.initial_h.grad.abs().min() > 1e-6
    model = build(dataclasses.replace(SMALL, cell=cell, norm="bn_step", layers=2)).double()
    torch.nn.init.normal_(model.initial_h)
    model(tokens(4, 14))
    model.eval()
    whole = model(tokens(4, 14)).logits
    first = model(tokens(4, 14)[:, :5])
    second = model(tokens(4, 14)[:, 5:], None, first.state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)
    fresh = torch.tensor([False, True, False, True])
    restarted = model(tokens(4, 14)[:, 5:], None, model.restart(first.state, fresh)).logits
    torch.testing.assert_close(restarted[~fresh], whole[~fresh, 5:])
    torch.testing.assert_close(restarted[fresh], model(tokens(4, 14)[:, 5:]).logits[fresh])


@pytest.mark.parametrize("cell", ["gru", "rnn_tanh", "rnn_relu"])
def test_initial_values_of_other_cells(cell: str) -> None:
    model = build(dataclasses.replace(SMALL, cell=cell))
    blocks = model.lstm.get_parameter("weight_hh_l0").split(16)
    assert len(blocks) == (3 if cell == "gru" else 1)
    for block in blocks:
        torch.testing.assert_close(block @ block.T, torch.eye(16), atol=1e-5, rtol=0)
    assert not model.lstm.get_parameter("bias_ih_l0").any()
    # Two models that differ in the nonlinearity alone.
    assert cell == "gru" or model.lstm.nonlinearity == cell.removeprefix("rnn_")


def test_initial_values() -> None:
    model = build(SMALL)
    eye = torch.eye(16)
    for block in model.lstm.get_parameter("weight_hh_l0").chunk(4):
        torch.testing.assert_close(block @ block.T, eye, atol=1e-5, rtol=0)
    assert model.lstm.get_parameter("bias_ih_l0").tolist() == [0.0] * 16 + [1.0] * 16 + [0.0] * 32
    assert not model.lstm.get_parameter("bias_hh_l0").any()
    tied = build(dataclasses.replace(SMALL, tie_embeddings=True))
    assert tied.head.weight is tied.embedding.weight


def test_state_noise_is_for_training_only() -> None:
    model = build(dataclasses.replace(SMALL, state_noise=0.5))
    assert not model(tokens()).logits.equal(model(tokens()).logits)
    model.eval()
    assert model(tokens()).logits.equal(model(tokens()).logits)


def test_refusals() -> None:
    with pytest.raises(InputError, match="bidirectional=false"):
        build(dataclasses.replace(SMALL, bidirectional=True))
    with pytest.raises(InputError, match="tie_embeddings=false"):
        build(dataclasses.replace(SMALL, tie_embeddings=True), classes=2)


@pytest.mark.parametrize("norm", available_norms())
def test_learns_to_repeat(norm: str) -> None:
    model = build(dataclasses.replace(SMALL, norm=norm))
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    losses = []
    for _ in range(25):
        logits = model(tokens(8)).logits
        loss = torch.nn.functional.cross_entropy(logits[:, 1:].flatten(0, 1), tokens(8)[:, :-1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
