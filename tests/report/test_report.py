"""The page: what it says, what it escapes, and that nothing in a comparison makes it fail."""

import copy
import errno
import io
import re
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from normlab.report import figures, page, render, terminal_table, write

from .sample import sample

VOID = {"meta", "link", "br", "hr", "img", "input", "source", "wbr", "col"}


class Page(HTMLParser):
    """Checks nesting, and gathers ids, links and script contents."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.scripts, self.texts = [], [], [], 0, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[key] for key in ("src", "href", "xlink:href") if found.get(key)]
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def says(self, words):
        return words in " ".join(" ".join(self.texts).split())


def checked(comparison):
    parsed = Page(render(comparison))
    assert not parsed.open
    assert len(parsed.ids) == len(set(parsed.ids))
    return parsed


def emptied(comparison):
    for arm in comparison["arms"]:
        arm.update(accuracy=None, difference=None, lr=None, curves=[], tuning=[], n=0)
        arm.update(seconds_per_step=None, peak_memory_bytes=None, saved_for_backward_bytes=None)
    comparison.update(complete=False, runs_done=0)


def one_condition(comparison):
    del comparison["conditions"][1]
    comparison["arms"] = [a for a in comparison["arms"] if a["condition"] == "iid64"]


def one_normalizer(comparison):
    label = comparison["baseline"]
    comparison["arms"] = [a for a in comparison["arms"] if a["normalizer"] == label]
    comparison["normalizers"] = [n for n in comparison["normalizers"] if n["label"] == label]


def all_diverged(comparison):
    for arm in comparison["arms"]:
        arm.update(diverged=arm["n"], reasons=["the loss became nan"])
        arm["accuracy"] = {"mean": 0.1, "low": 0.1, "high": 0.1, "values": [0.1, 0.1]}
        for curve in arm["curves"]:
            for key in ("train_loss", "valid_accuracy", "valid_loss"):
                curve[key] = [None] * len(curve["epoch"])


def not_numbers(comparison):
    for arm in comparison["arms"]:
        arm["accuracy"].update(low=float("nan"), high=None)
        arm["seconds_per_step"] = {"median": float("inf"), "low": None, "high": None}
        arm["tuning"] = [{"lr": None, "valid_accuracy": float("nan"), "outcome": None}]


def without_extras(comparison):
    for key in ("title", "network", "data", "recipe", "environment", "command", "diverged_runs"):
        del comparison[key]


def nothing_at_all(comparison):
    comparison.clear()


def no_tuning(comparison):
    for arm in comparison["arms"]:
        arm.update(tuning=[], lr_at_edge=False)


CASES = [
    emptied, one_condition, one_normalizer, all_diverged, not_numbers, without_extras,
    nothing_at_all, no_tuning,
]  # fmt: skip


@pytest.mark.parametrize("change", CASES)
def test_every_comparison_gives_a_page_and_a_table(change):
    comparison = sample()
    change(comparison)
    checked(comparison)
    console = Console(file=io.StringIO(), width=100)
    console.print(terminal_table(comparison))
    figures(comparison)


def test_one_seed_and_many():
    checked(sample(seeds=1))
    assert checked(sample(seeds=5)).says("95 %")


def test_the_page_says_what_the_comparison_says():
    comparison = sample()
    parsed = checked(comparison)
    for words in (comparison["title"], *comparison["summary"], comparison["command"]):
        assert parsed.says(words)
    assert parsed.says("training loss is not finite")
    assert parsed.says("edge of grid")
    batch = next(a for a in comparison["arms"] if a["normalizer"] == "batch")
    assert parsed.says(f"{100 * batch['accuracy']['mean']:.1f} %")


@pytest.mark.usefixtures("undrawn")
def test_a_small_number_of_seeds_is_pointed_out_and_a_large_one_is_not():
    assert checked(sample(seeds=2)).says("Few seeds")
    assert not checked(sample(seeds=6)).says("Few seeds")


ATTACK = "<script>alert('1')</script>\"'&lt;</title></svg></style>"


def poisoned():
    """The sample with markup wherever text of others stands."""
    comparison = sample()
    for entry in comparison["normalizers"]:
        if entry["label"] == "ic":
            entry.update(label=ATTACK, name=ATTACK, title=ATTACK, pattern=ATTACK)
            entry["options"] = {ATTACK: ATTACK}
    for arm in comparison["arms"]:
        if arm["normalizer"] == "ic":
            arm.update(normalizer=ATTACK, reasons=[ATTACK])
    comparison["conditions"][0]["label"] = ATTACK
    comparison["diverged_runs"][0].update(normalizer=ATTACK, reason=ATTACK, record=ATTACK)
    comparison["recipe"][ATTACK] = ATTACK
    comparison["environment"] = {ATTACK: ATTACK}
    comparison.update(title=ATTACK, command=ATTACK, summary=[ATTACK])
    comparison["data"].update(title=ATTACK, note=ATTACK)
    return comparison


def test_foreign_text_stays_text():
    assert "<script>alert" not in render(poisoned())
    assert checked(poisoned()).scripts == 1
    console = Console(file=io.StringIO(), width=200)
    console.print(terminal_table(poisoned()))


def test_markup_of_the_terminal_is_not_obeyed():
    comparison = sample()
    comparison["arms"][0]["normalizer"] = comparison["normalizers"][0]["label"] = "[red]x[/nope]"
    console = Console(file=io.StringIO(), width=200)
    console.print(terminal_table(comparison))
    assert "[red]x[/nope]" in console.file.getvalue()


def test_the_page_needs_nothing_from_elsewhere_and_is_small():
    text = render(sample())
    assert all(link.startswith(("#", "data:")) for link in Page(text).links)
    assert "@import" not in text
    assert not re.search(r"url\(\s*['\"]?(?!data:|#)", text)
    assert len(text.encode()) < 1_000_000


def test_figures_are_charts_that_users_know():
    import altair

    found = figures(sample())
    assert len(found) >= 6
    assert all(isinstance(chart, altair.TopLevelMixin) for chart in found.values())


def test_the_terminal_table_ranks():
    console = Console(file=io.StringIO(), width=120)
    console.print(terminal_table(sample()))
    text = console.file.getvalue()
    assert text.index("batch") < text.index("none")
    batch = next(a for a in sample()["arms"] if a["normalizer"] == "batch")
    assert f"{100 * batch['accuracy']['mean']:.1f}" in text


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = write(sample(), tmp_path / "report.html")
    old = path.read_text(encoding="utf-8")
    changed = copy.deepcopy(sample()) | {"title": "another"}

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(page.os, "replace", full)
    with pytest.raises(OSError, match=r"Could not write the report.*No space left"):
        write(changed, path)
    assert path.read_text(encoding="utf-8") == old
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="Could not write the report"):
        write(sample(), tmp_path / "nowhere" / "report.html")


@pytest.mark.parametrize("missing", ["altair", "jinja2", "vl_convert"])
def test_a_missing_extra_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"normlab\[lab\]"):
        render(sample())
