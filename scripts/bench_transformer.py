"""What a training step of normlab's Transformer costs with each norm, as a multiple of one with ln: make bench

    python scripts/bench_transformer.py                    the table, and results/bench_transformer.json
    python scripts/bench_transformer.py --norms bn gn      some norms only

A step is forward and backward (no optimizer) of 4 layers, width 256, batch 32 x 128, a mask over texts of 64 to 128
tokens. `classification` is an encoder with a head on the mean, `language_modelling` a decoder with a loss per token;
norms that share statistics over time take the pool that is their default in each. Every measurement is paired with
one of ln right before it, and all take turns: what else the machine does falls on both. A ratio is the median over
pairs, with the quartiles beside it. `cpu` is the same ratio in processor time, which other programs disturb less. The
row `torch products` is the ln model with NORMLAB_PRODUCTS=torch beside the products that are this machine's choice.

Shape suffixes: B batch, T time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from normlab.config import TransformerConfig, available_norms
from normlab.machine import products
from normlab.models.transformer import TransformerModel
from normlab.records.environment import collect_environment

RESULT = Path(__file__).resolve().parent.parent / "results" / "bench_transformer.json"
TASKS = ("classification", "language_modelling")
ROWS, LENGTH, WIDTH, LAYERS, HEADS, VOCABULARY, CLASSES = 32, 128, 256, 4, 4, 64, 2
TORCH_PRODUCTS = "torch products"
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [norm for norm in available_norms() if norm != "ln"]
    parser.add_argument("--norms", nargs="+", default=others, choices=others)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    load_before = os.getloadavg()[0]
    chosen = products.choice()
    print(f"{options.threads} threads, load average {load_before:.1f}; ratios to ln: median (quartiles)")
    print(f"oneDNN's products: {', '.join(sorted(chosen.onednn)) or 'none'} ({chosen.reason})")
    rows = [row for task in options.tasks for row in measured(task, options.norms, options.rounds)]
    environment = collect_environment()
    result = {
        "unit": "training step (forward and backward), multiple of the one with ln",
        "shape": {"layers": LAYERS, "width": WIDTH, "heads": HEADS, "batch": ROWS, "length": LENGTH},
        "threads": options.threads,
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        "environment": {key: environment[key] for key in ("machine", "cpu", "cores", "platform", "versions", "git")},
        "products": {"onednn": sorted(chosen.onednn), "reason": chosen.reason},
        "rows": rows,
    }
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measured(task: str, norms: list[str], rounds: int) -> list[dict[str, Any]]:
    """The rows of one task, printed as they come."""
    base = step_of("ln", task)
    variants = {norm: step_of(norm, task) for norm in norms}
    variants[TORCH_PRODUCTS] = with_torch_products(step_of("ln", task))
    # The first step of each warms caches; the second grows the heap.
    for step in (base, *variants.values()) * 2:
        step()
    pairs: dict[str, list[tuple[float, ...]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            pairs[name].append((*timed(base), *timed(step)))
    rows = []
    for name, found in pairs.items():
        wall = [own / of_base for of_base, _, own, _ in found]
        low, middle, high = statistics.quantiles(wall, n=4) if len(wall) > 1 else wall * 3
        row = {
            "task": task, "variant": name, "ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)],
            "cpu_ratio": round(statistics.median(own / of_base for _, of_base, _, own in found), 3),
            "seconds": round(statistics.median(own for _, _, own, _ in found), 4),
            "base_seconds": round(statistics.median(of_base for of_base, *_ in found), 4),
            "pairs": rounds,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{task:18} {name:15} {middle:6.3f} ({low:.3f} to {high:.3f})  cpu {row['cpu_ratio']:.3f}"
            f"  {row['seconds'] * 1e3:6.0f} ms",
            flush=True,
        )
    return rows


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


def timed(step: Step) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    main()
