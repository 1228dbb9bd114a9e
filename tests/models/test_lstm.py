"""`normlab.LSTM`: equal to torch's without a norm; with one, right under padding, chunks and both directions.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from normlab.config import InputError, LSTMSites, NormOptions, SiteConfig, available_norms
from normlab.models.lstm import LSTM, LSTMState
from normlab.norms import build_norm
from normlab.norms.base import Norm

IN, H, B, T = 5, 16, 4, 6
LENGTHS = torch.tensor([4, 6, 1, 3])

SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "projection": {"proj_size": 3, "num_layers": 2, "bidirectional": True},
    "no_bias": {"bias": False, "num_layers": 3},
}


def pair(backend: str, **shape: Any) -> tuple[LSTM, nn.LSTM]:
    torch.manual_seed(0)
    # A projection has no fast form.
    backend = "reference" if "proj_size" in shape and backend == "fast" else backend
    mine = LSTM(IN, H, **shape, dtype=torch.float64, norm="none", backend=cast(Any, backend))
    theirs = nn.LSTM(IN, H, **shape, dtype=torch.float64)
    theirs.load_state_dict(mine.state_dict())
    return mine, theirs


def states(lstm: nn.LSTM, *rows: int) -> tuple[Tensor, Tensor]:
    count = lstm.num_layers * (2 if lstm.bidirectional else 1)
    h = torch.randn(count, *rows, lstm.proj_size or H, dtype=torch.float64, requires_grad=True)
    return h, torch.randn(count, *rows, H, dtype=torch.float64, requires_grad=True)


def assert_same(mine: LSTM, theirs: nn.LSTM, x: Any, hx: Any, leaf: Tensor) -> None:
    """Outputs, states and all gradients."""
    results = []
    for lstm in (mine, theirs):
        out, (h, c) = lstm(x, hx)
        data = out.data if isinstance(out, PackedSequence) else out
        loss = (data * torch.linspace(-1, 1, data.numel(), dtype=data.dtype).view_as(data)).sum()
        inputs = [leaf, *lstm.parameters(), *(hx or ())]
        results.append([data, h, c, *torch.autograd.grad(loss + h.square().sum() + c.sum(), inputs, retain_graph=True)])
        if isinstance(out, PackedSequence):
            results[-1] += [value for value in out[1:] if value is not None]
    assert len(results[0]) == len(results[1])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["auto", "fast", "reference"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "state"])
def test_none_equals_torch(backend: str, shape: dict[str, Any], given: bool) -> None:
    mine, theirs = pair(backend, **shape)
    assert sum(isinstance(module, Norm) and not module.identity for module in mine.modules()) == 0
    x = torch.randn(B, T, IN, dtype=torch.float64, requires_grad=True)
    assert_same(mine, theirs, x, states(theirs, x.shape[0 if theirs.batch_first else 1]) if given else None, x)
    unbatched = torch.randn(T, IN, dtype=torch.float64, requires_grad=True)
    assert_same(mine, theirs, unbatched, states(theirs) if given else None, unbatched)
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    assert_same(mine, theirs, packed, states(theirs, B) if given else None, x)
    packed = pack_padded_sequence(x, LENGTHS.sort(descending=True).values, batch_first=True)
    assert_same(mine, theirs, packed, None, x)


def test_dropout_between_layers_and_not_in_evaluation() -> None:
    x = torch.randn(T, B, IN, dtype=torch.float64)
    mine, theirs = pair("reference", num_layers=2, dropout=0.5)
    assert not mine(x)[0].equal(mine(x)[0])
    torch.testing.assert_close(mine.eval()(x)[0], theirs.eval()(x)[0])


def normed(norm: str, **shape: Any) -> LSTM:
    """In evaluation, with stored values left by three training batches."""
    torch.manual_seed(0)
    lstm = LSTM(IN, H, norm=norm, max_steps=32, dtype=torch.float64, batch_first=True, **shape)
    # A published gain of 0.1 would hide mistakes.
    for module in lstm.modules():
        if isinstance(module, Norm) and module.weight is not None:
            nn.init.normal_(module.weight, 1.0, 0.3)
    for _ in range(3):
        lstm(torch.randn(B, 12, IN, dtype=torch.float64) + 1)
    return lstm.eval()


def sample(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("norm", available_norms())
@pytest.mark.parametrize("bidirectional", [False, True])
def test_padded_batch_equals_its_rows(norm: str, bidirectional: bool) -> None:
    lstm = normed(norm, bidirectional=bidirectional, num_layers=2)
    x = sample(B, T, IN)
    for row, length in enumerate(LENGTHS.tolist()):
        x[row, length:] = torch.nan
    out, state = lstm(x, lengths=LENGTHS)
    packed, packed_state = lstm(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False))
    torch.testing.assert_close(pad_packed_sequence(packed, batch_first=True)[0], out)
    assert state.step.tolist() == packed_state.step.tolist() == LENGTHS.tolist()
    for row, length in enumerate(LENGTHS.tolist()):
        alone, (h, c) = lstm(x[row, :length])
        torch.testing.assert_close(out[row, :length], alone)
        assert (out[row, length:] == 0).all()
        for values, expected in ((state[0], h), (state[1], c), (packed_state[0], h), (packed_state[1], c)):
            torch.testing.assert_close(values[:, row], expected)


@pytest.mark.parametrize("norm", available_norms())
@pytest.mark.parametrize("training", [True, False])
def test_batch_first_both_ways(norm: str, training: bool) -> None:
    first = normed(norm, bidirectional=True, num_layers=2).train(training)
    last = copy.deepcopy(first)
    last.batch_first = False
    x = sample(B, T, IN)
    out, state = first(x, lengths=LENGTHS)
    turned, turned_state = last(x.transpose(0, 1), lengths=LENGTHS)
    assert torch.equal(out, turned.transpose(0, 1))
    assert all(torch.equal(one, other) for one, other in zip(state, turned_state, strict=True))
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    twins = normed(norm, bidirectional=True, num_layers=2).train(training)
    torch.testing.assert_close(pad_packed_sequence(twins(packed)[0], batch_first=True)[0], out)
    for one, other, third in zip(first.buffers(), last.buffers(), twins.buffers(), strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, third)


@pytest.mark.parametrize("norm", available_norms())
def test_padding_reaches_no_gradient_and_no_stored_value(norm: str) -> None:
    results = []
    for pad in (1e3, float("nan")):
        lstm = normed(norm, num_layers=2, bidirectional=True).train()
        x = sample(B, T, IN)
        for row, length in enumerate(LENGTHS.tolist()):
            x[row, length:] = pad
        out, (h, c) = lstm(x, lengths=LENGTHS)
        loss = (out * sample(*out.shape)).sum() + h.sum() + c.sum()
        results.append([*torch.autograd.grad(loss, list(lstm.parameters())), *lstm.buffers()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
        assert one.isfinite().all()


@pytest.mark.parametrize("norm", available_norms())
def test_chunks_with_the_state_equal_one_sequence(norm: str) -> None:
    lstm = normed(norm, num_layers=2)
    x = sample(B, 12, IN)
    whole, (h, c) = lstm(x)
    state, parts = None, []
    for chunk in x.split([5, 1, 6], dim=1):
        out, state = lstm(chunk, state)
        state = state.detach().to("cpu")
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert state is not None
    torch.testing.assert_close((state[0], state[1]), (h, c))
    assert state.step.tolist() == [12] * B
    # A plain (h, c) has no time step: norms that count them must then differ, and no others.
    first = lstm(x[:, :5])[1]
    again = lstm(x[:, 5:], (first[0], first[1]))[0]
    remembers = first.carry is not None or lstm.counts_steps
    assert torch.allclose(again, whole[:, 5:]) == (not remembers)


@pytest.mark.parametrize("norm", available_norms())
def test_rows_of_unequal_lengths_continue_at_their_own_step(norm: str) -> None:
    lstm = normed(norm)
    x = sample(B, 12, IN)
    _, state = lstm(x[:, :T], lengths=LENGTHS)
    assert state.step.tolist() == LENGTHS.tolist()
    rest = torch.stack([x[row, length : length + 5] for row, length in enumerate(LENGTHS.tolist())])
    out, state = lstm(rest, state)
    for row, length in enumerate(LENGTHS.tolist()):
        alone, _ = lstm(x[row, : length + 5])
        torch.testing.assert_close(out[row], alone[length:])
    assert state.step.equal(LENGTHS + 5)


def test_training_statistics_follow_the_step_of_each_row() -> None:
    lstm = LSTM(IN, H, norm="bn_step", max_steps=32, batch_first=True)
    zeros = torch.zeros(1, B, H)
    lstm(torch.randn(B, 2, IN), LSTMState(zeros, zeros, torch.tensor([0, 7, 7, 0])))
    for name, buffer in lstm.named_buffers():
        if name.endswith("seen"):
            assert buffer.nonzero().flatten().tolist() == [0, 1, 7, 8]
    with pytest.raises(InputError, match="at least 2 rows"):
        lstm(torch.randn(1, 2, IN))


@pytest.mark.parametrize("norm", available_norms())
def test_restart_puts_rows_back_to_the_start(norm: str) -> None:
    lstm = normed(norm)
    x = sample(B, 12, IN)
    zeros = torch.zeros(1, B, H, dtype=torch.float64)
    start = LSTMState(zeros, zeros, torch.zeros(B, dtype=torch.long))
    _, state = lstm(x[:, :5])
    fresh = torch.tensor([True, False, True, False])
    out, after = lstm(x[:, 5:], state.restart(fresh, start))
    torch.testing.assert_close(out[fresh], lstm(x[:, 5:])[0][fresh])
    torch.testing.assert_close(out[~fresh], lstm(x)[0][~fresh, 5:])
    assert after.step.tolist() == [7, 12, 7, 12]


@pytest.mark.parametrize("norm", available_norms())
@pytest.mark.parametrize("training", [True, False])
def test_causal_by_autograd(norm: str, training: bool) -> None:
    lstm = normed(norm, num_layers=2).train(training)
    x = sample(B, T, IN).requires_grad_()
    (grad,) = torch.autograd.grad((copy.deepcopy(lstm)(x)[0][:, :3] * sample(B, 3, H)).sum(), x)
    assert grad[:, :3].abs().max() > 0
    assert grad[:, 3:].abs().max() == 0
    other = torch.cat([x[:, :3], sample(B, T - 3, IN) + 1], 1)
    torch.testing.assert_close(
        copy.deepcopy(lstm)(other)[0][:, :3], copy.deepcopy(lstm)(x)[0][:, :3], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("norm", available_norms())
def test_truncated_backpropagation_counts_on_per_row(norm: str) -> None:
    """Chunks with a detached state, rows that restart on their own: training never mixes rows of unlike time steps."""
    lstm, twin = normed(norm).train(), normed(norm).train()
    zeros = torch.zeros(1, B, H, dtype=torch.float64)
    start = LSTMState(zeros, zeros, torch.zeros(B, dtype=torch.long))
    x = sample(B, 12, IN)
    _, state = lstm(x[:, :4])
    state = state.detach().restart(torch.tensor([True, True, False, False]), start)
    assert state.step.tolist() == [0, 0, 4, 4]
    out, after = lstm(x[:, 4:8], state)
    assert after.step.tolist() == [4, 4, 8, 8]
    if not lstm.counts_steps:
        return
    _, before = twin(x[:, :4])
    before = before.detach()
    fresh = twin(x[:2, 4:8])[0]
    older = LSTMState(before[0][:, 2:], before[1][:, 2:], before.step[2:])
    torch.testing.assert_close(out, torch.cat([fresh, twin(x[2:, 4:8], older)[0]]))


def test_classifiers_pool_the_input_projection_over_time_and_say_so() -> None:
    lstm = LSTM(IN, H, norm="bn", causal=False)
    causal = {name: norm.causal for name, norm in lstm.named_modules() if isinstance(norm, Norm)}
    assert causal == {
        "norms.l0.input_to_hidden": False,
        "norms.l0.hidden_to_hidden": True,
        "norms.l0.cell": True,
    }


@pytest.mark.parametrize("norm", available_norms())
def test_sites_can_be_bare_gained_and_mixed(norm: str) -> None:
    bare, own = SiteConfig(norm="none"), SiteConfig()
    for chosen in itertools.product((bare, own), repeat=3):
        lstm = LSTM(IN, H, norm=norm, sites=LSTMSites(*chosen))
        found = [m for m in lstm.modules() if isinstance(m, Norm)]
        assert [module.name for module in found] == [norm if site is own else "none" for site in chosen]
        assert [module.site for module in found] == ["input_to_hidden", "hidden_to_hidden", "cell"]
    gained = build_norm(norm, H).weight is not None
    lstm = LSTM(IN, H, norm="ln", sites=LSTMSites(cell=SiteConfig(norm=norm, gain=0.7 if gained else None)))
    (cell,) = [m for m in lstm.modules() if isinstance(m, Norm) and m.site == "cell"]
    assert cell.name == norm
    assert not gained or cell.gain == 0.7
    assert lstm(torch.randn(T, B, IN))[0].isfinite().all()


def test_published_gains_stand_inside_the_recurrence() -> None:
    gains = [m.gain for m in LSTM(IN, H, norm="bn_step").modules() if isinstance(m, Norm)]
    assert gains == [0.1, 0.1, 0.1]
    assert [m.bias is None for m in LSTM(IN, H, norm="ln").modules() if isinstance(m, Norm)] == [True, True, False]


def test_wrong_options_say_what_is_right() -> None:
    with pytest.raises(InputError, match=r"norm_options.groups is set, but no norm in use \(ln\) takes it"):
        LSTM(IN, H, norm="ln", norm_options=NormOptions(groups=2))
    with pytest.raises(InputError, match="unknown norm"):
        LSTM(IN, H, norm="layernorm")
    with pytest.raises(InputError, match="unknown LSTM backend"):
        LSTM(IN, H, backend=cast(Any, "quick"))
    with pytest.raises(InputError, match='lrn at hidden_to_hidden has no fast form; use backend="auto"'):
        LSTM(IN, H, norm="lrn", backend="fast")
    with pytest.raises(InputError, match="leave out `lengths`"):
        LSTM(IN, H)(pack_padded_sequence(torch.randn(T, B, IN), torch.tensor([6, 4, 3, 1])), lengths=LENGTHS)


@pytest.mark.parametrize("norm", available_norms())
def test_bf16_autocast_trains(norm: str) -> None:
    lstm = LSTM(IN, H, norm=norm, batch_first=True)
    x = torch.randn(B, T, IN)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = lstm(x, lengths=LENGTHS)
        out, _ = lstm(x, state)
    out.float().square().sum().backward()
    exact = copy.deepcopy(lstm).double()(x.double(), cast(Any, tuple(value.double() for value in state)))[0]
    assert out.shape == exact.shape
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lstm.parameters())


@pytest.mark.parametrize("norm", ["none", "ln"])
def test_states_that_torch_refuses_are_refused(norm: str) -> None:
    lstm = LSTM(3, 5, norm=norm)
    x_TBF = torch.randn(4, 2, 3)
    for shape in ((1, 1, 5), (2, 2, 5), (1, 2, 4)):
        with pytest.raises(RuntimeError, match="Expected hidden"):
            lstm(x_TBF, (torch.zeros(shape), torch.zeros(shape)))
