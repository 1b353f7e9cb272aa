"""The benchmark runs and writes a sound record; times themselves are never tested."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

import normlab as nl

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def command(*words):
    line = [sys.executable, str(BENCHMARKS / "layers.py"), *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of one run, every method, in its shortest form."""
    out = tmp_path_factory.mktemp("records")
    done = command("--short", "--rounds", 1, "--shapes", "A", "D", "--out", out)
    assert done.returncode == 0, done.stderr
    (data,) = out.glob("*.json")
    assert sorted(out.iterdir()) == [data, data.with_suffix(".md")]  # nothing half-written
    return json.loads(data.read_text()), data.with_suffix(".md").read_text(encoding="utf-8")


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's own modules, imported as the script does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _cells
    import _record
    import _run
    import _table
    import _timing

    return SimpleNamespace(cells=_cells, record=_record, run=_run, table=_table, timing=_timing)


def test_head_tells_what_it_ran_on(written):
    record, _ = written
    assert record["schema"] == 1
    assert record["kind"] == "layers"
    assert record["complete"] is True
    assert record["short"] is True
    assert record["threads"] == 1
    assert record["clock"] in ("processor time", "wall time")
    assert {"cpu", "cores", "torch", "revision"} <= set(record["environment"])
    assert record["date"].endswith("+00:00")
    assert record["command"] == "python benchmarks/layers.py --short --rounds 1 --shapes A D"
    if sys.platform != "win32":
        assert record["allocator"]["MALLOC_MMAP_MAX_"] == "0"
        assert len(record["load_at_start"]) == len(record["load_at_end"]) == 3


def test_every_method_is_measured_at_every_place(written):
    record, _ = written
    ours = [r for r in record["rows"] if r["variant"] == "normlab"]
    places = {(r["dtype"], r["layout"]) for r in ours if r["shape"] == "A"}
    assert len(places) == 4
    for name in nl.catalogue("activation"):
        found = [
            (r["dtype"], r["layout"]) for r in ours if (r["method"], r["shape"]) == (name, "A")
        ]
        assert set(found) == places
        assert len(found) == 4
    on_d = {(r["method"], r["dtype"], r["layout"]) for r in ours if r["shape"] == "D"}
    dtypes = ("float32", "bfloat16")
    assert on_d == {(m, d, "nlc") for m in ("layer", "rms", "dyt") for d in dtypes}
    assert {r["method"] for r in record["rows"] if r["variant"] == "native"} >= {
        "batch", "group", "instance", "layer", "rms",
    }  # fmt: skip


def test_rows_hold_times_and_the_ratios_that_follow_from_them(written):
    record, _ = written
    for row in record["rows"]:
        assert row["error"] is None
        for name in ("forward_ms", "both_ms", "copy_ms"):
            assert 0 < row[name]["min"] <= row[name]["median"]
        copy = row["copy_ms"]["min"]
        assert row["forward_ratio"] == pytest.approx(row["forward_ms"]["min"] / copy)
        assert row["both_ratio"] == pytest.approx(row["both_ms"]["min"] / (2.5 * copy))
        assert row["saved_ratio"] >= 0
        assert row["page_faults"] >= 0
        assert row["rounds"] == 1


def test_the_table_shows_every_method_and_says_that_times_mean_nothing(written):
    _, text = written
    for name in nl.catalogue("activation"):
        assert f"\n| {name} | normlab | " in text
    assert "Tiny tensors: these times say nothing" in text
    assert "## Against torch's own layer" in text
    assert "slower in" in text


def test_unknown_method_is_refused():
    done = command("--short", "--methods", "bacth")
    assert done.returncode == 2
    assert "bacth" in done.stderr


class Broken(nn.Module):
    """Works once, then fails, as a layer would whose kernel fails now and then."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("no such kernel")
        return x * 2


def test_a_failing_variant_is_recorded_and_the_others_go_on(modules):
    place = modules.cells.Place("A", (2, 4, 3, 3), "float32", "nchw")
    builds = {"normlab": Broken, "native": nn.Identity, "compile": lambda: 1 / 0}
    cell = modules.cells.Cell("batch", place, builds)
    rows = modules.timing.measure(cell, modules.timing.Inputs(place, 0), rounds=2)
    broken, good, unbuilt = rows
    assert broken["error"] == "RuntimeError: no such kernel"
    assert broken["forward_ratio"] is None
    assert unbuilt["error"] == "ZeroDivisionError: division by zero"
    assert good["error"] is None
    assert good["both_ratio"] > 0
    table = modules.table.table("A", rows)
    assert "| batch | normlab | failed |" in table


def test_saved_bytes_count_the_input_once(modules):
    place = modules.cells.Place("A", (2, 4, 8, 8), "float32", "nchw")
    x = modules.timing.Inputs(place, 0).next()[0]
    saved = modules.timing.saved_ratio
    assert saved(nn.Identity(), x) == 0
    assert saved(nn.ReLU(), x) == 1
    assert saved(nn.Sequential(nn.Tanh(), nn.Tanh()), x) == 2
    assert 1 < saved(nn.BatchNorm2d(4), x) < 1.1  # x, and per channel a mean and a deviation


def test_an_interrupted_run_keeps_what_it_measured(modules, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["layers.py", "--out", "somewhere", "--short"])
    options = SimpleNamespace(short=True, rounds=1, out=tmp_path / "new")
    place = modules.cells.Place("A", (2, 4, 3, 3), "float32", "nchw")
    cell = modules.cells.Cell("batch", place, {"normlab": nn.Identity})
    rows = modules.timing.measure(cell, modules.timing.Inputs(place, 0), rounds=1)

    def results():
        yield cell, rows
        raise KeyboardInterrupt

    record = modules.record.Record(options)
    assert modules.run.follow(results(), 2, record, lambda *_: None) == 130
    (path,) = (tmp_path / "new").glob("*.json")
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert content["command"] == "python benchmarks/layers.py --short"
    assert [r["method"] for r in content["rows"]] == ["batch"]
    assert "Incomplete" in path.with_suffix(".md").read_text(encoding="utf-8")
    # A later run of the same day has a file of its own.
    assert modules.record.Record(options).write()[0] != path


def test_slower_cells_are_named(modules):
    factors = {
        ("batch", "A", "float32", "nchw"): 2.0,
        ("layer", "A", "bfloat16", "nchw"): 3.0,
        ("group", "A", "float32", "nchw"): 1.05,
        ("rms", "A", "float32", "nchw"): 0.5,
    }
    text = modules.table.verdict("forward", factors)
    assert "of 4 cells normlab is faster in 1, equal within 10% in 1, slower in 2:" in text
    assert text.endswith("- layer A bf16 nchw: 3.0× the time\n- batch A fp32 nchw: 2.0× the time")


def test_every_experiment_is_a_comparison_that_can_be_planned(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import tyro

    import experiments
    from normlab.cli import split_lists
    from normlab.commands.compare import Compare

    for name in experiments.EXPERIMENTS:
        words = split_lists(experiments.command(name, str(tmp_path)))
        plan = tyro.cli(Compare, args=words[1:]).plan()
        assert plan.runs_planned >= 3 * len(plan.normalizers)
        assert len(plan.seeds) >= 3
        assert plan.title


def test_implicit_biases_show_in_a_short_run(tmp_path):
    line = [sys.executable, str(BENCHMARKS / "rescaling.py"), "--steps", "20", "--seeds", "1"]
    done = subprocess.run(
        [*line, "--out", str(tmp_path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = {row["arm"]: row["curve"] for row in json.loads(
        (tmp_path / "runs.json").read_text())["rows"]}  # fmt: skip
    plain, decay, rescaled = (rows[arm] for arm in ("nothing", "weight decay", "rescaling"))
    # Float32 sums over 784 pixels, and the projection's.
    assert plain[-1]["outside_norm"] == pytest.approx(plain[0]["outside_norm"], rel=1e-4)
    assert plain[-1]["norm_1"] > plain[0]["norm_1"] * 1.0001
    shrunk = (1 - 0.1 * 5e-3) ** 20
    assert decay[-1]["outside_norm"] == pytest.approx(shrunk * decay[0]["outside_norm"], rel=1e-4)
    assert rescaled[-1]["norm_1"] == pytest.approx(rescaled[0]["norm_1"], rel=1e-5)
    assert rescaled[-1]["outside_norm"] < rescaled[0]["outside_norm"] * 0.9999
    assert "| rescaling |" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_variance_shift_is_measured_in_a_short_run(tmp_path):
    line = [sys.executable, str(BENCHMARKS / "variance_shift.py"), "--steps", "2", "--seeds", "1"]
    done = subprocess.run(
        [*line, "--network", "cnn:depth=2,width=4", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "runs.json").read_text())["rows"]
    direct = [r for r in rows if r["form"] == "dropout, then batch" and r["rate"] == 0.5]
    assert all(0 < layer["predicted"] < 1 for row in direct for layer in row["layers"])
    assert "| ic | 0.05 |" in (tmp_path / "summary.md").read_text(encoding="utf-8")


def test_steps_are_timed_beside_what_they_are_held_against(tmp_path):
    script = BENCHMARKS / "steps.py"
    line = [sys.executable, script, "--short", "--only", "adaptive_clip", "--out", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (data,) = tmp_path.glob("*.json")
    record = json.loads(data.read_text())
    assert record["kind"] == "steps"
    assert record["command"] == "python benchmarks/steps.py --short --only adaptive_clip"
    names = [row["case"] for row in record["rows"]]
    assert names == ["group", "adaptive_clip"]
    base, method = record["rows"]
    assert base["ratio"] == 1
    assert method["ratio"] == method["step_ms"]["min"] / base["step_ms"]["min"]
    assert "| adaptive_clip |" in data.with_suffix(".md").read_text(encoding="utf-8")


def test_steps_of_no_such_case_are_refused(tmp_path):
    line = [sys.executable, BENCHMARKS / "steps.py", "--only", "agc", "--out", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "no case is called 'agc'" in done.stderr
    assert "adaptive_clip" in done.stderr
