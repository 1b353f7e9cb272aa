import dataclasses

import pytest

from normlab.bench.choice import ChoiceError, Term, parse
from normlab.bench.plan import TUNING_SEED, Plan, chosen_rate
from normlab.bench.recipe import Condition, PlanError, Recipe
from normlab.bench.records import Record, Store, StoreError

from .conftest import RECIPE, make_plan


@pytest.mark.parametrize(
    ("spec", "name", "options"),
    [
        ("batch", "batch", {}),
        (" group:groups=4 ", "group", {"groups": 4}),
        ("lp_batch:p=max,eps=1e-3", "lp_batch", {"p": "max", "eps": 1e-3}),
        ("batch:affine=false,momentum=none", "batch", {"affine": False, "momentum": None}),
    ],
)
def test_choices_are_read(spec, name, options):
    choice = parse(spec)
    assert choice.label == spec.strip()
    assert choice.terms == (Term(name, options),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("grop", "Did you mean group"),
        ("group:grups=4", "Did you mean groups"),
        ("group:groups", "name=value"),
        ("group:groups=4,groups=2", "each once"),
        ("", "no method is called ''"),
    ],
)
def test_wrong_choices_say_what_is_wrong(spec, message):
    with pytest.raises(ChoiceError, match=message):
        parse(spec)


def test_short_runs_shrink_the_schedules_of_renormalization_unless_told_otherwise():
    layer = parse("batch_renorm").factory(1300)(8)  # a hundredth of the paper's steps
    assert layer.statistics.rmax.begin == 50
    assert layer.statistics.rmax.end == 400
    assert layer.statistics.momentum == pytest.approx(0.01)
    kept = parse("batch_renorm:rmax=2,momentum=0.5").factory(1300)(8)
    assert kept.statistics.rmax == 2
    assert kept.statistics.momentum == 0.5
    assert parse("batch_renorm").factory(None)(8).statistics.rmax.begin == 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 10), "divides"),
        ((64, 0), "divides"),
        ((64, 8, "sorted"), "'iid' or 'class'"),
        ((64, 64, "class"), "one class a step"),
    ],
)
def test_impossible_conditions(arguments, message):
    with pytest.raises(PlanError, match=message):
        Condition(*arguments)


def test_conditions_say_what_they_are():
    assert Condition(64, 8, "class").label(8) == "8 samples of one class share statistics"
    assert Condition(64, 64).label(1) == "64 i.i.d. samples share statistics"
    # Batches made of groups of one class are mixed, but not quite i.i.d.
    assert Condition(64, 64).label(8) == "64 mixed samples share statistics"
    assert "own" in Condition(64, 1).label(1)
    assert "optimizer batch 32" in Condition(32, 8).label(1)


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": 0},
        {"points": 0},
        {"validation": 1.0},
        {"lrs": ()},
        {"lrs": (0.1, -1.0)},
        {"validation": 0.0},
        {"epochs": float("inf")},
        {"lrs": (float("inf"),)},
        {"weight_decay": float("nan")},
        {"weight_decay": -1.0},
        {"momentum": 2.0},
        {"train_limit": 0},
    ],
)
def test_impossible_recipes(options):
    with pytest.raises(PlanError):
        dataclasses.replace(RECIPE, **options)


def test_a_run_is_named_by_everything_that_decides_it_and_nothing_else(plan):
    condition = plan.conditions[0]
    one = plan.spec("batch", condition, 0.1, 0, "final")
    assert one.id == plan.spec("batch", condition, 0.1, 0, "final").id
    others = [
        plan.spec("none", condition, 0.1, 0, "final"),
        plan.spec("batch", Condition(20, 10), 0.1, 0, "final"),
        plan.spec("batch", condition, 0.2, 0, "final"),
        plan.spec("batch", condition, 0.1, 1, "final"),
        plan.spec("batch", condition, 0.1, 0, "tune"),
        dataclasses.replace(one, fingerprint="other"),
        dataclasses.replace(one, grain=2),
        dataclasses.replace(one, recipe=dataclasses.replace(RECIPE, weight_decay=0.0)),
    ]
    assert len({one.id, *(o.id for o in others)}) == len(others) + 1
    # Where the code of a network of one's own has changed, it is another network.
    assert dataclasses.replace(one, code="a").id != dataclasses.replace(one, code="b").id
    # Another baseline leaves built-in networks what they are.
    assert dataclasses.replace(one, reference="layer").id == one.id
    # Another grid, or another length of tuning, leaves final runs what they were.
    for change in ({"lrs": (0.1,)}, {"tune_epochs": 2}):
        recipe = dataclasses.replace(RECIPE, **change)
        assert dataclasses.replace(one, recipe=recipe).id == one.id


def test_all_arms_get_batches_that_the_class_conditions_need(data):
    conditions = (Condition(40, 40), Condition(40, 4, "class"), Condition(40, 2, "class"))
    plan = make_plan(data, conditions=conditions)
    assert plan.grain == 4
    assert {spec.grain for arm in plan.arms() for spec in plan.tuning(*arm)} == {4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizers": ()}, "needs a normalizer"),
        ({"normalizers": ("batch", "batch")}, "twice"),
        ({"normalizers": ("batch", "group:groups=2", "group: groups=2")}, "one arm twice"),
        ({"baseline": "layer"}, "baseline"),
        ({"seeds": (0, TUNING_SEED)}, "kept for tuning"),
        ({"conditions": (Condition(60, 6, "class"), Condition(60, 4, "class"))}, "divide"),
        ({"conditions": (Condition(20, 20), Condition(64, 8, "class"))}, "divide"),
    ],
)
def test_impossible_plans(plan, change, message):
    with pytest.raises(PlanError, match=message):
        dataclasses.replace(plan, **change)


def test_a_plan_survives_its_file(plan, tmp_path):
    store = Store(tmp_path)
    plan.save(store)
    assert Plan.load(store) == plan


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"recipe": {"lrs": 3}}', "null"])
def test_a_corrupt_plan_is_a_clear_error(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(StoreError, match=r"plan\.json"):
        Plan.load(Store(tmp_path))


def _tuned(accuracy, outcome="finished"):
    end = {"outcome": outcome, "valid_accuracy": accuracy}
    return Record("a", {}, {}, end=end)


def test_the_best_validated_rate_is_chosen(plan):
    low, high = RECIPE.lrs
    assert chosen_rate(plan, [_tuned(0.5), _tuned(0.6)]) == high
    assert chosen_rate(plan, [_tuned(0.6), _tuned(0.6)]) == low
    assert chosen_rate(plan, [_tuned(0.1), _tuned(0.9, "diverged")]) == low
    assert chosen_rate(plan, [_tuned(0.1, "diverged"), _tuned(0.1, "diverged")]) == low
    assert chosen_rate(plan, [_tuned(None, "failed"), _tuned(0.2)]) == high
    assert chosen_rate(plan, [_tuned(None, "failed"), None]) is None


def test_one_rate_needs_no_tuning(data):
    plan = make_plan(data, recipe=Recipe(lrs=(0.1,), validation=0.0))
    assert plan.tuning("batch", plan.conditions[0]) == []
    assert chosen_rate(plan, []) == 0.1
    assert plan.runs_planned == 4
