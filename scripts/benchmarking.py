"""What the benchmarks share: paired timings, what they ran on, results on disk, blocks of generated text in a page."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch

from normlab.config import InputError
from normlab.records.environment import collect_environment

ROOT = Path(__file__).resolve().parent.parent
FEWEST_PAIRS = 3
WARM_UPS = {"cpu": 2, "cuda": 3}
"""The first step of each variant builds kernels, the second grows the heap, the third records CUDA graphs."""

Step = Callable[[], None]
Key = TypeVar("Key", bound=Hashable)


class Pair(NamedTuple):
    """Seconds by the clock and of the processor: of the base, then of a variant right after it."""

    base: float
    base_processor: float
    own: float
    own_processor: float


def timed(step: Step, device: str) -> tuple[float, float]:
    """Seconds by the clock and of the processor; on a GPU until it is done, which leaves the processor waiting."""
    if device != "cpu":
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def paired(
    base: Step, variants: Mapping[Key, Step], device: str, seconds: float, say: Callable[[int], None]
) -> dict[Key, list[Pair]]:
    """Pairs of the base and each variant in turn, until `seconds` are over and each has `FEWEST_PAIRS`.

    All variants take turns, each right after the base: what else the machine does then falls on both.

    Args:
        say: told the number of rounds done, after each.
    """
    for step in (base, *variants.values()):
        for _ in range(WARM_UPS[device]):
            step()
    pairs: dict[Key, list[Pair]] = {key: [] for key in variants}
    began, rounds = time.monotonic(), 0
    while variants and (rounds < FEWEST_PAIRS or time.monotonic() - began < seconds):
        for key, step in variants.items():
            pairs[key].append(Pair(*timed(base, device), *timed(step, device)))
        rounds += 1
        say(rounds)
    return pairs


def summary(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Medians and quartiles of the seconds of a step and of its ratio to the base."""
    ratio, ratio_quartiles = spread(pair.own / pair.base for pair in pairs)
    seconds, seconds_quartiles = spread(pair.own for pair in pairs)
    base, base_quartiles = spread(pair.base for pair in pairs)
    return {
        "ratio": ratio,
        "quartiles": ratio_quartiles,
        "cpu_ratio": spread(pair.own_processor / pair.base_processor for pair in pairs)[0],
        "seconds": seconds,
        "seconds_quartiles": seconds_quartiles,
        "base_seconds": base,
        "base_seconds_quartiles": base_quartiles,
        "pairs": len(pairs),
    }


def spread(values: Iterator[float]) -> tuple[float, list[float]]:
    """Median and both quartiles, to four digits; within the range of the values."""
    low, middle, high = (float(f"{value:.4g}") for value in statistics.quantiles(values, n=4, method="inclusive"))
    return middle, [low, high]


class Conditions:
    """What a measurement ran on and with; begun before it, asked after it. `gpus`: their names."""

    def __init__(self, script: str, arguments: Sequence[str], gpus: Sequence[str] = ()) -> None:
        self._command = shlex.join(["python", f"scripts/{script}", *arguments])
        self._gpus = gpus
        self._load = os.getloadavg()[0]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; no path but those of the command."""
        # Of the commit as it was first asked for: what an earlier part wrote makes no changed checkout of this one.
        environment = collect_environment(self._gpus)
        return {
            "command": self._command,
            "date": datetime.now(UTC).date().isoformat(),
            "threads": torch.get_num_threads(),
            "load_average": {"before": round(self._load, 2), "after": round(os.getloadavg()[0], 2)},
            **{key: environment[key] for key in ("machine", "cpu", "cores", "platform", "versions", "git")},
        }


def sentence(conditions: Mapping[str, Any]) -> str:
    """`Conditions` for people."""
    versions, load, git = conditions["versions"], conditions["load_average"], conditions["git"]
    threads = f"{conditions['threads']} thread{'s' * (conditions['threads'] > 1)}"
    commit = f" at commit {git['commit'][:7]}{' with changes' * git['dirty']}" if git["commit"] else ""
    return (
        f"Measured on {conditions['date']}{commit} with `{conditions['command']}`: {conditions['machine']} "
        f"({conditions['cpu']}), {threads}, load average {load['before']:.1f} before and "
        f"{load['after']:.1f} after, Python {versions['python']}, torch {versions['torch']}."
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def block(page: str, name: str) -> str:
    """What stands in `page` between `<!-- name: begin -->` and `<!-- name: end -->`."""
    return page.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0].strip()


def filled(page: str, name: str, content: str) -> str:
    """`page` with `content` in its block `name`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    return f"{page.split(begin)[0]}{begin}\n{content}\n{end}{page.split(end)[1]}"


def read_json(path: Path) -> dict[str, Any]:
    """An earlier result, empty if there is none.

    Raises:
        InputError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        raise InputError(f"{path.name} is no result of a bench; move it away, or name another --result") from None


def as_json(result: Mapping[str, Any]) -> bytes:
    return (json.dumps(result, indent=1) + "\n").encode()


def write(files: Mapping[Path, bytes]) -> None:
    """Write each file whole or not at all."""
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its place and then renamed: Ctrl-C leaves the old one.
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            new = Path(scratch) / path.name
            new.write_bytes(content)
            new.replace(path)


class Parser(argparse.ArgumentParser):
    """Answers a wrong flag with one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see --help")


def guarded(main: Callable[[Sequence[str]], None]) -> int:
    """The exit code of `main`; a mistake, or Ctrl-C, is one line."""
    try:
        main(sys.argv[1:])
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing unfinished was written", file=sys.stderr)
        return 130
    return 0
