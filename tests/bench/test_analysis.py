import itertools

import pytest

from normlab.bench.analysis import analyse, interval, paired
from normlab.bench.recipe import Condition
from normlab.bench.records import Store

from .conftest import RECIPE, make_plan

CONDITIONS = (Condition(40, 40), Condition(40, 4, "class"))


def put(store, spec, accuracy, outcome="finished", **end):
    environment = {"cpu": "x", "torch": "2"}
    start = {"event": "start", "spec": spec.as_dict(), "environment": environment}
    store.append(spec.id, {**start, "parameters": 10, "saved_for_backward_bytes": 100})
    point = {"event": "point", "step": 9, "epoch": 1.0, "train_loss": 1.0}
    store.append(spec.id, {**point, "valid_accuracy": accuracy, "seconds_per_step": 0.01})
    key = "valid_accuracy" if spec.phase == "tune" else "test_accuracy"
    store.append(spec.id, {"event": "end", "outcome": outcome, key: accuracy, **end})


@pytest.fixture
def plan(data):
    names = ("none", "instance", "batch")
    return make_plan(data, names, conditions=CONDITIONS, seeds=(0, 1, 2))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


FINALS = {
    ("none", "b40-n40-iid"): (0.80, 0.81, 0.82),
    ("instance", "b40-n40-iid"): (0.84, 0.86, 0.85),
    ("batch", "b40-n40-iid"): (0.87, 0.88, 0.89),
    ("none", "b40-n4-class"): (0.80, 0.81, 0.82),
    ("instance", "b40-n4-class"): (0.84, 0.86, 0.85),
    ("batch", "b40-n4-class"): (0.50, 0.55, 0.60),
}


@pytest.fixture
def filled(plan, store):
    for normalizer, condition in plan.arms():
        for spec in plan.tuning(normalizer, condition):
            put(store, spec, 0.5 + spec.lr)
        for spec in plan.finals(normalizer, condition, 0.1):
            put(store, spec, FINALS[normalizer, condition.id][spec.seed])
    return store


def arm(comparison, normalizer, condition):
    return next(
        a
        for a in comparison["arms"]
        if (a["normalizer"], a["condition"]) == (normalizer, condition)
    )


def test_means_intervals_and_paired_differences(plan, filled):
    comparison = analyse(plan, filled)
    assert comparison["complete"]
    assert comparison["runs_done"] == comparison["runs_planned"] == 6 * (2 + 3)
    instance = arm(comparison, "instance", "b40-n4-class")
    assert instance["lr"] == 0.1
    assert instance["lr_at_edge"]
    assert instance["accuracy"]["mean"] == pytest.approx(0.85)
    difference = instance["difference"]
    assert difference["mean"] == pytest.approx(0.30)
    assert difference["n"] == 3
    # t = mean/(sd/√n) of (0.34, 0.31, 0.25) is 11.34; two-sided at 2 degrees of freedom
    assert difference["p"] == pytest.approx(0.00769, abs=1e-4)
    assert arm(comparison, "batch", "b40-n4-class")["difference"] is None


def test_the_summary_follows_from_the_numbers(plan, filled):
    text = " ".join(analyse(plan, filled)["summary"])
    assert "When 40 mixed samples share statistics (optimizer batch 40), batch is best" in text
    assert "When 4 samples of one class share statistics" in text
    assert "instance is best at 85.0 %" in text
    assert "it beats batch by 30.0 ±" in text
    assert "batch -33.0" in text
    assert "none, instance stay within 0.5" in text
    assert "edge of the grid" in text


def test_diverged_runs_are_counted_and_shown(plan, filled):
    spec = plan.finals("none", CONDITIONS[0], 0.1)[0]
    filled.path(spec.id).unlink()
    put(filled, spec, 0.1, "diverged", reason="the loss became nan")
    comparison = analyse(plan, filled)
    none = arm(comparison, "none", CONDITIONS[0].id)
    assert none["diverged"] == 1
    assert none["accuracy"]["mean"] == pytest.approx((0.1 + 0.81 + 0.82) / 3)
    assert [r["reason"] for r in comparison["diverged_runs"]] == ["the loss became nan"]
    assert "1 run diverged: none 1." in comparison["summary"]


def test_an_arm_that_cannot_run_leaves_the_rest_complete(plan, store):
    for normalizer, condition in plan.arms():
        fails = normalizer == "none"
        for spec in plan.tuning(normalizer, condition):
            put(store, spec, None if fails else 0.5, "failed" if fails else "finished", reason="x")
        for spec in [] if fails else plan.finals(normalizer, condition, RECIPE.lrs[0]):
            put(store, spec, 0.5)
    comparison = analyse(plan, store)
    assert comparison["complete"]
    none = arm(comparison, "none", CONDITIONS[0].id)
    assert none["lr"] is None
    assert none["accuracy"] is None
    assert none["failed"] == 2
    assert any("failed: none" in sentence for sentence in comparison["summary"])


def test_nothing_yet_is_said_plainly(plan, store):
    comparison = analyse(plan, store)
    assert not comparison["complete"]
    assert comparison["runs_done"] == 0
    assert comparison["summary"] == [
        "No final run has finished yet, so there is nothing to compare."
    ]


def test_a_record_with_nonsense_in_it_is_survived(plan, filled):
    spec = plan.finals("batch", CONDITIONS[0], 0.1)[0]
    filled.append(spec.id, {"event": "point", "step": "x", "seconds_per_step": "<b>"})
    filled.append(spec.id, {"event": "end", "outcome": "finished", "test_accuracy": "much"})
    batch = arm(analyse(plan, filled), "batch", CONDITIONS[0].id)
    assert batch["n"] == 2


@pytest.mark.parametrize("value", ["abc", 10**400, 37.0, -5.0, [1], True])
def test_an_accuracy_that_cannot_be_is_not_believed(plan, filled, value):
    spec = plan.finals("batch", CONDITIONS[0], 0.1)[0]
    filled.append(spec.id, {"event": "point", "step": 1, "seconds_per_step": 10**400})
    filled.append(spec.id, {"event": "end", "outcome": "finished", "test_accuracy": value})
    assert arm(analyse(plan, filled), "batch", CONDITIONS[0].id)["n"] == 2


@pytest.mark.parametrize("seed", ["abc", None, 1, [1]])
def test_a_record_that_says_it_is_another_run_is_not_that_run(plan, filled, seed):
    spec = plan.finals("batch", CONDITIONS[0], 0.1)[0]
    lines = list(filled.lines(spec.id))
    lines[0]["spec"]["seed"] = seed
    filled.rewrite(spec.id, lines)
    comparison = analyse(plan, filled)
    assert arm(comparison, "batch", CONDITIONS[0].id)["n"] == 2
    assert not comparison["complete"]


def test_no_difference_is_not_called_a_win(plan, store):
    for normalizer, condition in plan.arms():
        for spec in plan.tuning(normalizer, condition):
            put(store, spec, 0.1)
        for spec in plan.finals(normalizer, condition, RECIPE.lrs[0]):
            put(store, spec, 0.1)
    text = " ".join(analyse(plan, store)["summary"])
    assert "beats" not in text
    assert "no different from batch" in text


def test_an_uncertain_lead_is_not_called_a_win(plan, store):
    values = {"none": (0.5, 0.9, 0.7), "instance": (0.1, 0.1, 0.1), "batch": (0.69, 0.69, 0.7)}
    for normalizer, condition in plan.arms():
        for spec in plan.tuning(normalizer, condition):
            put(store, spec, 0.1)
        for spec in plan.finals(normalizer, condition, RECIPE.lrs[0]):
            put(store, spec, values[normalizer][spec.seed])
    text = " ".join(analyse(plan, store)["summary"])
    assert "it is ahead of batch by" in text
    assert "could be chance" in text


def test_the_bootstrap_interval_matches_full_enumeration():
    values = [0.1, 0.4, 0.7]
    means = sorted(sum(draw) / 3 for draw in itertools.product(values, repeat=3))
    found = interval(values)
    # All 27 resamples of three values; their 2.5 % and 97.5 % quantiles are the extremes.
    assert found["low"] == pytest.approx(means[0])
    assert found["high"] == pytest.approx(means[-1])
    assert interval([0.3]) == {"mean": 0.3, "low": 0.3, "high": 0.3, "values": [0.3]}
    assert interval([]) is None


def test_pairs_are_made_by_seed():
    found = paired({0: 0.5, 2: 0.9}, {0: 0.4, 1: 0.0, 2: 0.7})
    assert found["n"] == 2
    assert found["mean"] == pytest.approx(0.15)
    assert paired({0: 0.5}, {1: 0.5}) is None
    assert paired({0: 0.5}, {0: 0.4})["p"] is None


def test_files_that_are_no_records_are_named(plan, filled):
    assert not any("could not be read" in line for line in analyse(plan, filled)["summary"])
    (filled.runs / "torn.jsonl").write_text("{")
    said = analyse(plan, filled)["summary"][-1]
    assert said == "1 record file could not be read and is left out: torn.jsonl."
