"""What a comparison consists of, and the runs that it still needs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from normlab.bench import choice
from normlab.bench.recipe import Condition, PlanError, Recipe, RunSpec
from normlab.bench.records import Record, Store, StoreError, write_text

TUNING_SEED = 1_000_003  # no seed of a final run, so that the rate is not chosen on what is judged


@dataclass(frozen=True)
class Plan:
    """A comparison of normalizers.

    Attributes:
        data: Name of the data set.
        fingerprint: Digest of its content.
        network: Spec of the network.
        normalizers: Specs, in the order of display.
        baseline: The one that the others are held against.
        conditions: Who shares statistics.
        seeds: Of the final runs.
        recipe: How networks are trained.
        title: Heading of the report; empty for one made from the rest.
        code: Digest of the source of an imported network; empty for built-in ones.
        facts: What the report says of the data and the network, see `describe`.
        command: What repeats the comparison.
    """

    data: str
    fingerprint: str
    network: str
    normalizers: tuple[str, ...]
    baseline: str
    conditions: tuple[Condition, ...]
    seeds: tuple[int, ...]
    recipe: Recipe
    title: str = ""
    command: str = ""
    code: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.normalizers or not self.conditions or not self.seeds:
            raise PlanError("a comparison needs a normalizer, a condition and a seed")
        for what in ("normalizers", "conditions", "seeds"):
            values = getattr(self, what)
            if len(set(values)) != len(values):
                raise PlanError(f"{what} name something twice: {', '.join(map(str, values))}")
        if self.baseline not in self.normalizers:
            raise PlanError(
                f"the baseline {self.baseline!r} is not among the normalizers "
                f"{', '.join(self.normalizers)}"
            )
        if TUNING_SEED in self.seeds:
            raise PlanError(f"seed {TUNING_SEED} is kept for tuning")
        parsed = [choice.parse(spec) for spec in self.normalizers]
        for i, one in enumerate(parsed):
            for other in parsed[:i]:
                if one.terms == other.terms:
                    raise PlanError(f"{other.label!r} and {one.label!r} name one arm twice")
        grain = self.grain
        for condition in self.conditions:
            if condition.batch_size % grain:
                raise PlanError(
                    f"batches are made of groups of {grain} samples of one class, which do not "
                    f"divide a batch of {condition.batch_size}"
                )
            if condition.composition == "class" and grain % condition.norm_batch:
                raise PlanError(
                    f"normalization batches of one class must divide each other; {grain} is no "
                    f"multiple of {condition.norm_batch}"
                )

    @property
    def grain(self) -> int:
        """Samples of one class that every batch of every arm is made of.

        The optimizer's batches must be equal in all conditions, so that only who shares statistics
        differs; where one condition needs groups of one class, all get batches made of them.
        """
        sizes = [c.norm_batch for c in self.conditions if c.composition == "class"]
        return max(sizes, default=1)

    def spec(
        self, normalizer: str, condition: Condition, lr: float, seed: int, phase: str
    ) -> RunSpec:
        """Return the spec of one run."""
        return RunSpec(
            data=self.data,
            fingerprint=self.fingerprint,
            network=self.network,
            normalizer=normalizer,
            condition=condition,
            grain=self.grain,
            lr=lr,
            seed=seed,
            phase="tune" if phase == "tune" else "final",
            recipe=self.recipe,
            reference=self.baseline,
            code=self.code,
        )

    def arms(self) -> Iterator[tuple[str, Condition]]:
        """Every normalizer in every condition."""
        for condition in self.conditions:
            for normalizer in self.normalizers:
                yield normalizer, condition

    def tuning(self, normalizer: str, condition: Condition) -> list[RunSpec]:
        """The tuning runs of one arm; none where there is one learning rate."""
        rates = self.recipe.lrs if len(self.recipe.lrs) > 1 else ()
        return [self.spec(normalizer, condition, lr, TUNING_SEED, "tune") for lr in rates]

    def finals(self, normalizer: str, condition: Condition, lr: float) -> list[RunSpec]:
        """The final runs of one arm."""
        return [self.spec(normalizer, condition, lr, seed, "final") for seed in self.seeds]

    @property
    def runs_planned(self) -> int:
        """Number of runs of the whole comparison."""
        rates = len(self.recipe.lrs) if len(self.recipe.lrs) > 1 else 0
        arms = len(self.normalizers) * len(self.conditions)
        return arms * (rates + len(self.seeds))

    def save(self, store: Store) -> None:
        """Write the plan beside its records.

        Raises:
            StoreError: If the disk is full or not writable.
        """
        write_text(store.directory / "plan.json", json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(store: Store) -> Plan:
        """Read the plan of a record folder.

        Raises:
            StoreError: If there is none, or it cannot be read.
        """
        path = store.directory / "plan.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            recipe = values.pop("recipe")
            conditions = tuple(Condition(**c) for c in values.pop("conditions"))
            recipe = Recipe(**{**recipe, "lrs": tuple(recipe["lrs"])})
            values |= {k: tuple(values[k]) for k in ("normalizers", "seeds")}
            plan = Plan(**values, conditions=conditions, recipe=recipe)
            if not all(isinstance(plan.facts.get(k, {}), dict) for k in ("data", "network")):
                raise ValueError("its facts are not tables")
            return plan
        except FileNotFoundError:
            raise StoreError(
                f"{store.directory} holds no plan.json: it is not a folder that "
                "'normlab compare --out' wrote"
            ) from None
        except (
            OSError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            raise StoreError(f"cannot read {path}: {error}") from error


def chosen_rate(plan: Plan, records: Sequence[Record | None]) -> float | None:
    """Return the learning rate with the best validation accuracy; the lower one of equals.

    Args:
        plan: The comparison.
        records: The arm's tuning records, in the order of the rates.

    Returns:
        The rate; None where no tuning run has ended or all failed. Where all diverged, the lowest.
    """
    if len(plan.recipe.lrs) == 1:
        return plan.recipe.lrs[0]
    scores: list[tuple[float, float]] = []
    for lr, record in zip(plan.recipe.lrs, records, strict=True):
        if record is not None and record.outcome in ("finished", "diverged"):
            accuracy = record.final("valid_accuracy") if record.outcome == "finished" else None
            scores.append((-1.0 if accuracy is None else accuracy, -lr))
    return -max(scores)[1] if scores else None


def describe_recipe(plan: Plan) -> dict[str, Any]:
    """Return the recipe as flat values for the report."""
    r = plan.recipe
    grain = plan.grain
    batches = "shuffled" if grain == 1 else f"shuffled groups of {grain} samples of one class"
    return {
        "optimizer": f"SGD, momentum {r.momentum:g}",
        "learning rates tried": ", ".join(f"{lr:g}" for lr in r.lrs),
        "schedule": f"linear warm-up over {r.warmup:.0%} of the steps, then cosine to 0",
        "weight decay": f"{r.weight_decay:g} on weights, none on scales, shifts and biases",
        "epochs": f"{r.epochs:g} (tuning {r.tune_epochs:g})",
        "batches": f"{batches}, the same in every arm",
        "validation split": f"{r.validation:.0%} of the training data",
        "augmentation": ", ".join(
            [f"random crop, {r.crop} pixels"] * bool(r.crop) + ["random flip"] * r.flip
        )
        or "none",
        "seeds": ", ".join(map(str, plan.seeds)),
        "initial weights": "equal in every arm for equal seeds",
        "baseline": plan.baseline,
    }
