"""Laws about what a layer computes: its areas, moments, invariances and independent oracles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from normlab.conformance.measure import gap
from normlab.conformance.report import Finding, NotApplicable, Worst, violations
from normlab.conformance.subject import Subject
from normlab.core.card import Invariance
from normlab.core.partition import partition

_LARGE = 1e4
_NEGLIGIBLE = (
    "float64 on inputs of size 1e4, where ε ≤ 1e-3 changes less than 1e-7 of a deviation and "
    "rounding less than 1e-10"
)
_TWO_ORDERS = "float64, two orders of the same sums"


def partition_reversible(s: Subject) -> Finding:
    """undo(regroup(x)) is x, bit for bit."""
    found = []
    for rank in s.ranks:
        for dtype in (torch.float64, torch.bfloat16):
            x = s.x(rank, dtype)
            layout = s.layout(tuple(x.shape))
            back = layout.undo(layout.regroup(x))
            if back.shape != x.shape or not torch.equal(back, x):
                found.append(f"{tuple(x.shape)}, {dtype}: differs by {gap(back, x):.2g}")
    return violations(found, f"{2 * len(s.ranks)} tensors come back bit for bit")


def moments(s: Subject) -> Finding:
    """Before recovery, each area has mean 0 and deviation 1."""
    if not s.moments:
        raise NotApplicable("no moments are declared")
    pattern = partition(s.moments) if isinstance(s.moments, str) else None
    worst = Worst()
    for rank in s.ranks:
        x = _LARGE * s.x(rank)
        layout = s.layout(tuple(x.shape), pattern)
        if layout.members < 2:
            continue
        z = layout.regroup(s.run(_without_recovery(s), x))
        worst.see(f"mean, rank {rank}", z.mean(-1).abs().max().item())
        deviation = z.std(-1, correction=0)
        worst.see(f"deviation, rank {rank}", (deviation - 1).abs().max().item())
    return worst.finding(1e-6, _NEGLIGIBLE)


def _without_recovery(s: Subject) -> nn.Module:
    """The layer with γ = 1, β = 0 and no activation or dropout."""
    layer = s.layer(plain=True)
    with torch.no_grad():
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            parameter = getattr(layer, name, None)
            if isinstance(parameter, Tensor):
                parameter.fill_(value)
    recovery = getattr(layer, "recovery", None)
    if recovery is not None:
        layer.recovery = replace(recovery, activation=None, dropout=0.0)
    return layer


def invariances(s: Subject) -> Finding:
    """f(a·x) = f(x) and f(x + b) = f(x) for the declared families of a > 0 and b."""
    if not s.declared:
        raise NotApplicable("no invariances are declared")
    worst = Worst()
    for rank in s.ranks:
        x = _LARGE * s.x(rank)
        y = s.run(s.layer(), x)
        for invariance in s.declared:
            for moved in _moved(s, x, invariance):
                worst.see(f"{invariance}, rank {rank}", gap(s.run(s.layer(), moved), y))
    return worst.finding(1e-6, _NEGLIGIBLE)


def _moved(s: Subject, x: Tensor, invariance: Invariance) -> Iterator[Tensor]:
    """x under members of the family: small and large factors, or offsets of either sign."""
    first = s.channels_first(x)
    n, c, *positions = first.shape
    ones = [1] * len(positions)
    groups = s.groups or 1
    shape = {
        "tensor": [1, 1, *ones],
        "channel": [1, c, *ones],
        "sample": [n, 1, *ones],
        "sample and channel": [n, c, *ones],
        "position": [n, 1, *positions],
        "sample and group": [n, groups, *ones],
    }[invariance.per]
    generator = torch.Generator().manual_seed(3)
    for _ in range(2):
        u = (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1).to(x)
        u = u.repeat_interleave(c // groups, 1) if invariance.per == "sample and group" else u
        moved = first * u.exp() if invariance.kind == "scale" else first + 3 * _LARGE * u
        yield s.lay(moved) if s.channel_dim == -1 else moved


def twin(s: Subject) -> Finding:
    """Values, gradients and buffers are those of another layer, in training and evaluation."""
    if s.twin is None:
        raise NotApplicable("no twin is given, or its options are others")
    worst, refused = Worst(), []
    for rank in s.ranks:
        theirs = s.twin(s.channels, rank).to(s.device, torch.float64).train()
        try:
            s.run(theirs, s.x(rank))
        except (ValueError, RuntimeError) as error:  # no result is no contradiction
            refused.append(f"the twin refuses rank {rank} ({error})"[:80])
            continue
        ours = s.layer()
        theirs.load_state_dict(ours.state_dict())
        back = s.layer(plain=True)
        back.load_state_dict(theirs.state_dict())
        for layer, label in ((ours, "own state"), (back, "state from the twin")):
            _compare(s, layer, theirs, rank, label, worst)
            theirs.load_state_dict(ours.state_dict())
            back.load_state_dict(ours.state_dict())
    return worst.finding(1e-9, _TWO_ORDERS, "; ".join(refused))


def _compare(
    s: Subject, ours: nn.Module, theirs: nn.Module, rank: int, label: str, worst: Worst
) -> None:
    """Two steps of training, then evaluation, of two layers side by side."""
    for mode, seed in (("training", 1), ("training again", 2), ("evaluation", 3)):
        for layer in (ours, theirs):
            layer.train(mode != "evaluation")
        x = s.x(rank, seed=seed)
        actual, expected = s.gradients(ours, x), s.gradients(theirs, x)
        where = f"{mode}, rank {rank}, {label}"
        for name, value in expected.items():
            worst.see(f"{name} in {where}", gap(actual[name], value))
        stored = ours.state_dict()
        for name, value in theirs.state_dict().items():
            worst.see(f"{name} after {where}", gap(stored[name], value))
    for layer in (ours, theirs):
        layer.train()


def reference(s: Subject) -> Finding:
    """Values and gradients in training are those of the formula written out."""
    if s.reference is None:
        raise NotApplicable("no reference is given, or its options are others")
    worst = Worst()
    for rank in s.ranks:
        x = s.x(rank)
        actual = s.gradients(s.layer(), x)
        expected = s.gradients(_Formula(s, s.layer()), x)
        for name, value in expected.items():
            plain = name.replace("∂/∂layer.", "∂/∂")
            worst.see(f"{plain} in training, rank {rank}", gap(actual[plain], value))
    return worst.finding(1e-9, _TWO_ORDERS)


class _Formula(nn.Module):
    """A reference as a module, with the parameters of a layer."""

    def __init__(self, s: Subject, layer: nn.Module) -> None:
        super().__init__()
        self.subject, self.layer = s, layer

    def forward(self, x: Tensor) -> Tensor:
        assert self.subject.reference is not None
        first = self.subject.channels_first(x)
        y = self.subject.reference(first, dict(self.layer.named_parameters()))
        return self.subject.lay(y)


def large_mean(s: Subject) -> Finding:
    """A mean of 10⁴ beside a deviation of 1 leaves float32 results right."""
    worst = Worst()
    for rank in s.ranks:
        x = s.x(rank)
        # Signs alternate along every axis, so that areas of any kind deviate by about 1; a mean
        # rounded to float32 is off by up to 5e-4, which smaller deviations would magnify.
        index = torch.stack(torch.meshgrid(*map(torch.arange, x.shape), indexing="ij")).sum(0)
        x = (1e4 + (1 - 2 * (index % 2)).to(x) + 0.2 * (x - x.mean()) / x.std()).float()
        actual, expected = s.run(s.layer(torch.float32), x), s.run(s.layer(), x.double())
        worst.see(f"float32 beside float64, rank {rank}", gap(actual, expected))
    reason = "one step of float32 at 1e4; both sides get the same, already rounded, input"
    return worst.finding(1e-3, reason)
