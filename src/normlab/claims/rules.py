"""How observations decide on a claim: rules that are fixed before anything is run.

Effects are signed so that what the paper claims is positive. Intervals are Student's t intervals
over repetitions, at 95 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Verdict = Literal[
    "reproduced", "partly", "not reproduced", "contradicted", "not testable here", "open"
]


@dataclass(frozen=True)
class Judgement:
    """What records say of a claim.

    Attributes:
        verdict: The word.
        effect: Its size in the rule's unit; None where there are no records.
        low: Lower end of the 95 % interval.
        high: Upper end.
        n: Repetitions.
        records: What it rests on.
        why: What the verdict alone does not say: which condition fails, what is missing, or how
            many repetitions an undecided one would take.
        undecided: Whether it is ``"not reproduced"`` only since the interval reaches across a
            border of the rule: the repetitions are too few to tell, one way or the other.
    """

    verdict: Verdict
    effect: float | None
    low: float | None
    high: float | None
    n: int
    records: tuple[str, ...] = ()
    why: str = ""
    undecided: bool = False


Values = Mapping[str, float]


class Rule(Protocol):
    """Decides from the values of all repetitions."""

    @property
    def unit(self) -> str:
        """What the effect is measured in."""

    def text(self) -> str:
        """The rule in words."""

    def judge(self, observations: Sequence[Values]) -> Judgement:
        """Compute the verdict."""


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t interval; all three equal for one value.

    Args:
        values: One for each repetition.

    Returns:
        Mean, lower and upper end; nan where a value is nan.

    Example:
        >>> [round(v, 3) for v in interval([1.0, 2.0, 3.0])]
        [2.0, -0.484, 4.484]
    """
    mean = statistics.fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, mean, mean
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def repetitions(mean: float, half: float, n: int, border: float) -> int | None:
    """How many repetitions of that mean and spread keep a 95 % interval to one side of a border.

    Args:
        mean: Of the n values.
        half: Half the width of their interval.
        n: How many they are.
        border: What the interval is not to reach across.

    Returns:
        The least number, from n on; None from 1000 on.

    Example:
        >>> mean, low, high = interval([1.0, 2.0, 3.0])  # reaches below 0
        >>> repetitions(mean, high - mean, 3, 0.0)
        4
    """
    from scipy.stats import t

    deviation = half * math.sqrt(n) / float(t.ppf(0.975, n - 1))
    for count in range(n, 1000):
        if float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count) < abs(mean - border):
            return count
    return None


def _over(
    values: Sequence[float], borders: Sequence[float], verdict_at: Callable[[float], Verdict]
) -> Judgement:
    """The verdict of a mean and its interval; a single repetition decides nothing."""
    n = len(values)
    mean, low, high = interval(values)
    if n < 2:
        why = "undecided: one repetition has no interval"
        return Judgement("not reproduced", mean, low, high, n, why=why, undecided=True)
    return _by_interval(
        (mean, low, high, n), borders, verdict_at,
        lambda border: repetitions(mean, high - mean, n, border),
    )  # fmt: skip


def _by_interval(
    found: tuple[float, float, float, int],
    borders: Sequence[float],
    verdict_at: Callable[[float], Verdict],
    enough: Callable[[float], int | None],
) -> Judgement:
    """The verdict of where an interval lies between the rule's borders.

    Args:
        found: Effect, lower and upper end, n.
        borders: In ascending order; an interval that reaches across one decides nothing.
        verdict_at: The verdict of an effect that were known exactly.
        enough: How many repetitions would keep the interval off a border.
    """
    effect, low, high, n = found
    if not math.isfinite(low + high):
        why = "a repetition gave no finite number"
        return Judgement("not reproduced", effect, low, high, n, why=why)
    between = [border for border in borders if low <= border <= high]
    words = {verdict_at(low), verdict_at(high), *map(verdict_at, between)}
    if "reproduced" not in words and "not reproduced" in words:
        why = f"the effect falls short of {max(borders):g}"
        return Judgement("not reproduced", effect, low, high, n, why=why)
    if len(words) == 1:
        return Judgement(words.pop(), effect, low, high, n)
    across = " and ".join(f"{border:g}" for border in between)
    count = enough(min(between, key=lambda border: abs(border - effect)))
    why = (
        f"undecided: the interval reaches across {across}; at this mean and spread it would take "
        f"{count or 'more than 1000'} repetitions"
    )
    return Judgement("not reproduced", effect, low, high, n, why=why, undecided=True)


@dataclass(frozen=True)
class Exact:
    """A law: the value is the expected one, in every repetition.

    Attributes:
        key: Name of the value.
        tolerance: Largest distance from `expected`, with its reason in `because`.
        expected: What the law says.
        because: Reason of the tolerance.
    """

    key: str
    tolerance: float
    expected: float = 0.0
    because: str = "rounding"
    unit: str = "largest distance from the law"

    def text(self) -> str:
        """The rule in words."""
        return (
            f"exact: |{self.key} − {self.expected:g}| ≤ {self.tolerance:g} in every repetition "
            f"({self.because})"
        )

    def judge(self, observations: Sequence[Values]) -> Judgement:
        """Reproduced if no repetition is off, else contradicted."""
        off = [abs(o[self.key] - self.expected) for o in observations]
        worst = max((math.inf if math.isnan(v) else v) for v in off)
        verdict: Verdict = "reproduced" if worst <= self.tolerance else "contradicted"
        return Judgement(verdict, worst, min(off), worst, len(off))


@dataclass(frozen=True)
class Greater:
    """The effect is positive: the interval lies above `margin`.

    Attributes:
        key: Name of the effect, one number a repetition (for two arms, their paired difference).
        margin: What the effect has to exceed; 0 for its sign alone.
        unit: Of the effect.
    """

    key: str
    margin: float = 0.0
    unit: str = ""

    def text(self) -> str:
        """The rule in words."""
        return (
            f"the 95 % t interval of {self.key} lies above {self.margin:g} (reproduced) or below "
            f"{-self.margin or 0:g} (contradicted); else not reproduced"
        )

    def judge(self, observations: Sequence[Values]) -> Judgement:
        """Compute the verdict."""

        def verdict(effect: float) -> Verdict:
            if abs(effect) <= self.margin:
                return "not reproduced"
            return "reproduced" if effect > 0 else "contradicted"

        borders = (-self.margin, self.margin) if self.margin else (0.0,)
        return _over([o[self.key] for o in observations], borders, verdict)


@dataclass(frozen=True)
class Equal:
    """Two things are the same but for `margin`: the interval of the effect lies within ±margin.

    Attributes:
        key: Name of the difference.
        margin: The least difference that would count.
        unit: Of the difference.
    """

    key: str
    margin: float
    unit: str = ""

    def text(self) -> str:
        """The rule in words."""
        return (
            f"the 95 % t interval of {self.key} lies within ±{self.margin:g} (reproduced) or "
            "wholly outside (contradicted); else not reproduced"
        )

    def judge(self, observations: Sequence[Values]) -> Judgement:
        """Compute the verdict."""

        def verdict(effect: float) -> Verdict:
            return "reproduced" if abs(effect) <= self.margin else "contradicted"

        borders = (-self.margin, self.margin)
        return _over([o[self.key] for o in observations], borders, verdict)


@dataclass(frozen=True)
class NotLess:
    """The effect is not below −margin: nothing is lost, or nothing is gained by the other.

    Attributes:
        key: Name of the effect.
        margin: The least loss that would count.
        unit: Of the effect.
    """

    key: str
    margin: float
    unit: str = ""

    def text(self) -> str:
        """The rule in words."""
        return (
            f"the 95 % t interval of {self.key} lies above {-self.margin:g} (reproduced) or below "
            "(contradicted); else not reproduced"
        )

    def judge(self, observations: Sequence[Values]) -> Judgement:
        """Compute the verdict."""

        def verdict(effect: float) -> Verdict:
            if effect == -self.margin:
                return "not reproduced"
            return "reproduced" if effect > -self.margin else "contradicted"

        return _over([o[self.key] for o in observations], (-self.margin,), verdict)


@dataclass(frozen=True)
class Correlated:
    """Two values go together across repetitions, or against each other.

    The effect is Spearman's ρ, with the 95 % interval tanh(atanh ρ ± 1.96·√((1 + ρ²/2)/(n − 3)))
    (Bonett & Wright 2000, Psychometrika 65).

    Attributes:
        x: Name of one value.
        y: Name of the other.
        sign: 1, or −1 where the claim is that one falls as the other rises; the effect is sign·ρ.
        unit: Of the effect.
    """

    x: str
    y: str
    sign: int = 1
    unit: str = "Spearman's ρ"

    def text(self) -> str:
        """The rule in words."""
        reversed_ = "" if self.sign > 0 else ", sign reversed,"
        return (
            f"the 95 % interval of Spearman's ρ of {self.x} and {self.y}{reversed_} lies above 0 "
            "(reproduced) or below 0 (contradicted); else not reproduced"
        )

    def judge(self, observations: Sequence[Values]) -> Judgement:
        """Compute the verdict."""
        from scipy.stats import spearmanr

        n = len(observations)
        columns = [[o[key] for o in observations] for key in (self.x, self.y)]
        if n < 4:
            why = "undecided: fewer than four repetitions have no interval"
            return Judgement("not reproduced", math.nan, math.nan, math.nan, n, (), why, True)
        if not all(map(math.isfinite, columns[0] + columns[1])) or any(
            min(column) == max(column) for column in columns
        ):
            why = "a value is not finite, or the same in all repetitions"
            return Judgement("not reproduced", math.nan, math.nan, math.nan, n, (), why)
        rho = self.sign * float(spearmanr(*columns).statistic)
        ends = [_fisher(rho, n, side * _NORMAL) for side in (-1, 1)]

        def verdict(effect: float) -> Verdict:
            if effect == 0:
                return "not reproduced"
            return "reproduced" if effect > 0 else "contradicted"

        def enough(border: float) -> int | None:
            counts = range(n, 1000)
            return next((m for m in counts if _fisher(abs(rho), m, -_NORMAL) > border), None)

        return _by_interval((rho, ends[0], ends[1], n), (0.0,), verdict, enough)


_NORMAL = 1.959964  # of the normal distribution, the 97.5 % quantile


def _fisher(rho: float, n: int, quantile: float) -> float:
    """An end of the interval of Spearman's ρ; ρ itself where it is ±1."""
    if abs(rho) > 1 - 1e-12:
        return rho
    return math.tanh(math.atanh(rho) + quantile * math.sqrt((1 + rho**2 / 2) / (n - 3)))


@dataclass(frozen=True)
class Each:
    """A claim over several conditions: each has a rule of its own.

    Reproduced if all are; contradicted if one is and none is reproduced; partly if some are; the
    effect that is shown is that of the condition farthest from being reproduced.
    """

    rules: tuple[Greater | Equal | NotLess | Exact, ...]

    @property
    def unit(self) -> str:
        """That of the first rule."""
        return self.rules[0].unit

    def text(self) -> str:
        """The rules in words."""
        return "; and ".join(rule.text() for rule in self.rules)

    def judge(self, observations: Sequence[Values]) -> Judgement:
        """Combine the rules' verdicts."""
        found = [rule.judge(observations) for rule in self.rules]
        words = {one.verdict for one in found}
        verdict: Verdict
        if words == {"reproduced"}:
            verdict = "reproduced"
        elif "reproduced" in words:
            verdict = "partly"
        else:
            verdict = "contradicted" if "contradicted" in words else "not reproduced"
        order: tuple[Verdict, ...] = ("contradicted", "not reproduced", "reproduced")
        worst = min(found, key=lambda one: order.index(one.verdict))
        why = "; ".join(
            f"{rule.key}: {one.why or one.verdict}"
            for rule, one in zip(self.rules, found, strict=True)
        )
        return Judgement(
            verdict, worst.effect, worst.low, worst.high, len(observations), why=why,
            undecided=verdict == "not reproduced" and any(one.undecided for one in found),
        )  # fmt: skip


def keys(rule: Rule) -> frozenset[str]:
    """Names of the values that a rule decides from.

    Args:
        rule: One of this module's, or one that has a `key`.

    Example:
        >>> sorted(keys(Each((Equal("near", 0.1), NotLess("gain", 0.0)))))
        ['gain', 'near']
    """
    if isinstance(rule, Each):
        return frozenset().union(*map(keys, rule.rules))
    if isinstance(rule, Correlated):
        return frozenset({rule.x, rule.y})
    return frozenset({str(key)} if (key := getattr(rule, "key", None)) else ())
