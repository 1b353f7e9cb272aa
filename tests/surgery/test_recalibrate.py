"""Statistics of the population, exactly, whatever the batches."""

import copy

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.surgery.recalibrate import recalibrate


def data():
    """Sorted, so that batches differ: their variances alone are far too small."""
    torch.manual_seed(0)
    return (torch.randn(60, 3, 2, 2).sort(0).values * 3 + 5).split(5)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nl.BatchNorm])
def test_the_population_is_all_batches(norm):
    layer = norm(3)
    (found,) = recalibrate(layer, data())
    rows = torch.cat(data()).double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(layer.running_mean.double(), rows.mean(1), rtol=1e-6, atol=0)
    # Bessel's correction is that of the population, 240 values, in both.
    torch.testing.assert_close(layer.running_var.double(), rows.var(1), rtol=1e-6, atol=0)
    assert found.variance < 0.2  # it was 1
    assert found.mean > 1
    naive = copy.deepcopy(layer)
    if norm is nn.BatchNorm2d:
        torch.optim.swa_utils.update_bn(data(), naive)
        assert (naive.running_var < 0.3 * layer.running_var).all()


def test_only_statistics_change():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9), nl.BatchNorm(4, momentum=0.3),
        nl.norm("batch_renorm", 4), nl.norm("lp_batch", 4), nn.InstanceNorm2d(4),
    )  # fmt: skip
    model[0].eval()
    model[3].use = "stored"
    model(torch.randn(4, 3, 2, 2))
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    found = recalibrate(model, [(x, torch.zeros(len(x))) for x in data()])
    assert [r.name for r in found] == ["1", "3", "4", "5"]
    assert [m.training for m in model.modules()] == modes
    assert (model[3].use, model[3].update, model[3].statistics.momentum) == ("stored", "auto", 0.3)
    assert model[1].momentum == 0.1
    for key, value in model.state_dict().items():
        changed = "running" in key or (key == "3.num_batches_tracked") or "num_batches" in key
        assert changed or torch.equal(value, before[key]), key
    assert torch.equal(model.state_dict()["1.num_batches_tracked"], before["1.num_batches_tracked"])
    # Dropout was off: with it, the second normalizer would have met ten times the variance.
    assert (model[3].running_var < 2).all()


def test_evaluation_is_then_that_of_the_whole_batch():
    """On one batch, evaluation equals training, but for Bessel's correction."""
    layer = nn.BatchNorm1d(3).train()
    x = torch.randn(50, 3)
    recalibrate(layer, [x])
    expected = layer(x)
    recalibrate(layer, [x])
    y = layer.eval()(x)
    torch.testing.assert_close(y, expected * (49 / 50) ** 0.5, rtol=1e-4, atol=1e-4)


def test_an_error_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3), nl.BatchNorm(3))
    model(torch.randn(8, 3))
    before = copy.deepcopy(model.state_dict())

    def batches():
        yield torch.randn(8, 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert model.training
    assert model[1]._pooled is None


def test_forms_of_batches():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, a, b):
            return self.norm(a + b)

    x = torch.randn(6, 2)
    for batch in ({"a": x, "b": x}, ((x, x), None)):
        model = Two()
        recalibrate(model, [batch])
        torch.testing.assert_close(model.norm.running_mean, 2 * x.mean(0))


def test_nothing_to_do():
    with pytest.raises(ValueError, match="nothing to recalibrate"):
        recalibrate(nn.Linear(2, 2), [torch.ones(2, 2)])
    with pytest.raises(ValueError, match="received none"):
        recalibrate(nn.BatchNorm1d(2), [])


def test_a_layers_own_dropout_is_off():
    """Else the second of two layers would be told of inputs that evaluation never gives it."""
    torch.manual_seed(0)
    x = torch.randn(512, 4)
    model = nn.Sequential(nl.norm("ic", 4, dropout=0.5), nl.norm("ic", 4))
    recalibrate(model, [x])
    torch.testing.assert_close(model[1].running_var, torch.ones(4), rtol=5e-3, atol=0)


def test_batches_are_read_no_further():
    stream = iter(data())
    recalibrate(nn.BatchNorm2d(3), stream, limit=2)
    assert len(list(stream)) == 10
