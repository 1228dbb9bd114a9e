"""Norms swapped into architectures of transformers and into plain torch modules.

Shapes: B batch, T time, F features, V vocabulary.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tiny_architectures import FOUR, OWN, WIDTH, V, batch, build, ids
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

import normlab
from normlab.config import InputError, available_norms
from normlab.models.padding import CACHES, pooling
from normlab.models.swap import SwapReport, reads_ahead, swap_norms
from normlab.norms import build_norm, norm_options
from normlab.norms.base import Norm

every_norm = pytest.mark.parametrize("norm", available_norms())
POOLS = ("batch", "batch_time", "prefix", "time", "token")
four = pytest.mark.parametrize("architecture", FOUR)


def norms(model: nn.Module) -> dict[str, Norm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Norm)}


def watch(model: nn.Module) -> dict[str, tuple[Tensor, Tensor | None, int | Tensor]]:
    """What each norm was called with last: x, mask, step."""
    seen: dict[str, Any] = {}
    for name, norm in norms(model).items():
        norm.register_forward_hook(lambda module, args, y, name=name: seen.update({name: args}))
    return seen


# Whatever is not the norm stays the same.


@four
@pytest.mark.parametrize("double", [True, False])
def test_its_own_norm_leaves_logits_unchanged(architecture: str, double: bool):
    model = build(architecture, double=double)
    for training in (True, False):
        model.train(training)
        swapped = copy.deepcopy(model)
        report = swap_norms(swapped, OWN[architecture])
        assert len(report.rows) == {"gpt2": 5, "bert": 6, "llama": 5, "t5": 12}[architecture]
        a, b = model(**batch(architecture)).logits, swapped(**batch(architecture)).logits
        # The RMSNorms of transformers compute in fp32 whatever comes in.
        exact = double and OWN[architecture] == "ln"
        assert torch.allclose(a, b, rtol=0, atol=float(a.detach().abs().max()) * (1e-12 if exact else 1e-6))
        assert (a - 1.001 * b).abs().max() > float(a.detach().abs().max()) * 1e-5  # the tolerance tells them apart


@four
def test_parameters_keep_names_values_and_what_is_trained(architecture: str):
    model = build(architecture)
    model.get_input_embeddings().requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen = next(name for name, parameter in model.named_parameters() if parameter.ndim == 1)
    model.get_parameter(frozen).requires_grad_(False)
    swap_norms(model, "bn", affine=True)
    after = model.state_dict()
    assert set(before) <= set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not model.get_parameter(frozen).requires_grad
    assert sum(not parameter.requires_grad for parameter in model.parameters()) == 2
    assert set(after) - set(before) == {f"{name}.running_{kind}" for name in norms(model) for kind in ("mean", "var")}


def test_precision_and_mode_stay():
    model = build("llama").to(torch.bfloat16).eval()
    swap_norms(model, "bn")
    for norm in norms(model).values():
        assert norm.weight is not None
        assert norm.weight.dtype == torch.bfloat16
        assert norm.get_buffer("running_var").dtype == torch.float32
        assert not norm.training
    assert model(ids(2, 4)).logits.dtype == torch.bfloat16


def test_eps_is_kept_unless_given():
    model = build("llama")
    swap_norms(model, "ln")
    assert {norm.eps for norm in norms(model).values()} == {1e-6}
    other = build("llama")
    swap_norms(other, "ln", eps=0.5)
    assert {norm.eps for norm in norms(other).values()} == {0.5}


def test_gain_and_affine_as_given():
    model = build("gpt2")
    report = swap_norms(model, "ln", gain=0.5)
    assert {float(norm.get_parameter("weight").detach().mean()) for norm in norms(model).values()} == {0.5}
    assert {(row.kept, row.note) for row in report.rows} == {("bias", "gain as given")}
    bare = build("gpt2")
    report = swap_norms(bare, "ln", affine=False)
    assert {row.note for row in report.rows} == {"weight dropped; bias dropped"}
    assert all(not list(norm.parameters()) for norm in norms(bare).values())


def test_without_a_bias_there_stays_none():
    model = build("llama")
    swap_norms(model, "ln")
    assert all(norm.bias is None for norm in norms(model).values())
    biased = build("llama")
    swap_norms(biased, "ln", bias=True)
    assert all(norm.bias is not None and not norm.bias.any() for norm in norms(biased).values())


def test_swapping_leaves_random_state_and_modes_alone():
    model = build("bert")
    model.get_submodule("bert.encoder.layer.0").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    swap_norms(model, "bn")
    assert torch.equal(state, torch.get_rng_state())
    assert {name: module.training for name, module in model.named_modules()} == modes


# Every norm trains.


@four
@every_norm
def test_every_norm_trains(architecture: str, norm: str):
    model = build(architecture)
    swap_norms(model, norm, allow_leak=True)
    given = batch(architecture)
    targets = given.get("decoder_input_ids", given["input_ids"])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = functional.cross_entropy(model(**given).logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert all(p.grad is not None for part in norms(model).values() for p in part.parameters())


# Padding.


def padded(given: dict[str, Tensor], more: int, left: bool = False) -> dict[str, Tensor]:
    """Rows of 3 to 6 tokens, with `more` columns of padding beyond the longest, which hold other tokens each time."""
    result = {}
    for name, tokens_BT in given.items():
        B, T = tokens_BT.shape
        mask_BT = torch.arange(T + more) < torch.tensor([T, T - 1, T, T - 2])[:B, None]
        filled = torch.where(mask_BT, functional.pad(tokens_BT, (0, more)), ids(B, T + more, seed=9 + more))
        if left:
            mask_BT, filled = (
                mask_BT.flip(1),
                torch.stack([_left(row, mask) for row, mask in zip(filled, mask_BT, strict=True)]),
            )
        prefix = "decoder_" if name.startswith("decoder_") else ""
        result |= {name: filled, f"{prefix}attention_mask": mask_BT.long()}
    return result


def _left(row_T: Tensor, mask_T: Tensor) -> Tensor:
    return torch.cat((row_T[~mask_T], row_T[mask_T]))


def outcome(model: nn.Module, given: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Logits of the real entries in training, gradients, stored statistics; the model itself stays as it is."""
    model = copy.deepcopy(model)
    mask_BT = given.get("decoder_attention_mask", given["attention_mask"]).bool()
    real = model(**given).logits[mask_BT]
    (real * torch.linspace(-1, 1, real.numel(), dtype=real.dtype).view_as(real)).sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [real], grads, [buffer for norm in norms(model).values() for buffer in norm.buffers()]


def assert_same(a: tuple[list[Tensor], ...], b: tuple[list[Tensor], ...], tolerance: float) -> None:
    """Relative to the largest value of each list: the gradients of some biases are 0 but for rounding."""
    for first, second in zip(a, b, strict=True):
        if not first:
            continue  # this norm stores nothing
        first, second = (torch.cat([value.detach().double().flatten() for value in side]) for side in (first, second))
        assert torch.allclose(first, second, rtol=0, atol=tolerance * float(first.abs().max()))


@four
@every_norm
def test_padding_reaches_nothing_real(architecture: str, norm: str):
    model = build(architecture, double=True)
    swap_norms(model, norm, allow_leak=True)
    assert_same(*(outcome(model, padded(batch(architecture), more)) for more in (0, 3)), tolerance=1e-6)


@every_norm
def test_padding_on_the_left_is_as_padding_on_the_right(norm: str):
    """Rotary positions are relative, so the text alone decides."""
    model = build("llama", double=True)
    swap_norms(model, norm, allow_leak=True)
    assert_same(*(outcome(model, padded(batch("llama"), 2, left=left)) for left in (False, True)), tolerance=1e-4)


def test_an_encoder_and_a_decoder_have_masks_of_their_own():
    model = build("t5")
    report = swap_norms(model, "bn")
    assert report.masks > 0
    seen = watch(model)
    tokens = ids(3, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    for encoder_mask, decoder_mask in ((mask, None), (None, mask), (mask, mask.flip(0))):
        model(
            input_ids=tokens, attention_mask=encoder_mask, decoder_input_ids=tokens, decoder_attention_mask=decoder_mask
        )
        for name, (_, got, _) in seen.items():
            expected = encoder_mask if name.startswith("encoder.") else decoder_mask
            assert (got is None) == (expected is None), name
            assert got is None or torch.equal(got, expected.bool()), name


def test_a_forward_pass_that_fails_leaves_no_mask_behind():
    model = build("gpt2")
    swap_norms(model, "bn")
    seen = watch(model)
    tokens, mask = ids(2, 4), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    with pytest.raises(IndexError):
        model(tokens + V, attention_mask=mask)
    model.transformer.h[0](torch.randn(2, 4, WIDTH))
    assert seen["transformer.h.0.ln_1"][1] is None


@every_norm
def test_what_a_norm_pools_over_is_as_it_behaves(norm: str):
    options: dict[str, Any] = {"groups": 4} if norm == "gn" else {}
    pools = POOLS if "pool" in norm_options(norm) else ()
    x_BTF = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other_BTF = x_BTF.clone()
    other_BTF[0, 1] = x_BTF[0, 1].flip(0)
    checked = 0
    for pool in (None, *pools):
        try:
            new = build_norm(norm, 8, **options, **({"pool": pool} if pool else {})).double()
        except InputError:
            continue  # another norm's pool
        checked += 1
        for training in (True, False):
            y, other = (copy.deepcopy(new).train(training)(x).detach() for x in (x_BTF, other_BTF))
            changed_BT = (y - other).abs().amax(-1) > 1e-9
            over_time, over_rows = bool(changed_BT[0, [0, 2, 3]].any()), bool(changed_BT[1:].any())
            found = pooling(new)
            assert (found.training if training else found.evaluation) == over_time
            assert found.context or not (over_time or over_rows)
    assert checked > (2 if pools else 0)


@every_norm
def test_swapping_runs_no_new_norm(norm: str, monkeypatch: pytest.MonkeyPatch):
    """A norm that synchronizes would wait for processes that do not swap."""

    def run(*given: Any) -> Tensor:
        raise AssertionError("a norm ran")

    model = build("bert")
    monkeypatch.setattr(Norm, "forward", run)
    assert swap_norms(model, norm).rows


def test_a_mask_that_does_not_say_what_is_padding_is_refused():
    model = build("gpt2")
    swap_norms(model, "bn")
    with pytest.raises(InputError, match="batch x time, 1 = real token"):
        model(ids(2, 4), attention_mask=torch.zeros(2, 1, 4, 4))
    with pytest.raises(InputError, match="does not fit 2 rows of 0 cached and 4 new tokens"):
        model(ids(2, 4), attention_mask=torch.ones(2, 5))
    same = build("gpt2")
    swap_norms(same, "rms")  # needs no mask
    same(ids(2, 4), attention_mask=torch.zeros(2, 1, 4, 4))


# Causality.


@every_norm
@pytest.mark.parametrize("training", [True, False])
def test_no_time_step_of_a_causal_model_sees_a_later_one(norm: str, training: bool):
    model = build("gpt2", double=True)
    if not build_norm(norm, WIDTH).causal:
        with pytest.raises(InputError, match="would see later time steps"):
            swap_norms(model, norm)
        return
    swap_norms(model, norm)
    model(ids(4, 6))  # stored values
    model.train(training)
    x_BTF = torch.randn(4, 6, WIDTH, dtype=torch.float64).requires_grad_()
    weight = torch.randn(4, 4, V, dtype=torch.float64)
    (grad,) = torch.autograd.grad((model(inputs_embeds=x_BTF).logits[:, :4] * weight).sum(), x_BTF)
    assert grad[:, :4].abs().max() > 0
    assert not grad[:, 4:].any()


def test_a_norm_that_sees_later_tokens_is_refused_where_the_model_is_causal():
    model = build("gpt2")
    before = copy.deepcopy(model)
    with pytest.raises(InputError, match=r"transformer.h.0.ln_1 would see later time steps.*allow_leak=True") as error:
        swap_norms(model, "bn", pool="batch_time")
    assert "\n" not in str(error.value)
    assert str(before) == str(model)
    assert torch.equal(before(ids(2, 4)).logits, model(ids(2, 4)).logits)
    report = swap_norms(model, "bn", pool="batch_time", allow_leak=True)
    assert {row.note for row in report.rows} == {"sees later time steps"}
    told = swap_norms(before, "bn", pool="batch_time", causal=False)
    assert {(row.causal, row.note) for row in told.rows} == {(False, "")}


@pytest.mark.parametrize(("architecture", "ahead"), [("gpt2", False), ("llama", False), ("bert", True), ("t5", False)])
def test_whether_a_model_is_causal_is_seen(architecture: str, ahead: bool):
    model = build(architecture)
    assert reads_ahead(model) == ahead
    report = swap_norms(model, "bn")
    for row in report.rows:
        causal = not ahead and not row.name.startswith("encoder.")
        assert row.causal == causal
        assert ("pool=batch," in row.new, "pool=batch_time," in row.new) == (causal, not causal)


def test_a_bert_that_decodes_is_causal():
    assert reads_ahead(build("bert", is_decoder=True)) is False


def test_a_headless_classifier_of_a_causal_model_is_seen_through():
    import transformers

    fields = build("gpt2").config
    fields.num_labels = 3
    assert reads_ahead(transformers.GPT2ForSequenceClassification(fields)) is False


def test_what_cannot_be_found_out_is_taken_to_be_causal():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    with pytest.raises(
        InputError, match="taken to be causal, for it could not be found out: Sequential takes no input_ids"
    ):
        swap_norms(model, "inorm", pool="time")
    report = swap_norms(model, "inorm")
    assert report.rows[0].causal
    assert "taken to be causal" in str(report)


# The report, and which modules.


def test_the_report_says_what_was_replaced():
    model = build("gpt2")
    report = normlab.swap_norms(model, "rms", ["*.ln_1", "transformer.ln_f"])
    assert isinstance(report, SwapReport)
    assert report.model is model
    assert [row.name for row in report.rows] == ["transformer.h.0.ln_1", "transformer.h.1.ln_1", "transformer.ln_f"]
    assert {(row.old, row.dim, row.kept, row.note) for row in report.rows} == {
        ("LayerNorm", WIDTH, "weight", "bias dropped")
    }
    assert report.masks == 0
    assert sorted(norms(model)) == [row.name for row in report.rows]
    lines = str(report).splitlines()
    assert lines[0] == "3 norms are rms now; the model is causal: no output sees a later token"
    assert lines[2].startswith("transformer.h.0.ln_1  LayerNorm  rms(32, eps=1e-05, gain=1, bias=False)  yes")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm": "lnn"}, "did you mean 'ln'?"),
        ({"norm": "ln", "pool": "batch"}, "ln has no option 'pool'"),
        ({"norm": "ln", "sites": "*.ln_3"}, "no norm is called '*.ln_3'; there are: transformer.h.0.ln_1,"),
        ({"norm": "ln", "sites": ["*.ln_1", "ln_f"]}, "no norm is called 'ln_f'"),
    ],
)
def test_a_mistake_gets_one_line_and_changes_nothing(options: dict[str, Any], said: str):
    model = build("gpt2")
    with pytest.raises(InputError) as error:
        swap_norms(model, **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not norms(model)


def test_nothing_to_replace_is_a_mistake():
    with pytest.raises(InputError, match="there is no LayerNorm or RMSNorm in this Linear"):
        swap_norms(nn.Linear(3, 3), "ln")
    with pytest.raises(InputError, match="is itself a norm"):
        swap_norms(nn.LayerNorm(3), "ln")
    with pytest.raises(InputError, match="on the meta device"):
        swap_norms(nn.Sequential(nn.LayerNorm(3, device="meta")), "ln")
    twice = nn.Sequential(nn.LayerNorm(3))
    swap_norms(twice, "rms")
    with pytest.raises(InputError, match="0 is one of normlab's norms already"):
        swap_norms(twice, "ln")


def test_a_shared_module_is_replaced_by_a_shared_one():
    shared = nn.LayerNorm(8)
    model = nn.Sequential(shared, nn.Linear(8, 8), shared)
    report = swap_norms(model, "rms")
    assert model[0] is model[2]
    assert [(row.name, row.note) for row in report.rows] == [("0", "bias dropped"), ("2", "the same module as 0")]


def test_copies_pickles_and_state_dicts():
    model = build("llama")
    swap_norms(model, "bn_step", max_steps=6)
    given = padded(batch("llama"), 2)
    model(**given)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = build("llama")
    swap_norms(again, "bn_step", max_steps=6)
    again.load_state_dict(model.state_dict())
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False), again]
    for other in others:
        seen, original = watch(other), watch(model)
        a, b = model.eval()(**given).logits, other.eval()(**given).logits
        assert torch.equal(a, b)
        masks = [[args[1] for args in calls.values()] for calls in (original, seen)]
        assert masks[0]
        assert all(torch.equal(x, y) for x, y in zip(*masks, strict=True))
        other.train()(**given)  # a copy stores into its own buffers
        assert torch.equal(model.eval()(**given).logits, a)


# Shapes other than B x T x F, caches, checkpointing.


def test_queries_and_keys_are_rows_of_their_own():
    model = build("qwen3", double=True)
    swap_norms(model, "bn_step", "*_norm")
    seen = watch(model)
    for T in (6, 2):  # 2 is also the number of heads
        given = padded({"input_ids": ids(4, T)}, 0) if T > 2 else {"input_ids": ids(4, T)}
        model(**given)
        x, mask, step = seen["model.layers.0.self_attn.q_norm"]
        assert x.shape == (8, T, 16)
        assert step == 0
        if T > 2:
            assert mask is not None
            assert torch.equal(mask, given["attention_mask"].bool().repeat_interleave(2, 0))
    own = build("qwen3", double=True)
    swapped = copy.deepcopy(own)
    swap_norms(swapped, "rms")
    assert torch.allclose(own(ids(4, 6)).logits, swapped(ids(4, 6)).logits, atol=1e-5)


def test_four_dimensions_without_a_clue_are_refused():
    model = nn.Sequential(nn.LayerNorm(8))
    swap_norms(model, "bn")
    with pytest.raises(InputError, match="cannot tell which dimension of the input of 0"):
        model(torch.randn(2, 3, 4, 8))
    per_entry = nn.Sequential(nn.LayerNorm(8))
    x = torch.randn(2, 3, 4, 8)
    y = per_entry(x)
    swap_norms(per_entry, "ln")
    assert torch.allclose(per_entry(x), y, atol=1e-6)
    assert torch.allclose(per_entry(x[0, 0, 0]), y[0, 0, 0], atol=1e-6)
    assert torch.allclose(per_entry(input=x), y, atol=1e-6)


def test_tokens_in_one_row_find_their_time_steps_again():
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(V, 8), nn.LayerNorm(8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x_BTF = self.embed(input_ids)
            return self.norm(x_BTF.flatten(0, 1)).view_as(x_BTF)

    model = Flat()
    swap_norms(model, "bn_step", causal=True)
    seen = watch(model)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    model(ids(2, 3), attention_mask=mask)
    x, got, _ = seen["norm"]
    assert x.shape == (2, 3, 8)
    assert got is not None
    assert torch.equal(got, mask.bool())


@pytest.mark.parametrize("norm", ["ln", "bn", "bn_step"])
@pytest.mark.parametrize("left", [False, True])
def test_a_cache_gives_the_same_logits(norm: str, left: bool):
    model = build("llama", double=True)
    swap_norms(model, norm)
    for seed in range(3):
        model(ids(4, 8, seed))
    model.eval()
    tokens, mask = ids(2, 6), torch.ones(2, 6, dtype=torch.long)
    if left:
        mask[1, :3] = 0
    whole = model(tokens, attention_mask=mask).logits
    first = model(tokens[:, :4], attention_mask=mask[:, :4], use_cache=True)
    rest = model(tokens[:, 4:], attention_mask=mask, **cache_of(first)).logits
    assert torch.allclose(whole[:, 4:], rest, atol=1e-5)


def cache_of(output: Any) -> dict[str, Any]:
    """By the first name that this version of transformers has for it, in results as in arguments."""
    name = next(name for name in CACHES if name in output)
    return {name: output[name]}


@pytest.mark.parametrize("name", ["cache", "past_key_values", "cache_params"])
def test_a_cache_by_any_name_tells_the_time_step(name: str):
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(V, 8), nn.LayerNorm(8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **caches: Any) -> Tensor:
            return self.norm(self.embed(input_ids))

    model = Cached()
    swap_norms(model, "bn_step", causal=True)
    seen = watch(model)
    cache = DynamicCache()
    cache.update(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4), 0)
    for given, step in ((cache, 3), (None, 0), (False, 0), (True, 0), ({}, 0), ([], 0)):
        model(ids(2, 1), **{name: given})
        assert seen["norm"][2] == step
    with pytest.raises(InputError, match="a cache of type dict does not tell"):
        model(ids(2, 1), **{name: {"of": "its own"}})


@pytest.mark.parametrize("norm", ["bn", "bn_step", "inorm"])
def test_a_cache_that_does_not_tell_is_refused_where_it_must(norm: str):
    model = MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=8, num_hidden_layers=1, state_size=2)).double()
    swap_norms(model, norm)
    model(ids(4, 5))
    model.eval()
    tokens = ids(2, 5)
    whole, first = model(tokens).logits, model(tokens[:, :4], use_cache=True)
    if norm == "bn":  # no entry depends on its time step
        rest = model(tokens[:, 4:], **cache_of(first)).logits
        assert torch.allclose(whole[:, 4:], rest, atol=1e-6)
        assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape == (2, 7)
        return
    with pytest.raises(InputError, match="use_cache=False"):
        model(tokens[:, 4:], **cache_of(first))


def test_a_norm_over_the_sequence_refuses_a_cache():
    model = build("llama")
    swap_norms(model, "inorm")
    model.eval()
    first = model(ids(2, 4), use_cache=True)
    with pytest.raises(InputError, match="use_cache=False"):
        model(ids(2, 1), **cache_of(first))
    made = model.generate(ids(2, 4), max_new_tokens=3, use_cache=False, do_sample=False)
    assert made.shape == (2, 7)


def test_gradient_checkpointing():
    plain = build("llama")
    swap_norms(plain, "ln")
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        model(**padded(batch("llama"), 2)).logits.square().mean().backward()
    for a, b in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-7)
    pooled = build("llama")
    swap_norms(pooled, "bn")
    pooled.gradient_checkpointing_enable()
    loss = pooled(**padded(batch("llama"), 2)).logits.mean()
    with pytest.raises(InputError, match=r"gradient checkpointing runs model\.layers\.1"):
        loss.backward()


def test_torchs_own_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16))
    x_BTF, padding_BT = torch.randn(3, 5, 16), torch.arange(5) >= torch.tensor([[5], [3], [4]])
    model.eval()
    swapped = copy.deepcopy(model)
    swap_norms(swapped, "ln", causal=False)
    with torch.no_grad():  # where torch would take a fused kernel with LayerNorms of its own
        a, b = (m(x_BTF, src_key_padding_mask=padding_BT) for m in (model, swapped))
        assert torch.allclose(a[~padding_BT], b[~padding_BT], atol=1e-5)
        swap_norms(copy_ := copy.deepcopy(model), "none", causal=False)
        c = copy_(x_BTF, src_key_padding_mask=padding_BT)
    assert not torch.allclose(a[~padding_BT], c[~padding_BT], atol=1e-2)

    swap_norms(model, "bn", causal=False)
    seen = watch(model)
    model.train()(x_BTF, src_key_padding_mask=padding_BT)
    assert len(seen) == 5
    assert all(mask is not None and torch.equal(mask, ~padding_BT) for _, mask, _ in seen.values())


@pytest.mark.parametrize("norm", ["inorm", "bn_step"])
@pytest.mark.parametrize("padding", [0, 2])
def test_torchs_own_encoder_without_rows(norm: str, padding: int):
    """T x F is one row of T time steps, as torch has it; T and F are not rows and time."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(16)).double()
    swap_norms(model, norm, causal=False)
    x_BTF, padding_T = torch.randn(4, 7, 16, dtype=torch.float64), torch.arange(7) >= 7 - padding
    model.train()(x_BTF)  # stored values
    given = {"src_key_padding_mask": padding_T} if padding else {}
    model.train(norm == "inorm")
    batched = model(x_BTF[:1], **{key: value[None] for key, value in given.items()})[0]
    assert torch.allclose(model(x_BTF[0], **given)[~padding_T], batched[~padding_T], rtol=0, atol=1e-12)
    # A norm that took the time steps for rows would give something else.
    with torch.no_grad():
        alone = torch.stack([model(x_BTF[0, t : t + 1])[0] for t in range(7)])
    assert not torch.allclose(alone, batched, atol=1e-3)


def test_time_before_rows_is_refused_where_it_matters():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 1, enable_nested_tensor=False)
    with pytest.raises(InputError, match="batch_first=True"):
        swap_norms(model, "bn", causal=False)
    swap_norms(model, "rms", causal=False)
    model(torch.randn(5, 3, 16))
