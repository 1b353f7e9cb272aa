"""Binary networks without batch normalization (2104.08215)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from normlab.bench.records import Store
from normlab.claims.claim import Claim, Observation, Paper, Scale
from normlab.claims.places import folder
from normlab.claims.rules import Greater, NotLess

PAPER = Paper(
    "binary", "\"BNN − BN = ?\": Training Binary Neural Networks without Batch Normalization",
    "Chen, Zhang, Ouyang, Liu, Shen & Wang", 2021, "2104.08215",
)  # fmt: skip
_SEEDS: dict[Scale, int] = {"smoke": 2, "cpu": 3}
_WORDS: dict[Scale, list[str]] = {
    "smoke": ["--smoke"],
    "cpu": ["--epochs", "2.5"],
}


@dataclass(frozen=True)
class TwoStages:
    """`normlab.bench.binary`: a teacher, then each arm in two stages; effects of two arms.

    Attributes:
        arm: Whose test accuracy counts.
        against: Whose is taken off.
    """

    arm: str
    against: str

    def text(self, scale: Scale) -> str:
        """Say in words what is done at that scale."""
        words = " ".join(_WORDS.get(scale, []))
        return words and f"python -m normlab.bench.binary {words}"

    def seeds(self, scale: Scale) -> int:
        """How many final runs an arm has."""
        return _SEEDS.get(scale, 0)

    def read(self, claim: Claim, scale: Scale) -> list[Observation]:
        """Read the seeds whose two arms ended; a diverged run counts as guessing."""
        place = self._place(scale)
        if not (place / "runs").is_dir():
            return []
        found: dict[int, dict[str, tuple[float, str]]] = {}
        for record in Store(place):
            spec, accuracy = record.spec, record.final("test_accuracy")
            seed = spec.get("seed")
            if spec.get("purpose") == "test" and accuracy is not None and type(seed) is int:
                name = f"{place.name}/runs/{record.id}.jsonl"
                found.setdefault(seed, {})[str(spec.get("arm"))] = 100 * accuracy, name
        pairs = {
            seed: (arms[self.arm], arms[self.against])
            for seed, arms in sorted(found.items())
            if arms.keys() >= {self.arm, self.against}
        }
        return [
            Observation(seed, {"difference": ours[0] - theirs[0]}, (ours[1], theirs[1]))
            for seed, (ours, theirs) in pairs.items()
        ]

    def run(self, claim: Claim, scale: Scale, progress: Callable[[str], None]) -> None:
        """Run or resume what the claim lacks.

        Raises:
            KeyboardInterrupt: If it was interrupted; finished runs are kept.
        """
        from normlab.bench.binary import everything, parse

        if len(self.read(claim, scale)) >= self.seeds(scale):
            return
        progress(f"{claim.id}: a teacher and two one-bit networks, two stages each")
        out = str(self._place(scale))
        everything(parse([*_WORDS[scale], "--arms", self.arm, self.against, "--out", out]))

    def _place(self, scale: Scale) -> Path:
        return folder(scale) / ("binary-fashion-mini" if scale == "cpu" else f"binary-{scale}")


_ORIGINAL = "ReActNet-A, ImageNet, 256 epochs a stage"
_UNIT = "percentage points"
CLAIMS = [
    Claim(
        "without-batch-norm", PAPER,
        "One-bit networks with scaled standardization, scaled residual branches and adaptive "
        "clipping come near those with batch normalization.",
        "68.0 against 69.4 % (ImageNet), 92.08 % with a drop of 0.23 to 0.44 (CIFAR-10)", _ORIGINAL,
        TwoStages("norm_free", "batch"), NotLess("difference", 1.5, unit=_UNIT),
        note="a network of 18,000 bits, two and a half epochs a stage, batches of 64",
    ),
    Claim(
        "needs-its-parts", PAPER,
        "Taking batch normalization out without these parts costs most of the accuracy.",
        "34.1 against 68.0 %", _ORIGINAL,
        TwoStages("norm_free", "none"), Greater("difference", unit=_UNIT),
        note="six binary layers instead of twenty-six, and rates tuned for each arm",
    ),
]  # fmt: skip
