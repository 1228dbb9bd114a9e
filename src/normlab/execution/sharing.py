"""How many workers go onto this machine's cores, or onto each of its GPUs: from what runs were seen to need. No torch.

What is learned stays in a file beside the workers' logs, so that the next study begins with it.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from normlab.config import InputError, RunConfig
from normlab.execution.durations import likes
from normlab.execution.gpus import Gpu, Load, gpu_loads
from normlab.execution.jobs import Job
from normlab.machine.limits import available_memory_mib
from normlab.records.disk import parse_json, to_json, write_atomically

__all__ = ["CoreSharing", "GpuSharing", "Need", "Needs", "Sharing"]

MEMORY_SHARE = 0.9
"""Of the memory; the rest is for what differs between runs that are alike."""

TIME_SHARE = 0.9
"""Of a GPU's time that runs together should fill: without MPS their kernels take turns, so that more gains nothing."""

LOOK_SECONDS = 2.0
SAMPLES = 15
"""Looks at a GPU while a run trains on it alone, after which its need is known."""

LEAST_UTILIZATION = 0.01
CONTEXT_MIB = 800.0
"""What a process takes on a GPU beside its tensors, which alone its record knows: CUDA's context, libraries, gaps."""


@dataclass(frozen=True)
class Need:
    """What one run takes: memory, and the share of a GPU's time when it is alone there (0: unknown)."""

    memory_mib: float
    utilization: float = 0.0

    def joined(self, other: Need) -> Need:
        """Enough for either."""
        return Need(max(self.memory_mib, other.memory_mib), max(self.utilization, other.utilization))


class Needs:
    """Of runs and their like (`durations.likes`) on one kind of device.

    Args:
        path: of the file; one that is damaged is begun anew.
        device: needs on different devices have nothing to do with each other.
    """

    def __init__(self, path: Path, device: str) -> None:
        self._path = path
        self._device = device
        self._wanted: dict[str, tuple[str, str]] = {}

    def want(self, config: RunConfig) -> None:
        """A run of this kind is part of the study."""
        names = likes(config)
        self._wanted[names[0]] = names

    def of(self, config: RunConfig) -> Need | None:
        """What the runs most like it took; None if there were none."""
        return self._of(likes(config), self._read())

    def largest(self) -> Need | None:
        """Enough for any kind of run that the study had so far; until one of these is known, for any in the file."""
        known = self._read()
        wanted = [self._of(names, known) for names in self._wanted.values()]
        needs = [need for need in wanted if need is not None] or list(known.values())
        return functools.reduce(Need.joined, needs) if needs else None

    def _of(self, names: Sequence[str], known: Mapping[str, Need]) -> Need | None:
        return next((known[name] for name in names if name in known), None)

    def add(self, config: RunConfig, need: Need) -> None:
        """A run took so much; what its like took before is kept if it was more."""
        known = self._read()
        for like in likes(config):
            known[like] = known[like].joined(need) if like in known else need
        everything = {**self._file(), self._device: {like: asdict(each) for like, each in known.items()}}
        write_atomically(self._path, to_json(everything, indent=1) + "\n")

    def _read(self) -> dict[str, Need]:
        try:
            return {like: Need(**values) for like, values in self._file().get(self._device, {}).items()}
        except (TypeError, AttributeError):
            return {}

    def _file(self) -> dict[str, dict[str, dict[str, float]]]:
        try:
            return parse_json(self._path.read_bytes(), str(self._path))
        except (OSError, InputError):
            return {}


class Sharing(ABC):
    """How many workers are together on each of some places.

    Args:
        entries: of the places, for CUDA_VISIBLE_DEVICES; None leaves it as it is.
        needs: of runs on such a place.
        memory_mib: of one place; 0 if unknown.
        say: told in one line what was chosen, whenever it changes.
    """

    def __init__(
        self, entries: Sequence[str | None], needs: Needs, memory_mib: float, say: Callable[[str], None]
    ) -> None:
        self.entries = entries
        self.needs = needs
        self.memory_mib = memory_mib
        self._say = say
        self._said = ""
        self._most = sys.maxsize

    def at_once(self) -> int:
        """How many workers one place takes now."""
        return max(1, min(self._most, self._chosen()))

    @abstractmethod
    def _chosen(self) -> int: ...

    @abstractmethod
    def note(self, job: Job) -> None:
        """The run of this job ended: learn from its record."""

    def look(self, alone: Mapping[int, Job]) -> None:  # noqa: B027
        """Look at the places (by number) that one run has had to itself since its start."""

    def lower(self, job: Job, beside: int, is_sure: bool) -> bool:
        """Memory was too small for this job: fewer go on from now, if it was one of several.

        Args:
            beside: the most that were on its place while it ran, itself included.
            is_sure: it said so itself; one that was killed may have been killed for other reasons.

        Returns:
            Whether sharing may have been the cause.
        """
        if beside < 2:
            return False
        fewer = beside // 2
        if is_sure and self.memory_mib:
            self.needs.add(job.config, Need(MEMORY_SHARE * self.memory_mib / fewer))
        if fewer < self._most:
            self._most = fewer
            how = "out of memory" if is_sure else "killed, as for memory,"
            self._say(f"{job.id}: {how} with {beside} at once: {fewer} from now on, and it runs again")
        return True

    def _fitting(self, need: Need) -> int:
        return int(MEMORY_SHARE * self.memory_mib / max(1.0, need.memory_mib) + 1e-6)

    def _choose(self, number: int, why: str) -> int:
        line = f"{number} at once: {why}"
        if line != self._said:
            self._said = line
            self._say(line)
        return number


class CoreSharing(Sharing):
    """`size` workers on the cores, or as many as fit into the memory that was free at the start.

    What a run takes is its process's peak, of which some is shared with the others: this errs to the safe side. Nothing
    is known before the first run ended.
    """

    def __init__(self, size: int, needs: Needs, say: Callable[[str], None]) -> None:
        super().__init__([None], needs, available_memory_mib() or 0.0, say)
        self.size = size

    def _chosen(self) -> int:
        need = self.needs.largest()
        if need is None or not self.memory_mib:
            return self.size
        fitting = self._fitting(need)
        if fitting >= min(self.size, self._most):
            return self.size
        memory = f"{need.memory_mib:,.0f} of the {self.memory_mib:,.0f} MiB that were free"
        return self._choose(max(1, fitting), f"a run takes {memory}, so that {self.size} do not fit")

    def note(self, job: Job) -> None:
        peak_mib = _peak_mib(job)
        if peak_mib:
            self.needs.add(job.config, Need(peak_mib))


class GpuSharing(Sharing):
    """`asked` workers on each GPU, or as many as its memory and its time have room for.

    The first run has its GPU to itself while its need is measured: memory in use beyond what was before it, and the
    share of the time in which a kernel ran. Later ones, whose record says what they allocated, count with that.
    """

    def __init__(self, gpus: Sequence[Gpu], asked: int, needs: Needs, cores: int, say: Callable[[str], None]) -> None:
        super().__init__([gpu.entry for gpu in gpus], needs, min(gpu.memory_mib for gpu in gpus), say)
        self._gpus = gpus
        self._asked = asked
        self._cores_each = max(1, cores // len(gpus))
        self._idle = {} if asked else gpu_loads()
        self._seen: dict[str, list[Load]] = {}
        self._looked = 0.0

    def _chosen(self) -> int:
        if self._asked:
            return self._asked
        if not all(gpu.uuid in self._idle for gpu in self._gpus):
            return self._choose(1, "nvidia-smi does not say how busy the GPU is; --runs-per-gpu N takes more")
        need = self.needs.largest()
        if need is None or not need.utilization:
            return self._choose(1, "what a run takes of its GPU is measured first")
        by_memory = self._fitting(need)
        by_time = math.ceil(TIME_SHARE / need.utilization)
        number = max(1, min(by_memory, by_time, self._cores_each))
        takes = f"{need.memory_mib:,.0f} of {self.memory_mib:,.0f} MiB and {need.utilization:.0%} of its time"
        return self._choose(number, f"on each GPU: a run takes {takes}; {self._cores_each} cores for each GPU")

    def look(self, alone: Mapping[int, Job]) -> None:
        wanted = {place: job for place, job in alone.items() if self._is_wanted(job)}
        if not wanted or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        loads = gpu_loads()
        for place, job in wanted.items():
            uuid = self._gpus[place].uuid
            rows = job.record.metrics()
            if uuid not in loads or not rows:
                continue  # it is starting
            idle_mib = self._idle[uuid].memory_mib
            load = Load(max(0.0, loads[uuid].memory_mib - idle_mib), loads[uuid].utilization)
            seen = self._seen.setdefault(job.id, [])
            seen.append(load)
            # Its memory is at its peak once it has validated.
            if len(seen) >= SAMPLES and any("valid_loss_nats" in row for row in rows):
                self._learn(job)

    def note(self, job: Job) -> None:
        if self._asked:
            return
        if self._is_wanted(job) and job.id in self._seen:
            self._learn(job)  # it was too short for all samples
        peak_mib = _peak_mib(job)
        if peak_mib:
            self.needs.add(job.config, Need(peak_mib + CONTEXT_MIB))

    def _is_wanted(self, job: Job) -> bool:
        need = self.needs.of(job.config)
        return not self._asked and (need is None or not need.utilization)

    def _learn(self, job: Job) -> None:
        seen = self._seen.pop(job.id)
        busy = statistics.mean(load.utilization for load in seen)
        self.needs.add(job.config, Need(max(load.memory_mib for load in seen), max(busy, LEAST_UTILIZATION)))


def _peak_mib(job: Job) -> float:
    return float(job.record.outcome().results.get("peak_memory_mib", 0.0))
