"""Runs per hour on this machine, by way of running them and by how many are at once: make bench-runs

    python scripts/bench_runs.py                     the table, and results/bench_runs.json
    python scripts/bench_runs.py --quick             few steps, one wave of each: does it work?
    python scripts/bench_runs.py --device cuda       on the GPUs there are, so many at once on each
    python scripts/bench_runs.py --write             measure nothing; the page anew from the result

A wave is so many real jobs as there are workers, begun together by the engine that studies use, from the start of the
first process to the end of the last: with imports, text, training, validation and the final test. All waves take turns,
round by round, until `--seconds` are over and there are three rounds: what else the machine does falls on all. The
number is the median over waves, quartiles beside it in the result. Workers share the cores as `LocalWorkers` does it.
Ways beside the first are measured with one worker per core alone. Ctrl-C writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarking import (
    FEWEST_PAIRS,
    ROOT,
    Conditions,
    Parser,
    as_json,
    filled,
    guarded,
    markdown_table,
    read_json,
    sentence,
    spread,
    write,
)

from normlab.claims.families import CHAR_LSTM, char_mlp, char_transformer
from normlab.config import InputError, OutputConfig, RunConfig
from normlab.data.pydocs import load_pydocs
from normlab.execution.engine import Engine
from normlab.execution.gpus import Gpu, visible_gpus
from normlab.execution.jobs import Job
from normlab.execution.local import LocalWorkers, Method
from normlab.records.environment import available_cores

RESULT = ROOT / "results" / "bench_runs.json"
PAGE = ROOT / "docs" / "running.md"
POLL_SECONDS = 0.05
CHARACTERS = 200_000


@dataclass(frozen=True)
class Way:
    """A way of running jobs.

    Args:
        engine: for so many workers (on each GPU, if there are any), with a folder for what they write.
        together: runs that go to one worker, which trains them as one stacked model.
    """

    engine: Callable[[int, Path, Sequence[Gpu]], Engine]
    together: int = 1


def local_workers(method: Method) -> Callable[[int, Path, Sequence[Gpu]], Engine]:
    def build(at_once: int, folder: Path, gpus: Sequence[Gpu]) -> Engine:
        size = at_once * max(1, len(gpus))
        return LocalWorkers(size, folder, gpus=gpus, runs_per_gpu=at_once if gpus else 0, method=method)

    return build


WAYS = {
    "forked from a server": Way(local_workers("forkserver")),
    "a Python for each": Way(local_workers("spawn")),
    "stacked by 4": Way(local_workers("forkserver"), together=4),
}
"""The first is what studies do. Another way is another line here."""


def families(steps: int, accelerator: str, text: Path) -> dict[str, RunConfig]:
    """The runs that are timed: those that arguments share, cut to `steps`, and a tiny one."""
    lstm, transformer, mlp = CHAR_LSTM["small"], char_transformer("pre")["small"], char_mlp("relu")["small"]
    tiny = dataclasses.replace(lstm, model=dataclasses.replace(lstm.model, width=16))
    found = {}
    shared = {"LSTM (section D)": lstm, "Transformer (section E)": transformer, "feed-forward (section A)": mlp}
    for name, config in {**shared, "tiny LSTM": tiny}.items():
        training = dataclasses.replace(config.training, steps=steps, accelerator=accelerator, checkpoint_every=steps)
        model = dataclasses.replace(config.model, norm="ln")
        data = dataclasses.replace(config.data, corpus=str(text))
        found[name] = dataclasses.replace(config, model=model, data=data, training=training)
    return found


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write."""
    cores = available_cores()
    counts = sorted({cores, *(number for number in (1, 2, 4, 8, 16, 32, 64, 128) if number <= max(8, cores))})
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", nargs="+", type=int, default=counts, help="workers, on each GPU if there are any")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--seconds", type=float, default=300, help="of waves in all; at least 3 of each are timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="one wave of each, of runs of 2 steps")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--result", type=lambda text: Path(text).resolve(), default=RESULT)
    options = parser.parse_args(arguments)
    if min(*options.at_once, options.steps, 1) < 1:
        parser.error("--at-once and --steps must be at least 1")
    if next(iter(WAYS)) not in options.ways and cores not in options.at_once:
        parser.error(f"--ways: ways beside the first are measured with {cores} at once alone; add it to --at-once")
    if options.write and not options.result.exists():
        parser.error(f"--write: there is no {options.result.name} yet")
    if options.quick and options.result == RESULT:
        parser.error("--quick is no measurement: give it a --result of its own")
    result = read_json(options.result) if options.write else measured(arguments, options, cores)
    written = {options.result: as_json(result)}
    if options.result == RESULT:
        written[PAGE] = filled(PAGE.read_text(encoding="utf-8"), "runs", page_block(result)).encode()
    write(written)


def measured(arguments: Sequence[str], options: argparse.Namespace, cores: int) -> dict[str, Any]:
    """The result; each wave is printed as it ends."""
    gpus = visible_gpus() if options.device == "cuda" else []
    if options.device == "cuda" and not gpus:
        raise InputError("nvidia-smi and CUDA_VISIBLE_DEVICES name no GPU here; leave --device out")
    with tempfile.TemporaryDirectory() as folder:
        # Read to its end by the final test of each run, so that it is cut as the steps are.
        text = Path(folder) / "text.txt"
        text.write_text("\n\n".join(load_pydocs()["train"].texts)[:CHARACTERS], encoding="utf-8")
        return measured_on(text, arguments, options, cores, gpus)


def measured_on(
    text: Path, arguments: Sequence[str], options: argparse.Namespace, cores: int, gpus: Sequence[Gpu]
) -> dict[str, Any]:
    conditions = Conditions("bench_runs.py", arguments, [gpu.model for gpu in gpus if gpu.model])
    steps, fewest = (2, 1) if options.quick else (options.steps, FEWEST_PAIRS)
    runs = families(steps, "gpu" if gpus else "cpu", text)
    usual = next(iter(WAYS))
    cells = [
        (family, way, at_once)
        for family in runs
        for way in options.ways
        for at_once in sorted(set(options.at_once))
        if way == usual or at_once == cores
    ]
    for way in options.ways:  # starts the server, reads the text, builds kernels
        for config in runs.values():
            wave(WAYS[way], config, 1, gpus)
    times: dict[tuple[str, str, int], list[float]] = {cell: [] for cell in cells}
    began, rounds = time.monotonic(), 0
    while rounds < fewest or (not options.quick and time.monotonic() - began < options.seconds):
        for cell in cells:
            family, way, at_once = cell
            number, seconds = wave(WAYS[way], runs[family], at_once, gpus)
            times[cell].append(number / seconds * 3600)
            print(f"{family:24} {way:20} {at_once:3} at once: {times[cell][-1]:8.0f} runs per hour", flush=True)
        rounds += 1
    rows = []
    for (family, way, at_once), hourly in times.items():
        threads = max(1, cores // (at_once * max(1, len(gpus))))
        median, quartiles = spread(iter(hourly * 2 if len(hourly) == 1 else hourly))
        rows.append(
            {"family": family, "way": way, "at_once": at_once, "threads": threads}
            | {"runs_per_hour": median, "quartiles": quartiles, "waves": len(hourly)}
        )
    return {
        "unit": "runs per hour",
        "steps": steps,
        "characters": CHARACTERS,
        "gpus": len(gpus),
        **conditions.as_dict(),
        "rows": rows,
    }


def wave(way: Way, config: RunConfig, at_once: int, gpus: Sequence[Gpu]) -> tuple[int, float]:
    """A group of runs for each of so many workers: their number, and the seconds from the first start to the last end.

    Raises:
        InputError: one did not end as it should; says why.
    """
    workers = at_once * max(1, len(gpus))
    with tempfile.TemporaryDirectory() as folder:
        output = OutputConfig(runs_dir=f"{folder}/runs", wandb="off", progress=False)
        seeds = range(workers * way.together)
        stack = "always" if way.together > 1 else "never"
        jobs = [Job(dataclasses.replace(config, seed=seed, output=output), stack=stack) for seed in seeds]
        with way.engine(at_once, Path(folder) / "jobs", gpus) as engine:
            began = time.perf_counter()
            engine.start([jobs[first : first + way.together] for first in range(0, len(jobs), way.together)])
            while engine.jobs:
                time.sleep(POLL_SECONDS)
                for ended in engine.ended():
                    if not ended.job.is_done():
                        raise InputError(f"{ended.job.id}: {ended.reason or 'it left no result'}")
                    if way.together > 1 and "stacked" not in ended.job.record.environment():
                        raise InputError(f"{ended.job.id} was trained by itself, not stacked; leave out that way")
            return len(jobs), time.perf_counter() - began


def page_block(result: Mapping[str, Any]) -> str:
    """The block `runs` of docs/running.md."""
    if not result:
        return "Not measured yet: `make bench-runs`."
    threads = {row["at_once"]: row["threads"] for row in result["rows"]}
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in result["rows"]:
        cells.setdefault((row["family"], row["way"]), {})[row["at_once"]] = f"{row['runs_per_hour']:,.0f}"
    counts = sorted(threads)
    header = ["run", "each is", *(f"{number} x {threads[number]}" for number in counts)]
    table = [[*names, *(of_count.get(number, "–") for number in counts)] for names, of_count in cells.items()]
    where = f"on each of {result['gpus']} GPUs" if result["gpus"] else "on the cores"
    waves = min(row["waves"] for row in result["rows"])
    return (
        f"{markdown_table(header, table)}\n\n{sentence(result)} Runs per hour, of {result['steps']} steps each on "
        f"{result['characters']:,} characters with all that belongs to a run; workers x threads {where}; the median "
        f"over at least {waves} waves."
    )


if __name__ == "__main__":
    sys.exit(guarded(main))
