"""Puts a norm in place of the LayerNorm and RMSNorm modules of somebody else's model.

Shapes: B batch, T time, F features.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normlab.config import InputError
from normlab.models.lookalikes import Lookalike, recognize
from normlab.models.padding import Adapter, Pooling, Streams, listen, pooling
from normlab.norms import build_norm, norm_options
from normlab.norms.base import Norm
from normlab.norms.recompute import at_rest

__all__ = ["SwapReport", "SwapRow", "reads_ahead", "swap_norms"]


@dataclass(frozen=True)
class SwapRow:
    """One norm that was replaced.

    Attributes:
        name: of the module in the model.
        old: class of the module that stood there.
        new: the norm that stands there now, with its options.
        dim: number of features.
        causal: it belongs to a part of the model where no time step may see a later one.
        kept: "weight, bias", "weight" or "": the parameters whose values were taken over.
        note: what else to know; "" for nothing.
    """

    name: str
    old: str
    new: str
    dim: int
    causal: bool
    kept: str
    note: str


@dataclass(frozen=True)
class SwapReport:
    """What `swap_norms` did; `print` it for a table.

    Attributes:
        norm: name of the norm that was put in.
        rows: one per replaced module, in the model's order.
        skipped: name and reason of each module with the parameters of a norm that was left as it is.
        causality: how it was found out which parts are causal.
        masks: number of modules that tell the norms their attention mask; 0 where no norm needs one.
        model: the model itself.
    """

    norm: str
    rows: tuple[SwapRow, ...]
    skipped: tuple[tuple[str, str], ...]
    causality: str
    masks: int
    model: nn.Module = field(repr=False, compare=False)

    def __str__(self) -> str:
        head = ("name", "was", "is", "causal", "kept", "note")
        cells = [(r.name, r.old, r.new, "yes" if r.causal else "no", r.kept or "-", r.note) for r in self.rows]
        widths = [max(len(line[column]) for line in (head, *cells)) for column in range(len(head))]
        table = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in (head, *cells)]
        left = [f"left as it is: {name} ({reason})" for name, reason in self.skipped]
        return "\n".join([f"{len(self.rows)} norms are {self.norm} now; {self.causality}", *table, *left])


def swap_norms(
    model: nn.Module,
    norm: str,
    sites: str | Sequence[str] | None = None,
    *,
    causal: bool | None = None,
    allow_leak: bool = False,
    **options: Any,
) -> SwapReport:
    """Replace the LayerNorm and RMSNorm modules of `model`, in place, by the norm of that name.

    A module is known by what it computes, not by its class: LayerNorm or RMSNorm over the last dimension, with the
    gain w or 1 + w. Its eps, gain and bias are kept where the new norm has such, unless `options` say otherwise; a
    module without gain or bias gets none. The new norm stands under the old name, so parameters keep their names too.
    normlab's own norms, and norms that take a second input, are left alone.

    Norms that pool over tokens leave out what the 2-D attention mask of the running call says is padding. Each row's
    real tokens are its time steps 0, 1, 2, ..., wherever its padding stands.

    Args:
        norm: a file name in normlab/norms; "none" takes the norms out.
        sites: name or pattern (`*.ln_1`), or several, of the modules to replace; None replaces all.
        causal: no time step of the model may see a later one. None finds out by changing a later token; an encoder of
            an encoder-decoder is not causal; where it cannot be found out, the model is taken to be causal.
        allow_leak: put a norm that sees later time steps into a causal part all the same.
        options: of the norm, such as eps, pool, momentum.

    Raises:
        InputError: nothing to replace, a pattern that matches nothing, an option the norm has not, a norm that would
            see later time steps in a causal part, parameters on the meta device. The model is then as it was. Calls
            of the swapped model raise it too: gradient checkpointing or a cache with a norm that pools over tokens.
    """
    found, skipped = _find(model, sites)
    seen = _observe(model, {name: module for name, (module, _) in found.items()})
    if causal is not None:
        seen = seen._replace(causal=causal, encoder=set(), how=f"causal={causal} as told")
    streams = Streams()
    swapped: dict[int, tuple[Norm, SwapRow]] = {}
    needs: dict[Norm, Pooling] = {}
    rows: list[SwapRow] = []
    first_names: dict[int, str] = {}
    for name, (module, like) in found.items():
        if id(module) in swapped:
            new, row = swapped[id(module)]
            also = f"the same module as {first_names[id(module)]}"
            row = SwapRow(name, row.old, row.new, row.dim, row.causal, row.kept, also)
        else:
            part_is_causal = seen.causal and id(module) not in seen.encoder
            new, row = _replacement(name, module, like, norm, part_is_causal, options)
            if part_is_causal and not new.causal:
                if not allow_leak:
                    raise InputError(
                        f"{row.new} at {name} would see later time steps, and there the model is causal ({seen.how}); "
                        "choose options that do not, or give allow_leak=True (causal=False if it is not causal)"
                    )
                row = SwapRow(name, row.old, row.new, row.dim, True, row.kept, _join(row.note, "sees later time steps"))
            needs[new] = pooling(new)
            swapped[id(module)] = new, row
            first_names[id(module)] = name
        rows.append(row)
    if any(need.context for need in needs.values()):
        _require_batch_first(model, norm)
    # From here on nothing can go wrong any more, so that a refused swap leaves the model alone.
    for name, (module, _) in found.items():
        new = swapped[id(module)][0]
        if first_names[id(module)] == name:
            _move(new, module, model)
            Adapter(streams, name, new, needs[new], seen.time.get(name))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    masks = listen(model, streams, {new for new, need in needs.items() if need.context})
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoder):
            part.use_nested_tensor = False  # its layers no longer take nested tensors
    return SwapReport(norm, tuple(rows), tuple(skipped), seen.how, masks, model)


def _find(
    model: nn.Module, sites: str | Sequence[str] | None
) -> tuple[dict[str, tuple[nn.Module, Lookalike]], list[tuple[str, str]]]:
    patterns = ["*"] if sites is None else [sites] if isinstance(sites, str) else list(sites)
    found: dict[str, tuple[nn.Module, Lookalike]] = {}
    skipped: list[tuple[str, str]] = []
    seen: dict[int, Lookalike | str | None] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            raise InputError("the model is on the meta device and has no values yet; load or initialize it first")
        if id(module) not in seen:
            seen[id(module)] = recognize(module)
        like = seen[id(module)]
        if isinstance(like, Lookalike) and name == "":
            raise InputError("the model is itself a norm; build the other one with normlab.build_norm")
        if isinstance(like, Lookalike):
            found[name] = module, like
        elif like is not None:
            skipped.append((name, like))
    if not found:
        reasons = "".join(f"; {name} {reason}" for name, reason in skipped[:1])
        raise InputError(f"there is no LayerNorm or RMSNorm in this {type(model).__name__} to replace{reasons}")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in found):
            names = list(found)
            more = f", ... ({len(names)} in all)" if len(names) > 6 else ""
            raise InputError(f"no norm is called {pattern!r}; there are: {', '.join(names[:6])}{more}")
    chosen = {name for name in found if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)}
    left = [(name, why) for name, why in skipped if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    return {name: value for name, value in found.items() if name in chosen}, left


def _replacement(
    name: str, module: nn.Module, like: Lookalike, norm: str, causal: bool, options: dict[str, Any]
) -> tuple[Norm, SwapRow]:
    """The new norm, with the old one's values, on the CPU; and its row of the report."""
    takes = norm_options(norm)
    own: dict[str, Any] = {"eps": like.eps, "affine": like.weight is not None, "bias": like.bias is not None}
    new = build_norm(norm, like.dim, causal=causal, **{**{k: v for k, v in own.items() if k in takes}, **options})
    kept, notes = [], []
    for key, old in (("weight", like.weight), ("bias", like.bias)):
        parameter = getattr(new, key)
        if old is None:
            continue
        if key == "weight" and "gain" in options:
            notes.append("gain as given")
        elif parameter is None or parameter.shape != old.shape:
            notes.append(f"{key} dropped")
        else:
            with torch.no_grad():
                parameter.copy_(old)
            kept.append(key)
    if module._forward_hooks or module._forward_pre_hooks:
        notes.append("its hooks are gone")
    row = SwapRow(
        name, type(module).__name__, f"{norm}({new.extra_repr()})", like.dim, causal, ", ".join(kept), "; ".join(notes)
    )
    new.site = name
    return new, row


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _move(new: Norm, module: nn.Module, model: nn.Module) -> None:
    """Device, precision, mode and what is trained: as the module that it replaces."""
    like = next(module.parameters(), None)
    model_like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    new.to(device=(like if like is not None else model_like).device)
    new.to(dtype=(like if like is not None else model_like).dtype)
    new.train(module.training)
    for key, parameter in new.named_parameters():
        old = getattr(module, key, like)
        parameter.requires_grad_(old.requires_grad if isinstance(old, Tensor) else True)


def _require_batch_first(model: nn.Module, norm: str) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise InputError(
                f"{norm} pools over tokens and needs batch x time x features, but {name} has batch_first=False; build "
                "the model with batch_first=True"
            )


# What a model does, found by running it on a few random tokens.


class _Seen(NamedTuple):
    """What a model was seen to do.

    `causal`: no output sees a later token. `encoder`: ids of the modules of a part that is not causal all the same.
    `how`: in words. `time`: which dimension of the input of the norm of that name is time.
    """

    causal: bool
    encoder: set[int]
    how: str
    time: dict[str, int]


SIZES = ((2, 7, 5), (3, 5, 7))
"""Rows, tokens and decoder tokens of two runs: a dimension of 7 and then 5, or of 5 and then 7, is time."""


def reads_ahead(model: nn.Module) -> bool:
    """Whether outputs of `model` depend on later tokens of their row (of the decoder's row, if it has one).

    Raises:
        InputError: it cannot be found out: the model does not take token ids, or has no output per token.
    """
    with at_rest(model), torch.no_grad():
        return _reads_ahead(_Tokens(model))


def _observe(model: nn.Module, norms: dict[str, nn.Module]) -> _Seen:
    encoder: set[int] = set()
    time: dict[str, int] = {}
    try:
        tokens = _Tokens(model)
        if tokens.decodes:
            encoder = {id(part) for part in model.get_encoder().modules()}  # pyright: ignore[reportCallIssue]
            decoder = model.get_decoder().modules()  # pyright: ignore[reportCallIssue]
            encoder -= {id(part) for part in decoder}
        with at_rest(model), torch.no_grad():
            time = _time_dimensions(tokens, norms)
            causal = not _reads_ahead(tokens)
    except Exception as error:  # a model may fail in any way on tokens it was not made for
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return _Seen(True, encoder, f"taken to be causal, for it could not be found out: {why}", time)
    part = "the decoder is" if tokens.decodes else "the model is"
    how = f"{part} causal: no output sees a later token" if causal else f"{part} not causal: outputs see later tokens"
    return _Seen(causal, encoder, how, time)


class _Tokens:
    """Calls `model` with random tokens and gives back its outputs."""

    def __init__(self, model: nn.Module) -> None:
        self.names = set(inspect.signature(model.forward).parameters)
        if "input_ids" not in self.names:
            raise InputError(f"{type(model).__name__} takes no input_ids")
        self.model = model
        config = getattr(model, "config", None)
        self.decodes = bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in self.names
        if hasattr(model, "get_input_embeddings"):
            size = model.get_input_embeddings().num_embeddings  # pyright: ignore[reportCallIssue]
        else:
            size = config.vocab_size  # pyright: ignore[reportOptionalMemberAccess]
        special = {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos", "decoder_start")}
        self.ids = torch.tensor([i for i in range(min(size, 100)) if i not in special])
        self.device = next(model.parameters()).device

    def draw(self, rows: int, time: int, decoder_time: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(0)

        def ids(columns: int) -> Tensor:
            return self.ids[torch.randint(len(self.ids), (rows, columns), generator=draw)].to(self.device)

        given = {"input_ids": ids(time)}
        if self.decodes:
            given["decoder_input_ids"] = ids(decoder_time)
        if "attention_mask" in self.names:  # or some models guess one
            given["attention_mask"] = torch.ones_like(given["input_ids"])
        return given

    def outputs(self, given: dict[str, Tensor]) -> list[Tensor]:
        more = {"use_cache": False} if "use_cache" in self.names else {}
        return list(_tensors(self.model(**given, **more)))

    def other(self, ids_BT: Tensor) -> Tensor:
        """The same tokens, but for the last one of each row."""
        place = torch.searchsorted(self.ids, ids_BT[:, -1].cpu().contiguous())
        last_B = self.ids[(place + 1) % len(self.ids)].to(self.device)
        return torch.cat((ids_BT[:, :-1], last_B[:, None]), dim=1)


def _reads_ahead(tokens: _Tokens) -> bool:
    key = "decoder_input_ids" if tokens.decodes else "input_ids"
    given = tokens.draw(*SIZES[0])
    shape = given[key].shape
    pair = [tokens.outputs({**given, key: ids}) for ids in (given[key], tokens.other(given[key]))]
    compared = [both for both in zip(*pair, strict=True) if both[0].ndim >= 3 and both[0].shape[:2] == shape]
    if not compared:
        base = getattr(tokens.model, "base_model", tokens.model)
        if base is not tokens.model:
            return _reads_ahead(_Tokens(base))
        raise InputError(f"{type(tokens.model).__name__} has no output per token")
    return any(not torch.allclose(a[:, :-1], b[:, :-1], rtol=0, atol=_noise(a)) for a, b in compared)


def _noise(y: Tensor) -> float:
    return 8 * torch.finfo(y.dtype).eps * float(y.abs().max())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _time_dimensions(tokens: _Tokens, norms: dict[str, nn.Module]) -> dict[str, int]:
    """Which dimension of each norm's input is as long as the text, in texts of two lengths."""
    shapes: dict[str, list[torch.Size]] = {name: [] for name in norms}
    for size in SIZES:
        last: dict[str, torch.Size] = {}
        handles = [module.register_forward_pre_hook(_note(last, name)) for name, module in norms.items()]
        try:
            tokens.outputs(tokens.draw(*size))
        finally:
            for handle in handles:
                handle.remove()
        for name, shape in last.items():
            shapes[name].append(shape)
    found = {}
    for name, pair in shapes.items():
        if len(pair) == 2 and len(pair[0]) == len(pair[1]) > 2:
            axes = [a for a, both in enumerate(zip(*(s[:-1] for s in pair), strict=True)) if both in ((7, 5), (5, 7))]
            if len(axes) == 1:
                found[name] = axes[0]
    return found


def _note(shapes: dict[str, torch.Size], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            shapes[name] = args[0].shape

    return note
