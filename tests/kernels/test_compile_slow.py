"""torch.compile: one whole graph whose outputs, gradients and statistics are the eager ones."""

import copy
import shutil
import warnings

import pytest
import torch
from torch import nn

import normlab as nl

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++")


def model():
    """All layers in one graph: a compilation takes long, whatever its size."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nl.BatchNorm(8, activation="relu"),
        nn.Conv2d(8, 8, 1), nl.GroupNorm(2, 8),
        nn.Conv2d(8, 8, 1), nl.FilterResponseNorm(8, learned_eps=True),
        nn.Conv2d(8, 8, 1), nl.BatchRenorm(8, rmax=2.0, dmax=1.0, momentum=0.3),
        nl.norm("ic", 8, dropout=0.0), nn.Conv2d(8, 8, 1), nl.RMSNorm(8), nl.NoNorm(8),
        nl.DynamicTanh(8), nn.Conv2d(8, 8, 1), nl.EvoNormS0(8, 2), nn.Conv2d(8, 8, 1),
        nl.EvoNormB0(8), nn.Conv2d(8, 8, 1), nl.SwitchableNorm(8),
    )  # fmt: skip


def alone():
    """By itself, r and d are cheap to compute again in the backward pass, from updated buffers."""
    return nn.Sequential(nl.BatchRenorm(3, rmax=2.0, dmax=1.0, momentum=0.3))


@pytest.mark.parametrize("build", [model, alone])
def test_compiled_training_is_eager_training_slow(build):
    torch._dynamo.reset()
    eager = build().double()
    traced = copy.deepcopy(eager)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler itself
        compiled = torch.compile(traced, fullgraph=True)
        for seed in range(2):
            x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed)).double()
            x, z = 3 * x.clone().requires_grad_(), 3 * x.clone().requires_grad_()
            x.retain_grad(), z.retain_grad()
            y, t = eager(x), compiled(z)
            # Fused loops sum float64 in another order; a few layers deep.
            torch.testing.assert_close(t, y, rtol=1e-8, atol=1e-9)
            y.pow(3).sum().backward()
            t.pow(3).sum().backward()
            torch.testing.assert_close(z.grad, x.grad, rtol=1e-7, atol=1e-8)
            for (key, p), q in zip(eager.named_parameters(), traced.parameters(), strict=True):
                # γ under another normalization has gradients that cancel; they are sums of
                # some hundred terms of size 1.
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-7, atol=1e-8, msg=key)
            for (key, b), c in zip(eager.named_buffers(), traced.buffers(), strict=True):
                torch.testing.assert_close(c, b, rtol=1e-9, atol=1e-10, msg=key)
            eager.zero_grad(), traced.zero_grad()
