"""Rules: what reproduces, contradicts, and decides nothing."""

import math

import pytest
from scipy import stats

from normlab.claims.rules import Each, Equal, Exact, Greater, NotLess, interval


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
