"""The exact arguments hold, can fail, are all named by a claim, and the committed file says what is computed here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from normlab import exact
from normlab.__main__ import main
from normlab.claims import available_claims, load_claim
from normlab.exact import CHECKS
from normlab.records.checks import read_checks

COMMITTED = Path(__file__).parents[1] / "results" / "exact.json"


@pytest.mark.parametrize("name", CHECKS)
def test_it_holds_and_the_committed_file_says_so(name: str) -> None:
    computed = CHECKS[name]()
    assert computed.holds
    assert computed.name == name
    (committed,) = [check for check in read_checks(COMMITTED) if check.name == name]
    assert committed.value == pytest.approx(computed.value, abs=1e-9)
    assert (committed.statement, committed.bound, committed.holds) == (computed.statement, computed.bound, True)


def test_claims_and_checks_name_each_other() -> None:
    claims = [load_claim(name) for name in available_claims()]
    assert {check for claim in claims for check in (*claim.checks, *claim.limits)} == set(CHECKS)
    assert [check.name for check in read_checks(COMMITTED)] == list(CHECKS)


class Wrong(nn.Module):
    """Stands in for every norm, with gain and bias."""

    def __init__(self, name: str, dim: int, function: Callable[[Tensor, str], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x_BTF: Tensor) -> Tensor:
        return self.function(x_BTF, self.name) * self.weight + self.bias


def whitened(x_BTF: Tensor, name: str) -> Tensor:
    centered_NF = (x_BTF - x_BTF.mean((0, 1))).flatten(0, 1)
    values, vectors = torch.linalg.eigh(centered_NF.T @ centered_NF / len(centered_NF))
    return (centered_NF @ vectors / values.clamp(min=1e-3).sqrt()).view_as(x_BTF)


WRONG: dict[str, Callable[[Tensor, str], Tensor]] = {
    "the input": lambda x_BTF, name: x_BTF,
    "whitened": whitened,
    "median and name": lambda x_BTF, name: (x_BTF - x_BTF.flatten(0, 1).median(0).values) * len(name),
}


@pytest.mark.parametrize("name", sorted(set(CHECKS) - {"mostly_positive_before_bn"}))  # that one computes no norm
def test_it_is_broken_by_some_wrong_norm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = []
    for wrong, function in WRONG.items():
        monkeypatch.setattr(exact, "build_norm", lambda norm, dim, f=function, **options: Wrong(norm, dim, f))
        if not CHECKS[name]().holds:
            broken.append(wrong)
    assert broken


def test_the_command_writes_the_file_and_says_what_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["exact", "--results_dir", str(tmp_path / "results")]
    assert main(arguments) == 0
    assert f"{len(CHECKS)} of {len(CHECKS)} hold" in capsys.readouterr().out
    assert [check.name for check in read_checks(tmp_path / "results" / "exact.json")] == list(CHECKS)
    monkeypatch.setattr(exact, "build_norm", lambda norm, dim, **options: Wrong(norm, dim, WRONG["the input"]))
    assert main(arguments) == 1
    assert "broken  bn_mean_and_variance: " in capsys.readouterr().out
    assert not read_checks(tmp_path / "results" / "exact.json")[0].holds
