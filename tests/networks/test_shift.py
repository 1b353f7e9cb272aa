"""The variance shift between training and evaluation, where it is known."""

import copy

import pytest
import torch
from network_fakes import Batch
from torch import nn

import normlab as nl
from normlab.networks import build, variance_shift


class Louder(nn.Module):
    """Doubles its input in training."""

    def forward(self, x):
        return 2 * x if self.training else x


def rows(*columns):
    return torch.tensor(columns).T


def test_a_known_ratio():
    net = nn.Sequential(Louder(), nn.BatchNorm1d(2), Louder(), nn.Linear(2, 3), nn.BatchNorm1d(3))
    [first, second] = variance_shift(net, [torch.randn(64, 2), torch.randn(32, 2)])
    assert (first.name, second.name) == ("1", "4")
    # Multiplication by 2 is exact, and so are sums of float64 squares of float32 to 1e-12.
    assert first.measured == pytest.approx(0.25, rel=1e-12)
    assert first.predicted is None
    assert second.predicted is None


def test_the_variance_is_that_of_all_batches_together():
    x = rows([0.0, 2.0, 4.0, 10.0], [1.0, 1.0, 5.0, 5.0])

    class Last(nn.Module):
        def forward(self, x):
            return x if self.training else x.clamp(max=4)

    for batches in ([x], [x[:1], x[1:]], [x[:2], x[:0], x[2:]]):
        [shift] = variance_shift(nn.Sequential(Last(), Reader()), batches)
        train, seen = x.double().var(0, correction=0), x.double().clamp(max=4)
        expected = seen.var(0, correction=0).sum() / train.sum()
        # Four float64 additions.
        assert shift.measured == pytest.approx(expected.item(), rel=1e-12)


class Reader(nn.Module):
    """Has a stored statistic and accepts any batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(2))

    def forward(self, x):
        return x


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.5])
def test_dropout_shifts_by_the_formula(rate):
    keep = 1 - rate
    x = torch.randn(20000, 3) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 1.0, 3.0])
    net = nn.Sequential(nn.Dropout(rate), nn.BatchNorm1d(3))
    [shift] = variance_shift(net, x.split(5000))
    c, v = x.double().mean(0), x.double().var(0, correction=0)
    formula = (v.sum() / ((c.square() + v) / keep - c.square()).sum()).item()
    # The same float64 sums in another order.
    assert shift.predicted == pytest.approx(formula, rel=1e-9)
    # 60000 gates: about 1% standard error of the variance.
    assert shift.measured == pytest.approx(formula, rel=0.04)
    assert shift.measured < 1


def test_a_single_channel_is_the_formula_of_the_paper():
    # Mean 1 and variance 1 exactly: 1/((1 + 1)/0.8 − 1) = 2/3.
    x = torch.tensor([0.0, 2.0]).repeat(50)[:, None]
    [shift] = variance_shift(nn.Sequential(nn.Dropout(0.2), nn.BatchNorm1d(1)), [x])
    assert shift.predicted == pytest.approx(2 / 3, rel=1e-12)  # float64 arithmetic


def test_only_direct_outputs_of_dropout_are_predicted():
    def predicted(*layers):
        [shift] = variance_shift(nn.Sequential(*layers, nn.BatchNorm1d(3)), [torch.randn(8, 3)])
        return shift.predicted

    assert predicted(nn.Dropout(0.5)) is not None
    assert predicted(nn.Dropout(0.5), nn.Linear(3, 3)) is None
    assert predicted(nn.AlphaDropout(0.5)) is None
    assert predicted(nn.Dropout(0.5), nn.Identity()) is not None


def test_dropout_at_the_end_of_a_normalizer_is_known():
    net = nn.Sequential(nl.norm("ic", 3, dropout=0.5), nn.BatchNorm1d(3))
    first, second = variance_shift(net, [torch.randn(4000, 3)])
    assert first.predicted is None
    assert 0.4 < second.predicted < 0.6  # v/(v/p) = p where the mean is about 0


def test_evaluation_has_the_statistics_that_the_model_stores():
    # Stored mean 0 and variance 1 leave the variance as it is, the batch's own bring it to 1.
    net = nn.Sequential(nn.BatchNorm1d(2, affine=False), Reader())
    x = 3 * torch.randn(64, 2)
    _, shift = variance_shift(net, [x, x])
    expected = x.double().var(0, correction=0).mean().item()
    # ε = 1e-5 beside variances of 1 and 9, and float32.
    assert shift.measured == pytest.approx(expected, rel=1e-4)


def test_layers_without_stored_statistics_and_unused_ones_are_left_out():
    net = nn.Sequential(nn.LayerNorm(3), nn.BatchNorm1d(3, track_running_stats=False), Used())
    assert [shift.name for shift in variance_shift(net, [torch.randn(8, 3)])] == ["2.used"]


class Used(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.BatchNorm1d(3)
        self.used = Batch(3)

    def forward(self, x):
        return self.used(input=self.used(x))


def test_all_normalizers_of_a_network_are_measured():
    net = build("resnet8:width=4", lambda c: nl.norm("ic", c), classes=3, image_shape=(1, 8, 8))
    shifts = variance_shift(net, [(torch.randn(16, 1, 8, 8), torch.zeros(16))])
    assert len(shifts) == 7
    assert all(shift.measured > 0 for shift in shifts)


@pytest.mark.parametrize("mode", [True, False])
def test_nothing_is_changed(mode):
    net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3), nl.norm("ic", 3))
    net(torch.randn(8, 3)).sum().backward()
    net[2].eval() if mode else net.eval()
    modes = [module.training for module in net.modules()]
    state = copy.deepcopy(net.state_dict())
    gradients = [p.grad.clone() for p in net.parameters()]
    batches = [torch.randn(8, 3) for _ in range(3)]
    random = torch.get_rng_state()
    variance_shift(net, iter(batches))
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == [module.training for module in net.modules()]
    after = net.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="at least one batch; received none"):
        variance_shift(nn.BatchNorm1d(3), [])
