"""Tells the norms inside somebody else's model which entries are real and at which time step they stand.

A norm that replaces a LayerNorm is called with the activations alone. Two kinds of hooks give it the rest: a
`Listener` on every module that is told an attention mask, and an `Adapter` on the norm. Both are plain objects beside
one shared `Streams`, so that a model with hooks can be copied and pickled.

Shapes: B batch, T time, L time steps of a cache and of the input together, F features, N heads.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normlab.config import InputError
from normlab.norms.base import Norm, Step

__all__ = ["CACHES", "Adapter", "Listener", "Pooling", "Streams", "listen", "pooling"]

TOKENS = ("input_ids", "inputs_embeds", "src", "tgt")
OTHER_INPUTS = ("pixel_values", "input_features")
CACHES = ("cache", "past_key_values", "cache_params")
"""Of what was read before: `cache` since transformers 5.24, which still takes the others for a while."""
PADDING_MASKS = ("src_key_padding_mask", "tgt_key_padding_mask")
"""Of torch.nn.Transformer and its parts; True (or -inf) = padding."""


class Stream:
    """The tokens that a module reads: B rows of T, after `past` tokens of a cache.

    Args:
        rows, time: B and T; None where unknown.
        mask_BL: True = real entry; None = no padding.
        readable: False if there is a mask but it does not say what is padding.
        untold: type of a cache that does not say how many tokens are in it; `past` is 0 then.
    """

    def __init__(
        self,
        rows: int | None,
        time: int | None,
        mask_BL: Tensor | None,
        past: int = 0,
        readable: bool = True,
        untold: str = "",
    ) -> None:
        self.past, self.readable, self.untold = past, readable, untold
        self.mask_BL = None if mask_BL is None or bool(mask_BL.all()) else mask_BL
        if mask_BL is not None:
            rows = rows if rows is not None else mask_BL.shape[0]
            time = time if time is not None else mask_BL.shape[1] - past
        self.rows, self.time = rows, time
        if mask_BL is not None and not self.fits(mask_BL):
            raise InputError(
                f"an attention mask of shape {tuple(mask_BL.shape)} does not fit {rows} rows of {past} cached and "
                f"{time} new tokens; give one entry per token"
            )
        self._arranged: tuple[Tensor | None, Tensor | None, Step] | None = None

    def fits(self, mask_BL: Tensor) -> bool:
        """Whether `mask_BL` has one entry per token, those in the cache included."""
        return self.time is not None and (self.rows, self.past + self.time) == tuple(mask_BL.shape)

    def arranged(self) -> tuple[Tensor | None, Tensor | None, Step]:
        """`mask_BT`, `order_BT` and `step`: in the order, each row's real tokens stand first, as the norms want them.

        The order is None where they do already (padding on the right). Then a row's n-th real token is time step n,
        wherever its padding stands: no norm ever meets a negative time step.
        """
        if self._arranged is None:
            self._arranged = self._arrange()
        return self._arranged

    def _arrange(self) -> tuple[Tensor | None, Tensor | None, Step]:
        if self.mask_BL is None:
            return None, None, self.past
        before_BP, mask_BT = self.mask_BL[:, : self.past], self.mask_BL[:, self.past :]
        step: Step = 0 if self.past == 0 else before_BP.sum(dim=1)
        if not bool((mask_BT[:, 1:] & ~mask_BT[:, :-1]).any()):
            return mask_BT, None, step
        order_BT = (~mask_BT).to(torch.uint8).argsort(dim=1, stable=True)
        return mask_BT.gather(1, order_BT), order_BT, step


class Streams:
    """The streams of the modules whose forward pass is running, outermost first."""

    def __init__(self) -> None:
        self._open: list[tuple[Listener, Stream]] = []

    @property
    def current(self) -> Stream | None:
        return self._open[-1][1] if self._open else None

    def begin(self, owner: Listener, stream: Stream) -> None:
        self._open.append((owner, stream))

    def end(self, owner: Listener) -> None:
        """Forget the owner's stream and, where a forward pass was broken off within it, what that one left."""
        owners = [known for known, _ in self._open]
        if owner in owners:
            del self._open[owners.index(owner) :]


class Listener:
    """Reads the attention mask that one module is called with.

    A module that takes tokens, pixels or the like begins a stream: no mask there means no padding, whatever a module
    around it was given (the decoder of an encoder-decoder has a mask of its own). Within a stream only a mask that
    tells padding, B x L, is news.
    """

    def __init__(self, streams: Streams, module: nn.Module) -> None:
        self.streams = streams
        self.names = list(inspect.signature(module.forward).parameters)
        self.begins = any(name in self.names for name in (*TOKENS, *OTHER_INPUTS))

    @staticmethod
    def hears(module: nn.Module) -> bool:
        """Whether `module` is told a mask, or reads something that no mask of tokens fits."""
        names = set(inspect.signature(module.forward).parameters)
        return bool(names & {"attention_mask", *PADDING_MASKS} or (names & {*OTHER_INPUTS} and not names & {*TOKENS}))

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.streams.begin(self, self._stream(given))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.streams.end(self)

    def _stream(self, given: dict[str, Any]) -> Stream:
        around = self.streams.current
        mask_BL = _real(given)
        if self.begins:
            tokens = next((given[name] for name in TOKENS if isinstance(given.get(name), Tensor)), None)
            rows, time = (None, None) if tokens is None else _rows_and_time(tokens)
            readable = mask_BL is not None or not _masked(given)
            past, untold = _cached(given)
            return Stream(rows, time, mask_BL, past, readable, untold)
        if around is None:
            return Stream(None, None, mask_BL, readable=mask_BL is not None or not _masked(given))
        if mask_BL is not None and around.mask_BL is None and around.fits(mask_BL):
            return Stream(around.rows, around.time, mask_BL, around.past, untold=around.untold)
        return around


def _rows_and_time(tokens: Tensor) -> tuple[int, int]:
    """B and T of ids B x T, embeddings B x T x F, or embeddings T x F, which torch.nn.Transformer takes as one row."""
    if tokens.ndim == 2 and tokens.is_floating_point():
        return 1, tokens.shape[0]
    return tokens.shape[0], tokens.shape[1]


def _masked(given: dict[str, Any]) -> bool:
    return any(given.get(name) is not None for name in ("attention_mask", *PADDING_MASKS))


def _real(given: dict[str, Any]) -> Tensor | None:
    """The mask B x L, True = real, if the module is given one that says so."""
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask != 0
    for name in PADDING_MASKS:
        mask = given.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 1:  # of one row without a dimension for rows
            mask = mask[None]
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return ~mask if mask.dtype == torch.bool else mask == 0
    return None


def _cached(given: dict[str, Any]) -> tuple[int, str]:
    """Tokens in the cache that the module is given, if it is given one; its type if it does not tell."""
    for name in CACHES:
        cache = given.get(name)
        # A module may mean something else by the word: a switch, or a store of its own that is still empty.
        if cache is None or isinstance(cache, bool) or cache in ({}, [], ()):
            continue
        try:
            return int(cache.get_seq_length()), ""
        except (AttributeError, ValueError):  # ValueError: of linear attention and state spaces alone
            return 0, type(cache).__name__
    return 0, ""


class Pooling(NamedTuple):
    """What a norm needs to know beside the entry itself.

    `context`: which entries are real, or their time steps. `training`, `evaluation`: in that mode an entry depends on
    others of its sequence.
    """

    context: bool
    training: bool
    evaluation: bool


def pooling(norm: Norm) -> Pooling:
    """As the norm declares it: nothing runs, so that one process alone may swap a norm that waits for the others."""
    over_time = norm.shares.time != "step"
    context = over_time or not norm.batch_independent or norm.needs_statistics or norm.per_step
    return Pooling(context, training=over_time, evaluation=over_time and not norm.needs_statistics)


class _Shape(NamedTuple):
    """How to undo what an `Adapter` did to the shape of its norm's input."""

    shape: torch.Size
    time: int | None = None
    lead: torch.Size | None = None
    order_BT: Tensor | None = None


class Adapter:
    """Stands around one norm: B x T x F from whatever the module before it gives, and back.

    Args:
        streams: what the listeners heard.
        name: of the norm in the model, for messages.
        norm: the norm.
        pools: see `Pooling`.
        time: which dimension of the input was seen to be time, if it was.
    """

    def __init__(self, streams: Streams, name: str, norm: Norm, pools: Pooling, time: int | None) -> None:
        self.streams, self.name, self.pools, self.time = streams, name, pools, time
        self._undo: _Shape | None = None
        norm.register_forward_pre_hook(self.before, with_kwargs=True)
        norm.register_forward_hook(self.after)

    def before(
        self, norm: Norm, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        if not self.pools.context:
            self._undo = _Shape(x.shape)
            return (x if x.ndim == 3 else x.reshape(-1, 1, x.shape[-1]),), {}
        if torch._C._current_graph_task_id() != -1:
            raise InputError(
                f"gradient checkpointing runs {self.name} ({norm.name}) a second time, without the attention mask, and "
                "would store its statistics twice; switch it off, or use a "
                "norm that looks at one entry alone, such as ln"
            )
        stream = self.streams.current
        if stream is not None and not stream.readable:
            raise InputError(
                f"{self.name} ({norm.name}) pools over tokens and cannot tell padding from this attention mask; give "
                "the model one of shape batch x time, 1 = real token"
            )
        over_time = self.pools.training if norm.training else self.pools.evaluation
        if stream is not None and stream.untold and (norm.per_step or over_time):
            raise InputError(
                f"{self.name} ({norm.name}) has to know at which time step its input stands, and a cache of type "
                f"{stream.untold} does not tell how many tokens are in it; use_cache=False"
            )
        if stream is not None and stream.past and over_time:
            raise InputError(
                f"{self.name} ({norm.name}) takes its statistics over the time steps of a sequence, and those before "
                "are in a cache of keys and values that does not hold them; use_cache=False"
            )
        x_BTF, undo, fits = self._arrange(x, stream)
        if stream is None or not fits:
            self._undo = undo
            return (x_BTF, None, 0), {}
        mask_BT, order_BT, step = stream.arranged()
        assert stream.rows is not None or mask_BT is None
        repeats = 1 if mask_BT is None else len(x_BTF) // len(mask_BT)
        if repeats > 1:
            mask_BT = mask_BT.repeat_interleave(repeats, 0) if mask_BT is not None else None
            order_BT = order_BT.repeat_interleave(repeats, 0) if order_BT is not None else None
            step = step if isinstance(step, int) else step.repeat_interleave(repeats, 0)
        if order_BT is not None:
            x_BTF = x_BTF.gather(1, order_BT[:, :, None].expand_as(x_BTF))
        self._undo = undo._replace(order_BT=order_BT)
        return (x_BTF, mask_BT, step), {}

    def after(self, norm: Norm, args: tuple[Any, ...], y_BTF: Tensor) -> Tensor:
        undo, self._undo = self._undo, None
        assert undo is not None
        if undo.order_BT is not None:
            back_BT = undo.order_BT.argsort(dim=1)
            y_BTF = y_BTF.gather(1, back_BT[:, :, None].expand_as(y_BTF))
        if undo.time is None:
            return y_BTF.reshape(undo.shape)
        assert undo.lead is not None
        return y_BTF.reshape(*undo.lead, *y_BTF.shape[1:]).movedim(-2, undo.time)

    def _arrange(self, x: Tensor, stream: Stream | None) -> tuple[Tensor, _Shape, bool]:
        """`x` as rows x time x F; whether rows and time are those of the stream."""
        F = x.shape[-1]
        rows, time = (None, None) if stream is None else (stream.rows, stream.time)
        if x.ndim <= 2:
            if rows is not None and time is not None and x.numel() == rows * time * F:
                return x.reshape(rows, time, F), _Shape(x.shape), True  # all tokens, one after the other
            return x.reshape(-1, 1, F), _Shape(x.shape), False
        axis = self._time_axis(x, time)
        moved = x.movedim(axis, -2)
        undo = _Shape(x.shape, axis, moved.shape[:-2])
        x_BTF = moved.reshape(-1, *moved.shape[-2:])
        fits = (time is None or x_BTF.shape[1] == time) and (rows is None or len(x_BTF) % rows == 0)
        if not fits and stream is not None and stream.mask_BL is not None:
            raise InputError(
                f"{self.name} gets a tensor of shape {tuple(x.shape)}, which does not fit the attention mask of shape "
                f"{tuple(stream.mask_BL.shape)}; leave it out with sites=, or give a batch without padding"
            )
        return x_BTF, undo, fits

    def _time_axis(self, x: Tensor, time: int | None) -> int:
        if self.time is not None and self.time < x.ndim - 1 and time in (None, x.shape[self.time]):
            return self.time
        if x.ndim == 3 and time in (None, x.shape[1]):
            return 1
        fitting = [axis for axis in range(x.ndim - 1) if x.shape[axis] == time]
        if len(fitting) == 1:
            return fitting[0]
        if x.ndim == 3:
            return 1
        raise InputError(
            f"cannot tell which dimension of the input of {self.name}, of shape {tuple(x.shape)}, is time; leave it "
            "out with sites=, or use a norm that looks at one entry alone, such as ln"
        )


def listen(model: nn.Module, streams: Streams, norms: set[Norm]) -> int:
    """Put a `Listener` on every module of `model` that holds one of the `norms` and is told a mask; how many."""
    count = 0
    for module in model.modules():
        if isinstance(module, Norm) or not any(part in norms for part in module.modules()):
            continue
        if Listener.hears(module):
            listener = Listener(streams, module)
            module.register_forward_pre_hook(listener.before, with_kwargs=True)
            module.register_forward_hook(listener.after, always_call=True)
            count += 1
    return count
