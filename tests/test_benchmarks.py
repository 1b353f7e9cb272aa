"""The benchmark runs and writes a sound record; times themselves are never tested."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import normlab as nl

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def command(*words, script="layers.py"):
    line = [sys.executable, str(BENCHMARKS / script), *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of one run, every method, in its shortest form."""
    out = tmp_path_factory.mktemp("records")
    done = command("--tiny", "--rounds", 1, "--shapes", "A", "D", "--out", out)
    assert done.returncode == 0, done.stderr
    (data,) = out.glob("*.json")
    assert sorted(out.iterdir()) == [data, data.with_suffix(".md")]  # nothing half-written
    return json.loads(data.read_text()), data.with_suffix(".md").read_text(encoding="utf-8")


@pytest.fixture
def modules(monkeypatch):
    """The benchmark's own modules, imported as the script does."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _cases
    import _cells
    import _record
    import _run
    import _table
    import _timing
    import everything

    return SimpleNamespace(
        cases=_cases, cells=_cells, record=_record, run=_run, table=_table, timing=_timing,
        everything=everything,
    )  # fmt: skip


def cell_of(modules, name="batch", shape="A", **variants):
    """A small cell with given layers."""
    dims = (2, 5, 4) if shape == "D" else (2, 4, 3, 3)
    place = modules.cells.Place(shape, dims, "float32", "nlc" if shape == "D" else "nchw")
    return modules.cells.Cell(modules.cases.cases()[name], place, variants)


def rows_of(modules, cell):
    return modules.timing.measure(cell, modules.timing.Inputs(cell.place, 0), rounds=1)


def test_head_tells_what_it_ran_on(written):
    record, _ = written
    assert record["schema"] == 2
    assert record["kind"] == "layers"
    assert record["complete"] is True
    assert record["tiny"] is True
    assert record["threads"] == 1
    assert record["clock"] in ("processor time", "wall time")
    assert {"cpu", "cores", "torch", "revision"} <= set(record["environment"])
    assert record["date"].endswith("+00:00")
    assert record["command"] == "python benchmarks/layers.py --tiny --rounds 1 --shapes A D"
    if sys.platform != "win32":
        assert record["allocator"]["MALLOC_MMAP_MAX_"] == "0"
        assert len(record["load_at_start"]) == len(record["load_at_end"]) == 3


def test_every_method_is_measured_at_every_place(written):
    record, _ = written
    ours = [r for r in record["rows"] if r["variant"] == "normlab"]
    places = {(r["dtype"], r["layout"]) for r in ours if r["shape"] == "A"}
    assert len(places) == 4
    for name in [*nl.catalogue("activation"), "batch+relu", "batch+add+relu", "rms/position"]:
        found = [
            (r["dtype"], r["layout"]) for r in ours if (r["method"], r["shape"]) == (name, "A")
        ]
        assert set(found) == places
        assert len(found) == 4
    on_d = {(r["method"], r["dtype"], r["layout"]) for r in ours if r["shape"] == "D"}
    dtypes = ("float32", "bfloat16")
    assert on_d == {(m, d, "nlc") for m in ("layer", "rms", "dyt") for d in dtypes}
    assert {r["method"] for r in record["rows"] if r["variant"] == "native"} >= {
        "batch", "group", "instance", "layer", "rms", "position", "rms/position", "batch+relu",
    }  # fmt: skip
    options = {r["method"]: r["options"] for r in ours}
    assert options["batch"] == {}
    assert options["batch+relu"] == {"activation": "relu"}


def test_rows_hold_times_and_the_ratios_that_follow_from_them(written):
    record, _ = written
    for row in record["rows"]:
        assert row["error"] is None
        for name in ("forward_ms", "both_ms", "copy_ms"):
            assert 0 < row[name]["min"] <= row[name]["median"]
        copy = row["copy_ms"]["min"]
        # Read x, write y; read x and dy, write dx; with a residual, read it twice, write dr.
        once, both = (1.5, 4) if "+add+" in row["method"] else (1, 2.5)
        assert row["forward_ratio"] == pytest.approx(row["forward_ms"]["min"] / (once * copy))
        assert row["both_ratio"] == pytest.approx(row["both_ms"]["min"] / (both * copy))
        assert row["saved_ratio"] >= 0
        assert row["page_faults"] >= 0
        assert row["rounds"] == 1


def test_the_table_shows_every_method_and_says_that_times_mean_nothing(written):
    _, text = written
    for name in nl.catalogue("activation"):
        assert re.search(rf"\n\\| {name} \\| (≤ \\d\\.\\d)? \\| normlab \\| ", text)
    assert "Tiny tensors: these times say nothing" in text
    assert "## Over the target" in text
    assert "## Against native\n" in text
    assert "slower in" in text


def test_unknown_method_is_refused():
    done = command("--tiny", "--methods", "bacth")
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
    cell = cell_of(modules, normlab=Broken, native=nn.Identity, compiled=lambda: 1 / 0)
    rows = modules.timing.measure(cell, modules.timing.Inputs(cell.place, 0), rounds=2)
    broken, good, unbuilt = rows
    assert broken["error"] == "RuntimeError: no such kernel"
    assert broken["forward_ratio"] is None
    assert unbuilt["error"] == "ZeroDivisionError: division by zero"
    assert good["error"] is None
    assert good["both_ratio"] > 0
    table = modules.table.table("A", rows)
    assert "| batch | ≤ 2.0 | normlab | failed |" in table


def test_slow_cells_have_fewer_rounds(modules, monkeypatch):
    monkeypatch.setattr(modules.timing, "ENOUGH", 0.0)
    cell = cell_of(modules, normlab=nn.Identity)
    inputs = modules.timing.Inputs(cell.place, 0)
    assert modules.timing.measure(cell, inputs, rounds=9)[0]["rounds"] == 3
    assert modules.timing.measure(cell, inputs, rounds=2)[0]["rounds"] == 2


def test_saved_bytes_count_the_input_once(modules):
    place = modules.cells.Place("A", (2, 4, 8, 8), "float32", "nchw")
    x = modules.timing.Inputs(place, 0).next()[0]
    saved = modules.timing.saved_ratio
    assert saved(nn.Identity(), x) == 0
    assert saved(nn.ReLU(), x) == 1
    assert saved(nn.Sequential(nn.Tanh(), nn.Tanh()), x) == 2
    assert 1 < saved(nn.BatchNorm2d(4), x) < 1.1  # x, and per channel a mean and a deviation


def options_of(out, **more):
    return SimpleNamespace(**{
        "tiny": True, "rounds": 1, "out": out, "resume": False, "show": False, **more
    })  # fmt: skip


def test_an_interrupted_run_keeps_what_it_measured(modules, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["layers.py", "--out", "somewhere", "--tiny"])
    out = tmp_path / "new"
    cell = cell_of(modules, normlab=nn.Identity)

    def results():
        yield cell, rows_of(modules, cell)
        raise KeyboardInterrupt

    record = modules.record.Record(options_of(out))
    assert modules.run.follow(results(), 2, record, lambda *_: None) == 130
    (path,) = out.glob("*.json")
    content = json.loads(path.read_text())
    assert content["complete"] is False
    assert content["command"] == "python benchmarks/layers.py --tiny"
    assert [r["method"] for r in content["rows"]] == ["batch"]
    assert "Incomplete" in path.with_suffix(".md").read_text(encoding="utf-8")
    # A later run of the same day has a file of its own.
    assert modules.record.Record(options_of(out)).write()[0] != path


def test_an_interrupted_run_is_continued(modules, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["layers.py", "--tiny", "--resume"])
    first = cell_of(modules, "batch", normlab=nn.Identity)
    second = cell_of(modules, "group", normlab=nn.Identity)
    record = modules.record.Record(options_of(tmp_path))
    record.add(rows_of(modules, first))
    (path, _) = record.write()
    again = options_of(tmp_path, resume=True)
    record = modules.record.Record(again)
    assert record.cells == {first.key}
    assert second.key not in record.cells
    results = [(second, rows_of(modules, second))]
    assert modules.run.follow(results, 1, record, lambda *_: None) == 0
    content = json.loads(path.read_text())  # the same file
    assert content["complete"] is True
    assert [r["method"] for r in content["rows"]] == ["batch", "group"]
    # A record of other rounds, threads or sources is another one.
    assert not modules.record.Record(options_of(tmp_path, resume=True, rounds=2)).cells
    with monkeypatch.context() as patch:
        patch.setattr(modules.record.torch, "get_num_threads", lambda: 2)
        assert not modules.record.Record(again).cells
    with monkeypatch.context() as patch:
        patch.setattr(modules.record, "sources", lambda: "changed")
        assert not modules.record.Record(again).cells
    assert modules.record.Record(again).cells


def test_threads_are_in_the_name_of_a_record(modules, tmp_path, monkeypatch):
    monkeypatch.setattr(modules.record.torch, "get_num_threads", lambda: 2)
    record = modules.record.Record(options_of(tmp_path))
    assert all("-2-threads" in path.name for path in record.write())


def test_rows_are_chosen_by_options(modules):
    options = SimpleNamespace(
        tiny=True, methods=["batch", "rms"], shapes=["A", "D"], dtypes=["float32"],
        layouts=["nchw"], no_native=False, compile=["rms"], compile_shapes=["D"],
    )  # fmt: skip
    places = modules.cells.places(options)
    found = {str(c): list(c.variants) for p in places for c in modules.cells.cells(options, p)}
    assert found == {
        "batch A float32 nchw": ["normlab", "native"],
        "rms A float32 nchw": ["normlab", "native"],
        "rms D float32 nlc": ["normlab", "native", "compiled", "compiled native"],
    }
    options.compile, options.compile_shapes = [], None  # those with a target, everywhere
    found = {str(c): list(c.variants) for p in places for c in modules.cells.cells(options, p)}
    assert all("compiled" in variants for variants in found.values())
    assert modules.run.unknown_methods(["batch+relu", "bacth"]) == ["bacth"]


def test_native_layers_do_the_same_job(modules):
    """What normlab is timed against gives its results."""
    g = torch.Generator().manual_seed(0)
    for name, case in modules.cases.cases().items():
        for shape in ((3, 8, 5, 4), (3, 5, 8)):
            last = len(shape) == 3
            native = case.native(shape[1:], last, "float32")
            if native is None or name == "ic" or (last and name not in modules.cases.LAST):
                continue  # dropout draws other numbers
            x = torch.randn(shape, generator=g)
            # Float32: sums in another order.
            torch.testing.assert_close(native()(x), case.ours(8, last)()(x), rtol=1e-4, atol=1e-5)


def test_what_is_compiled_is_the_formula_and_no_kernel(modules, monkeypatch):
    seen, asked = [], []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append(nl.kernels.backend.name())
            return x

    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: asked.append(options))
    layer = modules.cells.compiled(Probe)()
    layer(torch.zeros(2))
    assert seen == ["reference"]
    assert asked == [{"dynamic": False}]
    assert nl.kernels.backend.name() == "auto"


def test_targets_are_those_of_large_and_small_maps(modules):
    cases = modules.cases.cases()
    assert cases["filter_response"].target(32 * 32, False) == 1.3
    assert cases["filter_response"].target(14 * 14, False) == 2.0
    assert cases["evonorm_s0"].target(14 * 14, False) == 2.0
    assert cases["layer"].target(1024, True) == 1.6
    assert cases["pca"].target(32 * 32, False) is None
    assert set(modules.cases.COMPILED) <= set(cases)


def row(method, dtype="float32", variant="normlab", both=1.0, target=1.6, saved=1.0, **more):
    return {
        "method": method, "shape": "A", "dims": [2, 4, 3, 3], "dtype": dtype, "layout": "nchw",
        "variant": variant, "target": target, "error": None, "saved_ratio": saved,
        "forward_ratio": 1.0, "both_ratio": both, "forward_ms": {"min": 1.0},
        "both_ms": {"min": both}, "copy_ms": {"min": 1.0}, **more,
    }  # fmt: skip


def test_what_is_over_its_target_is_marked_and_listed(modules):
    rows = [
        row("batch", both=1.64),  # 1.6 in two digits
        row("batch", "bfloat16", both=1.66),
        row("batch", "bfloat16", "native", both=9.0),  # not ours to keep
        row("rms", both=1.2, target=1.3, saved=1.06),
        row("pca", both=99.0, target=None),
    ]
    table = modules.table.table("A", rows)
    assert "| batch | ≤ 1.6 | normlab | 1.0 / 1.6 | 1.0 / **1.7** | 1.00 |" in table
    assert "|  |  | native | – | 1.0 / 9.0 | 1.00 |" in table
    assert "| pca |  | normlab | 1.0 / 99 | – | 1.00 |" in table
    text = modules.table.over_target(rows)
    assert "Of 3 cells with a target 2 keep to it, 1 do not:" in text
    assert "| method | A bf16 nchw |\n|---|---|\n| batch | 1.7 |" in text
    assert (
        "more than 1.05 in 1 of them:\n\n| method | A fp32 nchw |\n|---|---|\n| rms | 1.06 |"
        in text
    )
    assert modules.table.over_target(rows[4:]) == ""


def test_slower_cells_are_named_with_what_is_faster(modules):
    rows = [
        row("batch", both=2.0), row("batch", variant="native", both=3.0),
        row("batch", variant="compiled", both=1.0),
        row("group", both=1.05), row("group", variant="native", both=1.0),
        row("layer", both=3.0), row("layer", variant="compiled native", both=1.5),
        row("rms", both=1.0), row("rms", variant="native", both=2.0),
        row("none", both=9.0), row("none", variant="native", both=1.0),  # two identities
        row("pca", both=9.0),  # against nothing
    ]  # fmt: skip
    text = modules.table.against(rows)
    assert text.startswith("## Against the fastest of native, compiled, compiled native\n")
    assert "Forward: of 4 cells normlab is faster in 0, equal within 10% in 4, slower in 0." in text
    assert "of 4 cells normlab is faster in 1, equal within 10% in 1, slower in 2, by" in text
    assert text.endswith(
        "| method | A fp32 nchw |\n|---|---|\n| batch | 2.0 c |\n| layer | 2.0 nc |"
    )


def test_everything_runs_each_thread_count_that_there_are_cores_for(modules, tmp_path):
    def threads(cores, short):
        lines = modules.everything.parts(short, tmp_path, cores)
        assert all(line[-2:] == ["--out", str(tmp_path)] for line in lines[:-1])
        assert all(Path(line[0]).is_file() for line in lines)
        layers = [line for line in lines if line[0].endswith("layers.py")]
        assert all(("--resume" in line) is not short for line in layers)
        return [line[line.index("--threads") + 1] for line in layers]

    for short in (True, False):
        assert threads(1, short) == ["1"]
        assert threads(8, short) == ["1", "2"]


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
    line = [sys.executable, script, "--tiny", "--only", "adaptive_clip", "--out", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    (data,) = tmp_path.glob("*.json")
    record = json.loads(data.read_text())
    assert record["kind"] == "steps"
    assert record["command"] == "python benchmarks/steps.py --tiny --only adaptive_clip"
    names = [row["case"] for row in record["rows"]]
    assert names == ["none", "group", "adaptive_clip"]
    none, base, method = record["rows"]
    assert none["ratio"] == 1
    assert base["ratio"] == base["step_ms"]["min"] / none["step_ms"]["min"]
    assert method["target"] == 1.05
    assert method["ratio"] == method["step_ms"]["min"] / base["step_ms"]["min"]
    assert "| adaptive_clip |" in data.with_suffix(".md").read_text(encoding="utf-8")
    again = subprocess.run(
        [*line, "--resume"], capture_output=True, text=True, timeout=240, check=False
    )
    assert again.returncode == 0
    assert f"{data} holds this run" in again.stderr
    assert list(tmp_path.glob("*.json")) == [data]


def test_steps_over_their_target_are_marked(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _steps

    times = {"none": 100.0, "batch": 112.4, "group": 112.6, "native batch": 150.0}
    cases = [case for case in _steps.CASES if case.name in times]
    timed = [_steps.Timed(case, times=[times[case.name], 999.0]) for case in cases]
    head = {
        "date": "2026-01-01", "environment": dict.fromkeys(("cpu", "cores", "torch", "normlab",
        "revision"), "?"), "tiny": False, "command": "", "network": "", "batch": 1, "dtype": "",
        "layout": "", "threads": 1, "load_at_start": 0, "load_at_end": 0, "rounds": 2, "clock": "",
    }  # fmt: skip
    text = _steps.markdown(head | {"rows": [_steps.row(one, times) for one in timed]})
    assert "| none | 100.0 | none |  |  |" in text
    assert "| batch | 112.4 | none | 1.124 | ≤ 1.12 |" in text  # in two decimals it is not over
    assert "| group | 112.6 | none | **1.126** | ≤ 1.12 |" in text
    assert "| native batch | 150.0 | none | 1.500 |  |" in text
    assert "Over the target, of 2: group." in text


def test_accuracy_is_in_roundings(tmp_path, monkeypatch):
    done = command("--methods", "rms", "batch", "--out", tmp_path, script="accuracy.py")
    assert done.returncode == 0, done.stderr
    (data,) = tmp_path.glob("*.json")
    rows = json.loads(data.read_text())["rows"]
    assert {(r["method"], r["layout"]) for r in rows} == {
        ("rms", "nchw"), ("rms", "channels_last"), ("rms", "nlc"),
        ("batch", "nchw"), ("batch", "channels_last"),
    }  # fmt: skip
    for r in rows:
        # Nothing is exact, and nothing rounded more than once.
        assert all(0.5 < v <= 1 for v in r["roundings"]["normlab"].values())
    assert all(r["roundings"]["plain"]["dx"] > 1 for r in rows if r["method"] == "batch")
    assert "| rms | nlc | 0." in done.stdout
    assert "no row is called bacth" in command("--methods", "bacth", script="accuracy.py").stderr


def test_roundings_are_those_of_bfloat16(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from _accuracy import roundings, worst

    exact = torch.linspace(1, 2, 999, dtype=torch.float64)
    assert 0.95 < roundings(exact.bfloat16(), exact) <= 1
    assert roundings(exact.bfloat16() * 1.02, exact) > 5
    assert roundings(torch.zeros(3), torch.zeros(3, dtype=torch.float64)) == 0
    assert worst([]) == "–"
    errors = [{"y": 0.5, "dx": 12.0, "dweight": 0.2, "dbias": 1.5}, {"y": 0.7, "dx": 1.0}]
    assert worst(errors) == "0.70 / **12** / **1.50**"


def test_steps_of_no_such_case_are_refused(tmp_path):
    line = [sys.executable, BENCHMARKS / "steps.py", "--only", "agc", "--out", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert "no case is called 'agc'" in done.stderr
    assert "adaptive_clip" in done.stderr


def test_runs_with_the_recorder(tmp_path):
    done = command("--tiny", "--rounds", "1", "--out", tmp_path, script="recorder.py")
    assert done.returncode == 0, done.stderr
    (data,) = tmp_path.glob("recorder-*.json")
    record = json.loads(data.read_text())
    assert [row["case"] for row in record["rows"]] == ["resnet20", "mlp"]
    for row in record["rows"]:
        assert row["moments"] >= 1
        assert row["ratio"] > 0
        assert len(row["ratios"]) == 1
    assert "these times say nothing" in data.with_suffix(".md").read_text(encoding="utf-8")
    assert "no case is called vgg" in command("--only", "vgg", script="recorder.py").stderr
