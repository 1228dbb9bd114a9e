"""Train the shipped configs, one run after the other, and put what they reach into results/ and the README.

    python scripts/shipped_configs.py            train what is missing, write results/configs.csv and the README's table
    python scripts/shipped_configs.py --dry-run  print the commands

A run that is finished is not trained again, one that was interrupted goes on: the script can be stopped and started at
any time. `--only WORD` takes the commands that contain the word. A committed row stays until there is a record of its
run here.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import subprocess
import sys
from pathlib import Path

from normlab.__main__ import parse_run
from normlab.config import model_label, run_id
from normlab.records.record import RunRecord, record_ids

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "results" / "configs.csv"
README = ROOT / "README.md"
BEGIN, END = "<!-- configs: begin -->", "<!-- configs: end -->"

NORMS = ("none", "ln", "bn_step")
COMMANDS = [
    *(
        f"--config configs/char_{model}.yaml --norm {norm} --data {corpus} --seed 1"
        for corpus in ("pydocs", "ptb_char")
        for model in ("lstm", "transformer")
        for norm in NORMS
    ),
    *(
        f"--config configs/classify_{model}.yaml --norm {norm} --seed {seed}"
        for seed in (1, 2, 3)
        for model in ("lstm", "transformer")
        for norm in NORMS
    ),
    "--config configs/smoke.yaml",
    "--config configs/word_lstm.yaml",
    "--config configs/bpe_transformer.yaml",
    "--config configs/hf_gpt2.yaml",
]
COLUMNS: tuple[str, ...] = (
    "command",
    "norm", "model", "corpus", "seed", "outcome", "steps", "valid_loss_nats", "test_loss_nats",
    "test_bits_per_char", "test_word_perplexity", "test_accuracy", "test_running_loss_nats", "baseline",
    "tokens_per_second", "seconds",
    "machine", "threads", "run", "commit",
)  # fmt: skip


def row(command: str) -> dict[str, object] | None:
    """One line of the table, from the record of the run; None if there is no record."""
    config = parse_run(shlex.split(command))
    if run_id(config) not in record_ids(config.output.runs_dir):
        return None
    record = RunRecord.open(run_id(config), config.output.runs_dir)
    outcome, environment = record.outcome(), record.environment()
    if outcome.state not in ("finished", "diverged"):
        return None
    results = outcome.results
    baseline = "majority_test_accuracy"
    if baseline not in results:
        words = config.data.tokens == "word"
        baseline = "unigram_test_word_perplexity" if words else "unigram_test_bits_per_char"
    values = {
        **results,
        "command": f"python -m normlab train {command}",
        "norm": config.model.norm,
        "model": model_label(config.model),
        "corpus": config.data.corpus,
        "seed": config.seed,
        "outcome": outcome.state,
        "steps": outcome.step,
        "baseline": results[baseline],
        "seconds": outcome.seconds,
        "machine": environment["machine"],
        "threads": environment["threads"],
        "run": record.id,
        "commit": environment["git"]["commit"],
    }
    return {name: _short(values.get(name, "")) for name in COLUMNS}


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def markdown(rows: list[dict[str, str]]) -> str:
    """The table of the README."""
    lines = [
        "| config | corpus | norm | seed | steps | test | plain baseline | training seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        config = Path(shlex.split(r["command"])[5]).stem
        if r["outcome"] != "finished":
            test = r["outcome"]
        elif r["test_accuracy"]:
            test = f"{float(r['test_accuracy']):.1%} right"
        elif config.startswith("word"):
            test = f"{float(r['test_word_perplexity']):.0f} word perplexity"
        else:
            test = f"{float(r['test_bits_per_char']):.3f} bits per character"
        base = float(r["baseline"])
        if r["test_accuracy"]:
            beside = f"{base:.1%} (majority)"
        else:
            beside = f"{base:.0f} (unigram)" if config.startswith("word") else f"{base:.3f} (unigram)"
        cells = (config, r["corpus"], r["norm"], r["seed"], r["steps"], test, beside, f"{float(r['seconds']):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table() -> None:
    """results/configs.csv from the records, then the README's table from results/configs.csv."""
    committed = {kept["command"]: kept for kept in read_table()} if TABLE.exists() else {}
    found = [row(command) or committed.get(f"python -m normlab train {command}") for command in COMMANDS]
    rows = [values for values in found if values is not None]
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    text = README.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{before}{BEGIN}\n{markdown(read_table())}\n{END}{after}", encoding="utf-8")
    print(f"{len(rows)} of {len(COMMANDS)} runs are in {TABLE.relative_to(ROOT)} and in the README")


def read_table() -> list[dict[str, str]]:
    """The committed rows."""
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    parser.add_argument("--only", default="", help="take the commands that contain this")
    options = parser.parse_args()
    os.chdir(ROOT)
    commands = [command for command in COMMANDS if options.only in command]
    if options.dry_run:
        print("\n".join(f"python -m normlab train {command}" for command in commands))
        return 0
    failed = []
    for number, command in enumerate(commands, 1):
        print(f"[{number}/{len(commands)}] {command}", flush=True)
        code = subprocess.run([sys.executable, "-m", "normlab", "train", *shlex.split(command)]).returncode
        if code == 130:
            return code
        if code:
            failed.append(command)
    write_table()
    for command in failed:
        print(f"failed: {command}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
