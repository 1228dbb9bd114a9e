"""`Linear` is torch.nn.Linear in values, gradients and names; it differs in whose products it uses.

Shape suffixes: B batch, T time, I and O features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normlab.config import TransformerConfig
from normlab.machine import products
from normlab.models import linear
from normlab.models.linear import Linear
from normlab.models.transformer import TransformerModel

I, O = 12, 8  # noqa: E741

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products of our own that are taken, even for small inputs."""
    monkeypatch.setenv(products.VARIABLE, "onednn")
    monkeypatch.setattr(linear, "FEWEST_MULTIPLICATIONS", 1)
    found: list[str] = []
    for name in ("product", "input_gradient", "weight_gradient"):
        call = getattr(linear, name)

        def spied(*args: Any, name: str = name, call: Callable[..., Tensor] = call) -> Tensor:
            found.append(name)
            return call(*args)

        monkeypatch.setattr(linear, name, spied)
    return found


def twins(bias: bool = True) -> tuple[Linear, nn.Linear]:
    own, torchs = Linear(I, O, bias=bias), nn.Linear(I, O, bias=bias)
    torchs.load_state_dict(own.state_dict())
    return own, torchs


def close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(I,), (5, I), (2, 3, I), (3, 0, I)])
def test_values_and_gradients(shape: tuple[int, ...], bias: bool, calls: list[str]):
    own, torchs = twins(bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    outputs = []
    for layer in (own, torchs):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        grads = torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])
        outputs.append((y, *grads))
    close(*outputs)
    assert calls == (["product", "input_gradient", "weight_gradient"] if x.numel() else [])


def test_only_the_gradients_that_are_asked_for(calls: list[str]):
    own, _ = twins()
    own(torch.randn(4, I)).sum().backward()
    assert calls == ["product", "weight_gradient"]
    calls.clear()
    own.requires_grad_(False)(torch.randn(4, I, requires_grad=True)).sum().backward()
    assert calls == ["product", "input_gradient"]


def test_rows_that_do_not_lie_in_order():
    own, torchs = twins()
    x = torch.randn(I, 3, 5).permute(2, 1, 0)
    close(own(x), torchs(x))
    d_y = torch.randn(3, 5, O).transpose(0, 1)
    for layer in (own, torchs):
        layer(x).backward(d_y)
    close(own.weight.grad, torchs.weight.grad)


def test_second_derivatives():
    own, torchs = twins()
    x = torch.randn(4, I)
    found = []
    for layer in (own, torchs):
        leaf = x.clone().requires_grad_()
        inputs = [leaf, *layer.parameters()]
        first = torch.autograd.grad(layer(leaf).pow(3).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(torch.stack([grad.square().sum() for grad in first]).sum(), inputs))
    close(*found)


def test_the_same_state_and_start():
    torch.manual_seed(3)
    own = Linear(I, O)
    torch.manual_seed(3)
    assert all(map(torch.equal, own.state_dict().values(), nn.Linear(I, O).state_dict().values()))
    assert list(own.state_dict()) == list(nn.Linear(I, O).state_dict())
    assert isinstance(own, nn.Linear)


def test_elsewhere_it_is_torchs_linear(calls: list[str], monkeypatch: pytest.MonkeyPatch):
    own, torchs = twins()
    x = torch.randn(4, I)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own(x), torchs(x))
    assert torch.equal(torch.func.vmap(own)(x), torch.func.vmap(torchs)(x))
    close(torch.func.grad(lambda x: own(x).sum())(x), torch.func.grad(lambda x: torchs(x).sum())(x))
    assert own.to("meta")(x.to("meta")).device.type == "meta"
    own, torchs = twins()
    assert torch.equal(own.double()(x.double()), torchs.double()(x.double()))
    own, torchs = twins()
    compiled = torch.compile(own, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), torchs(x))
    monkeypatch.setattr(linear, "FEWEST_MULTIPLICATIONS", 4 * I * O + 1)
    assert torch.equal(own(x), torchs(x))
    monkeypatch.setattr(linear, "FEWEST_MULTIPLICATIONS", 4 * I * O)
    monkeypatch.setenv(products.VARIABLE, "torch")
    assert torch.equal(own(x), torchs(x))
    assert calls == []
    monkeypatch.setenv(products.VARIABLE, "onednn")
    own(x)
    assert calls == ["product"]


@pytest.mark.parametrize("tied", [True, False])
def test_every_linear_of_a_transformer(tied: bool, calls: list[str]):
    config = TransformerConfig(width=8, layers=2, heads=2, tie_embeddings=tied)
    torch.manual_seed(0)
    model = TransformerModel(config, vocab_size=11, classes=None, length=6)
    linears = [part for part in model.modules() if isinstance(part, nn.Linear)]
    model(torch.randint(11, (3, 6))).logits.sum().backward()
    assert all(type(part) is Linear for part in linears)
    assert len(linears) == 4 * 2 + 1
    assert [calls.count(name) for name in ("product", "input_gradient", "weight_gradient")] == [9, 9, 9]


def test_forward_mode_differentiation():
    layer, x = Linear(I, O), torch.randn(4, I)
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, x))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, x @ layer.weight.t())
