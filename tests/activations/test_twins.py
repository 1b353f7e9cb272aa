"""Torch's own layers: state dicts both ways, outputs, gradients and buffers."""

import pytest
import torch
from torch import nn

import normlab as nl

C = 6
# Both sides round sums of at most 200 terms in float64, in another order.
TIGHT = {"rtol": 1e-11, "atol": 1e-12}
POSITIONS = {0: (), 1: (5,), 2: (5, 3), 3: (4, 3, 2)}


def pair(ours, torchs, id, ranks=(1, 2, 3), last=False):
    return [pytest.param(ours, torchs, r, last, id=f"{id}-{r}") for r in ranks]


BATCH = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE = (None, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
PAIRS = [
    *pair(lambda: nl.BatchNorm(C), lambda r: BATCH[r](C), "batch", (0, 1, 2, 3)),
    *pair(lambda: nl.BatchNorm(C, eps=0.1, momentum=None),
          lambda r: BATCH[r](C, eps=0.1, momentum=None), "batch momentum None"),
    *pair(lambda: nl.BatchNorm(C, affine=False),
          lambda r: BATCH[r](C, affine=False), "batch not affine", (2,)),
    *pair(lambda: nl.BatchNorm(C, track_running_stats=False),
          lambda r: BATCH[r](C, track_running_stats=False), "batch untracked", (0, 2)),
    *pair(lambda: nl.norm("ic", C, dropout=0.0), lambda r: BATCH[r](C), "ic", (2,)),
    *pair(lambda: nl.InstanceNorm(C), lambda r: INSTANCE[r](C, affine=True), "instance"),
    *pair(lambda: nl.InstanceNorm(C, affine=False), lambda r: INSTANCE[r](C), "instance plain"),
    *pair(lambda: nl.InstanceNorm(C, track_running_stats=True),
          lambda r: INSTANCE[r](C, affine=True, track_running_stats=True), "instance tracked"),
    *pair(lambda: nl.GroupNorm(3, C), lambda r: nn.GroupNorm(3, C), "group", (0, 1, 2, 3)),
    *pair(lambda: nl.LayerNorm(C), lambda r: nn.GroupNorm(1, C), "layer as one group"),
    *pair(lambda: nl.LayerNorm(C, channel_dim=-1), lambda r: nn.LayerNorm(C), "layer last",
          (0, 1, 2), True),
    *pair(lambda: nl.RMSNorm(C, eps=1e-3, channel_dim=-1), lambda r: nn.RMSNorm(C, eps=1e-3),
          "rms last", (0, 1, 2), True),
]  # fmt: skip


def batch(rank, last, seed):
    x = torch.randn(8, C, *POSITIONS[rank], generator=torch.Generator().manual_seed(seed))
    x = 1.5 * x.double() + 0.7
    return (x.movedim(1, -1) if last else x).requires_grad_()


def fill(layer):
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p))


def compare(ours, theirs, rank, last):
    for seed in range(3):
        x, z = batch(rank, last, seed), batch(rank, last, seed)
        y, t = ours(x), theirs(z)
        torch.testing.assert_close(y, t, **TIGHT)
        weights = torch.sin(torch.arange(y.numel())).view(y.shape)
        (y * weights).sum().backward()
        (t * weights).sum().backward()
        torch.testing.assert_close(x.grad, z.grad, **TIGHT)
    for (key, p), (other, q) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert key == other
        torch.testing.assert_close(p.grad, q.grad, **TIGHT)
    uncounted = isinstance(ours, nl.InstanceNorm)  # torch's never counts its batches
    for key, value in theirs.state_dict().items():
        if not (uncounted and key == "num_batches_tracked"):
            torch.testing.assert_close(ours.state_dict()[key], value, **TIGHT)


@pytest.mark.parametrize("direction", ["into ours", "into torch's"])
@pytest.mark.parametrize(("ours", "torchs", "rank", "last"), PAIRS)
def test_twin(ours, torchs, rank, last, direction):
    a, b = ours().double(), torchs(rank).double()
    source, target = (b, a) if direction == "into ours" else (a, b)
    fill(source)
    for seed in (7, 8):
        source(batch(rank, last, seed))  # running statistics that are not at their start
    target.load_state_dict(source.state_dict(), strict=True)
    compare(a, b, rank, last)
    a.eval(), b.eval()
    a.zero_grad(), b.zero_grad()
    compare(a, b, rank, last)


@pytest.mark.parametrize("name", [n for n, c in nl.catalogue().items() if c.twin])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_card_names_a_twin_that_loads(name, rank):
    card = nl.catalogue()[name]
    ours, theirs = card.make(C, **card.case), card.twin(C, rank)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(8, C, *POSITIONS[rank])
    # Float32 rounding of both sides.
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_default_eps_are_torchs():
    x = 1e-4 * torch.randn(4, C)  # small enough for ε to matter
    twins = [
        (nl.RMSNorm(C, channel_dim=-1), nn.RMSNorm(C)),
        (nl.LayerNorm(C, channel_dim=-1), nn.LayerNorm(C)),
        (nl.BatchNorm(C), nn.BatchNorm1d(C)),
        (nl.GroupNorm(2, C), nn.GroupNorm(2, C)),
    ]
    for ours, theirs in twins:
        # Float32 rounding, amplified by at most 1/√ε·1e-4.
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-6)
