"""Rules: what reproduces, contradicts, and decides nothing."""

import math

import pytest
from scipy import stats

from normlab.claims.rules import (
    Correlated,
    Each,
    Equal,
    Exact,
    Greater,
    NotLess,
    interval,
    keys,
    repetitions,
)


def values(*numbers, key="d"):
    return [{key: v} for v in numbers]


def test_interval_is_students():
    data = [1.0, 2.0, 4.0, 4.5]
    expected = stats.ttest_1samp(data, 0).confidence_interval(0.95)
    mean, low, high = interval(data)
    assert mean == pytest.approx(2.875)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    assert interval([3.0]) == (3.0, 3.0, 3.0)
    assert all(math.isnan(v) for v in interval([1.0, math.nan]))


@pytest.mark.parametrize(
    ("rule", "data", "verdict"),
    [
        (Greater("d"), (1.0, 1.1, 0.9), "reproduced"),
        (Greater("d"), (-1.0, -1.1, -0.9), "contradicted"),
        (Greater("d"), (1.0, -1.0, 0.5), "not reproduced"),
        (Greater("d"), (1.0,), "not reproduced"),
        (Greater("d", 2.0), (1.0, 1.1, 0.9), "not reproduced"),
        (Greater("d"), (1.0, math.nan, 1.0), "not reproduced"),
        (Equal("d", 1.0), (0.1, -0.1, 0.0), "reproduced"),
        (Equal("d", 1.0), (3.0, 3.1, 2.9), "contradicted"),
        (Equal("d", 1.0), (0.0, 3.0, -3.0), "not reproduced"),
        (Equal("d", 1.0), (0.0,), "not reproduced"),
        (NotLess("d", 1.0), (-0.5, -0.4, -0.6), "reproduced"),
        (NotLess("d", 1.0), (-5.0, -5.1, -4.9), "contradicted"),
        (NotLess("d", 1.0), (5.0, -5.0, 0.0), "not reproduced"),
        (Exact("d", 1e-9), (0.0, 1e-10), "reproduced"),
        (Exact("d", 1e-9), (0.0, 1e-8), "contradicted"),
        (Exact("d", 1e-9), (0.0, math.nan), "contradicted"),
        (Exact("d", 1e-9, expected=1.0), (1.0,), "reproduced"),
    ],
)
def test_verdicts(rule, data, verdict):
    assert rule.judge(values(*data)).verdict == verdict
    assert rule.text()


def test_several_conditions():
    rules = (Greater("a"), Greater("b"))

    def judge(a, b):
        rows = [{"a": a + e, "b": b + e} for e in (-0.1, 0.0, 0.1)]
        return Each(rules).judge(rows)

    assert judge(1, 1).verdict == "reproduced"
    assert judge(1, 0).verdict == "partly"
    assert judge(1, -1).verdict == "partly"
    assert judge(0, 0).verdict == "not reproduced"
    assert judge(-1, 0).verdict == "contradicted"
    assert judge(1, -2).effect == pytest.approx(-2)  # the one farthest from being reproduced


@pytest.mark.parametrize(
    ("rule", "data", "across"),
    [
        (Greater("d"), (1.0, -1.0, 0.5), "0"),
        (Greater("d", 2.0), (0.0, 3.0, 5.0), "-2 and 2"),
        (Equal("d", 1.0), (0.0, 3.0, -3.0), "-1 and 1"),
        (Equal("d", 1.0), (0.8, 0.9, 1.0), "1"),
        (NotLess("d", 1.0), (5.0, -5.0, 0.0), "-1"),
    ],
)
def test_what_is_undecided_says_what_it_would_take(rule, data, across):
    judged = rule.judge(values(*data))
    assert judged.undecided
    assert f"reaches across {across};" in judged.why


def test_what_is_not_undecided():
    assert not Greater("d").judge(values(1.0, 1.1, 0.9)).undecided
    small = Greater("d", 2.0).judge(values(1.0, 1.1, 0.9))  # decided: there is an effect below 2
    assert (small.verdict, small.undecided, small.why) == (
        "not reproduced", False, "the effect falls short of 2",
    )  # fmt: skip
    opposite = Greater("d", 2.0).judge(values(-1.9, -2.1, -2.0))
    assert (opposite.verdict, opposite.undecided) == ("not reproduced", False)
    assert not Greater("d").judge(values(1.0, math.nan, 1.0)).undecided
    assert Greater("d").judge(values(1.0)).undecided  # one repetition


@pytest.mark.parametrize("data", [(1.0, 2.0, 4.0, -1.0), (0.3, -0.2, 0.9)])
def test_as_many_repetitions_as_it_would_take(data):
    """So many values of that mean and spread clear the border, and one less does not."""
    mean, low, high = interval(data)
    assert low < 0
    enough = repetitions(mean, high - mean, len(data), 0.0)
    half = {
        n: stats.t.ppf(0.975, n - 1) * stats.tstd(data) / math.sqrt(n) for n in (enough - 1, enough)
    }
    assert half[enough] < mean <= half[enough - 1]
    assert repetitions(0.0, 1.0, 3, 0.0) is None


def test_several_conditions_say_which():
    rows = [{"a": 1 + e, "b": e} for e in (-0.1, 0.0, 0.1)]
    judged = Each((Greater("a"), Greater("b"))).judge(rows)
    assert judged.why.startswith("a: reproduced; b: undecided: the interval reaches across 0")
    assert not judged.undecided  # partly
    assert Each((Greater("b"),)).judge(rows).undecided


def pairs(x, y):
    return [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]


def test_correlation():
    x, y = [3, 1, 4, 1, 5, 9, 2, 6], [2.0, 1.0, 3.5, 0.5, 6.0, 5.0, 2.0, 8.0]
    rho = stats.pearsonr(stats.rankdata(x), stats.rankdata(y)).statistic  # ranks, by their mean
    z, se = math.atanh(rho), math.sqrt((1 + rho**2 / 2) / 5)
    judged = Correlated("x", "y").judge(pairs(x, y))
    assert (judged.verdict, judged.n) == ("reproduced", 8)
    ends = stats.norm.interval(0.95, z, se)
    # 1.96 has seven digits
    assert (judged.effect, judged.low, judged.high) == pytest.approx(
        (rho, math.tanh(ends[0]), math.tanh(ends[1])), rel=1e-6
    )
    assert Correlated("x", "y", sign=-1).judge(pairs(x, y)).verdict == "contradicted"
    assert keys(Correlated("x", "y")) == {"x", "y"}


def test_correlation_undecided():
    judged = Correlated("x", "y").judge(pairs([1, 2, 3, 4, 5], [1, 3, 2, 5, 0]))
    assert (judged.verdict, judged.undecided) == ("not reproduced", True)
    rho = judged.effect
    count = int(judged.why.split()[-2])
    reach = {n: 1.96 * math.sqrt((1 + rho**2 / 2) / (n - 3)) for n in (count - 1, count)}
    assert reach[count] < abs(math.atanh(rho)) <= reach[count - 1]


@pytest.mark.parametrize(
    ("x", "y", "verdict", "undecided"),
    [
        ([1, 2, 3], [1, 2, 3], "not reproduced", True),  # too few for an interval
        ([1, 2, 3, 4], [1, 2, 3, 4], "reproduced", False),
        ([1, 1, 1, 1], [1, 2, 3, 4], "not reproduced", False),
        ([1, 2, math.nan, 4], [1, 2, 3, 4], "not reproduced", False),
    ],
)
def test_correlation_at_its_ends(x, y, verdict, undecided):
    judged = Correlated("x", "y").judge(pairs(x, y))
    assert (judged.verdict, judged.undecided) == (verdict, undecided)
