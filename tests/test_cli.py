"""The command line as a user meets it: what it accepts, what it says to mistakes, and how fast."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from normlab.__main__ import main, parse_run
from normlab.config import HuggingFaceConfig, InputError, TransformerConfig, config_from_dict


def test_short_flags_are_fields():
    config = parse_run(
        ["--norm", "rms", "--model", "transformer", "--data", "ptb_char", "--seed", "3", "--optim.lr", "1e-3"]
    )
    assert isinstance(config.model, TransformerConfig)
    assert (config.model.norm, config.data.corpus, config.seed, config.optim.lr) == ("rms", "ptb_char", 3, 1e-3)


def test_flags_change_the_config_file(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "transformer", "width": 64}, "seed": 5}))
    config = parse_run(["--config", str(path), "--model.layers", "3", "--seed=7"])
    assert isinstance(config.model, TransformerConfig)
    assert (config.model.width, config.model.layers, config.seed) == (64, 3, 7)


@pytest.mark.parametrize("model", ["--model hf:gpt2", "--model=hf:gpt2", "--model.name hf --model.architecture gpt2"])
def test_an_architecture_of_transformers_and_its_sizes(model: str):
    config = parse_run([*model.split(), "--norm", "bn", "--model.overrides.n_layer", "2", "--model.overrides.n_head=4"])
    assert isinstance(config.model, HuggingFaceConfig)
    assert (config.model.architecture, config.model.norm) == ("gpt2", "bn")
    assert config.model.overrides == {"n_layer": 2, "n_head": 4}
    same = parse_run([*model.split(), "--norm", "bn", "--model.overrides", '{"n_layer": 2, "n_head": 4}'])
    assert same == config


def test_a_flag_changes_one_override_of_the_config_file(tmp_path: Path):
    path = tmp_path / "run.yaml"
    overrides = {"n_layer": 2, "n_embd": 32}
    path.write_text(yaml.safe_dump({"model": {"name": "hf", "architecture": "gpt2", "overrides": overrides}}))
    config = parse_run(["--config", str(path), "--model.overrides.n_layer", "3"])
    assert isinstance(config.model, HuggingFaceConfig)
    assert config.model.overrides == {"n_layer": 3, "n_embd": 32}


MISTAKES = [
    ("--norm lnn", "unknown norm 'lnn' (did you mean 'ln'?); choose from: bn"),
    ("--model gru", "unknown model 'gru'; choose from: hf, lstm, mlp, transformer"),
    ("--data ptb_chat", "did you mean 'ptb_char'?"),
    ("--data missing/file.txt", "missing/file.txt"),
    ("--model.widht 3", "unknown flag '--model.widht' (did you mean '--model.width'?)"),
    ("--sed 3", "did you mean '--seed'?"),
    ("--training.step 3", "did you mean '--training.steps'?"),
    ("--seed three", "seed must be int, not 'three'"),
    ("--model.width 2.5", "model.width must be int, not '2.5'"),
    ("--data.tokens chars", "data.tokens must be one of auto, char, word, bpe, not 'chars'"),
    ("--model.norm_options.pool bath", "model.norm_options.pool must be one of batch"),
    ("--model transformer --model.heads 3", "it must divide model.width (128)"),
    ("--model transformer --data.stream stateful", "use data.stream=windows"),
    ("--model mlp --data.stream stateful", "the mlp has no recurrent state"),
    ("--model.sites.cell.norm bm", "unknown norm 'bm'"),
    ("--optim.lr 0", "optim.lr is 0.0; it must be a finite number > 0"),
    ("--training.steps 0", "training.steps is 0; it must be at least 1"),
    ("--model hf", "model.architecture is empty; name one, such as --model hf:gpt2"),
    ("--model hf:gpt2 --data.stream stateful", "use data.stream=windows"),
    ("--model hf:gpt2 --model.width 16", "unknown flag '--model.width'"),
    ("--model hf:gtp2", "did you mean gpt2"),
    ("--model hf:gpt2 --model.overrides.n_layers 2", "did you mean n_layer"),
    ("--model hf:gpt2 --model.overrides.n_layer two", "expected int, got str"),
    ("--config missing.yaml", "cannot read the config 'missing.yaml'"),
    ("--resume nothing", "no run 'nothing'"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES)
def test_a_mistake_gets_one_line(
    arguments: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"a: [", "is not YAML"),
        (b"just words", "holds no fields"),
        (b"modle: {}", "modle"),
        (b"model: {widht: 3}", "widht"),
        (b"model: {name: gru}", "unknown model 'gru'"),
    ],
)
def test_a_broken_config_file_gets_one_line(text: bytes, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_mistakes_are_found_before_torch_is_imported():
    code = (
        "import sys; from normlab.__main__ import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'pytorch_lightning', 'wandb', 'datasets', 'tokenizers'} & set(sys.modules); "
        "print(sorted(heavy)); sys.exit(code)"
    )
    for arguments in (["--norm", "x"], ["--model", "x"], ["--data", "x"], ["--optim.x", "1"], ["--seed", "x"]):
        done = subprocess.run([sys.executable, "-c", code, "train", *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stdout.strip() == "[]"
        assert "Traceback" not in done.stderr


def test_without_jsonargparse_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert main([]) == 0
    capsys.readouterr()
    for arguments in (["train", "--help"], ["status", "--help"], ["report", "--help"]):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert "pip install 'jsonargparse[signatures]'" in error
        assert error.count("\n") == 1


def test_help_of_an_architecture_of_transformers(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["train", "--model", "hf:gpt2", "--help"])
    assert "--model.overrides" in capsys.readouterr().out


def test_help_names_every_norm_option_and_both_models(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--model transformer --help" in text
    assert "--model hf --help" in text
    for flag in ("--model.norm_options.eps", "--model.sites.hidden_to_hidden.gain", "--data.stream", "--resume"):
        assert flag in text


def test_a_config_has_nothing_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "run_by_a_config.py").write_text("open('it_ran', 'w')\nclass Foo: pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    named = {"class_path": "run_by_a_config.Foo"}
    for values in (
        {"model": {"name": "hf", "architecture": "gpt2", "overrides": {"n_layer": named}}},
        {"model": {"name": "hf", "architecture": "gpt2", "from_file": {"a": [named]}}},
        {"model": {"name": "lstm", "sites": named}},
        {"model": named},
        {"optim": named},
        {"seed": named},
        {"data": "run_by_a_config.Foo"},
    ):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
        with contextlib.suppress(InputError):  # in one line, or taken for plain values
            parse_run(["--config", "run.yaml"])
        assert not (tmp_path / "it_ran").exists()
    __import__("run_by_a_config")
    assert (tmp_path / "it_ran").exists(), "it could not be imported at all"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "somebody/repo--code.Model"}}, "auto_map names code"),
        ({"text_config": {"auto_map": {}}}, "text_config.auto_map names code"),
        ({"attn_implementation": "somebody/kernel"}, "attn_implementation names a kernel"),
        ({"_attn_implementation_internal": "somebody/kernel"}, "names a kernel"),
        ({"parts": [{"experts_implementation": {"": "somebody/kernel"}}]}, "names a kernel"),
    ],
)
def test_an_architecture_can_not_ask_for_code(fields: dict, said: str):
    for part in ("overrides", "from_file"):
        with pytest.raises(InputError, match=said):
            config_from_dict({"model": {"name": "hf", "architecture": "gpt2", part: fields}})
    values = {"model": {"name": "hf", "architecture": "gpt2", "overrides": {"attn_implementation": "eager"}}}
    assert isinstance(config_from_dict(values).model, HuggingFaceConfig)


def test_a_hostile_architecture_file_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipe, deep, remote = tmp_path / "pipe.json", tmp_path / "deep.json", tmp_path / "remote.json"
    os.mkfifo(pipe)
    deep.write_text("[" * 100_000)
    remote.write_text('{"model_type": "gpt2", "text_config": {"auto_map": {"AutoModel": "somebody/repo--code.Model"}}}')
    for path, said in ((pipe, "is no plain file"), (deep, "is not JSON"), (remote, "auto_map names code")):
        assert main(["train", "--model", f"hf:{path}"]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
