"""Stored statistics, modes and company of samples, against what is known."""

import copy
import math

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.diagnostics.stochasticity import discrepancy, disturbance, dropout_shift, noise, stored
from normlab.diagnostics.subject import Subject

F = nn.functional


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nl.BatchNorm])
def test_stored_statistics(norm):
    """Sorted batches: the variance between them belongs to the population."""
    layer = norm(2)
    layer.running_mean.copy_(torch.tensor([1.0, -2.0]))
    layer.running_var.copy_(torch.tensor([2.0, 3.0]))
    x = torch.randn(12, 2, 3, 3, dtype=torch.float64).sort(0).values.float() + 0.5
    batches = [(part, part) for part in x.split(4)]
    with Subject(layer, F.mse_loss, batches) as subject:
        (found,) = stored(subject)
    rows = x.double().movedim(1, 0).flatten(1)
    mean, variance = rows.mean(1), rows.var(1, correction=0)
    off = ((torch.tensor([1.0, -2.0]) - mean).abs() / variance.sqrt()).max()
    ratios = torch.tensor([2.0, 3.0]) / variance
    far = int(ratios.log().abs().argmax())
    assert math.isclose(found.mean, float(off), rel_tol=1e-6)
    assert found.channel == far
    assert math.isclose(found.variance, float(ratios[far]), rel_tol=1e-6)
    worst = 0.0
    for part, _ in batches:
        train, evaluation = copy.deepcopy(layer).train()(part), copy.deepcopy(layer).eval()(part)
        worst = max(worst, float(((evaluation - train).norm() / train.norm()).detach()))
    assert math.isclose(found.discrepancy, worst, rel_tol=1e-4)


def test_other_stored_statistics_and_none():
    model = nn.Sequential(
        nl.norm("rms", 4), nl.norm("mean_only_batch", 4), nl.norm("batch_renorm", 4)
    )
    x = torch.randn(8, 4)
    with Subject(model, F.mse_loss, [(x, x)]) as subject:
        found = stored(subject)
    assert [s.name for s in found] == ["1", "2"]
    assert math.isnan(found[0].variance)
    assert not math.isnan(found[0].mean)


def test_modes_of_the_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[1].running_var.fill_(100.0)
    x, y = torch.randn(64, 3), torch.randint(0, 2, (64,))
    with Subject(model, F.cross_entropy, [(x, y)]) as subject:
        found = discrepancy(subject)
    model.eval()
    with torch.no_grad():
        evaluation = model(x)
        model[1].train()
        train = model(x)
    assert math.isclose(
        found.output, float((evaluation - train).norm() / train.norm()), rel_tol=1e-5
    )
    assert math.isclose(found.loss_train, float(F.cross_entropy(train, y)), rel_tol=1e-5)
    assert math.isclose(found.loss_eval, float(F.cross_entropy(evaluation, y)), rel_tol=1e-5)


def test_disturbance_of_centering_alone():
    """y = x − x̄ over b samples: for a given x, Var(x̄) = σ²·(b − 1)/b² in the other samples."""
    torch.manual_seed(0)
    pool = torch.randn(4096, 1, dtype=torch.float64)
    layer = nl.norm("mean_only_batch", 1, affine=False)
    for b in (4, 16):
        found, _ = disturbance(layer, pool, b, draws=24)
        expected = math.sqrt(float(pool.var()) * (b - 1) / b**2)
        # 4096 samples and 24 draws: half a percent of sampling error, four deviations.
        assert abs(found / expected - 1) < 0.02


def test_disturbance_falls_with_the_batch_and_is_none_without_one():
    torch.manual_seed(0)
    pool = torch.randn(256, 4, 2, 2)
    sizes = [disturbance(nn.BatchNorm2d(4), pool, b)[0] for b in (2, 8, 32, 128)]
    assert sizes == sorted(sizes, reverse=True)
    for layer in (nl.norm("group", 4), nl.norm("instance", 4)):
        assert disturbance(layer, pool, 8)[0] < 1e-6  # rounding
    with pytest.raises(ValueError, match="512 of the pool's 256"):
        disturbance(nn.BatchNorm2d(4), pool, 512)


def test_noise_of_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2))
    batches = [(torch.randn(16, 1, 6, 6), torch.randint(0, 2, (16,))) for _ in range(2)]
    with Subject(model, F.cross_entropy, batches) as subject:
        (found,) = noise(subject, 4)
    assert found.name == "1"
    assert 0.01 < found.disturbance < 1


def test_a_layers_own_dropout_is_off():
    torch.manual_seed(0)
    model = nl.norm("ic", 3, dropout=0.5)
    x = torch.randn(64, 3)
    nl.recalibrate(model, [x])
    with Subject(model, F.mse_loss, [(x, x)]) as subject:
        found = discrepancy(subject)
    assert found.output < 0.02  # Bessel's correction over 64 samples


def test_constant_channels_are_not_off():
    """What varies by less than ε is a constant to the layer, wherever rounding puts the ratio."""
    layer = nn.BatchNorm1d(3)
    layer.running_var.copy_(torch.tensor([1.0, 1e-15, 1.0]))
    x = torch.randn(64, 3)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    x[:, :2] = 0.0
    x[0, 1] = 1e-6
    with Subject(layer, F.mse_loss, [(x, x)]) as subject:
        (found,) = stored(subject)
    assert math.isclose(found.variance, 1, rel_tol=1e-5)
    assert found.mean < 1e-3


@pytest.mark.parametrize(
    ("name", "value"),
    [("running_var", math.nan), ("running_var", -1.0), ("running_mean", math.inf)],
)
def test_statistics_that_are_no_numbers(name, value):
    layer = nn.BatchNorm1d(3)
    getattr(layer, name)[1] = value
    x = torch.randn(64, 3)
    with Subject(layer, F.mse_loss, [(x, x)]) as subject:
        (found,) = stored(subject)
    assert math.inf in (found.variance, found.mean)
    if name == "running_var":
        assert found.channel == 1


def test_inputs_that_are_written_to_later():
    """A residual sum in place changes what the normalizer was given."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            x = x.clone()
            y = self.norm(x)
            x += 100 * y
            return x * self.weight

    block = Block()
    x = torch.randn(4, 3) * 5
    with Subject(block, F.mse_loss, [(x, x)]) as subject:
        (found,) = stored(subject)
    train = copy.deepcopy(block.norm)(x)
    evaluation = copy.deepcopy(block.norm).eval()(x)
    expected = float(((evaluation - train).norm() / train.norm()).detach())
    assert math.isclose(found.discrepancy, expected, rel_tol=1e-4)


@pytest.mark.parametrize("keep", [0.5, 0.9])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nl.BatchNorm])
def test_dropout_shifts_the_variance(keep, norm):
    """Li et al. 2018: v/((m² + v)/p − m²), whatever is stored, with a normalizer before it."""
    torch.manual_seed(0)
    model = nn.Sequential(norm(3), nn.Dropout(1 - keep), norm(3), nn.Linear(3, 1)).eval()
    with torch.no_grad():
        model[0].running_var.fill_(7.0)  # plays no part
        model[0].weight.fill_(2.0)
        model[0].bias.fill_(1.0)
    batches = [(torch.randn(4096, 3), torch.zeros(4096, 1)) for _ in range(4)]
    before = copy.deepcopy(model.state_dict())
    with Subject(model, F.mse_loss, batches) as subject:
        first, second = dropout_shift(subject)
    m, v = 1.0, 4.0
    assert math.isclose(first.ratio, 1, rel_tol=1e-9)
    # 4096 masks, repeated in each batch, of 3 channels: a deviation of half a percent.
    assert math.isclose(second.ratio, v / ((m * m + v) / keep - m * m), rel_tol=0.02)
    assert not model.training
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(),
                                                 strict=True))  # fmt: skip


def test_noise_of_what_stores_nothing():
    """Statistics of the batch disturb, stored or not."""
    torch.manual_seed(0)
    batches = [(torch.randn(16, 3), torch.zeros(16, 1))]
    values = []
    for stores in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=stores), nn.Linear(3, 1))
        with Subject(model, F.mse_loss, batches) as subject:
            (found,) = noise(subject, 4)
        values.append(found.disturbance)
    assert values[0] == values[1] > 0.1
    model = nn.Sequential(nl.norm("group", 4, groups=2), nn.LayerNorm(4), nn.Linear(4, 1))
    with Subject(model, F.mse_loss, [(torch.randn(8, 4), torch.zeros(8, 1))]) as subject:
        assert noise(subject, 4) == []
