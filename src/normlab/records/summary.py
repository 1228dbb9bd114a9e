"""A record as a table for the terminal; no torch."""

from __future__ import annotations

import math
import os
import re
import shlex

from rich.table import Table

from normlab.config import HuggingFaceConfig, InputError, RunConfig, model_label, run_id
from normlab.machine.terminal import PlainConsole
from normlab.records.environment import program
from normlab.records.progress import SPLITS
from normlab.records.record import RunRecord

__all__ = ["show", "summary_rows"]


def summary_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Name and value of everything worth saying about a run, in the order of the table.

    Raises:
        InputError: the record holds values of other kinds than a run writes.
    """
    try:
        return _rows(record)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the record {record.folder} is damaged ({type(error).__name__}: {error}); move its folder away"
        ) from None


def _rows(record: RunRecord) -> list[tuple[str, str]]:
    config, outcome, environment = record.config, record.outcome(), record.environment()
    results = outcome.results
    data = environment.get("data", {})
    tokens = str(data.get("tokens", config.data.tokens))
    rows = [
        ("run", record.id),
        ("outcome", outcome.state + (f": {outcome.reason}" if outcome.reason else "")),
        ("norm", _norm(config.model.norm, environment.get("sites", {}))),
        ("model", _model(config, results)),
        ("corpus", f"{config.data.corpus}, {tokens} tokens"),
        ("steps", f"{outcome.step} of {config.training.steps} in {outcome.seconds:.0f} s of training"),
    ]
    if "best_step" in results:
        rows.append(("weights", f"of step {results['best_step']} (best validation loss)"))
    for split in SPLITS:
        if f"{split}_loss_nats" in results:
            rows.append((split, _losses(results, split, tokens)))
    if "test_running_loss_nats" in results:
        rows.append(
            (
                "running",
                f"with running averages: test {_losses(results, 'test_running', tokens)}; gap to the statistics of "
                f"{results['recomputed_batches']} training batches, used above: mean "
                f"{float(results['statistics_gap_mean']):.2g} sigma, std {float(results['statistics_gap_std']):.2%}",
            )
        )
    leaks: dict[str, str] = environment.get("leaks", {})
    rows += [("leaks", f"{site}: {leak}") for site, leak in leaks.items()]
    unknown = {split: data.get("splits", {}).get(split, {}).get("unknown_tokens", 0) for split in ("valid", "test")}
    if any(unknown.values()):
        total = sum(data["splits"][split]["tokens"] for split in unknown)
        share = sum(unknown.values()) / max(1, total)
        caution = ": losses are too low, <unk> is cheaper than what it stands for" if share > 0.02 else ""
        counts = f"{unknown['valid']:,} tokens of valid and {unknown['test']:,} of test are <unk> ({share:.1%})"
        rows.append(("unknown", counts + caution))
    if "evaluation" in data and "test_loss_nats" in results:
        rows.append(("evaluated", str(data["evaluation"])))
    if "unigram_test_loss_nats" in results:
        rows.append(("baseline", f"unigram, test: {_losses(results, 'unigram_test', tokens)}"))
    if "majority_test_accuracy" in results:
        rows.append(("baseline", f"majority class, test: accuracy {float(results['majority_test_accuracy']):.2%}"))
    if "tokens_per_second" in results:
        rows.append(
            (
                "speed",
                f"{float(results['tokens_per_second']):,.0f} tokens per second, {environment.get('machine', '?')}",
            )
        )
        rows.append(("peak memory", f"{float(results['peak_memory_mib']):,.0f} MiB"))
    rows.append(("record", str(record.folder)))
    watch = "; make watch" if config.output.wandb != "off" and config.output.runs_dir == "runs" else ""
    rows.append(("look", f"{program('python')} -m normlab show {_shown(record)}{watch}"))
    if outcome.state in ("interrupted", "failed") and record.id == run_id(config):
        rows.append(("go on", f"{program('python')} -m normlab train --resume {_shown(record)}"))
    return rows


def show(record: RunRecord, console: PlainConsole | None = None) -> None:
    """Print the table; in a pipe too, where nothing is cut off."""
    console = console or PlainConsole(width=None if os.isatty(1) else 120)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in summary_rows(record):
        table.add_row(name, value)
    console.print()
    console.print(table)


def _norm(name: str, sites: dict[str, str]) -> str:
    """The norm, with the entries that share a training statistic where that is a choice."""
    pools = {pool for text in sites.values() for pool in re.findall(r"pool=(\w+)", text)}
    others = {site: text.partition("(")[0] for site, text in sites.items()}
    mixed = [f"{site} {other}" for site, other in others.items() if other not in (name, "none") and other]
    if mixed:
        name = f"{name} ({', '.join(mixed)})"
    return f"{name}, training statistics over: {', '.join(sorted(pools))}" if pools else name


def _model(config: RunConfig, results: dict[str, float | int | str]) -> str:
    model = config.model
    if isinstance(model, HuggingFaceConfig):
        sizes = ", ".join(f"{key} {value}" for key, value in model.overrides.items() if isinstance(value, int))
        shape = f"{model.architecture} of transformers" + (f" ({sizes})" if sizes else "")
    else:
        shape = f"{model_label(model)}, {model.layers} x {model.width}"
    parameters = results.get("parameters")
    return shape if parameters is None else f"{shape}, {int(parameters):,} parameters"


def _losses(results: dict[str, float | int | str], split: str, tokens: str) -> str:
    parts = [f"{float(results[f'{split}_loss_nats']):.4f} nats"]
    units = {"bits_per_char": "{:.4f} bits per character"}
    if tokens != "char":  # the perplexity of a character model is in the record, and of no use to the eye
        units["word_perplexity"] = "{:,.1f} word perplexity"
    for name, form in units.items():
        value = results.get(f"{split}_{name}")
        if value is not None and math.isfinite(float(value)):
            parts.append(form.format(float(value)))
    if f"{split}_accuracy" in results:
        parts.append(f"accuracy {float(results[f'{split}_accuracy']):.2%}")
    return ", ".join(parts)


def _shown(record: RunRecord) -> str:
    return shlex.quote(record.id if str(record.folder.parent) == "runs" else str(record.folder))
