"""The vocabulary of a run: validation, round trip, identity."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

import normlab
from normlab.config import (
    HuggingFaceConfig,
    InputError,
    LSTMConfig,
    MLPConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    TransformerConfig,
    available_norms,
    config_from_dict,
    config_to_dict,
    run_id,
)


@pytest.mark.parametrize(
    "model",
    [
        LSTMConfig(norm="bn"),
        LSTMConfig(cell="rnn_relu"),
        TransformerConfig(placement="peri"),
        MLPConfig(activation="sigmoid"),
        HuggingFaceConfig(architecture="gpt2", norm="bn", swap="*.ln_1", overrides={"n_layer": 2, "resid_pdrop": 0.0}),
    ],
)
def test_a_config_survives_yaml(model: ModelConfig):
    config = RunConfig(model=model, seed=9)
    assert config_from_dict(yaml.safe_load(yaml.safe_dump(config_to_dict(config)))) == config


def test_every_deciding_field_changes_the_id_and_output_does_not():
    base = RunConfig()
    ids = {run_id(base)}
    for part in ("model", "data", "optim", "training"):
        for field in dataclasses.fields(getattr(base, part)):
            values = config_to_dict(base)
            values[part][field.name] = "changed"
            # replaced behind validation's back: only the id is asked for
            changed = dataclasses.replace(getattr(base, part))
            object.__setattr__(changed, field.name, values[part][field.name])
            config = dataclasses.replace(base)
            object.__setattr__(config, part, changed)
            ids.add(run_id(config))
    count = sum(len(dataclasses.fields(getattr(base, part))) for part in ("model", "data", "optim", "training"))
    assert len(ids) == 1 + count
    assert run_id(dataclasses.replace(base, output=OutputConfig(claim="d1", wandb="off"))) == run_id(base)


def test_the_id_is_a_safe_folder_name():
    config = config_from_dict({"data": {"corpus": "../../etc/pass wd.txt"}})
    assert "/" not in run_id(config)
    assert run_id(config).startswith("lstm-ln-pass_wd-s1-")


def test_the_id_names_the_cell_and_stays_what_it_was_before_there_was_a_choice():
    assert run_id(RunConfig(model=LSTMConfig(cell="gru"))).startswith("gru-ln-")
    assert run_id(RunConfig(model=LSTMConfig(cell="lstm"))) == "lstm-ln-pydocs-s1-2239b9a5"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model": {"width": "x"}}, "model.width must be of type int"),
        ({"model": {"width": True}}, "model.width must be of type int"),
        ({"model": {"sites": {"cel": {}}}}, "did you mean 'model.sites.cell'?"),
        ({"data": 3}, "data must be a mapping"),
        ({"seed": -1}, "seed is -1"),
        ({"model": {"tie_embeddings": True, "embedding_width": 3}}, "model.tie_embeddings needs"),
        ({"model": {"norm_options": {"momentum": 0.0}}}, "momentum is 0.0"),
        ({"model": {"cell": "gruu"}}, "did you mean 'gru'?"),
        ({"model": {"cell": "gru", "sites": {"cell": {"norm": "ln"}}}}, "model.sites.cell is set, but gru has no c"),
        ({"model": {"cell": "rnn_tanh", "forget_bias": 0.0}}, "model.forget_bias is set, but rnn_tanh has no forget"),
        ({"model": {"name": "hf"}}, "model.architecture is empty"),
        ({"model": {"name": "hf", "architecture": "gpt2", "norm": "lnn"}}, "did you mean 'ln'?"),
        ({"model": {"name": "hf", "architecture": "gpt2", "overrides": 3}}, "model.overrides must be a mapping"),
        ({"model": {"name": "hf", "architecture": "gpt2", "overrides": {"vocab_size": 9}}}, "decided by the text"),
        ({"model": {"name": "hf", "architecture": "gpt2", "swap": "*.ln_1"}}, "norm own replaces none"),
        ({"model": {"name": "hf", "architecture": "gpt2", "norm_options": {"eps": 0.1}}}, "norm own takes none"),
        ({"model": {"name": "hf", "architecture": "missing/config.json"}}, "cannot read the architecture"),
        ({"model": {"name": "hf", "architecture": "gpt2"}, "data": {"stream": "stateful"}}, "use data.stream=windows"),
    ],
)
def test_wrong_values_are_named(values: dict, said: str):
    with pytest.raises(InputError, match=said.replace("?", r"\?")) as error:
        config_from_dict(values)
    assert "\n" not in str(error.value)


def test_norms_are_the_files():
    assert set(available_norms()) >= {"none", "ln", "rms", "bn", "bn_step", "gn", "inorm"}
    for name in available_norms():
        assert (Path(normlab.__file__).parent / "norms" / f"{name}.py").is_file()


def test_public_face_is_frozen():
    assert normlab.__all__ == [
        "GRU",
        "InputError",
        "LSTM",
        "Norm",
        "RNN",
        "RunConfig",
        "RunRecord",
        "TextDataModule",
        "TextModule",
        "build_norm",
        "recompute_statistics",
        "swap_norms",
        "train",
    ]
    assert all(getattr(normlab, name) is not None for name in normlab.__all__)
    with pytest.raises(AttributeError, match="it has GRU"):
        normlab.trian  # noqa: B018


def test_a_norm_that_stands_nowhere_is_refused():
    nowhere = {site: {"norm": "none"} for site in ("input_to_hidden", "hidden_to_hidden", "cell")}
    with pytest.raises(InputError, match=r"model\.norm is bn but no site has it"):
        config_from_dict({"model": {"norm": "bn", "sites": nowhere}})
    assert config_from_dict({"model": {"norm": "none", "sites": nowhere}}).model.norm == "none"
    del nowhere["cell"]
    assert config_from_dict({"model": {"norm": "bn", "sites": nowhere}}).model.norm == "bn"
    with pytest.raises(InputError, match=r"model\.norm is bn but no site has it"):
        config_from_dict({"model": {"norm": "bn", "cell": "gru", "sites": nowhere}})


def test_an_architectures_file_is_in_the_config_and_its_id(tmp_path: Path):
    def config(layers: int) -> RunConfig:
        fields = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": 9, "transformers_version": "5"}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return config_from_dict(
            {"model": {"name": "hf", "architecture": str(tmp_path), "overrides": {"hidden_size": 8}}}
        )

    two, three = config(2), config(3)
    assert isinstance(two.model, HuggingFaceConfig)
    assert (two.model.architecture, two.model.from_file) == ("llama", {"num_hidden_layers": 2})
    assert two.model.overrides == {"hidden_size": 8}
    assert run_id(two) != run_id(three)
    assert run_id(two).startswith("hf_llama-own-pydocs-s1-")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        config_from_dict({"model": {"name": "hf", "architecture": str(tmp_path / "config.json")}})
