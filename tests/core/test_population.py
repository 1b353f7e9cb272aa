"""Moments of a union, however it is cut."""

import torch

from normlab.core.population import Population


def test_population_of_a_union():
    x = torch.randn(40, 3, 2, dtype=torch.float64) + 100
    seen = Population()
    for part in x.split([7, 1, 0, 32]):
        seen.add(part.float(), 1)
    rows = x.float().double().movedim(1, 0).flatten(1)
    torch.testing.assert_close(seen.mean, rows.mean(1))
    torch.testing.assert_close(seen.variance, rows.var(1, correction=0))
    assert seen.count == 80
