"""Lost runs: counted once, and never drawn as if they had been trained to the end."""

from normlab.report import figures
from normlab.report.read import read

from .sample import sample


def rates_drawn(chart):
    """Learning rates that lie on the tuning curves of ``none``, from the chart's own data."""
    rows = [row for layer in chart.to_dict()["layer"] for row in layer["data"]["values"]]
    return {r["rate"] for r in rows if r["normalizer"] == "none" and "chosen" in r}


def test_a_diverged_trial_with_the_accuracy_of_guessing_is_no_point_of_the_curve():
    comparison = sample()
    arm = next(a for a in comparison["arms"] if a["normalizer"] == "none")
    for trial in arm["tuning"]:
        if trial["outcome"] == "diverged":
            trial["valid_accuracy"] = 0.1
    finished = {t["lr"] for t in arm["tuning"] if t["outcome"] == "finished"}
    assert len(finished) < len(arm["tuning"]), "the sample must have a diverged trial"
    chart = figures(comparison)[f"tuning/{arm['condition']}"]
    assert rates_drawn(chart) == finished


def test_a_diverged_run_that_is_also_counted_is_one_seed():
    comparison = sample(seeds=3)
    for arm in comparison["arms"]:
        arm.update(n=3, diverged=1)
    assert read(comparison).seeds == 3


def test_seeds_without_curves_are_those_that_were_counted():
    comparison = sample(seeds=3)
    comparison["diverged_runs"] = []
    for arm in comparison["arms"]:
        arm.update(n=3, curves=[])
    assert read(comparison).seeds == 3
