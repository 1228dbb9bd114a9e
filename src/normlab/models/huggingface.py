"""Architectures of the transformers library, randomly initialized, with their own norms or others in their place.

Nothing is downloaded: an architecture is built from the fields of its config.

Shapes: B batch, T time, F features, C classes, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from normlab.config import OWN_NORM, HuggingFaceConfig, InputError
from normlab.models.output import ModelOutput
from normlab.models.swap import reads_ahead, swap_norms
from normlab.models.transformer import mean_over_time
from normlab.norms import norm_options

__all__ = ["HuggingFaceModel", "require_architecture"]

PADDING_ID = 0
"""Id of the padding in the model; the text's own ids are one higher there.

No vocabulary of ours holds a padding symbol, and architectures want one: they never train its embedding, and some
(RoBERTa) count positions by it.
"""


def require_architecture(config: HuggingFaceConfig) -> None:
    """Raise `InputError` unless transformers is installed, knows the architecture and has the fields of `overrides`."""
    _architecture(config)


class HuggingFaceModel(nn.Module):
    """Tokens to logits.

    Args:
        config: architecture and norms.
        vocab_size: number of symbols V.
        classes: None for a causal language model (logits B x T x V); else the number of classes C (logits B x C from
            the mean over the real time steps and a linear layer; of an encoder-decoder the encoder alone is used).
        length: training length in tokens. The model has at least so many positions, and by default norms that keep
            statistics per step so many distinct time steps.

    Rows are padded on the right: column t is position t.

    Raises:
        InputError: an architecture that transformers does not know or cannot build so, that is not causal where it
            must be, or whose norms cannot be replaced so; in a call, a sequence longer than the positions.
    """

    def __init__(self, config: HuggingFaceConfig, vocab_size: int, *, classes: int | None, length: int) -> None:
        super().__init__()
        self.causal = classes is None
        settings = _architecture(config)
        self.positions = _fit_to_text(settings, config, vocab_size, length)
        with _quiet():
            self.network = _build(settings, config, causal=self.causal)
            width = self._width(config, length)
            if classes is None and reads_ahead(self.network):
                switch = ", or add --model.overrides.is_decoder true" if hasattr(settings, "is_decoder") else ""
                raise InputError(
                    f"{config.architecture} sees later tokens, so it cannot be a language model; use a corpus with "
                    f"labels{switch}"
                )
            if config.norm != OWN_NORM:
                self._swap(config, length)
        self.head = None if classes is None else nn.Linear(width, classes)

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor | None = None, state: Any | None = None) -> ModelOutput:
        """Logits of `tokens_BT`; `mask_BT` is True at real tokens. There is no state to carry: it must be None."""
        if state is not None:
            raise InputError("this model carries no state from one sequence to the next; pass state=None")
        if self.positions is not None and tokens_BT.shape[1] > self.positions:
            raise InputError(
                f"a sequence of {tokens_BT.shape[1]} tokens is longer than the {self.positions} positions of the "
                "architecture; raise data.length"
            )
        ids_BT = tokens_BT + 1
        if mask_BT is not None:
            ids_BT = ids_BT.masked_fill(~mask_BT, PADDING_ID)
        output = self.network(input_ids=ids_BT, attention_mask=None if mask_BT is None else mask_BT.long())
        if self.head is None:
            return ModelOutput(output.logits[..., 1:], None)
        return ModelOutput(self.head(mean_over_time(output.last_hidden_state, mask_BT)), None)

    def _width(self, config: HuggingFaceConfig, length: int) -> int:
        """Size of the last dimension of the output, seen by running the longest text there will be."""
        parameters = inspect.signature(self.network.forward).parameters
        if "input_ids" not in parameters:
            raise _more_than_text(config)
        ids_BT = torch.ones(1, length, dtype=torch.long)
        training = self.network.training
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                output = self.network.eval()(input_ids=ids_BT)
            return (output.logits if self.causal else output.last_hidden_state).shape[-1]
        except Exception as error:  # each architecture fails in its own way
            if _out_of_memory(error):
                raise
            if "pixel_values" in parameters and "pixel_values" in str(error):
                raise _more_than_text(config) from error
            raise InputError(
                f"{config.architecture} cannot read {length} tokens: {_one_line(error)}{_hint(config)}"
            ) from error
        finally:
            self.network.train(training)

    def _swap(self, config: HuggingFaceConfig, length: int) -> None:
        options = {key: value for key, value in dataclasses.asdict(config.norm_options).items() if value is not None}
        if "max_steps" in norm_options(config.norm):
            options.setdefault("max_steps", length)
        # As in our own Transformer, a pool that sees later tokens is there for those who name it.
        named = config.norm_options.pool is not None
        swap_norms(self.network, config.norm, config.swap, causal=self.causal, allow_leak=named, **options)


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"the model hf needs the transformers library ({_one_line(error)}); pip install 'transformers>=5,<6'"
        ) from None


def _architecture(config: HuggingFaceConfig) -> Any:
    """The config of the architecture, as transformers has it, with `overrides`."""
    transformers = _transformers()
    known = list(transformers.CONFIG_MAPPING.keys())
    if config.architecture not in known:
        near = difflib.get_close_matches(config.architecture, known, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else "; it knows such as gpt2, llama, bert, t5"
        raise InputError(
            f"transformers {transformers.__version__} knows no architecture {config.architecture!r}{hint} "
            "(a file is given by its path, with a / in it)"
        )
    with _quiet():
        plain = transformers.AutoConfig.for_model(config.architecture)
        fields = {*plain.to_dict(), *plain.attribute_map}
        for key in config.overrides:
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=3)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                raise InputError(f"{config.architecture} has no field {key!r} to override (model.overrides){hint}")
        try:
            return transformers.AutoConfig.for_model(config.architecture, **{**config.from_file, **config.overrides})
        except Exception as error:  # each architecture checks its fields in its own way
            raise InputError(f"{config.architecture} cannot have these model.overrides: {_one_line(error)}") from error


def _fit_to_text(settings: Any, config: HuggingFaceConfig, vocab_size: int, length: int) -> int | None:
    """Set what the text decides, in place; the number of positions, None where there is no limit."""
    if not hasattr(settings, "vocab_size"):
        raise _more_than_text(config)
    settings.vocab_size = vocab_size + 1
    settings.pad_token_id = PADDING_ID
    settings.bos_token_id = settings.eos_token_id = None
    settings.use_cache = False
    positions = getattr(settings, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    name = settings.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    for key in (name, "max_position_embeddings"):
        if key in config.overrides and positions < length:
            raise InputError(f"model.overrides.{key} is {positions}, but texts have up to {length} tokens; raise it")
    if positions < length + 2:
        settings.max_position_embeddings = length + 2  # 2: RoBERTa and its kin begin to count behind the padding's id
    return max(positions, length)


def _build(settings: Any, config: HuggingFaceConfig, *, causal: bool) -> nn.Module:
    transformers = _transformers()
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    try:
        if causal:
            return auto.from_config(settings, dtype=torch.float32, trust_remote_code=False)
        try:
            # A pooling layer would stand beside our own head, untrained.
            model = auto.from_config(settings, dtype=torch.float32, trust_remote_code=False, add_pooling_layer=False)
        except TypeError:
            model = auto.from_config(settings, dtype=torch.float32, trust_remote_code=False)
        return model.get_encoder() if settings.is_encoder_decoder else model
    except Exception as error:
        if _out_of_memory(error):
            raise
        line = _one_line(error) + _hint(config)
        if line.startswith("Unrecognized configuration class"):
            what = "language model" if causal else "model"
            line = f"it has no {what} of this kind" + ("; use it on a corpus with labels" if causal else "")
        raise InputError(f"transformers cannot build {config.architecture}: {line}") from error


def _more_than_text(config: HuggingFaceConfig) -> InputError:
    return InputError(f"{config.architecture} reads more than text; name an architecture for text alone, such as gpt2")


def _out_of_memory(error: BaseException) -> bool:
    """The sizes may be right and the machine too small; whoever trains says so, for models of any kind."""
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return True
    return isinstance(error, MemoryError | torch.OutOfMemoryError)


def _hint(config: HuggingFaceConfig) -> str:
    return "; check model.overrides" if config.overrides else ""


def _one_line(error: BaseException) -> str:
    line = " ".join(str(error).split())[:200]
    # A KeyError says the key and nothing else.
    return f"{type(error).__name__}: {line}" if isinstance(error, KeyError) or not line else line


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's advice on token ids and on models that it takes for something else."""
    logging = _transformers().logging
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
