"""The vocabulary of a run: validation, round trip, identity."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

import normlab
from normlab.config import (
    InputError,
    LSTMConfig,
    OutputConfig,
    RunConfig,
    TransformerConfig,
    available_norms,
    config_from_dict,
    config_to_dict,
    run_id,
)


@pytest.mark.parametrize("model", [LSTMConfig(norm="bn"), TransformerConfig(placement="peri")])
def test_a_config_survives_yaml(model: LSTMConfig | TransformerConfig):
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
        "InputError",
        "LSTM",
        "Norm",
        "RunConfig",
        "RunRecord",
        "TextDataModule",
        "TextModule",
        "build_norm",
        "recompute_statistics",
        "train",
    ]
    assert all(getattr(normlab, name) is not None for name in normlab.__all__)
    with pytest.raises(AttributeError, match="it has InputError"):
        normlab.trian  # noqa: B018


def test_a_norm_that_stands_nowhere_is_refused():
    nowhere = {site: {"norm": "none"} for site in ("input_to_hidden", "hidden_to_hidden", "cell")}
    with pytest.raises(InputError, match=r"model\.norm is bn but no site has it"):
        config_from_dict({"model": {"norm": "bn", "sites": nowhere}})
    assert config_from_dict({"model": {"norm": "none", "sites": nowhere}}).model.norm == "none"
