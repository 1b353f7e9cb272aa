"""How observations are made: by a function of the seed, or by a comparison of networks."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from normlab.bench.records import Record, Store, append_line, number, read_lines
from normlab.claims.claim import Claim, Observation, Scale
from normlab.claims.places import folder as records_of
from normlab.claims.rules import keys
from normlab.core.structure import plain

Arm = tuple[str, str]
Measure = Callable[[Scale, int], Mapping[str, float]]
Effect = Callable[["Arms"], Mapping[str, float]]


@dataclass(frozen=True)
class Measured:
    """A function of scale and seed gives the values; each is one line of a record file.

    Attributes:
        measure: ``measure(scale, seed) → values``; deterministic for a seed.
        repetitions: Seeds for each scale; a scale that is missing has none.
        sizes: What is done at each scale, in words.
        first: The first seed; one that is done again with new repetitions has others.
        gives: Names of the values; by default those that the rule decides from.
    """

    measure: Measure
    repetitions: Mapping[Scale, int]
    sizes: Mapping[Scale, str]
    first: int = 0
    gives: frozenset[str] | None = None

    def text(self, scale: Scale) -> str:
        """Say in words what is done at that scale."""
        return self.sizes.get(scale, "")

    def seeds(self, scale: Scale) -> int:
        """How many repetitions there are."""
        return self.repetitions.get(scale, 0)

    def read(self, claim: Claim, scale: Scale) -> list[Observation]:
        """Read the observations on record; lines that are torn or of another version are none."""
        path = _file(claim, scale)
        needed = keys(claim.rule) if self.gives is None else self.gives
        found: dict[int, Observation] = {}
        for line in read_lines(path):
            values = line.get("values")
            seed = line.get("seed")
            if line.get("version") != claim.version or not isinstance(values, dict):
                continue
            if type(seed) is not int or seed not in self._seeds(scale):
                continue
            numbers = {k: _number(v) for k, v in values.items()}
            if None in numbers.values() or not needed <= numbers.keys():
                continue
            record = f"claims/{path.parent.name}/{path.name}"
            found[seed] = Observation(seed, cast(dict[str, float], numbers), (record,))
        return [found[seed] for seed in sorted(found)]

    def run(self, claim: Claim, scale: Scale, progress: Callable[[str], None]) -> None:
        """Make the observations that are missing; each is on record when it is made."""
        from normlab.bench.environment import environment

        done = {one.seed for one in self.read(claim, scale)}
        path = _file(claim, scale)
        for count, seed in enumerate(self._seeds(scale), 1):
            if seed in done:
                continue
            progress(f"{claim.id}: {count} of {self.seeds(scale)}")
            start = time.monotonic()
            values = {k: float(v) for k, v in self.measure(scale, seed).items()}
            line = {
                "claim": claim.id,
                "version": claim.version,
                "scale": scale,
                "seed": seed,
                "values": plain(values),
                "seconds": round(time.monotonic() - start, 3),
                "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "environment": environment(),
            }
            path.parent.mkdir(parents=True, exist_ok=True)
            append_line(path, json.dumps(line, ensure_ascii=False))

    def _seeds(self, scale: Scale) -> range:
        return range(self.first, self.first + self.seeds(scale))


def _number(value: Any) -> float | None:
    """A value as `Measured.run` writes it; None for anything else."""
    if value in ("nan", "inf", "-inf"):
        return float(value)
    return number(value)


def _file(claim: Claim, scale: Scale) -> Path:
    return records_of(scale) / "claims" / claim.paper.key / f"{claim.name}.{scale}.jsonl"


class Arms:
    """The final runs of one seed in a comparison, by (normalizer, condition id).

    Whoever asks for an arm that has not ended gets a `KeyError`; what was asked for is remembered
    in `asked`, as names of records.
    """

    def __init__(self, finals: Mapping[Arm, Record], seed: int) -> None:
        self.finals, self.seed = finals, seed
        self.asked: dict[str, None] = {}

    def __call__(self, normalizer: str, condition: str) -> float:
        """The test accuracy of an arm, in percent; that of guessing where it diverged.

        Args:
            normalizer: As in the comparison.
            condition: Id of its condition, as ``b64-n4-iid``.
        """
        accuracy = self._of(normalizer, condition).final("test_accuracy")
        if accuracy is None:
            raise KeyError((normalizer, condition))
        return 100 * accuracy

    def along(self, normalizer: str, condition: str, key: str = "valid_accuracy") -> list[float]:
        """The accuracies along an arm's run, in percent, in order of steps; at least one.

        A run that diverged guesses from there on: its points are filled up with the accuracy of
        guessing.

        Args:
            normalizer: As in the comparison.
            condition: Id of its condition.
            key: ``"valid_accuracy"`` or ``"train_accuracy"`` (of the latest batches).

        Raises:
            KeyError: If the arm has not ended, or its record holds no such number.
        """
        run = self._of(normalizer, condition)
        found = [v for point in run.points if (v := number(point.get(key))) is not None]
        if run.outcome == "diverged":
            recipe = run.spec.get("recipe")
            planned = number(recipe.get("points")) if isinstance(recipe, dict) else None
            found += [run.final("test_accuracy") or 0.0] * (int(planned or 0) - len(found))
        if not found:
            raise KeyError((normalizer, condition, key))
        return [100 * value for value in found]

    def _of(self, normalizer: str, condition: str) -> Record:
        run = self.finals[normalizer, condition]
        self.asked[run.id] = None
        return run


@lru_cache(maxsize=8)
def _finals(folder: Path, state: object) -> dict[Arm, dict[int, Record]]:
    """Final runs by arm and seed; read again only where `state`, that of the files, is another."""
    from normlab.bench.analysis import finals
    from normlab.bench.plan import Plan

    store = Store(folder)
    return finals(Plan.load(store), store)


def _state(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of change of all that a comparison's verdict is read from."""
    files = [folder / "plan.json", *(folder / "runs").glob("*.jsonl")]
    return tuple(sorted((f.name, (s := f.stat()).st_size, s.st_mtime_ns) for f in files))


@dataclass(frozen=True)
class Compared:
    """A ``normlab compare`` with tuned rates gives an effect for each seed.

    Attributes:
        experiment: Name in `normlab.claims.experiments.EXPERIMENTS`; its records' folder.
        effect: Values of a seed, from the accuracies of all arms.
    """

    experiment: str
    effect: Effect

    def text(self, scale: Scale) -> str:
        """Say in words what is done at that scale."""
        from normlab.claims.experiments import options

        words = options(self.experiment, scale)
        return "" if words is None else f"normlab compare {words}"

    def seeds(self, scale: Scale) -> int:
        """How many seeds the comparison has; 0 where it has no such scale."""
        from normlab.claims.experiments import options, seeds

        return 0 if options(self.experiment, scale) is None else seeds(self.experiment, scale)

    def read(self, claim: Claim, scale: Scale) -> list[Observation]:
        """Read what finished; a diverged run counts as guessing."""
        folder = self._place(scale)
        if not (folder / "plan.json").is_file():
            return []
        ended = _finals(folder, _state(folder))
        found = []
        for seed in sorted({seed for runs in ended.values() for seed in runs}):
            arms = Arms({arm: runs[seed] for arm, runs in ended.items() if seed in runs}, seed)
            try:
                values = self.effect(arms)
            except KeyError:  # an arm that has not finished
                continue
            records = tuple(f"{folder.name}/runs/{run}.jsonl" for run in arms.asked)
            found.append(Observation(seed, values, records))
        return found

    def run(self, claim: Claim, scale: Scale, progress: Callable[[str], None]) -> None:
        """Run or resume the comparison, unless all that the claim needs is on record."""
        from normlab.claims.experiments import run

        if len(self.read(claim, scale)) >= self.seeds(scale):
            return
        progress(f"{claim.id}: normlab compare, {self.experiment}")
        run(self.experiment, scale, self._place(scale))

    def _place(self, scale: Scale) -> Path:
        from normlab.claims.experiments import records

        return records_of(scale) / records(self.experiment, scale)


@dataclass(frozen=True)
class Across:
    """Arms of a comparison are the repetitions: what each reached, beside what is measured of it.

    Attributes:
        compared: The comparison; its effect is that of a seed, and says what every arm reached.
        measured: Of the arm whose place among `arms` is the seed; one repetition for each.
        arms: Names of values of the effect, one for each arm.
        reached: Name of the value that is their mean over the comparison's seeds.
    """

    compared: Compared
    measured: Measured
    arms: tuple[str, ...]
    reached: str

    def text(self, scale: Scale) -> str:
        """Say in words what is done at that scale."""
        if not self.seeds(scale):
            return ""
        return f"{self.compared.text(scale)}; {self.measured.text(scale)}"

    def seeds(self, scale: Scale) -> int:
        """How many arms there are; 0 where the comparison has no such scale."""
        return min(self.measured.seeds(scale), len(self.arms) * self.compared.seeds(scale))

    def read(self, claim: Claim, scale: Scale) -> list[Observation]:
        """Read the arms of which both are on record; none before all seeds have ended."""
        runs = self.compared.read(claim, scale)
        if len(runs) < self.compared.seeds(scale):
            return []
        records = tuple(name for one in runs for name in one.records)
        found = []
        for one in self.measured.read(claim, scale):
            reached = statistics.fmean(run.values[self.arms[one.seed]] for run in runs)
            values = {**one.values, self.reached: reached}
            found.append(Observation(one.seed, values, (*one.records, *records)))
        return found

    def run(self, claim: Claim, scale: Scale, progress: Callable[[str], None]) -> None:
        """Make what is missing of both."""
        self.compared.run(claim, scale, progress)
        self.measured.run(claim, scale, progress)
