"""A comparison small enough for tests: a two-layer network on 200 images."""

from __future__ import annotations

import pytest

from normlab.bench.plan import Plan
from normlab.bench.recipe import Condition, Recipe
from normlab.bench.train import Task
from normlab.data import load


class Quiet:
    """A watcher that remembers what it was told."""

    def __init__(self):
        self.planned, self.ended_runs, self.epochs = None, [], 0.0

    def plan(self, units, done, runs, ended):
        self.planned = (units, done, runs, ended)

    def trained(self, run_id, share):
        self.epochs += share

    def ended(self, spec, record):
        self.ended_runs.append((spec, record))


@pytest.fixture
def watcher():
    return Quiet()


@pytest.fixture(scope="session")
def data():
    return load("fashion-mini")


RECIPE = Recipe(epochs=1, tune_epochs=0.5, lrs=(0.05, 0.1), train_limit=200, points=2)


def make_plan(data, normalizers=("none", "batch"), conditions=None, recipe=RECIPE, seeds=(0, 1)):
    return Plan(
        data="fashion-mini",
        fingerprint=data.fingerprint(),
        network="cnn:depth=2,width=4",
        normalizers=tuple(normalizers),
        baseline=normalizers[-1],
        conditions=conditions or (Condition(20, 20),),
        seeds=seeds,
        recipe=recipe,
        command="normlab compare",
    )


@pytest.fixture
def plan(data):
    return make_plan(data)


@pytest.fixture
def spec(plan):
    return plan.spec("batch", plan.conditions[0], 0.1, 0, "final")


@pytest.fixture(scope="session")
def task(data):
    return Task(data, make_plan(data).spec("batch", Condition(20, 20), 0.1, 0, "final"))
