"""Which matrix products are oneDNN's: measured once per machine and kept, or forced; equal to the default ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from normlab.config import InputError
from normlab.machine import products
from normlab.machine.products import KINDS, VARIABLE, Choice, Product, choice, kept

MIXED = {"forward": 0.7, "input_gradient": 1.2, "weight_gradient": 0.99, "recurrent": 0.5}

needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
pytestmark = needs_onednn


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    products._measured.cache_clear()
    yield
    products._measured.cache_clear()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that something was measured; what comes out is `MIXED`."""
    calls: list[int] = []

    def measure() -> dict[str, float]:
        calls.append(1)
        return MIXED

    monkeypatch.setattr(products, "_measure", measure)
    return calls


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "normlab").iterdir())


def test_measured_once_and_kept(measured: list[int], tmp_path: Path):
    first = choice()
    assert first.onednn == {"forward", "recurrent"}  # a win of 1 % is none
    assert "input_gradient 1.20" in first.reason
    (path,) = files(tmp_path)
    products._measured.cache_clear()  # as a new process
    assert choice() == first
    assert len(measured) == 1
    assert files(tmp_path) == [path]


def test_each_number_of_threads_has_its_own(measured: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for threads in (1, 2, 1):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert f"with {threads} threads" in choice().reason
    assert len(measured) == len(files(tmp_path)) == 2


def test_a_broken_file_is_measured_anew(measured: list[int], tmp_path: Path):
    first = choice()
    files(tmp_path)[0].write_text('{"forward": 0.1}')
    products._measured.cache_clear()
    assert choice() == first
    assert len(measured) == 2
    products._measured.cache_clear()
    assert choice() == first
    assert len(measured) == 2


def test_processes_that_measure_at_once_choose_alike(tmp_path: Path):
    path = tmp_path / "products.json"
    assert products._first_to_write(path, MIXED) == MIXED
    assert products._first_to_write(path, dict.fromkeys(KINDS, 2.0)) == MIXED


def test_the_variable_decides(measured: list[int], monkeypatch: pytest.MonkeyPatch):
    for value, expected in (("onednn", set(KINDS)), ("torch", set())):
        monkeypatch.setenv(VARIABLE, value)
        assert choice() == Choice(frozenset(expected), f"{VARIABLE}={value}")
    assert not measured
    monkeypatch.setenv(VARIABLE, "mkl")
    with pytest.raises(InputError, match="set it to onednn or torch"):
        choice()


def test_a_run_that_goes_on_keeps_its_own(measured: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, "torch")
    with kept(["forward"]):
        assert choice().onednn == {"forward"}
    with kept(None):
        assert choice().onednn == set()
    assert choice().onednn == set()
    assert not measured


def test_measuring_leaves_random_numbers_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_ROUNDS", 1)
    before = torch.random.get_rng_state()
    ratios = products._measure()
    assert torch.equal(before, torch.random.get_rng_state())
    assert set(ratios) == set(KINDS)
    assert all(ratio > 0 for ratio in ratios.values())


@pytest.mark.parametrize("value", ["onednn", "torch"])
@pytest.mark.parametrize("shape", [(5, 3, 7), (5, 7, 3), (1, 4, 4), (0, 3, 7)])
def test_the_products(shape: tuple[int, int, int], value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VARIABLE, value)
    rows, inputs, outputs = shape
    draw = torch.Generator().manual_seed(0)
    x, d_y, weight = (torch.randn(s, generator=draw) for s in ((rows, inputs), (rows, outputs), (outputs, inputs)))
    bias = torch.randn(outputs, generator=draw)
    for found, expected in (
        (products.product(x, weight, bias), x.double() @ weight.double().t() + bias),
        (products.input_gradient(d_y, weight), d_y.double() @ weight.double()),
        (products.weight_gradient(d_y, x), d_y.double().t() @ x.double()),
        *((Product(weight, rows, times)(x), x.double() @ weight.double().t()) for times in (1, 8)),
    ):
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
