"""How activations and gradients travel through the layers of a network."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from normlab.diagnostics.subject import Subject
from normlab.diagnostics.watch import by_channel, channel_dim, watched


@dataclass(frozen=True)
class Layer:
    """Signals at the output of one module, for one batch or as a mean over batches.

    Attributes:
        name: Dotted name.
        kind: Class of the module.
        depth: Place in the order of execution.
        shape: Shape of the output for the first batch.
        variance: Mean over channels of the variance over samples and positions (2106.05956).
        mean_square: Mean of all squares.
        gradient: ‖∂L/∂output‖_F; nan where the loss does not depend on it.
        cosine: Mean cosine of the angle between two samples; nan for a single one, and where
            a sample is zero.
        stable_rank: tr(M)/‖M‖₂ of the samples' cosine matrix M, from 1 to the number of samples
            (2106.05956).
        effective_rank: exp of the entropy of M's normalized spectrum (Roy & Vetterli 2007).
        dead: Share of channels that are zero at all samples and positions; 0 where the module's own
            weight (γ) is zero, as at the start of a residual branch.
    """

    name: str
    kind: str
    depth: int
    shape: tuple[int, ...]
    variance: float
    mean_square: float
    gradient: float
    cosine: float
    stable_rank: float
    effective_rank: float
    dead: float


@dataclass
class _Seen:
    """The first part of a `Layer`, until its gradient is known."""

    layer: Layer
    alive: Tensor
    gradient: list[float] = field(default_factory=list)


def propagation(subject: Subject, *, samples: int = 64) -> list[Layer]:
    """Measure every module's output, and the gradient of the loss at it.

    Args:
        subject: An entered `Subject`.
        samples: Most samples of a batch that enter the cosine matrix, N²·features each.

    Returns:
        Layers in order of execution, means over the batches. A module that runs several times is
        measured the first time.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> batch = torch.randn(16, 4), torch.randint(0, 2, (16,))
        >>> with Subject(model, nn.functional.cross_entropy, [batch]) as subject:
        ...     [layer.name for layer in propagation(subject)]
        ['0', '1', '2']
    """
    runs = [_one(subject, batch, samples) for batch in subject.batches]
    names = [name for name in runs[0] if all(name in run for run in runs)]
    return [_averaged([run[name] for run in runs]) for name in names]


def _one(subject: Subject, batch: object, samples: int) -> dict[str, _Seen]:
    found: dict[str, _Seen] = {}

    def see(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if name in found:
            return
        seen = found[name] = _measured(name, module, y, len(found), samples)
        if y.requires_grad:
            # The gradient of the value that is seen here, even if it is written to later.
            y.register_hook(  # type: ignore[no-untyped-call]
                lambda g: seen.gradient.append(float(g.detach().double().norm()))
            )

    at = subject.leaves()
    with watched(subject.model, see):
        loss = subject.evaluate(batch, at).loss
    torch.autograd.grad(loss, list(at.values()), allow_unused=True)
    return found


@torch.no_grad()
def _measured(name: str, module: nn.Module, y: Tensor, depth: int, samples: int) -> _Seen:
    y = y.detach()
    y = y if y.dtype == torch.float64 else y.float()
    # One number for each sample is one channel.
    rows = by_channel(y, channel_dim(module, y)) if y.ndim > 1 else y[None]
    weight = getattr(module, "weight", None)
    # A branch that starts at γ = 0 is silent, not dead: its gradient will move γ.
    silent = isinstance(weight, Tensor) and not bool(weight.any())
    alive = torch.ones(len(rows), dtype=torch.bool) if silent else (rows != 0).any(1).cpu()
    cosine, stable, effective = _angles(y[:samples].flatten(1) if y.ndim > 1 else y[:samples, None])
    layer = Layer(
        name, type(module).__name__, depth, tuple(y.shape),
        float(rows.var(1, correction=0).mean()), float(y.square().mean()), float("nan"),
        cosine, stable, effective, float("nan"),
    )  # fmt: skip
    return _Seen(layer, alive)


def _angles(rows: Tensor) -> tuple[float, float, float]:
    """Mean cosine, stable and effective rank of samples as rows."""
    lengths = rows.norm(dim=1, keepdim=True)
    n = len(rows)
    if n < 2 or not bool((lengths > 0).all()) or not bool(lengths.isfinite().all()):
        return float("nan"), float("nan"), float("nan")
    unit = rows / lengths
    M = (unit @ unit.T).double()
    spectrum = torch.linalg.eigvalsh(M).clamp(min=0)
    share = spectrum / spectrum.sum()
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    off = (M.sum() - M.diagonal().sum()) / (n * (n - 1))
    return float(off), float(n / spectrum[-1]), float(entropy.exp())


def _averaged(runs: list[_Seen]) -> Layer:
    def mean(name: str) -> float:
        return float(sum(getattr(run.layer, name) for run in runs) / len(runs))

    gradients = [run.gradient[0] if run.gradient else float("nan") for run in runs]
    shares = [float(run.alive.float().mean()) for run in runs]
    if len({len(run.alive) for run in runs}) == 1:  # lengths of sequences may differ
        shares = [float(torch.stack([run.alive for run in runs]).any(0).float().mean())]
    return replace(
        runs[0].layer,
        variance=mean("variance"),
        mean_square=mean("mean_square"),
        cosine=mean("cosine"),
        stable_rank=mean("stable_rank"),
        effective_rank=mean("effective_rank"),
        gradient=sum(gradients) / len(gradients),
        dead=1 - sum(shares) / len(shares),
    )


def growth(values: list[float]) -> float:
    """The factor by which a positive quantity grows from one layer to the next.

    Args:
        values: One for each layer, in order.

    Returns:
        exp of the slope of log(value) against the layer, by least squares; nan for fewer than two
        positive finite values.

    Example:
        >>> round(growth([1.0, 2.0, 4.0, 8.0]), 6)
        2.0
    """
    points = [(i, v) for i, v in enumerate(values) if 0 < v < float("inf")]
    if len(points) < 2:
        return float("nan")
    x = torch.tensor([p[0] for p in points], dtype=torch.float64)
    y = torch.tensor([p[1] for p in points], dtype=torch.float64).log()
    x = x - x.mean()
    return float(((x * y).sum() / x.square().sum()).exp())
