"""What a training step of `normlab.LSTM` costs, as a multiple of torch.nn.LSTM's: make bench

    python scripts/bench_recurrence.py                 the table, and results/bench_recurrence.json
    python scripts/bench_recurrence.py --norms all     every norm with a fast form

A step is forward and backward of one layer, the input as wide as the hidden state. Every measurement is paired with one
of torch.nn.LSTM right before it, and all variants take turns: what else the machine does then falls on both. A ratio is
the median over pairs, with the quartiles beside it. `cpu` is the same ratio in processor time, which other programs
disturb less; with several threads it counts their waiting too.

Shape suffixes: B batch, T time, I input features.
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
from torch import nn

import normlab
from normlab.records.environment import collect_environment
from normlab.recurrence import kernels

RESULT = Path(__file__).resolve().parent.parent / "results" / "bench_recurrence.json"
SHAPES = ((32, 100, 256), (64, 100, 512), (32, 35, 650), (20, 100, 1000))
NORMS = ("none", "ln", "bn_step")
ALL_NORMS = ("none", "ln", "rms", "gn", "bn", "bn_step")
BACKENDS = ("fast", "fast without compiler", "reference")
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=(*ALL_NORMS, "all"))
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, type=shape, help="B,T,H such as 32,100,256")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    norms = ALL_NORMS if "all" in options.norms else options.norms
    load_before = os.getloadavg()[0]
    print(f"{options.threads} threads, load average {load_before:.1f}; ratios to torch.nn.LSTM: median (quartiles)")
    rows = [row for each in options.shapes for row in measured(each, norms, options.backends, options.rounds)]
    environment = collect_environment()
    result = {
        "unit": "training step (forward and backward), multiple of torch.nn.LSTM's",
        "threads": options.threads,
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        "environment": {key: environment[key] for key in ("machine", "cpu", "cores", "platform", "versions", "git")},
        "compiler": kernels.compiler() is not None,
        "rows": rows,
    }
    options.result.parent.mkdir(parents=True, exist_ok=True)
    options.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def shape(text: str) -> tuple[int, ...]:
    """B, T and H from "B,T,H"."""
    values = tuple(int(part) for part in text.split(","))
    if len(values) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,T,H")
    return values


def measured(size: tuple[int, int, int], norms: Any, backends: Any, rounds: int) -> list[dict[str, Any]]:
    """The rows of one shape, printed as they come."""
    batch, length, hidden = size
    x_TBI = torch.randn(length, batch, hidden, requires_grad=True)
    base = step_of(nn.LSTM(hidden, hidden), x_TBI)
    variants = {(norm, backend): variant(norm, backend, hidden, x_TBI) for norm in norms for backend in backends}
    # The first step of each builds kernels and warms caches; the second grows the heap.
    for step in (base, *variants.values()) * 2:
        step()
    pairs: dict[Any, list[tuple[float, ...]]] = {key: [] for key in variants}
    for _ in range(rounds):
        for key, step in variants.items():
            pairs[key].append((*timed(base), *timed(step)))
    rows = []
    for (norm, backend), found in pairs.items():
        wall = [own / of_base for of_base, _, own, _ in found]
        low, middle, high = statistics.quantiles(wall, n=4) if len(wall) > 1 else wall * 3
        row = {
            "batch": batch, "length": length, "hidden": hidden, "norm": norm, "backend": backend,
            "ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)],
            "cpu_ratio": round(statistics.median(own / of_base for _, of_base, _, own in found), 3),
            "seconds": round(statistics.median(own for _, _, own, _ in found), 4),
            "base_seconds": round(statistics.median(of_base for of_base, *_ in found), 4),
            "pairs": rounds,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{batch:4} {length:4} {hidden:5}  {norm:8} {backend:22} {middle:5.2f} ({low:.2f} to {high:.2f})"
            f"  cpu {row['cpu_ratio']:.2f}  {row['seconds'] * 1e3:7.0f} ms",
            flush=True,
        )
    return rows


def variant(norm: str, backend: str, hidden: int, x_TBI: torch.Tensor) -> Step:
    """A training step of normlab.LSTM with this norm at every site."""
    kind = "reference" if backend == "reference" else "fast"
    step = step_of(normlab.LSTM(hidden, hidden, norm=norm, backend=kind), x_TBI)
    if backend != "fast without compiler":
        return step

    def without_compiler() -> None:
        with kernels.left_out("measured without"):
            step()

    return without_compiler


def step_of(lstm: nn.LSTM, x_TBI: torch.Tensor) -> Step:
    def step() -> None:
        lstm.zero_grad()
        x_TBI.grad = None
        lstm(x_TBI)[0].sum().backward()

    return step


def timed(step: Step) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    main()
