"""Recording training: what is recorded, when, and that it changes nothing."""

import copy
import json
import math
import warnings

import pytest
import torch
from torch import nn

import normlab as nl


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6),
        nl.BatchNorm(6),
        nn.ReLU(),
        nn.Linear(6, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 2),
    )


def train(model, recorder=None, steps=12):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        x, y = torch.randn(16, 4) * 3, torch.randint(0, 2, (16,))
        optimizer.zero_grad()
        if recorder is None:
            nn.functional.cross_entropy(model(x), y).backward()
        else:
            with recorder.step(lr=0.1) as step:
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                step.loss = loss
        optimizer.step()


def test_training_is_the_same_with_it():
    plain, watched = network(), network()
    train(plain)
    recorder = nl.Recorder(watched, every=1, share=1.0)
    train(watched, recorder)
    for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not any(m._forward_hooks for m in watched.modules())
    assert [m.step for m in recorder.moments] == list(range(12))


@pytest.mark.parametrize("name", ["batch", "group", "layer", "filter_response", "iterative"])
def test_normalizers_of_the_package_are_seen_whether_they_store_statistics_or_not(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nl.norm(name, 8))
    recorder = nl.Recorder(model, every=1, share=1.0)
    x = torch.randn(4, 3, 6, 6)
    with recorder.step():
        model(x)
    expected = float(model[0](x).detach().var((0, 2, 3), correction=0).mean())
    # the same sums in another order
    assert recorder.moments[0].variance == {"1": pytest.approx(expected, rel=1e-5)}


def test_what_is_recorded():
    model = network()
    recorder = nl.Recorder(model, every=1, share=1.0)
    x, y = torch.randn(16, 4) * 3, torch.randint(0, 2, (16,))
    twin = copy.deepcopy(model)
    with recorder.step(lr=0.1) as step:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        step.loss = loss
    (moment,) = recorder.moments
    variance = twin[0](x).detach().var(0, correction=0)
    assert math.isclose(moment.variance["1"], float(variance.mean()), rel_tol=1e-5)
    stored = model[1].running_var  # updated by this batch, as training sees it
    gap = (stored / variance).log().abs().max().exp()
    assert math.isclose(moment.gap["1"], float(gap), rel_tol=1e-5)
    assert "4" in moment.variance
    assert "4" not in moment.gap
    assert math.isclose(moment.gradient["0"], float(model[0].weight.grad.norm()), rel_tol=1e-6)
    assert math.isclose(
        moment.rate["0"], 0.1 / float(model[0].weight.detach().norm()) ** 2, rel_tol=1e-6
    )
    assert math.isclose(moment.loss, float(loss.detach()), rel_tol=1e-6)
    json.dumps(recorder.to_json())


def test_schedule():
    recorder = nl.Recorder(network(), every=5, share=1.0)
    train(recorder.model, recorder)
    assert [m.step for m in recorder.moments] == [0, 5, 10]
    costly = nl.Recorder(network(), every=1, share=0.05)
    train(costly.model, costly, 3)
    costly.spent += 1e6  # as if it had taken long
    train(costly.model, costly, 3)
    assert max(m.step for m in costly.moments) < 3
    assert costly.overhead > 0.05
    few = nl.Recorder(network(), every=1, share=1.0, keep=4)
    train(few.model, few, 12)
    assert len(few.moments) < 4
    assert few.every > 1


def test_an_error_leaves_no_hook():
    model = network()
    recorder = nl.Recorder(model, every=1)
    with pytest.raises(RuntimeError), recorder.step():
        raise RuntimeError
    assert not recorder.moments
    assert not any(m._forward_hooks for m in model.modules())


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    module = Module()
    recorder = nl.Recorder(module, every=2, share=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of that library: few workers, no logger
        trainer = lightning.Trainer(
            max_steps=5, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[recorder.callback()],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(40, 4), batch_size=8))
    assert [m.step for m in recorder.moments] == [0, 2, 4]
    for moment in recorder.moments:
        assert moment.loss > 0
        assert math.isclose(moment.rate["net.0"] * moment.weight["net.0"] ** 2, 0.5)
        assert "net.1" in moment.variance
        assert moment.gradient["net.0"] > 0
    assert not any(m._forward_hooks for m in module.modules())


@pytest.mark.parametrize("wrong", [{"every": 0}, {"share": 0}, {"share": 2}, {"keep": 1}])
def test_wrong_options(wrong):
    with pytest.raises(ValueError, match="every is at least 1"):
        nl.Recorder(network(), **wrong)


def test_json_of_what_is_not_finite():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    recorder = nl.Recorder(model, every=1, share=1.0)
    with recorder.step():  # no loss is given, and a constant input has no variance
        model(torch.ones(4, 2)).sum().backward()
    (one,) = json.loads(json.dumps(recorder.to_json(), allow_nan=False))
    assert one["loss"] == "nan"
    assert one["gap"]["0"] == "inf"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("normlab.diagnostics.recorder.time.perf_counter", lambda: self.now)

    def run(self, recorder, steps, training, recording):
        """Steps that take `training` seconds, and `recording` more where they are recorded."""
        for _ in range(steps):
            step = recorder.step()
            with step:
                self.now += training
                if step.chosen:
                    step._cost += recording
                    self.now += recording


@pytest.mark.parametrize("recording", [0.001, 0.3, 5.0])
def test_the_share_is_kept_at_every_step_after_the_first_moment(monkeypatch, recording):
    """Not only in the long run: a moment is left out if it would go beyond the share."""
    clock = Clock(monkeypatch)
    recorder = nl.Recorder(network(), every=1, keep=10_000)
    clock.now += 1e6  # building and loading is not training
    clock.run(recorder, 1, 0.1, recording)
    seen = []
    for _ in range(2000):
        before = len(recorder.moments)
        clock.run(recorder, 1, 0.1, recording)
        if len(recorder.moments) > before:
            seen.append(recorder.overhead)
    assert seen
    assert max(seen) <= 0.05 + 1e-9
    # As often as the share allows.
    allowed = 0.05 * (clock.now - 1e6 - 1000) / recording
    assert len(seen) >= min(1999, allowed - 2)


def test_no_limit(monkeypatch):
    clock = Clock(monkeypatch)
    recorder = nl.Recorder(network(), every=1, share=1.0)
    clock.run(recorder, 50, 0.1, 100.0)
    assert len(recorder.moments) == 50


def test_compiled_models_are_not_compiled_again():
    compiled = []

    def backend(graph, inputs):
        compiled.append(1)
        return graph.forward

    counts = []
    for every in (1000, 2):
        torch._dynamo.reset()
        compiled.clear()
        plain = network()
        model = torch.compile(plain, backend=backend)
        with torch.no_grad():
            model(torch.randn(16, 4))  # so that the first step, too, finds it compiled
        recorder = nl.Recorder(model, every=every, share=1.0)
        train(model, recorder, 30)
        counts.append(len(compiled))
    assert counts[1] <= counts[0]
    assert len(recorder.moments) == 15
    assert set(recorder.moments[0].weight) == {"0", "3", "5"}  # names of checkpoints
    assert set(recorder.moments[0].variance) == {"1", "4"}


def test_a_compiled_step_counts_as_a_whole(monkeypatch):
    clock = Clock(monkeypatch)
    recorder = nl.Recorder(torch.compile(network(), backend="eager"), every=1)
    clock.run(recorder, 1, 0.1, 0.0)
    assert recorder.spent == pytest.approx(0.1)


def test_no_hook_and_no_tensor_on_steps_that_are_not_chosen():
    model = network()
    recorder = nl.Recorder(model, every=2, share=1.0)
    for chosen in (True, False, True):
        with recorder.step():
            hooked = [bool(m._forward_hooks) for m in model]
            assert hooked == [False, chosen, False, False, chosen, False]


def test_inputs_without_batch_and_in_other_formats_do_not_stop_training():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4))
    recorder = nl.Recorder(model, every=1, share=1.0)
    with recorder.step() as step:
        step.loss = model(torch.randn(4)).sum()
    assert recorder.moments[0].variance == {}
    half = nn.Sequential(nn.BatchNorm1d(4)).bfloat16()
    recorder = nl.Recorder(half, every=1, share=1.0)
    x = (torch.randn(64, 4) + 100).bfloat16()
    with recorder.step():
        half(x)
    exact = float(x.double().var(0, correction=0).mean())
    # float32 beside an offset of 100
    assert recorder.moments[0].variance["0"] == pytest.approx(exact, rel=1e-4)
