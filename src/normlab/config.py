"""The vocabulary of a run: frozen, validated, torch-free dataclasses.

A `RunConfig` says everything that decides a run's numbers (model, data, optim, training, seed) and,
apart, where its record goes (`output`). The run's id is a hash of the first part alone, so the same
question asked twice has the same id wherever it is asked.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "DataConfig",
    "HuggingFaceConfig",
    "InputError",
    "LSTMConfig",
    "LSTMSites",
    "MLPConfig",
    "MLPSites",
    "ModelConfig",
    "NormOptions",
    "OptimConfig",
    "OutputConfig",
    "RunConfig",
    "SiteConfig",
    "TrainingConfig",
    "TransformerConfig",
    "TransformerSites",
    "available_norms",
    "available_probes",
    "check_norm_options",
    "config_from_dict",
    "config_hash",
    "config_to_dict",
    "model_label",
    "require_choice",
    "run_id",
    "without_cell",
]


class InputError(ValueError):
    """Something the user gave is wrong; the message is one line that says what and how to mend it."""


def require_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raise `InputError` naming the right `choices` (and the nearest one) unless `value` is among them."""
    names = sorted(set(choices))
    if value in names:
        return
    near = difflib.get_close_matches(value, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise InputError(f"unknown {what} {value!r}{hint}; choose from: {', '.join(names)}")


def available_norms() -> tuple[str, ...]:
    """Names of all norms: one file each in `normlab/norms/`; torch is not imported to list them."""
    folder = Path(__file__).parent / "norms"
    infrastructure = {
        "__init__",
        "base",
        "batch_statistics",
        "fused",
        "kernels",
        "moments",
        "recompute",
        "standardized",
    }
    return tuple(sorted(path.stem for path in folder.glob("*.py") if path.stem not in infrastructure))


def available_probes() -> tuple[str, ...]:
    """Names of all probes: one file each in `normlab/probes/`; torch is not imported to list them."""
    folder = Path(__file__).parent / "probes"
    infrastructure = {"__init__", "base", "listing", "sites"}
    return tuple(sorted(path.stem for path in folder.glob("*.py") if path.stem not in infrastructure))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


MODEL_NORM = "norm"
"""Value of `SiteConfig.norm` that means: the norm of the model, `model.norm`."""


@dataclass(frozen=True)
class SiteConfig:
    """What stands at one named site.

    Args:
        norm: "norm" for the model's norm (`model.norm`), "none" for nothing, or a norm's name to put
            another one at this site only.
        gain: initial value of the norm's gain; null takes the norm's published value for such a site.
    """

    norm: str = MODEL_NORM
    gain: float | None = None

    def __post_init__(self) -> None:
        if self.norm != MODEL_NORM:
            require_choice("norm", self.norm, (*available_norms(), MODEL_NORM))


def _require_norm_stands(norm: str, sites: LSTMSites | TransformerSites | MLPSites) -> None:
    named = {site.name: getattr(sites, site.name).norm for site in dataclasses.fields(sites)}
    _require(
        norm == "none" or any(value in (MODEL_NORM, norm) for value in named.values()),
        f"model.norm is {norm} but no site has it; use model.norm=none, or set a site's norm to {MODEL_NORM!r}",
    )


def _bare() -> SiteConfig:
    return SiteConfig(norm="none")


@dataclass(frozen=True)
class LSTMSites:
    """Sites of the LSTM (Cooijmans et al. 2016, arXiv 1603.09025, equations 6 to 8); a GRU or RNN has the first two.

    Args:
        input_to_hidden: on W_x x_t, gain only (the bias is the cell's own).
        hidden_to_hidden: on W_h h_{t-1}, gain only.
        cell: on c_t where it enters the output, gain and bias.
    """

    input_to_hidden: SiteConfig = field(default_factory=SiteConfig)
    hidden_to_hidden: SiteConfig = field(default_factory=SiteConfig)
    cell: SiteConfig = field(default_factory=SiteConfig)


def without_cell(sites: LSTMSites, model: str) -> LSTMSites:
    """`sites` for a recurrence that has no c: one at the cell would stand nowhere, and is refused."""
    _require(
        sites.cell == SiteConfig(),
        f"model.sites.cell is set, but {model} has no c that a norm could stand on; leave it out",
    )
    return dataclasses.replace(sites, cell=_bare())


@dataclass(frozen=True)
class TransformerSites:
    """Sites of the Transformer; `model.placement` says where in the block the first two stand.

    Args:
        attention: around the attention sublayer.
        ffn: around the feed-forward sublayer.
        final: before the head (absent in post placement, where the last block ends in a norm).
        embedding: on the sum of token and position embedding.
        query: on each head's queries, before rotary positions.
        key: on each head's keys, before rotary positions.
    """

    attention: SiteConfig = field(default_factory=SiteConfig)
    ffn: SiteConfig = field(default_factory=SiteConfig)
    final: SiteConfig = field(default_factory=SiteConfig)
    embedding: SiteConfig = field(default_factory=_bare)
    query: SiteConfig = field(default_factory=_bare)
    key: SiteConfig = field(default_factory=_bare)


@dataclass(frozen=True)
class MLPSites:
    """Sites of the feed-forward net.

    Args:
        hidden: in each layer between the linear map and the activation.
    """

    hidden: SiteConfig = field(default_factory=SiteConfig)


def _later(default: Any) -> Any:
    """A field that came after runs were recorded: it is left out of the run's id while it holds its default, with which
    a run trains as it did before the field came, so that old ids stay."""
    return field(default=default, metadata={"later": True})


@dataclass(frozen=True)
class NormOptions:
    """Options of the norm; null leaves the norm's own default. A norm refuses an option it does not have.

    Args:
        affine: learn a gain (and, where the site has one, a bias).
        eps: added to the variance, inside the root.
        momentum: weight of the newest batch in the stored statistics.
        groups: number of groups of features (gn).
        pool: which entries share a training statistic: batch, batch_time, prefix (batch norms), time, prefix (inorm),
            token, time, prefix (gn). batch_time and time see later text.
        max_steps: number of distinct time steps with statistics of their own (bn_step). Null takes the training length.
        unbiased: store the Bessel-corrected variance, as torch.nn.BatchNorm1d does.
        beyond: statistics of time steps from `max_steps` on (bn_step): pooled in one set of their own, or last.
        ghost_rows: rows per training statistic (batch norms): a statistics batch smaller than the batch.
        memory_batches: a training statistic also covers the last so many batches (batch norms): one larger than it.
        r_max: clip of the scale correction (brn).
        d_max: clip of the shift correction (brn).
        warmup: updates of the stored statistics as a plain batch norm (brn, pn).
        ramp: updates after those, over which the clips open (brn).
        penalty_mean: weight of the squared distance of the batch's means to the stored ones, in the loss (rbn).
        penalty_var: weight of the distance of the variances (rbn).
        group_scaling: groups of features whose root mean square each token is divided by first (pn, pnv).
        window: number of neighbouring features (lrn).
        alpha: initial slope (dyt, derf); strength (lrn).
        beta: exponent (lrn).
        k: added constant (lrn).
    """

    affine: bool | None = None
    eps: float | None = None
    momentum: float | None = None
    groups: int | None = None
    pool: Literal["batch", "batch_time", "prefix", "time", "token"] | None = None
    max_steps: int | None = None
    unbiased: bool | None = None
    beyond: Literal["pooled", "last"] | None = _later(None)
    ghost_rows: int | None = _later(None)
    memory_batches: int | None = _later(None)
    r_max: float | None = _later(None)
    d_max: float | None = _later(None)
    warmup: int | None = _later(None)
    ramp: int | None = _later(None)
    penalty_mean: float | None = _later(None)
    penalty_var: float | None = _later(None)
    group_scaling: int | None = _later(None)
    window: int | None = _later(None)
    alpha: float | None = _later(None)
    beta: float | None = _later(None)
    k: float | None = _later(None)

    def __post_init__(self) -> None:
        def require(name: str, holds: Callable[[Any], bool], what: str) -> None:
            value = getattr(self, name)
            _require(value is None or holds(value), f"model.norm_options.{name} is {value}; it must be {what}")

        require("eps", lambda value: value > 0, "> 0")
        require("momentum", lambda value: 0 < value <= 1, "in (0, 1]")
        for name in ("groups", "max_steps", "group_scaling", "window"):
            require(name, lambda value: value >= 1, "at least 1")
        require("ghost_rows", lambda value: value >= 2, "at least 2: one row has no variance")
        for name in ("memory_batches", "warmup", "ramp", "d_max", "penalty_mean", "penalty_var", "alpha", "beta"):
            require(name, lambda value: value >= 0, ">= 0")
        require("r_max", lambda value: value >= 1, "at least 1")
        require("k", lambda value: value > 0, "> 0")


@dataclass(frozen=True)
class LSTMConfig:
    """A stack of LSTM, GRU or RNN layers with a norm at named sites, between an embedding and a head.

    Args:
        norm: the norm under test; a file name in normlab/norms.
        sites: what stands at each site.
        norm_options: options of the norm.
        width: hidden units per layer and direction.
        embedding_width: size of the token embedding; 0 takes `width`.
        embedding_std: initial standard deviation of the embedding; null takes 1, or 1 / sqrt(its size) if tied to the
            head. Texts with many rare words want it small (0.06 in Zaremba et al. 2014, arXiv 1409.2329).
        layers: number of layers.
        bidirectional: read both ways (classification only).
        dropout: on the embedding, between layers and before the head.
        tie_embeddings: head and embedding share one matrix (needs equal widths).
        learned_state: learn h_0 and c_0 (else zeros).
        state_noise: standard deviation of noise on h_0 and c_0 in training; makes the rows of a batch
            differ at the first time step.
        recurrent_init: initial hidden-to-hidden matrices, one block per gate.
        forget_bias: initial bias of the forget gate (lstm alone).
        cell: the recurrence: lstm, gru, rnn_tanh or rnn_relu. Those beside lstm have no c, hence no site and no learned
            state of it.
        recompute: keep less for backward and compute it again, for long sequences: less memory, more time.
    """

    name: Literal["lstm"] = "lstm"
    norm: str = "ln"
    sites: LSTMSites = field(default_factory=LSTMSites)
    norm_options: NormOptions = field(default_factory=NormOptions)
    width: int = 256
    embedding_width: int = 0
    embedding_std: float | None = None
    layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    tie_embeddings: bool = False
    learned_state: bool = True
    state_noise: float = 0.0
    recurrent_init: Literal["orthogonal", "uniform"] = "orthogonal"
    forget_bias: float = 1.0
    cell: Literal["lstm", "gru", "rnn_tanh", "rnn_relu"] = _later("lstm")
    recompute: bool = _later(False)

    def __post_init__(self) -> None:
        require_choice("norm", self.norm, available_norms())
        require_choice("model.cell", self.cell, ("lstm", "gru", "rnn_tanh", "rnn_relu"))
        sites = self.sites
        if self.cell != "lstm":
            sites = without_cell(sites, self.cell)
            _require(
                self.forget_bias == LSTMConfig.forget_bias,
                f"model.forget_bias is set, but {self.cell} has no forget gate; leave it out",
            )
        _require_norm_stands(self.norm, sites)
        _require(self.width >= 1, f"model.width is {self.width}; it must be at least 1")
        _require(self.layers >= 1, f"model.layers is {self.layers}; it must be at least 1")
        _require(self.embedding_width >= 0, "model.embedding_width must be >= 0 (0 takes model.width)")
        _require(self.embedding_std is None or self.embedding_std > 0, "model.embedding_std must be > 0")
        _require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; it must be in [0, 1)")
        _require(self.state_noise >= 0, "model.state_noise must be >= 0")
        if self.tie_embeddings:
            out = self.width * (2 if self.bidirectional else 1)
            _require(
                self.embedding_width in (0, out),
                f"model.tie_embeddings needs model.embedding_width 0 or {out}, not {self.embedding_width}",
            )


@dataclass(frozen=True)
class TransformerConfig:
    """A Transformer: a causal decoder for language modelling, an encoder for classification.

    Args:
        norm: the norm under test; a file name in normlab/norms.
        sites: what stands at each site.
        norm_options: options of the norm.
        width: features of the residual stream.
        layers: number of blocks.
        heads: attention heads; divides `width`.
        ffn_width: hidden units of the feed-forward sublayer; 0 takes 4 * width, and 8/3 * width
            for swiglu, which has a third matrix.
        placement: pre = x + f(norm(x)) (GPT-2); post = norm(x + f(x)) (Vaswani et al. 2017);
            peri = x + norm(f(norm(x))) (Kim et al. 2025, arXiv 2502.02732).
        positions: rotary (Su et al. 2021) or learned.
        activation: of the feed-forward sublayer; gelu is the tanh form, as in GPT-2.
        dropout: on embedding, attention weights and sublayer outputs.
        tie_embeddings: head and embedding share one matrix.
    """

    name: Literal["transformer"] = "transformer"
    norm: str = "ln"
    sites: TransformerSites = field(default_factory=TransformerSites)
    norm_options: NormOptions = field(default_factory=NormOptions)
    width: int = 128
    layers: int = 4
    heads: int = 4
    ffn_width: int = 0
    placement: Literal["pre", "post", "peri"] = "pre"
    positions: Literal["rotary", "learned"] = "rotary"
    activation: Literal["gelu", "relu", "sigmoid", "swiglu"] = "gelu"
    dropout: float = 0.0
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        require_choice("norm", self.norm, available_norms())
        _require_norm_stands(self.norm, self.sites)
        for name in ("width", "layers", "heads"):
            _require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        _require(
            self.width % self.heads == 0, f"model.heads is {self.heads}; it must divide model.width ({self.width})"
        )
        _require(
            self.positions != "rotary" or (self.width // self.heads) % 2 == 0,
            f"rotary positions need an even model.width / model.heads, not {self.width // self.heads}; "
            "use model.positions=learned",
        )
        _require(self.ffn_width >= 0, "model.ffn_width must be >= 0 (0 takes the default)")
        _require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; it must be in [0, 1)")


@dataclass(frozen=True)
class MLPConfig:
    """A feed-forward net: of the last tokens' embeddings, joined, for language modelling (Bengio et al. 2003); of the
    mean of all embeddings for classification (Iyyer et al. 2015).

    Args:
        norm: the norm under test; a file name in normlab/norms.
        sites: what stands at each site.
        norm_options: options of the norm.
        width: hidden units per layer.
        embedding_width: size of the token embedding.
        layers: hidden layers: linear map, norm, activation.
        context: language modelling: tokens that the next one is predicted from.
        activation: after each norm; gelu is the tanh form.
        dropout: on the embedding, between layers and before the head.
    """

    name: Literal["mlp"] = "mlp"
    norm: str = "bn"
    sites: MLPSites = field(default_factory=MLPSites)
    norm_options: NormOptions = field(default_factory=NormOptions)
    width: int = 256
    embedding_width: int = 32
    layers: int = 2
    context: int = 8
    activation: Literal["relu", "sigmoid", "tanh", "gelu"] = "relu"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        require_choice("norm", self.norm, available_norms())
        _require_norm_stands(self.norm, self.sites)
        for name in ("width", "embedding_width", "layers", "context"):
            _require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        _require(0 <= self.dropout < 1, f"model.dropout is {self.dropout}; it must be in [0, 1)")


OWN_NORM = "own"
"""Value of `HuggingFaceConfig.norm` that means: the norms that the architecture comes with."""


@dataclass(frozen=True)
class HuggingFaceConfig:
    """An architecture of the transformers library, randomly initialized; its norms, or others in their place.

    Vocabulary, special tokens and the number of positions come from the text; dropout and all sizes are the
    architecture's own (those of gpt2: 124 million parameters) unless `overrides` say otherwise.

    Args:
        architecture: a model type, such as gpt2, llama or bert; or the path of a config.json, or of a folder that holds
            one. A file is read at once: `architecture` becomes its model type, its other fields go into `from_file`, so
            that the run's id and record hold what it said.
        norm: own leaves the architecture's norms; a file name in normlab/norms is put in place of each of them.
        norm_options: options of the norm.
        swap: pattern of the names of the norms that are replaced, such as *.ln_1; the others stay.
        overrides: fields of the architecture's config, such as n_layer, n_embd and n_head of gpt2.
        from_file: as `overrides`, but those come first, and fields that the architecture does not have are no mistake.
    """

    name: Literal["hf"] = "hf"
    architecture: str = ""
    norm: str = OWN_NORM
    norm_options: NormOptions = field(default_factory=NormOptions)
    swap: str = "*"
    overrides: dict[str, Any] = field(default_factory=dict)
    from_file: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(self.architecture != "", "model.architecture is empty; name one, such as --model hf:gpt2")
        require_choice("norm", self.norm, (*available_norms(), OWN_NORM))
        if self.norm == OWN_NORM:
            given = [key for key, value in dataclasses.asdict(self.norm_options).items() if value is not None]
            _require(
                not given, f"model.norm_options.{' '.join(given)} is set, but norm {OWN_NORM} takes none; choose a norm"
            )
            _require(self.swap == "*", f"model.swap is {self.swap!r}, but norm {OWN_NORM} replaces none; choose a norm")
        if "/" in self.architecture or self.architecture.endswith(".json"):
            architecture, fields = _read_architecture(Path(self.architecture).expanduser())
            object.__setattr__(self, "architecture", architecture)
            object.__setattr__(self, "from_file", fields)
        for name in ("overrides", "from_file"):
            _require_no_code(getattr(self, name), f"model.{name}")
        for key in TEXT_FIELDS:
            _require(key not in self.overrides, f"model.overrides.{key} is decided by the text; leave it out")


TEXT_FIELDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache")
"""Fields of an architecture's config that the text decides."""

_FILE_FACTS = ("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "auto_map")
"""Fields of a config.json that say where it comes from, or in which precision it was saved."""


def _require_no_code(fields: Any, where: str) -> None:
    """Raise `InputError` for a field, at any depth, that has transformers fetch code from its hub and run it."""
    if isinstance(fields, list | tuple):
        for value in fields:
            _require_no_code(value, where)
    if not isinstance(fields, Mapping):
        return
    for key, value in fields.items():
        inner = f"{where}.{key}"
        _require(key != "auto_map", f"{inner} names code to fetch and run, which normlab does not do; leave it out")
        if str(key).removesuffix("_internal").endswith("_implementation"):
            named = value.values() if isinstance(value, Mapping) else [value]
            _require(
                not any(isinstance(name, str) and "/" in name for name in named),
                f"{inner} names a kernel to fetch and run, which normlab does not do; use sdpa or eager",
            )
        _require_no_code(value, inner)


def _read_architecture(path: Path) -> tuple[str, dict[str, Any]]:
    """Model type and other fields of a config.json, without what the text decides."""
    file = path / "config.json" if path.is_dir() else path
    _require(not file.exists() or file.is_file(), f"the architecture {file} is no plain file; give a config.json")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the architecture {str(file)!r}: {error.strerror}; give a config.json") from None
    except (ValueError, RecursionError):
        raise InputError(f"the architecture {file} is not JSON; give a config.json of transformers") from None
    _require(
        isinstance(values, dict) and isinstance(values.get("model_type"), str),
        f"the architecture {file} has no model_type; give a config.json of transformers",
    )
    left_out = {"model_type", *TEXT_FIELDS, *_FILE_FACTS}
    return values["model_type"], {key: value for key, value in values.items() if key not in left_out}


ModelConfig = LSTMConfig | TransformerConfig | MLPConfig | HuggingFaceConfig
MODELS: dict[str, type[ModelConfig]] = {
    "lstm": LSTMConfig,
    "transformer": TransformerConfig,
    "mlp": MLPConfig,
    "hf": HuggingFaceConfig,
}


def model_label(model: ModelConfig) -> str:
    """What a model is called in ids and tags: that of its cell, or its own, with that of an architecture."""
    if isinstance(model, LSTMConfig):
        return model.cell
    if isinstance(model, HuggingFaceConfig):
        return f"{model.name}_{re.sub(r'[^a-z0-9]+', '_', model.architecture.lower())}"
    return model.name


@dataclass(frozen=True)
class DataConfig:
    """Which text, in which symbols, in which batches.

    Args:
        corpus: a corpus name, or a path: a .txt file, a folder of .txt files, a .csv / .tsv / .jsonl with labels.
        tokens: char, word (PTB convention: split at white space, <eos> per line), bpe (trained on the
            training split); auto takes the corpus's own convention.
        vocabulary: largest number of symbols for word and bpe; 0 keeps every training word (word) or takes 8,000 (bpe).
        batch_size: rows per batch and process.
        length: language modelling: tokens per window. Classification: longer texts are cut to this many tokens; 0
            takes 100 for language modelling and 400 for classification.
        stream: language modelling only. windows: stateless, non-overlapping, random offset each epoch, shuffled
            (Cooijmans et al. 2016). stateful: contiguous rows, the state is carried (truncated backpropagation).
        text_column: column of a .csv / .tsv / .jsonl file that holds the text.
        label_column: column that holds the label.
        resample: train on a bootstrap sample of the training split, drawn by the run's seed: of its texts, or of
            blocks of 1000 tokens of a stream (`normlab.data.resample`). Vocabulary, validation and test stay.
    """

    corpus: str = "pydocs"
    tokens: Literal["auto", "char", "word", "bpe"] = "auto"
    vocabulary: int = 0
    batch_size: int = 64
    length: int = 0
    stream: Literal["windows", "stateful"] = "windows"
    text_column: str = "text"
    label_column: str = "label"
    resample: bool = _later(False)

    def __post_init__(self) -> None:
        _require(self.corpus != "", "data.corpus is empty; give a corpus name or a path")
        _require(self.batch_size >= 1, f"data.batch_size is {self.batch_size}; it must be at least 1")
        _require(self.length >= 0, f"data.length is {self.length}; it must be >= 0 (0 takes the task's default)")
        _require(self.vocabulary >= 0, f"data.vocabulary is {self.vocabulary}; it must be >= 0")


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer. Weight decay touches matrices only: never gains, biases, norms, embeddings or initial states.

    Args:
        name: adamw (decoupled decay), adam (decay as L2 in the gradient), sgd (no momentum).
        lr: peak learning rate.
        weight_decay: see above.
        schedule: of the rate after warm-up: constant, or cosine / linear to zero at the last step.
        warmup_steps: steps of linear warm-up.
        clip: largest gradient norm; 0 does not clip.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    clip: float = 1.0

    def __post_init__(self) -> None:
        _require(self.lr > 0 and math.isfinite(self.lr), f"optim.lr is {self.lr}; it must be a finite number > 0")
        _require(self.weight_decay >= 0, "optim.weight_decay must be >= 0")
        _require(self.warmup_steps >= 0, "optim.warmup_steps must be >= 0")
        _require(self.clip >= 0, "optim.clip must be >= 0 (0 does not clip)")


@dataclass(frozen=True)
class TrainingConfig:
    """How long and on what.

    Args:
        steps: optimizer steps.
        valid_every: optimizer steps between validations.
        valid_batches: batches of such a validation, by which the best weights are chosen: every so many-th of the split
            (the first ones of a stateful stream, and where it has less than twice as many); 0 takes all. The final
            evaluation takes all.
        checkpoint_every: optimizer steps between checkpoints to resume from.
        accumulate: micro-batches per optimizer step (batch norms see one micro-batch, and `memory_batches` before it).
        precision: fp32, or bf16 (autocast; statistics stay fp32).
        accelerator: auto takes a GPU if there is one.
        devices: number of processes / GPUs.
        threads: CPU threads; 0 leaves torch's choice.
        early_stop: validations without improvement before stopping; 0 never stops early.
        divergence_nats: a training loss above this (nats per token or text), or not finite, ends the run as diverged.
        activations_every: optimizer steps between records of per-site activation statistics; 0 records none.
        recompute_batches: training batches (at most one pass over them) from which stored statistics are estimated
            anew before the final test; the numbers with the running averages are recorded beside. 0 keeps those alone.
    """

    steps: int = 250
    valid_every: int = 125
    checkpoint_every: int = 50
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    threads: int = 0
    early_stop: int = 0
    divergence_nats: float = 20.0
    activations_every: int = 125
    recompute_batches: int = _later(64)
    valid_batches: int = _later(0)

    def __post_init__(self) -> None:
        for name in ("steps", "valid_every", "checkpoint_every", "accumulate", "devices"):
            _require(getattr(self, name) >= 1, f"training.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("threads", "early_stop", "activations_every", "recompute_batches", "valid_batches"):
            _require(getattr(self, name) >= 0, f"training.{name} is {getattr(self, name)}; it must be >= 0")
        _require(self.divergence_nats > 0, "training.divergence_nats must be > 0")


@dataclass(frozen=True)
class OutputConfig:
    """Where the record goes and who watches. None of this changes a number, so none of it is in the run's id.

    Args:
        runs_dir: folder of records.
        wandb: auto (online with a key and a reachable server, else offline), online, offline, off.
        project: W&B project.
        entity: W&B entity; empty takes the account's default.
        claim: id of the argument this run serves; a W&B tag.
        progress: show the progress bar.
        fresh: train again even if the record is finished; the old record is kept beside it.
    """

    runs_dir: str = "runs"
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    project: str = "normlab"
    entity: str = ""
    claim: str = ""
    progress: bool = True
    fresh: bool = False


@dataclass(frozen=True)
class RunConfig:
    """One run.

    Args:
        model: the model and its norm.
        data: the text.
        optim: the optimizer.
        training: how long and on what.
        seed: of initial weights, batch order, dropout and, with data.resample, the sample of the training split.
        output: where the record goes.
    """

    model: ModelConfig = field(default_factory=LSTMConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    seed: int = 1
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        _require(0 <= self.seed < 2**32, f"seed is {self.seed}; it must be in [0, 2**32)")
        if not isinstance(self.model, LSTMConfig):
            called = "model from transformers" if isinstance(self.model, HuggingFaceConfig) else self.model.name
            _require(
                self.data.stream == "windows",
                f"the {called} has no recurrent state to carry: use data.stream=windows",
            )


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as nested plain values, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def config_hash(config: RunConfig) -> str:
    """SHA-256, in hex, of everything that decides the numbers."""
    deciding = _deciding(config)
    del deciding["output"]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def run_id(config: RunConfig) -> str:
    """A readable name and the first 8 digits of `config_hash`."""
    digest = config_hash(config)[:8]
    corpus = re.sub(r"[^a-z0-9]+", "_", Path(config.data.corpus).stem.lower()).strip("_") or "text"
    return f"{model_label(config.model)}-{config.model.norm}-{corpus[:24]}-s{config.seed}-{digest}"


def check_norm_options(options: Mapping[str, Any]) -> None:
    """Raise `InputError` for a value that `NormOptions` would refuse; other names are not looked at."""
    names = {f.name for f in dataclasses.fields(NormOptions)}
    _build(NormOptions, {name: value for name, value in options.items() if name in names}, "model.norm_options")


def _deciding(part: Any) -> dict[str, Any]:
    """`part` as nested plain values, without later fields that hold their default."""
    values: dict[str, Any] = {}
    for f in dataclasses.fields(part):
        value = getattr(part, f.name)
        if not (f.metadata.get("later") and value == f.default):
            values[f.name] = _deciding(value) if dataclasses.is_dataclass(value) else value
    return values


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Build a `RunConfig` from nested plain values; unknown fields and wrong types raise `InputError`."""
    if not isinstance(values, Mapping):
        raise InputError(f"a config is a mapping of fields, not {values!r:.100}")
    values = dict(values)
    model = values.get("model", {})
    if not isinstance(model, Mapping):
        raise InputError(f"model must be a mapping of fields, not {model!r:.100}")
    name = model.get("name", "lstm")
    require_choice("model", str(name), MODELS)
    built = _build(MODELS[name], model, "model")
    rest = {key: value for key, value in values.items() if key != "model"}
    return dataclasses.replace(_build(RunConfig, rest, ""), model=built)


def _build(cls: Any, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise InputError(f"{where} must be a mapping of fields, not {values!r:.100}")
    hints = typing.get_type_hints(cls)
    for key in values:
        require_choice("field", f"{where}.{key}".lstrip("."), [f"{where}.{name}".lstrip(".") for name in hints])
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type that `hint` asks for. Only lossless conversions: an int where a float is wanted."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in options:
            require_choice(where, str(value), options)
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{where} must be a mapping of fields, not {value!r:.100}")
        return dict(value)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        inner = [option for option in options if option is not type(None)]
        return _convert(inner[0], value, where)
    if hint is float and isinstance(value, str):
        # YAML 1.1 reads 2e-3 (no point) as a string.
        try:
            return float(value)
        except ValueError:
            pass
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{where} must be of type {hint.__name__}, not {value!r:.100}")
    return value
