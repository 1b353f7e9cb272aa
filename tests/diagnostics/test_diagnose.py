"""The whole diagnosis: findings that must come, and must not; budget, page, command line."""

import json
import math

import pytest
import torch
from test_subject import same, traces
from torch import nn

import normlab as nl
from normlab.cli import main
from normlab.diagnostics.diagnose import Diagnosis, diagnose
from normlab.diagnostics.findings import ranked

F = nn.functional


def batches(count=3, size=32, seed=0):
    torch.manual_seed(seed)
    return [(torch.randn(size, 3, 8, 8), torch.randint(0, 4, (size,))) for _ in range(count)]


def network(norm=nl.BatchNorm, depth=2):
    torch.manual_seed(0)
    layers = []
    for i in range(depth):
        layers += [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1, bias=False), norm(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def healthy():
    model = network()
    nl.recalibrate(model, [x for x, _ in batches()])
    return model


def said(found):
    return {(f.place, f.severity): f for f in found.findings}


def test_a_healthy_network_and_no_trace():
    model = healthy()
    before = traces(model)
    found = diagnose(model, F.cross_entropy, batches(), lr=0.01, weight_decay=1e-4, budget=60)
    same(traces(model), before)
    assert not found.skipped
    assert not [f for f in found.findings if f.severity != "note"], str(found)
    assert set(found.seconds) == set(found.numbers)
    json.dumps(found.to_json(), allow_nan=False)


def test_stored_statistics_that_are_off():
    model = healthy()
    model[1].running_var.mul_(4.1)
    found = diagnose(model, F.cross_entropy, batches(), budget=30)
    first = found.findings[0]
    assert (first.severity, first.place) == ("severe", "1")
    assert "4.1 × the population's" in first.says
    assert "nl.recalibrate" in first.remedy
    assert first.threshold.source
    nl.recalibrate(model, [x for x, _ in batches()])
    assert "1" not in {f.place for f in diagnose(model, F.cross_entropy, batches()).findings}


def test_dead_channels_and_idle_biases():
    model = network()
    model[1].bias.data.fill_(-100.0)
    model[3] = nn.Conv2d(8, 8, 3, padding=1)  # with a bias before a normalizer
    found = diagnose(model, F.cross_entropy, batches(), budget=30)
    assert any(f.place == "2" and "channels are zero" in f.says for f in found.findings)
    model = network()
    model[3] = nn.Conv2d(8, 8, 3, padding=1)
    found = diagnose(model, F.cross_entropy, batches(), budget=30)
    assert any(f.place == "3" and "biases change nothing" in f.says for f in found.findings)


def test_exploding_gradients():
    torch.manual_seed(0)
    layers = []
    for _ in range(10):
        layer = nn.Linear(16, 16, bias=False)
        layer.weight.data = 2 * torch.linalg.qr(torch.randn(16, 16))[0]
        layers.append(layer)
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    data = [(torch.randn(8, 16), torch.randint(0, 4, (8,)))]
    found = diagnose(model, F.cross_entropy, data, budget=30)
    grown = [f for f in found.findings if "gradients grow" in f.says]
    assert len(grown) == 1
    assert grown[0].severity == "severe"
    assert abs(grown[0].value - 2) < 0.2  # 2 a layer but for the last


def test_too_long_steps():
    found = diagnose(network(), F.cross_entropy, batches(), lr=1e4, budget=60)
    assert any("gradient descent does not descend" in f.says for f in found.findings)


def test_not_finite():
    model = network()
    model[0].weight.data[0] = math.inf
    found = diagnose(model, F.cross_entropy, batches(), budget=30)
    assert found.findings[0].severity == "severe"
    assert "not finite" in found.findings[0].says
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    "wrong", [{"budget": 0}, {"budget": math.nan}, {"lr": -1.0}, {"lr": math.inf},
              {"weight_decay": -0.1}, {"weight_decay": math.nan}]
)  # fmt: skip
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        diagnose(network(), F.cross_entropy, batches(), **wrong)


def test_budget():
    found = diagnose(network(), F.cross_entropy, batches(), lr=0.1, budget=1e-9)
    assert not found.numbers
    assert all("s left" in reason for reason in found.skipped.values())
    assert "not run" in str(found)


def test_one_failing_probe_costs_no_other(monkeypatch):
    from normlab.diagnostics import propagation

    def fails(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(propagation, "propagation", fails)
    found = diagnose(network(), F.cross_entropy, batches(), budget=30)
    assert found.skipped["propagation"] == "failed: RuntimeError: broken"
    assert "stored" in found.numbers


def test_a_layer_that_cannot_be_called_alone_costs_no_other():
    class Conditional(nn.BatchNorm1d):
        def forward(self, x, gain):
            return super().forward(x) * gain

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(192, 8), Conditional(8), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(self.norm(self.first(x.flatten(1)), 2.0))

    found = diagnose(Model(), F.cross_entropy, batches(), budget=30)
    assert not found.skipped
    (one,) = found.numbers["stored"]
    assert one.variance > 1
    assert math.isnan(one.discrepancy)
    assert found.numbers["noise"] == []


def test_a_model_that_returns_an_object_of_its_own():
    class Result:
        def __init__(self, logits):
            self.logits = logits

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return Result(self.inner(x))

    found = diagnose(
        Model(), lambda out, y: F.cross_entropy(out.logits, y), batches(), lr=0.1, budget=30
    )
    assert set(found.skipped) == {"scale", "gauss_newton"}  # which say what they need
    assert math.isnan(found.numbers["discrepancy"].output)
    assert math.isfinite(found.numbers["discrepancy"].loss_eval)


def test_progress():
    seen = []
    diagnose(network(), F.cross_entropy, batches(), budget=30,
             progress=lambda name, place, count: seen.append((name, place, count)))  # fmt: skip
    assert [place for _, place, _ in seen] == sorted(place for _, place, _ in seen)
    assert seen[0][0] == "propagation"


def test_ranking():
    found = diagnose(healthy(), F.cross_entropy, batches(), lr=1e4, budget=60)
    order = ["severe", "warning", "note"]
    places = [order.index(f.severity) for f in ranked(found.findings)]
    assert places == sorted(places)
    assert isinstance(found, Diagnosis)


# --- page and command line -----------------------------------------------------------------------


def test_the_page_escapes_and_survives_anything():
    pytest.importorskip("altair")
    from normlab.report import diagnosis

    found = diagnose(healthy(), F.cross_entropy, batches(), lr=0.1, budget=60).to_json()
    found["findings"] = [{"severity": "note", "place": "<script>x</script>", "says": "a & b"}]
    page = diagnosis.render(found, "<b>title</b>")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("<svg") >= 4
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert {"variance", "gradient", "losses", "slice", "plane", "spectrum"} <= set(
        diagnosis.figures(found)
    )
    assert "move orthogonally to themselves" in page
    assert "inputs kappa 80" in page
    plane = {"ticks": [-1, 0, 1], "losses": [[1.0, "nan", 2.0], [1.0, 0.5, "inf"], [900.0, 3, 4]]}
    page = diagnosis.render({"numbers": {"plane": plane}})
    assert "2 losses are not finite" in page
    assert "on a log scale" in page
    for broken in (
        {}, {"numbers": {"propagation": [1, {"variance": "x"}], "landscape": 3}},
        {"findings": 7, "facts": []}, {"numbers": {"plane": {"ticks": [0, 1], "losses": [[1]]}}},
        {"numbers": {"plane": {"ticks": [0, "x"], "losses": [["nan"] * 2] * 2}, "slice": [1]}},
        {"numbers": {"spectrum": {"values": [1, 2], "density": [0, 0]}, "factors": [{"a": {}}]}},
    ):  # fmt: skip
        assert "Findings" in diagnosis.render(broken)


def test_figures_and_page_of_the_object(tmp_path):
    pytest.importorskip("altair")
    found = diagnose(healthy(), F.cross_entropy, batches(), budget=60)
    assert "plane" in found.figures()
    assert "<h1>Mine &amp; yours" in found.write(tmp_path / "a.html", "Mine & yours").read_text()


def test_command(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["diagnose", "--network", "resnet8", "--batch-size", "16", "--batches", "2",
                 "--steps", "1", "--budget", "20", "--out", str(out)]) == 0  # fmt: skip
    text = capsys.readouterr().out
    assert "recalibrate" in text  # one step of momentum 0.1 leaves statistics far off
    found = json.loads((out / "diagnosis.json").read_text())
    assert found["mode"] == "train"
    assert "Findings" in (out / "diagnosis.html").read_text()


def test_command_reads_checkpoints_safely(tmp_path, capsys):
    model = nl.networks.build("mlp", nl.BatchNorm, classes=10, image_shape=(1, 28, 28))
    torch.save(model.state_dict(), tmp_path / "good.pt")
    options = ["--network", "mlp", "--batch-size", "8", "--batches", "1", "--budget", "5"]
    assert main(["diagnose", *options, "--checkpoint", str(tmp_path / "good.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["batches"] == 1
    torch.save(model, tmp_path / "whole.pt")  # a pickled object is not loaded
    (tmp_path / "junk.pt").write_bytes(b"junk")
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    for name, message in (("whole", "safely"), ("junk", "safely"), ("other", "does not fit"),
                          ("missing", "No such file")):  # fmt: skip
        assert main(["diagnose", *options, "--checkpoint", str(tmp_path / f"{name}.pt")]) == 1
        assert message in capsys.readouterr().err
    assert main(["diagnose", "--batches", "0"]) == 1


def test_statistics_that_are_no_numbers():
    model = healthy()
    model[1].running_var.fill_(math.nan)
    found = diagnose(model, F.cross_entropy, batches(), budget=30)
    severe = {f.place for f in found.findings if f.severity == "severe"}
    assert severe >= {"1", "model"}, str(found)  # the layer, and the loss in evaluation
    json.dumps(found.to_json(), allow_nan=False)


def test_too_few_observations_say_nothing_of_conditioning():
    """Second moments of 16 vectors of 64 numbers have rank 16, however good the network is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    data = [(torch.randn(16, 64), torch.randint(0, 4, (16,)))]
    found = diagnose(model, F.cross_entropy, data, budget=30)
    assert not [f for f in found.findings if "κ" in f.says], str(found)


def test_branches_that_start_silent_are_not_dead():
    """γ = 0 at the end of a residual branch is how networks are started."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
            nn.init.zeros_(self.branch[1].weight)
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            return self.head(x + self.branch(x))

    torch.manual_seed(0)
    data = [(torch.randn(32, 8), torch.randint(0, 4, (32,))) for _ in range(2)]
    found = diagnose(Residual(), F.cross_entropy, data, budget=30)
    assert not [f for f in found.findings if "zero at all" in f.says], str(found)


def test_a_deep_network_keeps_to_the_budget():
    """Covariate shift takes a gradient for each layer: it is known before, not after."""
    from normlab.diagnostics.diagnose import _probes
    from normlab.diagnostics.subject import Subject

    deep = nn.Sequential(*[nn.Linear(4, 4) for _ in range(100)])
    subject = Subject(deep, F.mse_loss, [(torch.ones(2, 4), torch.ones(2, 4))])
    cost = {probe.name: probe.cost for probe in _probes(subject, 0.1, None)}
    assert cost["covariate_shift"] >= 100


def test_slices_as_numbers_figures_and_in_the_budget():
    model = healthy()
    found = diagnose(model, F.cross_entropy, batches(), lr=0.1, budget=60)
    plane, line = found.numbers["plane"], found.numbers["slice"]
    assert plane.losses.shape == (len(plane.ticks),) * 2
    middle = len(plane.ticks) // 2
    assert plane.ticks[middle] == 0
    assert math.isclose(float(plane.losses[middle, middle]), found.facts["loss"], rel_tol=1e-6)
    assert plane.orthogonal == line.orthogonal == 2  # both convolutions
    numbers = found.to_json()["numbers"]
    assert numbers["plane"]["losses"][0][0] == float(plane.losses[0, 0])
    from normlab.diagnostics.diagnose import _plane
    from normlab.diagnostics.subject import Subject

    with Subject(model, F.cross_entropy, batches()[:1]) as subject:
        least = _plane(subject, 0.0, {})
    assert len(least.ticks) == 5  # no time left: as few as are worth a figure
    assert least.orthogonal is None


def test_derived_numbers_are_in_the_json():
    found = diagnose(healthy(), F.cross_entropy, batches(), lr=0.1, budget=60)
    numbers = found.to_json()["numbers"]
    walk = found.numbers["landscape"]
    assert numbers["landscape"]["smoothness"] == walk.smoothness
    assert numbers["landscape"]["variation"] == [min(walk.losses), max(walk.losses)]
    first = found.numbers["factors"][0]
    assert numbers["factors"][0]["inputs"]["kappa"] == first.inputs.condition()
    assert numbers["factors"][0]["gradients"]["kappa_80"] == first.gradients.condition(0.8)


def test_a_loss_that_is_no_number_is_said_without_a_learning_rate():
    found = diagnose(
        healthy(), lambda out, y: F.cross_entropy(out, y) * math.nan, batches(), budget=30
    )
    assert [f.says for f in found.findings if f.severity == "severe"] == [
        "the loss is not finite: nan"
    ]
    assert "not finite" in found.skipped["curvature"]
    json.dumps(found.to_json(), allow_nan=False)


def test_dropout_in_front_of_a_normalizer():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(16),
        nn.Linear(16, 4),
    )  # fmt: skip
    found = diagnose(model, F.cross_entropy, batches(), budget=30)
    (one,) = [f for f in found.findings if "dropout" in f.says]
    assert (one.place, one.severity) == ("4", "warning")
    assert one.value > 1.9
    assert "1801.05134" in one.threshold.source
    model[3].p = 0.0
    found = diagnose(model, F.cross_entropy, batches(), budget=30)
    assert not [f for f in found.findings if "dropout" in f.says]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [3, 7, 40])
def test_hooks_that_raise(error, call):
    """At any point nothing is left behind; an error costs its probe, an interrupt the rest."""
    model = healthy()
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == call:
            raise error("mine")

    model[2].register_forward_hook(hook)
    model[1].weight.grad = torch.ones(8)
    before = traces(model)
    if error is KeyboardInterrupt:
        with pytest.raises(KeyboardInterrupt):
            diagnose(model, F.cross_entropy, batches(), lr=0.1, budget=60)
    else:
        found = diagnose(model, F.cross_entropy, batches(), lr=0.1, budget=60)
        assert ["mine" in reason for reason in found.skipped.values()] == [True]
    same(traces(model), before)


@pytest.mark.parametrize("where", [torch.no_grad, torch.inference_mode])
def test_in_a_block_without_gradients(where):
    model, data = healthy(), batches()
    expected = diagnose(model, F.cross_entropy, data, lr=0.1, budget=60)
    with where():
        found = diagnose(model, F.cross_entropy, data, lr=0.1, budget=60)
    assert not found.skipped
    assert found.numbers["landscape"] == expected.numbers["landscape"]


def odd_models():
    """Name, model and batches of what is seldom but allowed."""
    torch.manual_seed(0)

    def images(dtype=torch.float32, size=32):
        return [(x.to(dtype)[:size], y[:size]) for x, y in batches()]

    tied = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 192), nn.BatchNorm1d(192), nn.Linear(192, 192),
        nn.Linear(192, 4),
    )  # fmt: skip
    tied[3].weight = tied[1].weight
    shared = network()
    shared.insert(3, shared[1])
    frozen = network()
    frozen[0].requires_grad_(False)
    frozen[1].requires_grad_(False)
    normalized = network()
    nn.utils.parametrizations.weight_norm(normalized[0])
    nn.utils.parametrizations.spectral_norm(normalized[3])
    words = [(torch.randint(0, 20, (16, 4)), torch.randint(0, 4, (16,)))] * 2
    return {
        "no normalizer": (network(lambda c: nn.Identity()), images()),
        "shared module": (shared, images()),
        "tied weights": (tied, images()),
        "frozen": (frozen, images()),
        "float64": (network().double(), images(torch.float64)),
        "bfloat16": (network().bfloat16(), images(torch.bfloat16)),
        "lists": (network(), [list(batch) for batch in images()]),
        "nothing stored": (
            network(lambda c: nn.BatchNorm2d(c, track_running_stats=False)), images(),
        ),
        "no momentum": (network(lambda c: nn.BatchNorm2d(c, momentum=None)), images()),
        "parametrized": (normalized, images()),
        "dropout": (nn.Sequential(nn.Dropout(0.3), network()), images()),
        "sparse gradients": (
            nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Flatten(), nn.Linear(32, 4)), words,
        ),
        "compiled": (torch.compile(network(), backend="eager"), images()),
    }  # fmt: skip


@pytest.mark.parametrize("name", odd_models())
def test_odd_models(name):
    model, data = odd_models()[name]
    before = traces(model)
    found = diagnose(model, F.cross_entropy, data, lr=0.1, weight_decay=1e-4, budget=100)
    same(traces(model), before)
    assert not found.skipped
    json.dumps(found.to_json(), allow_nan=False)
    assert ("noise" in found.numbers) == any(
        isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d, nl.BatchNorm)) for m in model.modules()
    )


def test_single_samples_cost_only_what_they_cannot_tell():
    found = diagnose(network(), F.cross_entropy, batches(size=1), lr=0.1, budget=60)
    assert set(found.skipped) == {"noise"}  # which says that it needs two
    assert "dependence" in found.numbers
