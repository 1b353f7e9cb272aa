"""The training-mode formulas once more, differentiable by autograd, in float64.

Statistics of areas are products with the matrix that says which element belongs to which area, so
that neither axes nor closed-form gradients enter. Labels and ε come from the numpy oracles.
"""

import math

import numpy as np
import torch

from activations import oracles


def membership(name, shape, options, mask=None):
    """The (areas, elements) matrix of zeros and ones, and each element's row in it."""
    labels = oracles.area_labels(name, shape, options).reshape(-1)
    _, row = np.unique(labels, return_inverse=True)
    matrix = torch.zeros(row.max() + 1, row.size, dtype=torch.float64)
    matrix[row, np.arange(row.size)] = 1
    if mask is not None:
        matrix = matrix * mask.unsqueeze(1).expand(shape).reshape(-1)
    return matrix, torch.as_tensor(row)


def moment_of(name, z, matrix, count, options):
    """What stands inside the root, for each area."""
    p = options.get("p", 1.0) if name == "lp_batch" else 1.0 if name == "l1_batch" else 2.0
    if p == "max":
        inside = torch.where(matrix > 0, z.abs(), -1.0)
        return inside.max(1).values
    powers = z * z if p == 2 else z.abs() ** p
    return matrix @ powers / count


def activate(y, name, options, threshold):
    activation = options.get("activation", "tlu" if name == "filter_response" else None)
    if activation == "relu":
        return torch.where(y > 0, y, 0)
    if activation == "silu":
        return y / (1 + torch.exp(-y))
    if activation == "tlu":
        return torch.where(y > threshold, y, threshold)
    return y


def forward(name, x, options, parameters, old=None, mask=None):
    """y in training mode; `old` = (μ, σ, rmax, dmax) for batch renormalization."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    if mask is not None:
        x = torch.where(mask.unsqueeze(1), x, 0)
    get = {k: v.view(shape) if v.ndim else v for k, v in parameters.items()}
    if name == "none":
        return x
    if name == "dyt":
        y = torch.tanh(get["alpha"] * x) * get.get("weight", 1) + get.get("bias", 0)
        return y if mask is None else torch.where(mask.unsqueeze(1), y, 0)
    matrix, row = membership(name, x.shape, options, mask)
    count = matrix.sum(1).clamp(min=1)
    flat = x.reshape(-1)
    mean = matrix @ flat / count
    centered = flat - mean[row]
    eps = oracles.EPS.get(name, 1e-5) if "eps" not in options else options["eps"]
    if options.get("learned_eps"):
        eps = eps + get["eps_learned"].abs()
    about_zero = name in ("rms", "filter_response") or (
        name == "lp_batch" and options.get("about", "zero") == "zero"
    )
    moment = moment_of(name, flat if about_zero else centered, matrix, count, options)
    if name == "l1_batch":
        scale = math.sqrt(math.pi / 2) * (moment + eps)
    elif name == "lp_batch":
        p = options.get("p", 1.0)
        scale = moment + eps if p == "max" else (moment + eps) ** (1 / p)
    else:
        scale = (moment + eps) ** 0.5
    shifted = flat if name in ("rms", "filter_response", "variance") else centered
    xhat = shifted if name == "mean_only_batch" else shifted / scale[row]
    if name == "batch_renorm":
        mu, sigma, rmax, dmax = old
        r = (scale / sigma).clamp(1 / rmax, rmax).detach()
        d = ((mean - mu) / sigma).clamp(-dmax, dmax).detach()
        xhat = xhat * r[row] + d[row]
    y = xhat.view(x.shape) * get.get("weight", 1) + get.get("bias", 0)
    y = activate(y, name, options, get.get("threshold"))
    return y if mask is None else torch.where(mask.unsqueeze(1), y, 0)
