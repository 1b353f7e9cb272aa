"""Correlation and information against Gaussians, discrete joints, and the laws of gates."""

import math

import pytest
import torch
from torch import nn

import normlab as nl
from normlab.diagnostics import dependence as dp
from normlab.diagnostics.subject import Subject


def gaussian(correlation, count, seed=0):
    torch.manual_seed(seed)
    z = torch.randn(2, count, dtype=torch.float64)
    return torch.stack([z[0], correlation * z[0] + math.sqrt(1 - correlation**2) * z[1]])


@pytest.mark.parametrize("correlation", [0.0, 0.6, -0.9])
def test_gaussian_pairs(correlation):
    found = dp.dependence(gaussian(correlation, 200_000))
    # The deviation of a correlation of 200 000 samples is 0.0022; four of them.
    assert abs(found.correlation - abs(correlation)) < 0.009
    assert abs(found.whiteness - found.correlation) < 1e-9  # one pair
    exact = -0.5 * math.log(1 - correlation**2)
    # dI/dρ = ρ/(1 − ρ²), where the deviation of ρ is itself (1 − ρ²)/√M.
    assert abs(found.information - exact) < 0.01
    assert found.zeros == 0
    assert found.offset < 0.01


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_information_of_gaussians_by_neighbors(correlation):
    pytest.importorskip("sklearn")
    x, y = gaussian(correlation, 4000)
    exact = -0.5 * math.log(1 - correlation**2)
    # The estimator's deviation at 4000 samples is about 0.015.
    assert abs(dp.information(x, y) - exact) < 0.06


def test_condition_and_whiteness():
    q, _ = torch.linalg.qr(torch.randn(64, 4, dtype=torch.float64))
    q = q - q.mean(0)
    q, _ = torch.linalg.qr(q)
    white = q.T - q.T.mean(1, keepdim=True)
    scaled = white * torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64)[:, None]
    found = dp.dependence(scaled + 5)
    assert found.whiteness < 1e-9
    assert math.isclose(found.condition, 100, rel_tol=1e-6)
    equal = torch.stack([white[0], 3 * white[0]])
    found = dp.dependence(equal)
    assert math.isclose(found.whiteness, 1, rel_tol=1e-9)
    assert found.condition == math.inf
    assert math.isfinite(found.information)


def test_constant_units_are_left_out():
    x = gaussian(0.5, 50)
    with_constant = torch.cat([x, torch.full((1, 50), 3.0, dtype=torch.float64)])
    assert dp.dependence(with_constant).correlation == dp.dependence(x).correlation
    assert math.isnan(dp.dependence(x[:1]).correlation)
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        dp.dependence(torch.ones(3, 1))


def joints():
    """Discrete joint distributions without and with an atom at 0."""
    torch.manual_seed(0)
    for values in ([-1.0, 1.0, 2.0], [0.0, 1.0, 2.0]):
        joint = torch.rand(3, 3, dtype=torch.float64)
        yield torch.tensor(values, dtype=torch.float64), joint / joint.sum()


@pytest.mark.parametrize("keep", [0.95, 0.5, 0.0, 1.0])
def test_information_behind_gates(keep):
    """I(x̂; ŷ) = p²·I(x; y) where nothing is 0 before; else less."""
    for values, joint in joints():
        before = dp.discrete_information(joint)
        after = dp.discrete_information(dp.gated(joint, values, values, keep))
        if (values == 0).any():
            assert after <= keep**2 * before + 1e-12
        else:
            assert math.isclose(after, keep**2 * before, abs_tol=1e-12)


def test_symmetric_zero_example():
    """{0, 2} at p = ½: the ratio is 0.097, not 0.25."""
    values = torch.tensor([0.0, 2.0], dtype=torch.float64)
    joint = torch.tensor([[0.4, 0.1], [0.1, 0.4]], dtype=torch.float64)
    ratio = dp.discrete_information(dp.gated(joint, values, values, 0.5)) / dp.discrete_information(
        joint
    )
    assert ratio < 0.25 - 0.1


@pytest.mark.parametrize("keep", [0.95, 0.5])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_correlation_behind_gates(keep, shift):
    """Exactly, from the moments of a discrete joint."""
    values = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    joint = torch.tensor([[0.2, 0.1, 0.0], [0.1, 0.2, 0.1], [0.0, 0.1, 0.2]], dtype=torch.float64)

    def correlation(joint, v):
        px = joint.sum(1)
        m = (px * v).sum()
        variance = (px * v**2).sum() - m**2
        return float(((v[:, None] * v * joint).sum() - m**2) / variance), float(m / variance.sqrt())

    v = values - (joint.sum(1) * values).sum() + shift
    before, offset = correlation(joint, v)
    gate = dp.gated(joint, v, v, keep)
    atoms = torch.cat([torch.zeros(1, dtype=torch.float64), v[v != 0]])
    after, _ = correlation(gate, atoms)
    assert math.isclose(after, dp.gated_correlation(before, offset, keep), rel_tol=1e-12)


def test_layers_of_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 6), nl.norm("decorrelated", 6, groups=1, eps=1e-6), nn.ReLU()
    )
    mix = torch.randn(6, 6)
    batches = [(torch.randn(64, 6) @ mix, None)] * 2
    with Subject(model, lambda out, y: out.mean(), batches) as subject:
        found = {d.name: d for d in dp.by_layer(subject)}
    assert list(found) == ["input", "0", "1", "2"]
    assert found["0"].correlation > 0.1
    assert found["1"].whiteness < 1e-3  # ε of 1e-6 beside eigenvalues of 1e-2 and more
    assert found["2"].zeros > 0.3
    assert found["2"].offset > 0.3


def test_before_and_after_a_layer():
    """Where the tensor before it is the output of no module: a sum."""

    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nl.norm("decorrelated", 4, groups=1, eps=1e-6)
            self.last = nn.Linear(4, 2)

        def forward(self, x):
            return self.last(self.norm(x + 2 * x.roll(1, 1)))

    torch.manual_seed(0)
    batches = [(torch.randn(64, 4), None)] * 2
    with Subject(Adds(), lambda out, y: out.mean(), batches) as subject:
        (found,) = dp.around(subject)
        assert [one.name for one in dp.around(subject, ["last"])] == ["last"]
    x = torch.cat([x for x, _ in batches])
    assert found.name == "norm"
    assert found.before == dp.dependence((x + 2 * x.roll(1, 1)).T, "norm")
    assert found.before.correlation > 0.2
    assert found.after.correlation < 1e-3  # ε of 1e-6


def test_what_cannot_be_correlated_is_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)))
    with Subject(model, lambda out, y: out.mean(), [(torch.randn(1, 3), None)]) as subject:
        assert [d.name for d in dp.by_layer(subject)] == ["1"]  # one sample, two positions
