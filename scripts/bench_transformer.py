"""What a training step of normlab's Transformer costs with each norm, as a multiple of one with ln: make bench

    python scripts/bench_transformer.py                    the table, and results/bench_transformer.json
    python scripts/bench_transformer.py --norms bn gn      some norms only
    python scripts/bench_transformer.py --write            measure nothing; the page anew from the result

A step is forward and backward (no optimizer) of 4 layers, width 256, batch 32 x 128, a mask over texts of 64 to 128
tokens. `classification` is an encoder with a head on the mean, `language modelling` a decoder with a loss per token;
norms that share statistics over time take the pool that is their default in each. Every measurement is paired with
one of ln right before it, and all take turns: what else the machine does falls on both. A ratio is the median over
pairs, with the quartiles beside it. `cpu` is the same ratio in processor time, which other programs disturb less. The
row `torch products` is the ln model with NORMLAB_PRODUCTS=torch beside the products that are this machine's choice.
The result goes into results/bench_transformer.json, from which the table of docs/speed.md is made; with another
--result the page stays. Ctrl-C writes nothing.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarking import (
    ROOT,
    Conditions,
    Parser,
    Step,
    as_json,
    filled,
    guarded,
    markdown_table,
    paired,
    read_json,
    sentence,
    summary,
    write,
)
from torch.nn import functional

from normlab.config import TransformerConfig, available_norms
from normlab.machine import products
from normlab.models.transformer import TransformerModel

RESULT = ROOT / "results" / "bench_transformer.json"
PAGE = ROOT / "docs" / "speed.md"
TASKS = ("classification", "language modelling")
ROWS, LENGTH, WIDTH, LAYERS, HEADS, VOCABULARY, CLASSES = 32, 128, 256, 4, 4, 64, 2
TORCH_PRODUCTS = "torch products"


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write."""
    others = [norm for norm in available_norms() if norm != "ln"]
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", nargs="+", default=others, choices=others)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--seconds", type=float, default=100, help="of pairs per task; at least 3 pairs are taken")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--result", type=lambda text: Path(text).resolve(), default=RESULT)
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    if options.write and not options.result.exists():
        parser.error(f"--write: there is no {options.result.name} yet")
    torch.set_num_threads(options.threads)
    result = read_json(options.result) if options.write else measured(arguments, options)
    written = {options.result: as_json(result)}
    if options.result == RESULT:
        written[PAGE] = filled(PAGE.read_text(encoding="utf-8"), "transformer", page_block(result)).encode()
    write(written)


def measured(arguments: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """The result; its rows are printed as they come."""
    conditions = Conditions("bench_transformer.py", arguments)
    chosen = products.choice()
    print(f"oneDNN's products: {', '.join(sorted(chosen.onednn)) or 'none'} ({chosen.reason})", flush=True)
    rows = []
    for task in options.tasks:
        for row in rows_of(task, options.norms, options.seconds):
            rows.append(row)
            low, high = row["quartiles"]
            print(
                f"{task:18} {row['variant']:15} {row['ratio']:6.3f} ({low:.3f} to {high:.3f})"
                f"  cpu {row['cpu_ratio']:.3f}  {row['seconds'] * 1e3:6.0f} ms",
                flush=True,
            )
    return {
        "unit": "training step (forward and backward); ratios are multiples of the one with ln",
        "shape": {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "batch": ROWS, "length": LENGTH},
        **conditions.as_dict(),
        "products": {"onednn": sorted(chosen.onednn), "reason": chosen.reason},
        "rows": rows,
    }


def rows_of(task: str, norms: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """One row per norm, and one of ln with torch's products."""
    variants = {norm: step_of(norm, task) for norm in norms}
    variants[TORCH_PRODUCTS] = with_torch_products(step_of("ln", task))

    def say(rounds: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{task}: {rounds} pairs", end="\r", file=sys.stderr, flush=True)

    found = paired(step_of("ln", task), variants, "cpu", seconds, say)
    return [{"task": task, "variant": name} | summary(pairs) for name, pairs in found.items()]


def step_of(norm: str, task: str) -> Step:
    """A training step of a model with this norm at every site that has the model's."""
    torch.manual_seed(0)
    classes = CLASSES if task == "classification" else None
    config = TransformerConfig(norm=norm, width=WIDTH, layers=LAYERS, heads=HEADS)
    model = TransformerModel(config, VOCABULARY, classes=classes, length=LENGTH)
    tokens_BT = torch.randint(VOCABULARY, (ROWS, LENGTH))
    mask_BT = torch.arange(LENGTH) < torch.randint(LENGTH // 2, LENGTH + 1, (ROWS, 1))
    target = tokens_BT[mask_BT] if classes is None else torch.randint(classes, (ROWS,))

    def step() -> None:
        model.zero_grad()
        logits = model(tokens_BT, mask_BT).logits
        functional.cross_entropy(logits[mask_BT] if classes is None else logits, target).backward()

    return step


def with_torch_products(step: Step) -> Step:
    def plain() -> None:
        with products.kept([]):
            step()

    return plain


def page_block(result: Mapping[str, Any]) -> str:
    """The block `transformer` of docs/speed.md."""
    tasks = list(dict.fromkeys(row["task"] for row in result["rows"]))
    cells: dict[str, dict[str, str]] = {}
    for row in result["rows"]:
        low, high = row["quartiles"]
        text = f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"
        cells.setdefault(row["variant"], {})[row["task"]] = f"{text}, cpu {row['cpu_ratio']:.3f}"
    table = [[name, *(of_task.get(task, "–") for task in tasks)] for name, of_task in cells.items()]
    onednn = ", ".join(kind.replace("_", " ") for kind in result["products"]["onednn"]) or "none"
    return (
        f"{markdown_table(['norm', *tasks], table)}\n\n{sentence(result)} Multiples of the step with ln: the median "
        f"over pairs, quartiles in parentheses, and the ratio in processor time. oneDNN's products here: {onednn} "
        f"({result['products']['reason']})."
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
