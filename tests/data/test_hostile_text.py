"""Corpora that nobody would give on purpose: one line says what is wrong, and nothing hangs or is written."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from normlab.__main__ import main
from normlab.config import DataConfig, InputError, RunConfig, run_id
from normlab.data.corpora import load_corpus, require_corpus
from normlab.data.files import read_text
from normlab.data.tokens import Tokenizer

NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "~nobody_of_that_name/text.txt",
    "nul\0.txt",
    "line\nend.txt",
    "\x1b[31mred.txt",
    "a" * 300 + ".txt",
    "a/" * 3000 + "b.txt",
    "half\udcff.txt",
    "..",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_that_is_no_text_gets_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["train", "--data.corpus", name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not set(error) & {"\x1b", "\0", "\udcff"}
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


@pytest.mark.parametrize("name", [*NAMES, "x" * 1000, "…/ünï.txt", "a b'\"$(c).txt", "."])
def test_no_name_leads_out_of_the_folder_of_runs(name: str) -> None:
    id_ = run_id(RunConfig(data=DataConfig(corpus=name)))
    assert id_.replace("_", "").replace("-", "").isalnum()
    assert id_.isascii()
    assert len(id_) < 100


def test_odd_names_that_are_files_are_read(tiny_text: Path, tmp_path: Path) -> None:
    for name in ("a b'\"$(c).txt", "-n.txt", "ünï.txt", "[bold]x.txt", "nl\n.txt", os.fsdecode(b"\xff.txt")):
        path = tmp_path / name
        shutil.copy(tiny_text, path)
        assert load_corpus(DataConfig(corpus=str(path))).splits["train"].texts


def test_pipes_and_devices_are_not_read(tmp_path: Path, tiny_text: Path) -> None:
    pipe, device = tmp_path / "pipe.txt", tmp_path / "device.txt"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    for path in (pipe, device):
        with pytest.raises(InputError, match="is a pipe or a device"):
            require_corpus(DataConfig(corpus=str(path)))
        with pytest.raises(InputError, match="is not a plain file"):
            read_text(path)
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    with pytest.raises(InputError, match="holds no \\.txt file"):
        require_corpus(DataConfig(corpus=str(tmp_path)))
    shutil.copy(tiny_text, tmp_path / "real.txt")
    assert load_corpus(DataConfig(corpus=str(tmp_path))).splits["train"].texts


def test_text_that_does_not_fit_in_memory_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(data: bytes) -> bytes:
        raise MemoryError

    monkeypatch.setattr(gzip, "decompress", full)
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="does not fit in memory"):
        read_text(path)


def test_a_damaged_copy_of_a_named_corpus_gets_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMLAB_DATA", str(tmp_path))
    (tmp_path / "sst2").mkdir()
    for name in ("train", "dev", "test"):
        (tmp_path / "sst2" / f"{name}.tsv").write_text("a text\twith no number\n")
    with pytest.raises(InputError, match="is not in the published layout") as refused:
        load_corpus(DataConfig(corpus="sst2"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "stored",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"kind": "char"}',
        '{"kind": "os.system", "symbols": ["<unk>"], "lines": false, "model": null}',
        '{"kind": "char", "symbols": [["a"], "<unk>"], "lines": false, "model": null}',
        '{"kind": "char", "symbols": ["two", "<unk>"], "lines": false, "model": null}',
        '{"kind": "bpe", "symbols": ["a"], "lines": false, "model": "{}"}',
        '{"kind": "bpe", "symbols": ["a"], "lines": false, "model": null}',
    ],
)
def test_a_hostile_tokenizer_gets_one_line(stored: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(stored)
    with pytest.raises(InputError, match="is not a tokenizer that normlab saved"):
        Tokenizer.load(path)


def test_the_hub_is_asked_for_data_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`datasets` 4 and later run no loading script, and nobody asks them to."""
    import datasets

    from normlab.data.corpora_hub import HUB, read_hub

    asked: list[tuple[tuple, dict]] = []

    def refuse(*given: object, **named: object) -> None:
        asked.append((given, named))
        raise ValueError("none today")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    for name in HUB:
        with pytest.raises(InputError, match="cannot get"):
            read_hub(name, "a hint")
    assert {option for _, named in asked for option in named} == {"revision"}
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')\n")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        datasets.load_dataset(str(script))
    assert not (tmp_path / "it_ran").exists()


def test_a_run_on_an_oddly_named_text_stays_in_its_folder(
    tiny_run: Callable[..., RunConfig], tiny_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from normlab.training.run import train

    text = tmp_path / "..[bold]\x1b[31m; touch x\n.txt"
    shutil.copy(tiny_text, text)
    record = train(tiny_run(data__corpus=str(text), training__steps=2, training__valid_every=2))
    capsys.readouterr()
    assert main(["show", str(record.folder)]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert r"[bold]\x1b[31m; touch x" in shown.replace("\n", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([text.name, "runs"])
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [record.id]
