"""Architectures of transformers as models of ours, and every field of their config.

Shapes: B batch, T time, V vocabulary, C classes.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_architectures import LLAMA, WIDTH
from torch import Tensor, nn

from normlab.config import HuggingFaceConfig, InputError, NormOptions, RunConfig, available_norms
from normlab.models import huggingface
from normlab.models.huggingface import HuggingFaceModel, require_architecture
from normlab.norms import build_norm
from normlab.norms.base import Norm
from normlab.records.summary import summary_rows
from normlab.training.optim import decayed_parameters
from normlab.training.run import train

V, LENGTH = 20, 12
GPT2 = {"n_layer": 2, "n_embd": WIDTH, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "bert": LLAMA,
    "roberta": LLAMA,
    "t5": {"num_layers": 2, "d_model": WIDTH, "num_heads": 2, "d_kv": 16, "d_ff": 64, "dropout_rate": 0.0},
}

WHISPER = {
    "encoder_layers": 1,
    "decoder_layers": 1,
    "d_model": WIDTH,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}


def config(architecture: str = "gpt2", **fields: Any) -> HuggingFaceConfig:
    return HuggingFaceConfig(**{"architecture": architecture, "overrides": SIZES.get(architecture, {}), **fields})


def build(settings: HuggingFaceConfig, classes: int | None = None, length: int = LENGTH) -> HuggingFaceModel:
    torch.manual_seed(3)
    return HuggingFaceModel(settings, V, classes=classes, length=length)


def norms(model: nn.Module) -> list[Norm]:
    return [part for part in model.modules() if isinstance(part, Norm)]


TOKENS = torch.arange(24).view(4, 6) % V
MASK = torch.arange(6) < torch.tensor([[6], [4], [5], [3]])


@pytest.mark.parametrize("norm", ["own", *available_norms()])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_language_model_has_logits_over_the_text_and_sees_no_later_token(architecture: str, norm: str):
    if norm != "own" and not build_norm(norm, WIDTH).causal:
        with pytest.raises(InputError, match="would see later time steps"):
            build(config(architecture, norm=norm))
        return
    model = build(config(architecture, norm=norm)).eval()
    logits = model(TOKENS).logits
    assert logits.shape == (4, 6, V)
    assert model(TOKENS).state is None
    later = TOKENS.clone()
    later[:, 4:] = (later[:, 4:] + 7) % V
    assert torch.equal(model(later).logits[:, :4], model(TOKENS).logits[:, :4])
    assert len(norms(model)) == (0 if norm == "own" else 5)


@pytest.mark.parametrize("architecture", list(SIZES))
def test_a_classifier_leaves_padding_out(architecture: str):
    model = build(config(architecture, norm="bn"), classes=3).train()
    results = []
    for more in (0, 3):
        tokens_BT = nn.functional.pad(TOKENS, (0, more), value=5 + more)
        mask_BT = nn.functional.pad(MASK, (0, more))
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        results.append(model(torch.where(mask_BT, tokens_BT, 5 + more), mask_BT).logits)
    assert results[0].shape == (4, 3)
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert not torch.allclose(results[0], model(TOKENS).logits, atol=1e-4)
    assert all("pool=batch_time" in repr(part) for part in norms(model))
    # Nothing is left untrained: several processes would wait for its gradient.
    model(TOKENS, MASK).logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_a_row_of_nothing_but_padding_is_finite():
    model = build(config("bert"), classes=2)
    mask_BT = MASK.clone()
    mask_BT[2] = False
    logits = model(TOKENS, mask_BT).logits
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_tokens_of_the_text_are_no_special_tokens():
    """The padding's embedding is never trained, so it must not be a token's."""
    model = build(config("bert"), classes=2)
    model(torch.zeros(2, 4, dtype=torch.long)).logits[:, 0].sum().backward()
    grad = model.network.get_input_embeddings().weight.grad
    assert grad[1].abs().max() > 0
    assert len(grad) == V + 1


def test_the_right_logit_belongs_to_each_token():
    model = build(config("gpt2")).eval()
    inner: Tensor = model.network(input_ids=TOKENS + 1).logits
    assert torch.equal(model(TOKENS).logits, inner[..., 1:])


def test_gains_biases_and_embeddings_do_not_decay():
    decayed = decayed_parameters(build(config("gpt2", norm="bn")))
    assert decayed == {
        f"network.transformer.h.{layer}.{part}.weight"
        for layer in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


OTHER_VALUES: dict[str, Any] = {
    "architecture": "opt",
    "norm": "ln",
    "norm_options": NormOptions(eps=0.1),
    "swap": "*.ln_1",
    "overrides": {**GPT2, "n_layer": 1},
    "from_file": {"activation_function": "relu"},
}


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(HuggingFaceConfig) if f.name != "name"])
def test_every_field_changes_something(name: str):
    def signature(settings: HuggingFaceConfig) -> tuple[list[tuple[int, ...]], Tensor]:
        model = build(settings)
        return [tuple(p.shape) for p in model.parameters()], model(TOKENS).logits.detach()

    base = config(norm="rms")
    other = {name: OTHER_VALUES[name]}
    if name == "architecture":
        other["overrides"] = {"num_hidden_layers": 1, "hidden_size": WIDTH, "num_attention_heads": 2}
    a, same, b = (signature(settings) for settings in (base, base, dataclasses.replace(base, **other)))
    assert a[0] == same[0]
    assert torch.equal(a[1], same[1])
    assert a[0] != b[0] or not torch.allclose(a[1], b[1], atol=1e-6)


def test_a_file_gives_sizes_and_overrides_change_them(tmp_path: Path):
    fields = {"model_type": "gpt2", **GPT2, "vocab_size": 9, "eos_token_id": 8, "n_ctx": 7, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = build(HuggingFaceConfig(architecture=str(tmp_path), overrides={"n_layer": 1}))
    assert model(TOKENS).logits.shape == (4, 6, V)
    assert len(model.network.transformer.h) == 1
    assert next(model.parameters()).dtype == torch.float32


def test_norms_with_steps_have_as_many_as_the_text():
    assert all("max_steps=12" in repr(part) for part in norms(build(config(norm="bn_step"))))
    given = config(norm="bn_step", norm_options=NormOptions(max_steps=5))
    assert all("max_steps=5" in repr(part) for part in norms(build(given)))


def test_a_pool_that_sees_later_tokens_is_there_for_those_who_name_it():
    model = build(config(norm="bn", norm_options=NormOptions(pool="batch_time")))
    assert norms(model)
    assert not any(part.causal for part in norms(model))


def test_positions_reach_as_far_as_the_text():
    long = build(config("gpt2", overrides={**GPT2, "n_positions": 40}), length=40)
    long(torch.zeros(1, 40, dtype=torch.long))
    with pytest.raises(InputError, match="a sequence of 41 tokens is longer than the 40 positions"):
        long(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(InputError, match="n_positions is 39, but texts have up to 40"):
        build(config("gpt2", overrides={**GPT2, "n_positions": 39}), length=40)
    wide = build(config("roberta"), classes=2, length=600)  # its own are 512, counted from behind the padding's id
    wide(torch.zeros(1, 600, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "classes", "said"),
    [
        (config("bert"), None, "add --model.overrides.is_decoder true"),
        (config("t5"), None, "cannot build t5: it has no language model of this kind; use it on a corpus with labels"),
        (config("gtp2"), None, "did you mean gpt2"),
        (
            config("gpt2", overrides={"n_layers": 2}),
            None,
            "'n_layers' to override (model.overrides); did you mean n_layer",
        ),
        (config("gpt2", overrides={**GPT2, "n_layer": "x"}), None, "expected int, got str"),
        (config("gpt2", overrides={**GPT2, "n_head": 3}), None, "must be divisible by num_heads"),
        (
            config("gpt2", overrides={**GPT2, "n_embd": -4}),
            None,
            "cannot build gpt2: Trying to create tensor with negative dimension -4: [21, -4]; check model.overrides",
        ),
        (
            config("gpt2", overrides={**GPT2, "activation_function": "foo"}),
            None,
            "cannot build gpt2: KeyError: 'foo'; check model.overrides",
        ),
        (config("bert", overrides={**LLAMA, "type_vocab_size": 0}), 2, "bert cannot read 12 tokens: index_select()"),
        (config("clip"), 2, "reads more than text"),
        (config("whisper", overrides=WHISPER), 2, "whisper reads more than text; name an architecture for text alone"),
        (config("vilt", overrides=LLAMA), 2, "vilt reads more than text; name an architecture for text alone"),
        (config("gpt2", norm="gn", norm_options=NormOptions(groups=5)), None, "gn cannot cut 32 features into 5"),
        (config("gpt2", norm="ln", norm_options=NormOptions(pool="batch")), None, "ln has no option 'pool'"),
        (config("gpt2", norm="ln", swap="*.ln_3"), None, "no norm is called '*.ln_3'"),
    ],
)
def test_a_mistake_gets_one_line(settings: HuggingFaceConfig, classes: int | None, said: str):
    with pytest.raises(InputError) as error:
        build(settings, classes)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] can't allocate memory")],
)
def test_too_little_memory_is_no_mistake_in_the_overrides(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(*given: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(importlib.import_module("transformers").AutoModelForCausalLM, "from_config", fail)
    with pytest.raises(type(error)) as raised:
        build(config())
    assert raised.value is error


def test_a_bert_that_decodes_is_a_language_model():
    model = build(config("bert", overrides={**LLAMA, "is_decoder": True}, norm="bn"))
    assert model(TOKENS).logits.shape == (4, 6, V)


def test_a_state_is_refused():
    with pytest.raises(InputError, match="state=None"):
        build(config())(TOKENS, None, 3)


def test_without_transformers_the_user_hears_what_to_install(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match="pip install 'transformers>=5,<6'"):
        require_architecture(config())
    assert huggingface.importlib is importlib


# Runs.

Build = Callable[..., RunConfig]


@pytest.fixture
def run(tiny_run: Build) -> Build:
    """As `tiny_run`, without the width that an architecture of transformers does not have."""

    def build_run(architecture: str, norm: str, **changes: Any) -> RunConfig:
        base = tiny_run(**changes)
        return dataclasses.replace(base, model=config(architecture, norm=norm))

    return build_run


@pytest.mark.parametrize(("architecture", "norm"), [("gpt2", "bn"), ("llama", "own")])
def test_a_language_model_trains(run: Build, architecture: str, norm: str):
    record = train(run(architecture, norm, optim__lr=1e-2, training__steps=40, training__valid_every=20))
    results = record.outcome().results
    assert record.id.startswith(f"hf_{architecture}-{norm}-tiny-s1-")
    assert results["test_loss_nats"] < results["unigram_test_loss_nats"]
    rows = dict(summary_rows(record))
    assert rows["model"].startswith(f"{architecture} of transformers (")
    sites = record.environment()["sites"]
    activations = [name for row in record.metrics() for name in row if name.startswith("activations/")]
    if norm == "bn":
        assert "pool=batch," in sites["transformer.h.0.ln_1"]
        assert any("transformer.h.1.ln_2" in name for name in activations)
    else:
        assert sites == {}
        assert not activations
        assert all(set(row) - {"step", "seconds"} for row in record.metrics())


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_a_classifier_trains(run: Build, architecture: str, tiny_labels: Path):
    record = train(run(architecture, "bn_step", data__corpus=str(tiny_labels)))
    assert record.outcome().state == "finished"
    assert "test_accuracy" in record.outcome().results


def test_the_same_seed_gives_the_same_numbers(run: Build, tmp_path: Path):
    once, again = (run("gpt2", "bn_step", output__runs_dir=str(tmp_path / folder)) for folder in ("a", "b"))
    assert train(once).outcome().results["test_loss_nats"] == train(again).outcome().results["test_loss_nats"]
