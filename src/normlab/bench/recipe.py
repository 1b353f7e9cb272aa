"""What a run is: everything that decides its numbers, as plain values.

Two runs with equal specs on one machine and one version of the program give equal numbers; the
name of a run is a digest of its spec.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Composition = Literal["iid", "class"]
Phase = Literal["tune", "final"]


class PlanError(ValueError):
    """A comparison that cannot be run as asked."""


@dataclass(frozen=True, order=True)
class Condition:
    """Who shares statistics.

    Attributes:
        batch_size: Samples of one optimizer step.
        norm_batch: Samples that share statistics; the batch is split into parts of this size,
            whose gradients are accumulated.
        composition: ``"iid"``, or ``"class"``: the samples of a part are of one class.
    """

    batch_size: int = 64
    norm_batch: int = 64
    composition: Composition = "iid"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise PlanError(f"the optimizer's batch has at least 1 sample; got {self.batch_size}")
        if self.norm_batch < 1 or self.batch_size % self.norm_batch:
            raise PlanError(
                f"the normalization batch divides the optimizer's batch; received "
                f"{self.norm_batch} and {self.batch_size}"
            )
        if self.composition not in ("iid", "class"):
            raise PlanError(f"composition is 'iid' or 'class'; received {self.composition!r}")
        if self.composition == "class" and self.norm_batch * 2 > self.batch_size:
            raise PlanError(
                f"{self.norm_batch} samples of one class would fill the optimizer's batch of "
                f"{self.batch_size}, which would then see one class a step: that tests "
                "optimization, not normalization. Use a smaller normalization batch."
            )

    @property
    def id(self) -> str:
        """A short name, e.g. ``b64-n8-class``."""
        return f"b{self.batch_size}-n{self.norm_batch}-{self.composition}"

    def label(self, grain: int) -> str:
        """The condition in words.

        Args:
            grain: Samples of one class that batches are made of; where there are such groups, a
                random part of a batch is mixed, but not quite i.i.d.
        """
        if self.norm_batch == 1:
            text = "each sample has statistics of its own"
        else:
            drawn = "i.i.d. samples" if grain == 1 else "mixed samples"
            kind = drawn if self.composition == "iid" else "samples of one class"
            text = f"{self.norm_batch} {kind} share statistics"
        return text if self.batch_size == 64 else f"{text} (optimizer batch {self.batch_size})"


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: stochastic gradient descent with momentum, cosine decay.

    Attributes:
        epochs: Passes over the training split in a final run.
        tune_epochs: Passes in a tuning run.
        momentum: Of the optimizer (not of a normalizer).
        weight_decay: On weights of more than one axis; scales, shifts and biases have none.
        warmup: Share of the steps over which the learning rate rises linearly from 0.
        lrs: Learning rates to tune over.
        validation: Share of the training data held out to tune on.
        train_limit: Use only that many training samples (balanced); None for all.
        crop: Pixels of random-crop padding.
        flip: Whether images are flipped at random.
        points: Measurements along a run.
    """

    epochs: float = 3.0
    tune_epochs: float = 3.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    validation: float = 0.1
    train_limit: int | None = None
    crop: int = 0
    flip: bool = False
    points: int = 6

    def __post_init__(self) -> None:
        positive = {"epochs": self.epochs, "tune_epochs": self.tune_epochs, "points": self.points}
        for name, value in positive.items():
            if not 0 < value < math.inf:
                raise PlanError(f"{name} is a finite number above 0; received {value}")
        shares = {"validation": self.validation, "warmup": self.warmup, "momentum": self.momentum}
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise PlanError(f"{name} is in [0, 1); received {share}")
        if not 0 <= self.weight_decay < math.inf:
            raise PlanError(f"weight_decay is a finite number ≥ 0; received {self.weight_decay}")
        if self.train_limit is not None and self.train_limit < 1:
            raise PlanError(f"train_limit is at least 1; received {self.train_limit}")
        if not self.lrs or any(not 0 < lr < math.inf for lr in self.lrs):
            raise PlanError(f"learning rates are positive, at least one; received {self.lrs}")
        if len(self.lrs) > 1 and not self.validation:
            raise PlanError("tuning over several learning rates needs a validation split")


@dataclass(frozen=True)
class RunSpec:
    """One training run.

    Attributes:
        data: Name of the data set.
        fingerprint: Digest of its content.
        network: Spec of the network.
        normalizer: Spec of the normalizer.
        condition: Who shares statistics.
        grain: Samples of one class that every batch, in every arm, is made of.
        lr: Learning rate.
        seed: Of weights, data order and dropout.
        phase: ``"tune"`` is judged on the validation split, ``"final"`` on the test set.
        recipe: How it is trained.
        reference: Normalizer whose network gives an imported network its initial weights.
        code: Digest of the source of an imported network; empty for built-in ones.
        version: Version of the rules here; a change of what a run computes raises it.
    """

    data: str
    fingerprint: str
    network: str
    normalizer: str
    condition: Condition
    grain: int
    lr: float
    seed: int
    phase: Phase
    recipe: Recipe
    reference: str = "none"
    code: str = ""
    version: int = 1

    @property
    def epochs(self) -> float:
        """Passes over the training split."""
        return self.recipe.tune_epochs if self.phase == "tune" else self.recipe.epochs

    def as_dict(self) -> dict[str, Any]:
        """Return what decides this run, as JSON values; the other phase's length does not."""
        values = asdict(self)
        recipe = values["recipe"]
        recipe["lrs"] = None
        recipe["epochs"] = self.epochs
        del recipe["tune_epochs"]
        if not self.code:  # built-in networks draw equal weights without a reference
            del values["reference"], values["code"]
        return values

    @property
    def id(self) -> str:
        """Name of the run's record: the arm, and a digest of the spec."""
        digest = hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()
        word = "".join(c if c.isalnum() else "-" for c in self.normalizer)
        return f"{word}-{self.condition.id}-{self.phase}-{digest[:12]}"
