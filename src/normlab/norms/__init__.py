"""The norms: one file each, named as the norm; `build_norm` makes one by name. Importing this does not import torch."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from normlab.config import InputError, available_norms, check_norm_options, require_choice

if TYPE_CHECKING:
    from normlab.norms.base import Norm

__all__ = ["build_norm", "norm_class", "norm_options"]


def norm_class(name: str) -> type[Norm]:
    """The class in the file `norms/<name>.py`; unknown names raise `InputError`."""
    require_choice("norm", name, available_norms())
    from normlab.norms.base import Norm

    module = importlib.import_module(f"normlab.norms.{name}")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Norm) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one Norm, not {len(found)}")
    return found[0]


def norm_options(name: str) -> tuple[str, ...]:
    """Names of the options that norm `name` takes, without `causal`, which the model decides."""
    return tuple(sorted(_keywords(norm_class(name)) - {"causal"}))


def build_norm(name: str, dim: int, *, causal: bool = True, **options: Any) -> Norm:
    """The norm `name` over `dim` features.

    Args:
        causal: the model is autoregressive: the default `pool` must not see later time steps.
        options: keyword arguments of the norm's class, such as affine, bias, gain, eps.

    Raises:
        InputError: unknown norm or option, or a value that cannot be.
    """
    cls = norm_class(name)
    known = norm_options(name)
    for option in options:
        if option not in known:
            raise InputError(f"{name} has no option {option!r}; it takes: {', '.join(known)}")
    check_norm_options(options)
    if "causal" in _keywords(cls):
        options["causal"] = causal
    return cls(dim, **options)


def _keywords(cls: type[Norm]) -> set[str]:
    """Keyword-only parameters of the constructor; where it passes others on, those of the class above too."""
    found: set[str] = set()
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = inspect.signature(owner.__init__).parameters.values()
        found |= {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found - cls.fixed_options
