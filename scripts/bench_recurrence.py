"""What a training step of `normlab.LSTM` costs, beside torch.nn.LSTM and LSTMs as they are usually written: make bench

    python scripts/bench_recurrence.py                   all four parts below
    python scripts/bench_recurrence.py --table           ratios to torch.nn.LSTM, by shape, norm and backend
    python scripts/bench_recurrence.py --sweep           seconds against length and against hidden size
    python scripts/bench_recurrence.py --profile         where the time of a normalized step goes, on a CPU
    python scripts/bench_recurrence.py --cells           normlab.GRU and RNN beside torch's and the plain loop
    python scripts/bench_recurrence.py --backends all    also a cell compiled by torch.compile (seconds to minutes)
    python scripts/bench_recurrence.py --norms all       every norm with a fast form
    python scripts/bench_recurrence.py --write           measure nothing; pages and figure anew from the result

A part that was measured replaces that part of results/bench_recurrence.json, from which the table of README.md, those
of docs/speed.md and docs/bench_recurrence.png are made. With another --result the figure comes beside that file
and the pages stay. Each part is written once it is measured; Ctrl-C ends the one under way and writes none of it.

A step is forward and backward of one layer, the input as wide as the hidden state. Every measurement is paired with one
of torch's own layer right before it, and all variants take turns: what else the machine does then falls on both. A
ratio is the median over pairs, with the quartiles beside it. `cpu` is the same ratio in processor time, which other
programs disturb less; with several threads it counts their waiting too.

Shape suffixes: B batch, T time, I input features.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib.style
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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter
from norms_table import BLUE, FAINT, ORANGE, TEXT, WHITE
from peer_lstms import NORMS as PEER_NORMS
from peer_lstms import peer
from recurrence_profile import PARTS, profile
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import nn

import normlab
from normlab.config import InputError
from normlab.recurrence import graphs, kernels

RESULT = ROOT / "results" / "bench_recurrence.json"
FIGURE = ROOT / "docs" / "bench_recurrence.png"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "speed.md"
PARTS_OF_RESULT = ("table", "sweep", "profile", "cells")

SHAPES = ((32, 100, 256), (64, 100, 512), (32, 35, 650), (20, 100, 1000))
SWEEP_BATCH, SWEEP_HIDDEN, SWEEP_LENGTH = 32, 256, 50
LENGTHS = (10, 25, 50, 100, 200, 400, 800)
HIDDENS = (64, 128, 256, 512, 1024)
SWEEP_SECONDS = 2.0  # of pairs per size: the small ones get more than the fewest
SWEPT = (("ln", "fast"), ("bn_step", "fast"), ("ln", "eager"))
CELLS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any]]] = {
    "lstm": (nn.LSTM, normlab.LSTM),
    "gru": (nn.GRU, normlab.GRU),
    "tanh rnn": (nn.RNN, normlab.RNN),
}
CELL_SHAPES = ((32, 100, 256), (64, 100, 512), (32, 784, 100))  # the last: an image of MNIST, pixel by pixel
NORMS = ("none", "ln", "bn_step")
ALL_NORMS = ("none", "ln", "rms", "gn", "bn", "bn_step")
BACKENDS = {
    "fast": "normlab",
    "fast-without-compiler": "without a C compiler",
    "eager": "eager loop",
    "jit": "torch.jit loop",
    "compiled": "torch.compile cell",
    "torch-bf16": "torch's own in bfloat16",
}
OTHERS = ("jit", "compiled", "torch-bf16")
"""Not this project's: one that fails is left out."""
UNASKED = ("fast", "fast-without-compiler", "eager", "jit", "torch-bf16")
PROFILE_ROUNDS = 3
NO_COMPILER = "the bench leaves the kernels out"

Size = tuple[int, int, int]
Row = dict[str, Any]
Say = Callable[[str], None]


def main(arguments: Sequence[str]) -> None:
    """Measure the parts that are asked for, print and write them.

    Raises:
        InputError: flags that do not go together.
    """
    options = parsed(arguments)
    torch.set_num_threads(options.threads)
    if "cuda" in options.devices:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.tf32
    result: dict[str, Any] = {"unit": "training step (forward and backward); ratios: of torch's own layer's"}
    result |= earlier(options.result)
    parts = [] if options.write else options.parts
    missing = [part for part in PARTS_OF_RESULT if part not in result and part not in parts]
    if options.result == RESULT and missing:
        raise InputError(f"{RESULT.name} has no {missing[0]} yet; measure it too, with --{missing[0]}")
    console = Console()
    if not console.is_terminal:
        console.width = 160
    # No thread of its own that redraws: it would run beside what is measured.
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        for part in parts:
            task = progress.add_task(part, total=None)

            def say(text: str, part: str = part, task: Any = task) -> None:
                progress.update(task, description=f"{part}: {text}", refresh=True)

            gpus = [torch.cuda.get_device_name()] if "cuda" in options.devices else []
            conditions = Conditions("bench_recurrence.py", arguments, gpus)
            rows = []
            for row in {"table": table, "sweep": sweep, "profile": profiles, "cells": cells}[part](options, say):
                rows.append(row)
                console.print(line(row), highlight=False, soft_wrap=True)
            if not rows:
                raise InputError(
                    f"{part}: none of {', '.join(options.backends)} is there or works; name other --backends"
                )
            precision = "fp32" if part == "profile" else options.precision
            facts = {"precision": precision, "tf32": options.tf32, "compiler": kernels.compiler() is not None}
            result[part] = {**conditions.as_dict(), **facts, "rows": rows}
            # Now: a later part may not end.
            write(files(result, options.result))
            progress.remove_task(task)
    show(console, result)
    if options.write:
        write(files(result, options.result))


def earlier(path: Path) -> dict[str, Any]:
    """The parts of an earlier result.

    Raises:
        InputError: it is none of this bench as it is now.
    """
    try:
        found = {part: value for part, value in read_json(path).items() if part in PARTS_OF_RESULT}
        for part, value in found.items():
            BLOCKS[part][2](value) if part in BLOCKS else figure(value)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(
            f"{path.name} is no result of this bench as it is now ({type(error).__name__}: {error}); move it away, or "
            "name another --result"
        ) from None
    return found


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; `parts` in the order of PARTS_OF_RESULT, all of them if none is named."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in (*PARTS_OF_RESULT, "write"):
        parser.add_argument(f"--{part}", action="store_true")
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--devices", nargs="+", default=present, choices=("cpu", "cuda"))
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=(*ALL_NORMS, "all"))
    parser.add_argument("--backends", nargs="+", default=UNASKED, choices=(*BACKENDS, "all"))
    parser.add_argument("--shapes", nargs="+", default=SHAPES, type=size, help="B,T,H such as 32,100,256")
    parser.add_argument("--seconds", type=float, default=40, help="of pairs per shape of the table; at least 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="bf16: under torch.autocast")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 in all products on a GPU, torch.nn.LSTM's too")
    parser.add_argument("--result", type=lambda text: Path(text).resolve(), default=RESULT)
    options = parser.parse_args(arguments)
    options.parts = [part for part in PARTS_OF_RESULT if getattr(options, part)] or list(PARTS_OF_RESULT)
    options.norms = ALL_NORMS if "all" in options.norms else options.norms
    options.backends = tuple(BACKENDS) if "all" in options.backends else options.backends
    if options.threads < 1:
        parser.error("--threads must be at least 1")
    if "cuda" in options.devices and not torch.cuda.is_available():
        parser.error("--devices cuda: torch sees no GPU")
    if options.tf32 and "cuda" not in options.devices:
        parser.error("--tf32 is of a GPU; add --devices cuda")
    if options.write and any(getattr(options, part) for part in PARTS_OF_RESULT):
        parser.error("--write measures nothing; leave out the other parts")
    if options.write and not options.result.exists():
        parser.error(f"--write: there is no {options.result.name} yet")
    return options


def size(text: str) -> Size:
    """B, T and H from "B,T,H"."""
    try:
        batch, length, hidden = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,T,H") from None
    if min(batch, length, hidden) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: B, T and H must be at least 1")
    return batch, length, hidden


# Measuring.


def table(options: argparse.Namespace, say: Say) -> Iterator[Row]:
    """Every norm and backend at every shape."""
    for device in options.devices:
        pairs = [
            (norm, backend)
            for norm in options.norms
            for backend in options.backends
            if exists(norm, backend, device, options.precision)
        ]
        for each in options.shapes:
            yield from measured(each, pairs, device, options.precision, options.seconds, say)


def sweep(options: argparse.Namespace, say: Say) -> Iterator[Row]:
    """`SWEPT` against length and against hidden size; few pairs each, as there are many sizes."""
    seconds = min(options.seconds, SWEEP_SECONDS)
    by_length = [(SWEEP_BATCH, length, SWEEP_HIDDEN) for length in LENGTHS]
    by_hidden = [(SWEEP_BATCH, SWEEP_LENGTH, hidden) for hidden in HIDDENS]
    for device in options.devices:
        for each in dict.fromkeys(by_length + by_hidden):
            yield from measured(each, SWEPT, device, options.precision, seconds, say)


def cells(options: argparse.Namespace, say: Say) -> Iterator[Row]:
    """The other recurrences, beside torch's own and the plain loop."""
    for device in options.devices:
        pairs = [(norm, backend) for norm in options.norms for backend in ("fast", "eager") if norm != "none"]
        for each in CELL_SHAPES:
            for cell in ("gru", "tanh rnn"):
                yield from measured(each, pairs, device, options.precision, options.seconds, say, cell)


def profiles(options: argparse.Namespace, say: Say) -> Iterator[Row]:
    """Where the time goes, of every norm but none; on a CPU, whose calls return when they are done."""
    for batch, length, hidden in options.shapes:
        for norm in options.norms:
            if norm == "none":
                continue
            say(f"{batch} x {length} x {hidden}, {norm}")
            x_TBI = torch.randn(length, batch, hidden, requires_grad=True)
            lstm = normlab.LSTM(hidden, hidden, norm=norm, backend="fast")
            row = {"device": "cpu", "cell": "lstm", "batch": batch, "length": length, "hidden": hidden, "norm": norm}
            row["engine"] = ": ".join(lstm.backend_choice("cpu"))
            yield row | profile(step_of(lstm, x_TBI, "fp32"), PROFILE_ROUNDS)


def exists(norm: str, backend: str, device: str, precision: str) -> bool:
    """Whether there is such a variant; a bare LSTM has no peers but torch's own."""
    match backend:
        case "fast-without-compiler":
            return norm != "none" and device == "cpu" and kernels.compiler() is not None
        case "jit" | "compiled":
            return norm in PEER_NORMS
        case "eager":
            return norm != "none"
        case "torch-bf16":
            return norm == "none" and in_half(device, precision)
    return True


def in_half(device: str, precision: str) -> bool:
    """Whether torch's own layer is measured in float16: its autocast to bfloat16 is one to that on a GPU, and casts the
    weights anew each time."""
    return device == "cuda" and precision == "bf16"


def measured(
    shape: Size,
    pairs: Sequence[tuple[str, str]],
    device: str,
    precision: str,
    seconds: float,
    say: Say,
    cell: str = "lstm",
) -> Iterator[Row]:
    """The rows of one shape, one per norm and backend; `graphs` of a row counts the CUDA graphs held at the end."""
    graphs.release()  # those of the shape before, which would leave no room
    batch, length, hidden = shape
    where = f"{device} {cell} {batch} x {length} x {hidden}"
    say(f"{where}, warming up")
    torch.manual_seed(0)
    x_TBI = torch.randn(length, batch, hidden, device=device, requires_grad=True)
    base = torchs_own(cell, x_TBI, precision, torch.float16 if in_half(device, precision) else None)
    variants = {pair: made for pair in pairs if (made := working_variant(*pair, x_TBI, precision, cell))}
    steps = {pair: step for pair, (step, _) in variants.items()}
    found = paired(base, steps, device, seconds, lambda rounds: say(f"{where}, {rounds} pairs"))
    for (norm, backend), timings in found.items():
        row = {"device": device, "cell": cell, "batch": batch, "length": length, "hidden": hidden, "norm": norm}
        row |= {"backend": backend, "engine": variants[norm, backend][1]} | summary(timings)
        row |= {"base_precision": "fp16"} if in_half(device, precision) else {}
        yield row if device == "cpu" else row | {"graphs": graphs.held()}


def working_variant(norm: str, backend: str, x_TBI: torch.Tensor, precision: str, cell: str) -> tuple[Step, str] | None:
    """As `variant`; None for one of `OTHERS` that can not be built here, or takes no step, which is said."""
    if backend not in OTHERS:
        return variant(norm, backend, x_TBI, precision, cell)
    try:
        made = variant(norm, backend, x_TBI, precision, cell)
        made[0]()
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        print(f"{norm}: {BACKENDS[backend]} is left out, it fails: {reason}", file=sys.stderr)
        return None
    return made


def variant(norm: str, backend: str, x_TBI: torch.Tensor, precision: str, cell: str) -> tuple[Step, str]:
    """A training step of a recurrence with this norm at every site, and what does the work."""
    (length, _, hidden), device = x_TBI.shape, x_TBI.device
    if backend == "torch-bf16":
        return torchs_own(cell, x_TBI, precision, torch.bfloat16), "torch"
    kind = "reference" if backend == "eager" else "fast"
    lstm = CELLS[cell][1](hidden, hidden, norm=norm, backend=kind, device=device)
    if backend == "jit":
        return step_of(peer(lstm, norm, length, "jit"), x_TBI, precision), "torch.jit.script"
    if backend == "compiled":
        return step_of(peer(lstm, norm, length, "compile"), x_TBI, precision), "torch.compile"
    step = step_of(lstm, x_TBI, precision)
    if backend != "fast-without-compiler":
        with autocast(device.type, precision):
            choice = lstm.backend_choice(device.type)
        if device.type == "cuda" and choice[0] != kind:
            raise InputError(f"{norm} on a GPU is the {choice[0]} here ({choice[1]}); leave it out, or --devices cpu")
        return step, ": ".join(choice)

    def without_kernels() -> None:
        with kernels.left_out(NO_COMPILER):
            step()

    with kernels.left_out(NO_COMPILER):
        return without_kernels, ": ".join(lstm.backend_choice(device.type))


def torchs_own(cell: str, x_TBI: torch.Tensor, precision: str, dtype: torch.dtype | None) -> Step:
    """A training step of torch's own layer, all in `dtype` if that is given."""
    layer = CELLS[cell][0](x_TBI.shape[2], x_TBI.shape[2], device=x_TBI.device, dtype=dtype)
    if dtype is None:
        return step_of(layer, x_TBI, precision)
    return step_of(layer, x_TBI.detach().to(dtype).requires_grad_(), "fp32")


def autocast(device: str, precision: str) -> torch.autocast:
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def step_of(lstm: nn.Module, x_TBI: torch.Tensor, precision: str) -> Step:
    """A training step: forward, backward, gradients of weights and input made anew."""

    def step() -> None:
        lstm.zero_grad()
        x_TBI.grad = None
        with autocast(x_TBI.device.type, precision):
            out_TBH = lstm(x_TBI)[0]
        out_TBH.float().sum().backward()

    return step


# Telling.


def shape_of(row: Row) -> str:
    return f"{row['batch']} x {row['length']} x {row['hidden']}"


def line(row: Row) -> str:
    """A row while the others are still to come."""
    start = f"{row['device']:4} {row['cell']:8} {shape_of(row):16} {row['norm']:8}"
    if "parts" in row:
        return f"{start} {'; '.join(f'{name} {text}' for name, text in zip(PARTS, shares(row), strict=True))}"
    low, high = row["quartiles"]
    held = f"  {row['graphs']} graphs" if "graphs" in row else ""
    return (
        f"{start} {row['backend']:22} {row['ratio']:5.2f} ({low:.2f} to {high:.2f})  cpu {row['cpu_ratio']:.2f}"
        f"  {milliseconds(row['seconds']):>8}  {row['pairs']} pairs  {row['engine']}{held}"
    )


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.2g} ms"


def shares(row: Row) -> list[str]:
    """The parts of a profiled step in percent of it."""
    return [f"{row['parts'][name] / row['seconds_with_clocks']:.0%}" for name in PARTS]


def ratios(part: Mapping[str, Any], quartiles: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of ratios: one row per device, cell, shape and norm, one column per backend."""
    shown = [backend for backend in BACKENDS if any(row["backend"] == backend for row in part["rows"])]
    together: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in part["rows"]:
        together.setdefault((row["device"], row["cell"], shape_of(row), row["norm"]), {})[row["backend"]] = row
    lines = []
    for key, of_backend in together.items():
        base = milliseconds(median(row["base_seconds"] for row in of_backend.values()))
        ratios = ["–" if row is None else _ratio(row, quartiles) for row in map(of_backend.get, shown)]
        lines.append([*key, base, *ratios])
    header = ["device", "cell", "B x T x H", "norm", "torch's own", *(BACKENDS[backend] for backend in shown)]
    return header, lines


def _ratio(row: Row, quartiles: bool) -> str:
    low, high = row["quartiles"]
    return f"{row['ratio']:.2f}" + f" ({low:.2f} to {high:.2f})" * quartiles


def parts_of_time(part: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of where the time goes."""
    lines = [[shape_of(row), row["norm"], milliseconds(row["seconds"]), *shares(row)] for row in part["rows"]]
    return ["B x T x H", "norm", "step", *PARTS], lines


def show(console: Console, result: Mapping[str, Any]) -> None:
    """The tables, for a terminal: without quartiles, which are in the lines before."""
    of_ratios = functools.partial(ratios, quartiles=False)
    tables = {"table": of_ratios, "profile": parts_of_time, "cells": of_ratios}
    for name, make in tables.items():
        if name in result:
            header, rows = make(result[name])
            printed = Table(*header, box=SIMPLE, padding=0)
            for row in rows:
                printed.add_row(*row)
            console.print(printed, sentence(result[name]), highlight=False)


def ratios_block(part: Mapping[str, Any]) -> str:
    """The block `bench` of the README, and `cells` of docs/speed.md."""
    precision = f", {part['precision']}" + ", TF32 allowed" * part["tf32"]
    precision += ", torch's own in fp16" * any("base_precision" in row for row in part["rows"])
    return (
        f"{markdown_table(*ratios(part, quartiles=True))}\n\n{sentence(part)} Training steps{precision}: the median "
        "over pairs with torch's own layer, quartiles in parentheses."
    )


def profile_block(part: Mapping[str, Any]) -> str:
    """The block `profile` of docs/speed.md."""
    return f"{markdown_table(*parts_of_time(part))}\n\n{sentence(part)}"


def files(result: Mapping[str, Any], path: Path) -> dict[Path, bytes]:
    """All that is made of a result, by path: with the committed one the pages too, as far as its parts are there."""
    made = {path: as_json(result)}
    if "sweep" in result:
        made[FIGURE if path == RESULT else path.with_suffix(".png")] = figure(result["sweep"])
    if path == RESULT:
        for part, (page, name, block) in BLOCKS.items():
            if part in result:
                text = made[page] if page in made else page.read_bytes()
                made[page] = filled(text.decode(), name, block(result[part])).encode()
    return made


BLOCKS = {
    "table": (README, "bench", ratios_block),
    "profile": (PAGE, "profile", profile_block),
    "cells": (PAGE, "cells", ratios_block),
}
"""Where a part of the committed result stands: the page, and its block there."""


# The figure.

# Colours, dashes and markers all differ: it reads in grey too.
CURVES = {
    ("none", "base"): ("torch.nn.LSTM", TEXT, "-", "o"),
    ("ln", "fast"): ("normlab.LSTM, ln", BLUE, "-", "s"),
    ("bn_step", "fast"): ("normlab.LSTM, bn_step", ORANGE, "-", "^"),
    ("ln", "eager"): ("eager loop, ln", FAINT, "--", "D"),
}


def figure(part: Mapping[str, Any]) -> bytes:
    """Seconds of a training step against length and hidden size, a row of panels per device, as PNG."""
    devices = list(dict.fromkeys(row["device"] for row in part["rows"]))
    with matplotlib.style.context("default"):
        drawn = Figure(figsize=(9, 3.9 * len(devices)), facecolor=WHITE, layout="constrained")
        panels = drawn.subplots(len(devices), 2, squeeze=False, sharey="row")
        for device, (left, right) in zip(devices, panels, strict=True):
            rows = [row for row in part["rows"] if row["device"] == device]
            where = part["cpu"] if device == "cpu" else part["machine"]
            draw(left, [row for row in rows if row["hidden"] == SWEEP_HIDDEN], "length")
            left.set(xlabel="T, time steps", ylabel=f"training step on {where}")
            left.set_title(f"batch {SWEEP_BATCH}, hidden size {SWEEP_HIDDEN}", fontsize=10, color=TEXT)
            draw(right, [row for row in rows if row["length"] == SWEEP_LENGTH], "hidden")
            right.set(xlabel="H, hidden size")
            right.set_title(f"batch {SWEEP_BATCH}, {SWEEP_LENGTH} time steps", fontsize=10, color=TEXT)
            left.legend(frameon=False, fontsize=9, labelcolor=TEXT)
        written = BytesIO()
        drawn.savefig(written, dpi=130, format="png", metadata={"Software": None})
    return written.getvalue()


def draw(axes: Axes, rows: Sequence[Row], against: str) -> None:
    """One panel: medians, with the quartiles as a band."""
    found = sorted({row[against] for row in rows})
    for (norm, backend), (label, colour, dashes, marker) in CURVES.items():
        prefix = "base_" if backend == "base" else ""
        # The base was measured beside every variant: all of its medians count.
        of_curve = [row for row in rows if backend == "base" or (row["norm"], row["backend"]) == (norm, backend)]
        at = [[row for row in of_curve if row[against] == value] for value in found]
        middle = [median(row[f"{prefix}seconds"] for row in here) for here in at]
        low, high = ([median(row[f"{prefix}seconds_quartiles"][end] for row in here) for here in at] for end in (0, 1))
        axes.plot(
            found, middle, color=colour, linestyle=dashes, marker=marker, markersize=4, linewidth=1.6, label=label
        )
        axes.fill_between(found, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set(major_locator=FixedLocator(found), major_formatter=FuncFormatter(lambda x, _: f"{x:.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g} s" if y >= 1 else f"{y * 1e3:g} ms"))
    axes.grid(color="#dfe3e8", linewidth=0.7)
    axes.tick_params(colors=TEXT, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(guarded(main))
