"""Models and steps that the tests of gradient transforms share."""

import torch
from torch import nn

import normlab as nl

NAMES = list(nl.catalogue("gradient"))


def small_model(dtype=torch.float64):
    """Convolutions (grouped too), a shift per channel, dense layers: small, no normalization."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3),
    ).to(dtype)  # fmt: skip


def batch(n=7, dtype=torch.float64, seed=0):
    """Inputs with means and deviations far from 0 and 1, and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(n, 2, 5, 5, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (n,), generator=generator)


def backward(model, n=7, seed=0, scale=1.0):
    """One backward pass; gradients are set anew."""
    x, y = batch(n, next(model.parameters()).dtype, seed)
    model.zero_grad()
    loss = scale * nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def rewritten(model, transform):
    """What a transform makes of the present gradients; parameters stay as they are."""
    optimizer = sgd(model, lr=0.0)
    transform.attach(optimizer)
    optimizer.step()
    transform.detach()
    return gradients(model)
