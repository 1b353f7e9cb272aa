"""The page where parts of a comparison are missing, odd or hostile."""

import io
import sys

import pytest
from rich.console import Console

from normlab.report import figures, render, terminal_table

from .sample import sample
from .test_report import CASES, Page

ATTACK = "<script>alert(1)</script>\"'"


def shown(comparison):
    file = io.StringIO()
    Console(file=file, width=160).print(terminal_table(comparison))
    return file.getvalue()


def checked(comparison):
    text = render(comparison)
    assert "<script>alert" not in text
    page = Page(text)
    assert not page.open
    assert page.scripts == 1
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert not link.startswith("#") or link[1:] in page.ids, f"{link} leads nowhere"
    shown(comparison)
    return page


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("change", CASES)
def test_every_link_leads_to_a_section_that_is_there(change):
    comparison = sample()
    change(comparison)
    checked(comparison)


@pytest.mark.usefixtures("undrawn")
def test_an_unfinished_comparison_says_so():
    page = checked(sample() | {"complete": False, "runs_done": 7})
    assert page.says("Incomplete: results may still change, 7 of 84 runs")
    assert checked(sample()).says("Complete, 84 of 84 runs")


@pytest.mark.usefixtures("undrawn")
def test_an_arm_without_a_finished_run_stands_last():
    comparison = sample()
    comparison["arms"][1].update(
        accuracy=None, difference=None, lr=None, curves=[], tuning=[], n=0, seconds_per_step=None
    )
    assert checked(comparison).says("no finished run")
    first = shown(comparison).partition("8 samples of one class")[0]
    names = [line.split()[0] for line in first.splitlines() if line.strip()]
    assert names.index("batch") > names.index("none")


def without(key):
    def change(comparison):
        for entry in (comparison, *comparison["arms"], *comparison["conditions"]):
            entry.pop(key, None)

    return change


def holding(value):
    def change(comparison):
        for arm in comparison["arms"]:
            arm.update(dict.fromkeys(set(arm) - {"normalizer", "condition"}, value))
        keep = {"arms", "conditions", "normalizers"}
        comparison.update(dict.fromkeys(set(comparison) - keep, value))

    return change


ODD = [
    *(without(key) for key in ("conditions", "normalizers", "arms", "baseline", "norm_batch")),
    *(holding(value) for value in (None, float("nan"), -1, "", "text", [], [None], {}, 10**400)),
]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("change", ODD)
def test_missing_and_odd_values_give_a_page(change):
    comparison = sample()
    change(comparison)
    checked(comparison)


def test_curves_and_rates_full_of_gaps_are_drawn():
    comparison = sample()
    for arm in comparison["arms"]:
        for curve in arm["curves"]:
            curve["train_loss"][::2] = [None] * len(curve["train_loss"][::2])
            curve["valid_accuracy"] = curve["valid_accuracy"][:1]
        arm["tuning"] = [{"lr": 0.1, "valid_accuracy": None, "outcome": "diverged"}]
        arm["accuracy"].update(low=None, high=float("nan"), values=[None])
    checked(comparison)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("place", ["label", "title", "recipe", "reason", "id"])
def test_markup_in_text_is_never_obeyed(place):
    comparison = sample()
    if place == "label":
        comparison["arms"][0]["normalizer"] = comparison["normalizers"][0]["label"] = ATTACK
    elif place == "title":
        comparison["title"] = ATTACK
    elif place == "recipe":
        comparison["recipe"] = {ATTACK: ATTACK}
    elif place == "reason":
        comparison["diverged_runs"][0]["reason"] = ATTACK
    else:
        comparison["conditions"][0]["id"] = comparison["arms"][0]["condition"] = ATTACK
    page = checked(comparison)
    if place != "id":
        assert page.says(ATTACK)


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_what_the_memory_column_means():
    page = checked(sample())
    assert page.says("what the network saves for backward per normalization batch")
    assert page.says("A smaller normalization batch saves less whatever the normalizer")
    comparison = sample()
    for arm in comparison["arms"]:
        arm.update(saved_for_backward_bytes=None, peak_memory_bytes=2**30)
    page = checked(comparison)
    assert page.says("peak of the process")
    assert not page.says("saved for backward")


def test_figures_and_tables_name_a_missing_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ImportError, match=r"'altair'.*normlab\[lab\]"):
        figures(sample())
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r"'rich'.*normlab\[lab\]"):
        terminal_table(sample())
