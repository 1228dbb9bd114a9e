"""Each probe against the same quantity computed slowly: loops, numpy, restarts, or sentences one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.config import NormOptions
from normlab.data.splits import Corpus
from normlab.models.lstm_model import CELLS
from normlab.models.transformer import TransformerModel
from normlab.norms import build_norm
from normlab.probes.activations import ActivationStatistics
from normlab.probes.base import Subject, prediction_nats
from normlab.probes.bias_variance import BiasVariance, split_losses
from normlab.probes.by_length import ByLength
from normlab.probes.companions import Companions
from normlab.probes.cost import Cost, SavedBytes
from normlab.probes.discrepancy import Discrepancy
from normlab.probes.drift import Drift
from normlab.probes.gradient_flow import GradientFlow, decay, hidden_gradients
from normlab.probes.leak import Leak
from normlab.probes.senses import Senses, auc, encode_pairs
from normlab.probes.sites import Call, layer_of, set_norms_training
from normlab.probes.sphere import Sphere, before_gain, geometry
from normlab.probes.step_statistics import Population, StepStatistics, settling_step

Build = Callable[..., Subject]


def embedded(subject: Subject, tokens_BT: Tensor) -> np.ndarray:
    """W_x x_t of the first layer of an LSTM model, B x T x G: what enters input_to_hidden."""
    model: Any = subject.model
    return (model.embedding(tokens_BT) @ model.lstm.weight_ih_l0.t()).detach().double().numpy()


# activations and drift


def test_activations_at_each_step_are_those_of_its_column(subject: Build) -> None:
    of = subject(model__norm="none", model__learned_state=False)
    found = ActivationStatistics(batches=3)(of)
    y = np.concatenate([embedded(of, batch.tokens_BT)[:, 4] for batch in of.batches("valid", 3)]).ravel()
    (row,) = [row for row in found.rows if row["site"] == "input_to_hidden" and row["step"] == 4]
    for name, value in {"mean": y.mean(), "std": y.std(), "active": (y > 0).mean()}.items():
        assert row[name] == pytest.approx(value, abs=1e-5), name
    assert row["p85"] == pytest.approx(np.quantile(y, 0.85), abs=1e-4)
    whole = [row for row in found.rows if row["site"] == "input_to_hidden" and row["step"] is None]
    assert found.summary["p50.input_to_hidden"] == whole[0]["p50"]


@pytest.mark.parametrize(("activation", "mode"), [("relu", "eval"), ("swiglu", "train")])
def test_share_of_relu_active(activation: str, mode: str, subject: Build) -> None:
    of = subject(model="transformer", model__activation=activation, model__layers=2, model__norm="bn")
    found = ActivationStatistics(batches=1, mode=mode)(of)
    model: Any = of.model.train(mode == "train")
    up = model.blocks[1].ffn.up
    seen: list[Tensor] = []
    up.register_forward_hook(lambda m, x, y: seen.append(y))
    batch = of.batches("valid", 1)[0]
    model(batch.tokens_BT, batch.mask_BT)
    gates = seen[0][..., : up.out_features // 2] if activation == "swiglu" else seen[0]
    kept = gates if batch.mask_BT is None else gates[batch.mask_BT]
    (row,) = [row for row in found.rows if (row["site"], row["layer"], row["step"]) == ("ffn_up", 1, None)]
    assert row["active"] == pytest.approx(float((kept > 0).double().mean()), abs=1e-6)


@pytest.mark.parametrize("norm", ["none", "bn"])
def test_share_of_units_that_a_hidden_layer_lets_pass(norm: str, subject: Build) -> None:
    of = subject(model="mlp", model__norm=norm)
    found = ActivationStatistics(batches=1)(of)
    passed: list[Tensor] = []
    model: Any = of.model.eval()
    for layer in model.layers:
        layer.register_forward_hook(lambda module, inputs, y: passed.append(y))
    batch = of.batches("valid", 1)[0]
    model(batch.tokens_BT, batch.mask_BT)
    shares = [float((y if batch.mask_BT is None else y[batch.mask_BT]).gt(0).double().mean()) for y in passed]
    assert found.summary["active.hidden"] == pytest.approx(sum(shares) / 2, abs=1e-6)


@pytest.mark.parametrize("norm", ["brn", "pn"])
def test_all_batches_see_the_same_model(norm: str, subject: Build) -> None:
    """In training mode too: these normalize by what they stored."""
    of = subject(model__norm=norm)
    before = {name: buffer.clone() for name, buffer in of.model.named_buffers()}
    ActivationStatistics(batches=2, mode="train").measure(of)
    assert all(buffer.equal(before[name]) for name, buffer in of.model.named_buffers())


def test_drift_is_between_the_two_checkpoints(subject: Build) -> None:
    of = subject(model__norm="none", model__learned_state=False)
    found = Drift(first="best", last="initial", batches=2)(of)
    levels: dict[str, np.ndarray] = {}
    for name in ("best", "initial"):
        model: Any = of.checkpoint(name)
        parts = [model.embedding(b.tokens_BT) @ model.lstm.weight_ih_l0.t() for b in of.batches("valid", 2)]
        levels[name] = torch.cat([part.flatten() for part in parts]).detach().double().numpy()
    first, last = levels["best"], levels["initial"]
    assert found.summary["mean_drift.input_to_hidden"] == pytest.approx(
        abs(last.mean() - first.mean()) / first.std(), rel=1e-3
    )
    assert found.summary["std_drift.input_to_hidden"] == pytest.approx(abs(last.std() / first.std() - 1), rel=1e-3)
    assert Drift(first="best", last="best")(of).summary["p85_drift.cell"] == 0


# step statistics


def test_population_is_that_of_all_entries_together() -> None:
    draw = torch.Generator().manual_seed(0)
    population = Population()
    entries: dict[int, list[np.ndarray]] = {}
    for _ in range(6):
        x_BTF = torch.randn(5, 7, 3, generator=draw) * 2 + 50
        mask_BT = torch.arange(7) < torch.randint(6, 8, (5, 1), generator=draw)
        x_BTF[~mask_BT] = math.nan
        population.add(x_BTF[:, :4], mask_BT[:, :4], 0)
        for column in range(4, 7):
            population.add(x_BTF[:, column : column + 1], mask_BT[:, column : column + 1], column)
        for row, time in mask_BT.nonzero().tolist():
            entries.setdefault(time, []).append(x_BTF[row, time].double().numpy())
    mean, var, count = population.moments()
    assert len(count) == 7
    for time, values in entries.items():
        assert int(count[time]) == len(values)
        np.testing.assert_allclose(mean[time], np.mean(values, 0), rtol=1e-12)
        np.testing.assert_allclose(var[time], np.var(values, 0), rtol=1e-9, atol=1e-12)


def test_steps_that_few_texts_reach_are_left_out() -> None:
    population = Population()
    lengths = torch.tensor([5, 3, 3, 3, 3, 3, 3, 3])
    population.add(torch.randn(8, 5, 2), torch.arange(5) < lengths.unsqueeze(1), 0)
    assert len(population.moments().count) == 3


def test_distances_and_spreads_by_hand(subject: Build) -> None:
    of = subject(model__norm="bn_step")
    found = StepStatistics(batches=5)(of)
    batches = of.batches("train", 5, train=True)
    x = np.concatenate([embedded(of, batch.tokens_BT) for batch in batches])
    late = x[:, 9:].reshape(-1, x.shape[-1])
    rows = [row for row in found.rows if row["site"] == "input_to_hidden"]
    assert [row["entries"] for row in rows] == [40] * 12
    norm: Any = of.model.get_submodule("lstm.norms.l0.input_to_hidden")
    for time in (0, 3, 11):
        mean, std = x[:, time].mean(0), x[:, time].std(0)
        assert rows[time]["mean_distance"] == pytest.approx(np.mean(abs(mean - late.mean(0)) / late.std(0)), rel=1e-5)
        assert rows[time]["std_distance"] == pytest.approx(np.mean(abs(std / late.std(0) - 1)), rel=1e-5)
        sigma = np.sqrt(x[:, time].var(0) + 1e-5)
        # Nothing was trained: no step was ever updated, and all take the first one's values.
        stored = norm.running_mean[0].double().numpy(), norm.running_var[0].double().numpy()
        assert rows[time]["stored_mean_distance"] == pytest.approx(np.mean(abs(stored[0] - mean) / sigma), rel=1e-4)
        far = np.mean(abs(np.sqrt(stored[1] + 1e-5) / sigma - 1))
        assert rows[time]["stored_std_distance"] == pytest.approx(far, rel=1e-4)
    means, variances = x.mean(0), x.var(0)
    spread = np.mean(means.std(0) / np.sqrt(variances.mean(0)))
    assert found.summary["step_mean_spread.input_to_hidden"] == pytest.approx(spread, rel=1e-5)
    spread = np.mean(np.sqrt(variances).std(0) / np.sqrt(variances).mean(0))
    assert found.summary["step_std_spread.input_to_hidden"] == pytest.approx(spread, rel=1e-5)
    assert found.summary["noise"] == pytest.approx(math.sqrt(2 / math.pi / 40))


def test_an_uncentred_norm_stores_a_mean_square(subject: Build) -> None:
    of = subject(model__norm="pnv")
    found = StepStatistics(batches=5)(of)
    x = np.concatenate([embedded(of, batch.tokens_BT) for batch in of.batches("train", 5, train=True)])[:, 3]
    norm: Any = of.model.get_submodule("lstm.norms.l0.input_to_hidden")
    stored, rms = norm.running_var.double().numpy(), np.sqrt((x**2).mean(0) + 1e-5)
    (row,) = [row for row in found.rows if row["site"] == "input_to_hidden" and row["step"] == 3]
    assert row["stored_std_distance"] == pytest.approx(np.mean(abs(np.sqrt(stored + 1e-5) / rms - 1)), rel=1e-4)
    grouped = StepStatistics(batches=1)(subject(model__norm="pnv", model__norm_options={"group_scaling": 2}))
    assert {row["stored_std_distance"] for row in grouped.rows} == {None}


def test_longer_texts_reach_later_steps(subject: Build) -> None:
    found = StepStatistics(batches=2, multiple=3)(subject(model__norm="bn_step"))
    assert found.summary["steps"] == 36


def test_settling_step_is_the_first_that_all_later_ones_agree_with() -> None:
    def rows(*distances: float) -> list[dict[str, Any]]:
        return [{"step": t, "mean_distance": d, "std_distance": 0.0} for t, d in enumerate(distances)]

    assert settling_step(rows(9, 0, 9, 0.1, 0.05, 0, 0, 0), 0.1) == 3
    assert settling_step(rows(0, 0, 0, 0), 0.1) == 0
    assert settling_step(rows(0, 0, 0, 0.2), 0.1) == 4
    assert settling_step(rows(9, 9, 9, 9, 9, 9, 0, 0), 0.1) == 8
    other = [{"step": t, "mean_distance": 0.0, "std_distance": d} for t, d in enumerate((1, 0, 0, 0))]
    assert settling_step(other, 0.1) == 1


# gradient flow


@pytest.mark.parametrize("norm", ["none", "ln", "bn_step", "brn", "pn"])
@pytest.mark.parametrize("net", ["lstm", "gru", "rnn_tanh"])
def test_gradients_by_restarting_at_every_time_step(net: str, norm: str) -> None:
    torch.manual_seed(0)
    # Fewer updates than time steps: a window is one update.
    options = NormOptions(warmup=2) if norm in ("brn", "pn") else NormOptions()
    cell = CELLS[net](2, 5, norm=norm, norm_options=options, dtype=torch.float64)
    x_TBF, head = torch.randn(6, 3, 2, dtype=torch.float64), torch.randn(5, dtype=torch.float64)

    def loss_of(h_BH: Tensor) -> Tensor:
        return (h_BH @ head).square().sum()

    found = hidden_gradients(cell, x_TBF, None, loss_of)
    for time in range(6):
        _, state = cell(x_TBF[: time + 1])
        h, *rest = (value.detach() for value in state.tensors)
        last = h.requires_grad_()
        if time < 5:
            last = cell(x_TBF[time + 1 :], state.of([h, *rest], state.step))[1].tensors[0]
        (gradient,) = torch.autograd.grad(loss_of(last[-1]), h)
        assert float(found[time]) == pytest.approx(float(gradient[-1].norm(dim=-1).mean()), rel=1e-9)


def test_gradients_of_blocks_by_starting_at_each(subject: Build) -> None:
    of = subject(model="transformer", model__layers=2, model__norm="ln", data__length=7)
    found = GradientFlow()(of)
    model, batch = of.model.eval(), of.batches("train", 1, train=True)[0]
    assert isinstance(model, TransformerModel)
    assert batch.targets_BT is not None
    for layer in range(2):
        starts: list[Tensor] = []

        def cut(module: nn.Module, x: object, y: Tensor, starts: list[Tensor] = starts) -> Tensor:
            starts.append(y.detach().requires_grad_())
            return starts[0]

        hook = model.blocks[layer].register_forward_hook(cut)
        nats = F.cross_entropy(model(batch.tokens_BT).logits[:, -1], batch.targets_BT[:, -1], reduction="none")
        hook.remove()
        expected = torch.zeros(7, dtype=torch.float64)
        for row in range(len(nats)):  # one example at a time: LN lets none see another
            (gradient,) = torch.autograd.grad(nats[row], starts[0], retain_graph=True)
            expected += gradient[row].double().norm(dim=-1) / len(nats)
        rows = [row for row in found.rows if row["kind"] == "lag" and row["layer"] == layer]
        assert [row["lag"] for row in rows] == [6, 5, 4, 3, 2, 1, 0]
        np.testing.assert_allclose([row["gradient_norm"] for row in rows], expected, rtol=1e-4, atol=1e-9)
        assert found.summary[f"block_gradient_norm.{layer}"] == pytest.approx(float(expected.norm()), rel=1e-4)


def test_gradients_by_parameters_are_those_of_the_mean_loss(subject: Build) -> None:
    of = subject(model__norm="rms", model__layers=2)
    found = GradientFlow()(of)
    model, batch = of.model.eval(), of.batches("train", 1, train=True)[0]
    prediction_nats(model(*batch.model_inputs()).logits, batch).mean().backward()
    for layer in range(2):
        own = [p for name, p in model.named_parameters() if name.endswith(f"_l{layer}") or f".l{layer}." in name]
        assert len(own) == 4 + 3  # weights and biases, and three gains
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in own if p.grad is not None))
        assert found.summary[f"parameter_gradient_norm.{layer}"] == pytest.approx(norm, rel=1e-5)


def test_an_untrained_net_swept_over_gains() -> None:
    found = GradientFlow(norm="bn_step", length=30, width=8, batch=6, gain="0.1,1")()
    assert found.summary["gradient_ratio.gain_1"] != found.summary["gradient_ratio.gain_0.1"]
    assert {(row["gain"], row["lag"]) for row in found.rows} == set(itertools.product((0.1, 1.0), range(30)))
    assert set(GradientFlow(norm="none", length=4, width=8, gain="")().summary) == {
        "gradient_norm_first",
        "gradient_norm_last",
        "gradient_ratio",
        "log10_decay_per_step",
    }


def test_decay_is_the_slope_of_an_exponential() -> None:
    found = decay(torch.tensor([1e-3, 1e-2, 1e-1, 1.0], dtype=torch.float64))
    assert found["log10_decay_per_step"] == pytest.approx(-1)
    assert found["gradient_ratio"] == pytest.approx(1e-3)


# discrepancy


def test_discrepancy_by_the_formula(subject: Build) -> None:
    of = subject(model__norm="bn_step")
    found = Discrepancy(batches=4)(of)
    norm: Any = of.model.get_submodule("lstm.norms.l0.input_to_hidden")
    stored_mean, stored_var = norm.running_mean[0].double().numpy(), norm.running_var[0].double().numpy()
    means, stds = [], []
    for batch in of.batches("train", 4, train=True):
        x = embedded(of, batch.tokens_BT)[:, 5]
        sigma = np.sqrt(x.var(0) + 1e-5)
        means.append(np.mean(abs(stored_mean - x.mean(0)) / sigma))
        stds.append(np.mean(abs(np.sqrt(stored_var + 1e-5) / sigma - 1)))
    (row,) = [row for row in found.rows if row["site"] == "input_to_hidden" and row["step"] == 5]
    assert row["discrepancy_mean"] == pytest.approx(np.mean(means), rel=1e-4)
    assert row["discrepancy_std"] == pytest.approx(np.mean(stds), rel=1e-4)


def test_losses_with_stored_and_with_batch_statistics(subject: Build) -> None:
    of = subject(model__norm="bn", model="transformer")
    found = Discrepancy(batches=2)(of).summary
    for mode, key in (("eval", "loss_nats_stored"), ("train", "loss_nats_batch")):
        of.model.train(mode == "train")
        parts = [prediction_nats(of.model(*b.model_inputs()).logits, b).detach() for b in of.batches("valid", 2)]
        assert found[key] == pytest.approx(float(torch.cat(parts).mean()), rel=1e-5)
    assert found["loss_nats_stored"] != found["loss_nats_batch"]


def test_one_statistic_for_all_steps_is_one_row(subject: Build, tiny_labels: Any) -> None:
    of = subject(model="transformer", model__norm="bn", model__layers=1, data__corpus=str(tiny_labels))
    found = Discrepancy(batches=2)(of)
    assert [(row["site"], row["step"]) for row in found.rows] == [("attention", None), ("ffn", None), ("final", None)]


def test_norms_that_store_nothing_have_no_discrepancy(subject: Build) -> None:
    found = Discrepancy(batches=1)(subject(model__norm="ln"))
    assert found.rows == []
    assert (found.summary["discrepancy_mean"], found.summary["discrepancy_std_median"]) == (0, 0)
    assert found.summary["loss_nats_stored"] == found.summary["loss_nats_batch"]


def test_running_averages_are_those_of_the_best_checkpoint(subject: Build) -> None:
    of = subject(model__norm="bn")
    batch = of.batches("train", 1, train=True)[0]
    for statistics, checkpoint in (("running", "best"), ("final", "final")):
        found = Discrepancy(batches=1, statistics=statistics)(of)
        then = replace(of, model=of.checkpoint(checkpoint))
        norm: Any = then.model.get_submodule("lstm.norms.l0.input_to_hidden")
        x = embedded(then, batch.tokens_BT)[:, 0]
        mean = np.mean(abs(norm.running_mean.double().numpy() - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))
        (row,) = [row for row in found.rows if row["site"] == "input_to_hidden" and row["step"] == 0]
        assert row["discrepancy_mean"] == pytest.approx(mean, rel=1e-4)


# companions


def test_companions_one_draw_after_the_other(subject: Build) -> None:
    of = subject(model__norm="bn", model="transformer", data__length=5)
    found = Companions(examples=16, draws=3)(of)
    batches = of.batches("train", 2, train=True)
    tokens = torch.cat([batch.tokens_BT for batch in batches])
    targets = torch.cat([b.targets_BT for b in batches if b.targets_BT is not None])
    of.model.train()
    torch.manual_seed(0)
    losses = torch.zeros(3, 16, 5, dtype=torch.float64)
    for draw in range(3):
        order = torch.randperm(16).tolist()
        for rows in (order[:8], order[8:]):
            logits = of.model(tokens[rows]).logits
            for place, example in enumerate(rows):
                losses[draw, example] = F.cross_entropy(logits[place], targets[example], reduction="none").double()
    table = losses.detach().numpy()
    within, between = table.var(0, ddof=1).mean(), table.mean(0).var(0, ddof=1).mean()
    assert found.summary["companion_variance"] == pytest.approx(within, rel=1e-4)
    assert found.summary["example_variance"] == pytest.approx(between, rel=1e-4)
    assert found.summary["companion_variance_ratio"] == pytest.approx(within / between, rel=1e-4)
    assert found.rows[3]["companion_variance"] == pytest.approx(table.var(0, ddof=1)[:, 3].mean(), rel=1e-4)


@pytest.mark.parametrize("model", ["lstm", "transformer"])
def test_companions_do_not_matter_to_ln(model: str, subject: Build) -> None:
    summary = Companions(examples=16, draws=3)(subject(model=model, model__norm="ln")).summary
    assert summary["companion_variance"] < 1e-12 < summary["example_variance"]


def test_companions_come_in_batches_of_one_size(subject: Build, tiny_labels: Any) -> None:
    of = subject(model__norm="bn", data__corpus=str(tiny_labels), data__batch_size=21)
    rows = [len(batch.tokens_BT) for batch in of.loader("train", train=True)]
    assert set(rows) == {20, 21}
    called: list[int] = []
    of.model.register_forward_pre_hook(lambda model, inputs: called.append(len(inputs[0])))
    Companions(examples=21 * len(rows), draws=2)(of)
    assert called == [20] * 2 * len(rows)


def test_equal_examples_have_no_ratio(subject: Build) -> None:
    of = subject(model__norm="ln")
    with torch.no_grad():
        for parameter in of.model.parameters():
            parameter.zero_()
    found = Companions(examples=16, draws=2)(of)
    assert found.summary["example_variance"] == 0
    assert math.isnan(found.summary["companion_variance_ratio"])
    assert all(math.isnan(row["ratio"]) for row in found.rows)


def test_companions_do_not_matter_to_running_statistics(subject: Build) -> None:
    summary = Companions(examples=16, draws=3)(subject(model__norm="pn", model__norm_options={"warmup": 0})).summary
    assert summary["companion_variance"] < 1e-12 < summary["example_variance"]


# sphere


def test_geometry_token_by_token() -> None:
    torch.manual_seed(0)
    y = torch.randn(200, 6, dtype=torch.float64) * 2 + 1
    torch.manual_seed(3)
    found = geometry(y)
    torch.manual_seed(3)
    shift = torch.randint(1, 200, (200,)).tolist()
    tokens = y.numpy()
    cosines = []
    for number, token in enumerate(tokens):
        other = tokens[(number + shift[number]) % 200]
        cosines.append(token @ other / np.linalg.norm(token) / np.linalg.norm(other))
    assert found["token_mean"] == pytest.approx(np.mean([abs(token.mean()) for token in tokens]))
    assert found["token_variance"] == pytest.approx(np.mean([token.var() for token in tokens]))
    distances = [abs(np.linalg.norm(token) / math.sqrt(6) - 1) for token in tokens]
    assert found["sphere_distance"] == pytest.approx(np.mean(distances))
    assert found["anisotropy"] == pytest.approx(np.mean(cosines))


def test_before_gain_is_what_a_norm_without_gain_gives() -> None:
    torch.manual_seed(0)
    x, norm = torch.randn(4, 5, 8), build_norm("ln", 8)
    plain = norm(x).detach()
    assert norm.weight is not None
    assert norm.bias is not None
    with torch.no_grad():
        norm.weight.uniform_(0.1, 2)
        norm.bias.uniform_(-1, 1)
    assert torch.allclose(before_gain(norm, Call(x, norm(x).detach(), None, 0)), plain, atol=1e-5)


def test_ln_puts_tokens_on_the_sphere_and_its_gain_takes_them_off(subject: Build) -> None:
    found = Sphere(tokens=100)(subject(model="transformer", model__norm="ln", model__width=64)).summary
    assert found["sphere_distance_before.final"] < 1e-3
    assert found["token_mean_before.final"] < 1e-4
    assert found["token_variance_before.final"] == pytest.approx(1, abs=1e-2)
    assert found["sphere_distance_after.final"] > 0.005
    bare = Sphere(tokens=100)(subject(model="transformer", model__norm="none", model__width=64)).summary
    assert bare["sphere_distance_before.final"] > 20 * found["sphere_distance_before.final"]
    assert bare["sphere_distance_before.final"] == bare["sphere_distance_after.final"]


# senses


def test_auc_pair_by_pair() -> None:
    torch.manual_seed(0)
    larger, smaller = torch.randint(0, 9, (13,)), torch.randint(0, 7, (17,))
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(larger.tolist(), smaller.tolist())]
    assert auc(larger, smaller) == pytest.approx(np.mean(pairs))
    assert auc(torch.ones(2), torch.zeros(2)) == 1


@pytest.mark.parametrize("tokens", ["word", "char"])
def test_targets_are_found_in_their_sentences(tokens: str, subject: Build, wic: Corpus) -> None:
    tokenizer = subject(data__tokens=tokens).text.tokenizer
    pairs, unknown = encode_pairs(wic, "valid", tokenizer, 0)
    targets = [text.split("\t")[0] for text in wic.splits["valid"].texts]
    if tokens == "word":
        assert unknown == 1  # "aloft"
        targets.remove("aloft")
    for pair, target in zip(pairs, targets, strict=True):
        for sentence, place in zip(pair.sentences, pair.places, strict=True):
            ids = sentence[place : place + 1] if tokens == "word" else sentence[place + 1 - len(target) : place + 1]
            assert tokenizer.decode(ids) == target


def test_sense_distances_sentence_by_sentence(subject: Build, wic: Corpus) -> None:
    of = subject(model="transformer", model__norm="ln", data__tokens="word")
    found = Senses()(of)
    pairs, _ = encode_pairs(wic, "valid", of.text.tokenizer, 0)
    model: Any = of.model.eval()
    words: list[Tensor] = []
    model.final_norm.register_forward_hook(lambda m, x, y: words.append(y[0].detach()))
    distances: dict[bool, list[float]] = {True: [], False: []}
    for pair in pairs:
        ends = []
        for sentence, place in zip(pair.sentences, pair.places, strict=True):
            model(torch.tensor([sentence]))
            ends.append(words[-1][place])
        distances[pair.same].append(float((ends[0] - ends[1]).norm()))
    (row,) = [row for row in found.rows if row["site"] == "final"]
    (out,) = [row for row in found.rows if row["site"] == "output"]
    assert row["distance_same"] * row["scale"] == pytest.approx(np.mean(distances[True]), rel=1e-4)
    assert row["distance_different"] * row["scale"] == pytest.approx(np.mean(distances[False]), rel=1e-4)
    assert out["distance_same"] == pytest.approx(row["distance_same"], rel=0.2)  # another sample of random pairs
    every = torch.cat(words)
    both = [float((a - b).norm()) for a, b in itertools.combinations(every, 2)]
    assert row["scale"] == pytest.approx(np.mean(both), rel=0.1)
    assert found.summary["pairs_unknown"] == 1
    assert (found.summary["pairs_same"], found.summary["pairs_different"]) == (2, 2)


# bias and variance


def test_both_splits_add_up_one_prediction_at_a_time() -> None:
    torch.manual_seed(0)
    log_p = torch.randn(4, 6, 5, dtype=torch.float64).log_softmax(-1)
    targets = torch.randint(5, (6,))
    found = split_losses(log_p, targets)
    for n in range(6):
        p, y = log_p[:, n].exp().numpy(), int(targets[n])
        q = np.exp(np.log(p).mean(0))
        q /= q.sum()
        kl = [(q * np.log(q / p[r])).sum() for r in range(4)]
        np.testing.assert_allclose(found["kl_RN"][:, n], kl, rtol=1e-9)
        assert float(found["bias_N"][n]) == pytest.approx(-math.log(q[y]))
        assert np.mean(-np.log(p[:, y])) == pytest.approx(-math.log(q[y]) + np.mean(kl))
        truth = np.eye(5)[y]
        assert float(found["brier_RN"][1, n]) == pytest.approx(((p[1] - truth) ** 2).sum())
        assert float(found["brier_bias_N"][n]) == pytest.approx(((p.mean(0) - truth) ** 2).sum())
        variance = ((p - p.mean(0)) ** 2).sum(-1).mean()
        assert float(found["brier_RN"][:, n].mean()) == pytest.approx(float(found["brier_bias_N"][n]) + variance)


def test_runs_of_one_arm(subject: Build, tiny_labels: Any) -> None:
    one = subject(data__corpus=str(tiny_labels))
    other = replace(one, run="other", config=replace(one.config, seed=9), model=one.checkpoint("last"))
    summary, rows = BiasVariance()(one, other)
    for whole, bias, variance in (
        ("loss_nats", "loss_bias_nats", "loss_variance_nats"),
        ("brier", "brier_bias", "brier_variance"),
    ):
        assert summary[whole] == pytest.approx(summary[bias] + summary[variance])
        assert summary[variance] > 0
    assert summary["loss_nats"] == pytest.approx(np.mean([row["loss_nats"] for row in rows]))
    assert summary["loss_spread_nats"] == pytest.approx(np.std([row["loss_nats"] for row in rows], ddof=1))
    assert [row["seed"] for row in rows] == [1, 9]
    same = BiasVariance()(one, replace(one, config=other.config)).summary
    assert same["loss_variance_nats"] == pytest.approx(0, abs=1e-12)
    assert same["brier_variance"] == pytest.approx(0, abs=1e-12)


def test_a_diverged_run_is_counted(subject: Build) -> None:
    one = subject()
    broken = replace(one, model=one.checkpoint("last"))
    with torch.no_grad():
        next(broken.model.parameters()).fill_(math.nan)
    summary, rows = BiasVariance()(one, one, broken)
    assert (summary["runs"], summary["diverged_runs"]) == (3, 1)
    assert math.isfinite(summary["loss_nats"])
    assert math.isnan(rows[2]["loss_nats"])


# length


def test_loss_by_length_one_token_at_a_time(subject: Build) -> None:
    of = subject(model__norm="bn_step", data__length=4)
    found = ByLength(longest=5, rows=3)(of)
    ids = torch.from_numpy(of.text.splits["test"].ids)
    starts = np.linspace(0, len(ids) - 21, 3).astype(int)
    model: Any = of.model.eval()
    for multiple in (1, 2, 5):
        losses = []
        for start in starts:
            state = model.initial_state(1)
            for place in range(start + 20 - 4 * multiple, start + 20):
                output = model(ids[place].view(1, 1), None, state)
                state = output.state
                if place >= start + 16:
                    losses.append(F.cross_entropy(output.logits[0], ids[place + 1].view(1)).item())
        assert found.summary[f"loss_nats_at_{multiple}x"] == pytest.approx(np.mean(losses), rel=1e-5)
    by_position = [row["loss_nats"] for row in found.rows if row["kind"] == "position"]
    assert len(by_position) == 20
    assert np.mean(by_position[16:]) == pytest.approx(found.summary["loss_nats_at_5x"])


# leaks


def test_leaks_are_what_the_norm_declares(subject: Build) -> None:
    bn = {"model": "transformer", "model__norm": "bn"}
    seeing = Leak()(subject(**bn, model__norm_options={"pool": "batch_time"})).summary
    assert seeing["future_leak_train"] > 1e-4
    assert seeing["row_leak_train"] > 1e-4
    assert (seeing["future_leak_eval"], seeing["row_leak_eval"]) == (0, 0)
    blind = Leak()(subject(**bn)).summary
    assert blind["row_leak_train"] > 1e-4
    assert (blind["future_leak_train"], blind["future_leak_eval"], blind["row_leak_eval"]) == (0, 0, 0)
    ln = Leak()(subject(model__norm="ln")).summary
    assert set(ln.values()) == {0}


def test_a_leak_by_finite_differences(subject: Build) -> None:
    of = subject(model="transformer", model__norm="bn", model__layers=1, data__length=4)
    model: Any = of.model.double().eval()
    set_norms_training(model)
    found = Leak(rows=3, length=4)(of)
    torch.manual_seed(0)
    tokens = torch.randint(of.text.vocabulary, (3, 4))
    weights = torch.randn(3, 4, of.text.vocabulary).double()
    x = model.token_embedding(tokens).detach()

    def weighted(x_BTF: Tensor) -> float:
        hook = model.token_embedding.register_forward_hook(lambda m, i, y: x_BTF)
        value = (model(tokens).logits * weights)[0].sum().item()
        hook.remove()
        return value

    slopes = torch.zeros_like(x)
    for index in itertools.product(*map(range, x.shape)):
        moved = [x.clone(), x.clone()]
        moved[0][index] += 1e-5
        moved[1][index] -= 1e-5
        slopes[index] = (weighted(moved[0]) - weighted(moved[1])) / 2e-5
    largest = slopes.abs().amax((1, 2))
    assert found.summary["row_leak_train"] == pytest.approx(float(largest[1:].max() / largest[0]), rel=1e-3)


# cost


def test_saved_bytes_of_a_known_graph() -> None:
    linear, x = nn.Linear(8, 16), torch.randn(4, 8)
    with SavedBytes(list(linear.parameters())) as counted:
        y = linear(x).tanh().exp()
        z = y * y
    assert z.requires_grad
    # The input, the outputs of tanh and of exp (which the product keeps too), and no weights.
    assert counted.bytes == 4 * (4 * 8 + 4 * 16 + 4 * 16)


def test_cost_adds_up(subject: Build) -> None:
    of = subject(model__norm="ln")
    found = Cost(steps=3)(of)
    parameters = sum(p.numel() for p in of.model.parameters())
    assert found.summary["parameter_bytes"] == 4 * parameters
    for backend, key in (("fast", "seconds_per_step"), ("reference", "seconds_per_step_reference")):
        seconds = [row["seconds"] for row in found.rows if row["backend"] == backend]
        assert len(seconds) == 3
        assert found.summary[key] == np.median(seconds)
    own = 2 * 4 * parameters + 2 * 4 * parameters  # gradients; two averages of Adam
    steps = 4 * len(list(of.model.parameters()))  # Adam counts them per parameter
    assert found.summary["peak_bytes"] == own + steps + found.summary["saved_bytes"] + found.summary["buffer_bytes"]
    deeper = Cost(steps=1)(subject(model__norm="ln", model__layers=2))
    assert deeper.summary["saved_bytes"] > 1.3 * found.summary["saved_bytes"]


def test_layers_are_read_from_paths() -> None:
    paths = {
        "lstm.norms.l1_reverse.cell": 1,
        "blocks.10.ffn_norm": 10,
        "final_norm": -1,
        "network.h.0.ln_1": 0,
        "l2": 2,
    }
    assert {path: layer_of(path) for path in paths} == paths
