"""Curvature of the loss: Hessian and Gauss–Newton matrix, of the function that is trained.

Statistics of the batch are part of that function: its second derivatives run through them. Tools
that measure in evaluation mode, with stored statistics as constants, report another matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from normlab.core.structure import mapped
from normlab.diagnostics import lanczos
from normlab.diagnostics.lanczos import Density, Eigenvalues, Estimate
from normlab.diagnostics.subject import Subject, arguments

Matrix = Literal["hessian", "gauss_newton"]


class Curvature:
    """Products of a curvature matrix of the mean loss with vectors over chosen parameters.

    Args:
        subject: An entered `Subject`.
        matrix: ``"hessian"``: ∇²L. ``"gauss_newton"``: Jᵀ·∇²_f L·J with J the derivative of the
            model's outputs f; positive semidefinite where the loss is convex in f, and Fisher's
            matrix for the cross-entropy and the squared error.
        names: Parameters that the matrix ranges over; None for all.

    Raises:
        ValueError: If a name is unknown, the matrix too, or the loss cannot be told from the
            output (``loss=None``) where the Gauss–Newton matrix needs that.

    Example:
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> with Subject(model, torch.nn.functional.mse_loss, [(x, y)]) as subject:
        ...     Curvature(subject).eigenvalues().values
        tensor([1.0000], dtype=torch.float64)
    """

    def __init__(
        self, subject: Subject, matrix: Matrix = "hessian", names: Iterable[str] | None = None
    ) -> None:
        if matrix not in ("hessian", "gauss_newton"):
            raise ValueError(f"matrix is 'hessian' or 'gauss_newton'; received {matrix!r}")
        if matrix == "gauss_newton" and subject.criterion is None:
            raise ValueError(
                "the Gauss–Newton matrix needs a loss as a function of the output: give loss="
            )
        self.subject, self.matrix = subject, matrix
        self.names = list(subject.parameters) if names is None else list(names)
        unknown = [n for n in self.names if n not in subject.parameters]
        if unknown or not self.names:
            raise ValueError(f"no trainable parameter named {', '.join(unknown) or '(none given)'}")
        self.size = sum(subject.parameters[n].numel() for n in self.names)
        self.products = 0
        self._kept: Callable[[list[Tensor]], list[Tensor]] | None = None

    def __call__(self, v: Tensor) -> Tensor:
        """Return A·v; v has shape (size,), in the order of `names`."""
        parts = self._split(v)
        total = torch.zeros(self.size, dtype=torch.float64, device="cpu")
        for batch in self.subject.batches:
            product = self._kept or self._prepared(batch)
            if len(self.subject.batches) == 1:
                self._kept = product  # one graph serves all products
            total += torch.cat([p.reshape(-1).cpu().double() for p in product(parts)])
        self.products += 1
        return total / len(self.subject.batches)

    def eigenvalues(
        self, k: int = 1, *, steps: int = 30, tolerance: float = 1e-3, seed: int = 0
    ) -> Eigenvalues:
        """The k eigenvalues of largest size; see `lanczos.eigenvalues`."""
        return lanczos.eigenvalues(self, self.size, k, steps=steps, tolerance=tolerance, seed=seed)

    def trace(self, draws: int = 20, seed: int = 0) -> Estimate:
        """The trace; see `lanczos.trace`."""
        return lanczos.trace(self, self.size, draws, seed)

    def density(self, *, steps: int = 40, draws: int = 3, seed: int = 0) -> Density:
        """The spectral density; see `lanczos.density`."""
        return lanczos.density(self, self.size, steps=steps, draws=draws, seed=seed)

    def _split(self, v: Tensor) -> list[Tensor]:
        like = [self.subject.parameters[n] for n in self.names]
        parts = torch.split(v, [p.numel() for p in like])
        return [a.reshape(p.shape).to(p) for a, p in zip(parts, like, strict=True)]

    def _prepared(self, batch: Any) -> Callable[[list[Tensor]], list[Tensor]]:
        at = {n: p for n, p in self.subject.leaves().items() if n in self.names}
        ordered = [at[n] for n in self.names]
        if self.matrix == "hessian":
            return _hessian(self.subject, batch, at, ordered)
        return _gauss_newton(self.subject, batch, at, ordered)


def _hessian(
    subject: Subject, batch: Any, at: Mapping[str, Tensor], ordered: list[Tensor]
) -> Callable[[list[Tensor]], list[Tensor]]:
    """v ↦ ∇(∇L·v)."""
    loss = subject.evaluate(batch, at).loss
    gradient = _grad(loss, ordered, create_graph=True)
    # A loss that is linear in a parameter has a gradient without a graph.
    curved = [i for i, g in enumerate(gradient) if g.requires_grad]

    def product(v: list[Tensor]) -> list[Tensor]:
        if not curved:
            return [torch.zeros_like(p) for p in ordered]
        return _grad([gradient[i] for i in curved], ordered, [v[i] for i in curved])

    return product


def _gauss_newton(
    subject: Subject, batch: Any, at: Mapping[str, Tensor], ordered: list[Tensor]
) -> Callable[[list[Tensor]], list[Tensor]]:
    """v ↦ Jᵀ·∇²_f L·J·v; J·v is the derivative of Jᵀ·u, linear in u, along v."""
    assert subject.criterion is not None
    f: list[Tensor] = []
    cut: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        if not t.requires_grad:
            return t
        f.append(t)
        cut.append(t.detach().requires_grad_())
        return cut[-1]

    output = mapped(subject.evaluate(batch, at).output, leaf)
    if not f:
        raise ValueError(
            f"the Gauss–Newton matrix needs outputs that depend on the parameters; none is found "
            f"in the model's {type(output).__name__}: return tensors, in containers or dataclasses"
        )
    # Of the outputs as such: where one is computed from another, the loss must not see that.
    slopes = _grad(subject.criterion(output, arguments(batch)[2]), cut, create_graph=True)
    u = [torch.zeros_like(t, requires_grad=True) for t in f]
    pulled = _grad(f, ordered, u, create_graph=True)

    def product(v: list[Tensor]) -> list[Tensor]:
        pushed = _grad([p for p in pulled if p.requires_grad], u,
                       [a for a, p in zip(v, pulled, strict=True) if p.requires_grad])  # fmt: skip
        curved = [(s, d) for s, d in zip(slopes, pushed, strict=True) if s.requires_grad]
        if not curved:
            return [torch.zeros_like(p) for p in ordered]
        bent = _grad([s for s, _ in curved], cut, [d for _, d in curved])
        return _grad(f, ordered, bent)

    return product


def _grad(
    of: Tensor | list[Tensor],
    at: list[Tensor],
    along: list[Tensor] | None = None,
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    found = torch.autograd.grad(
        of, at, along, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return [g.to_dense() if g.is_sparse else g for g in found]


def by_layer(
    subject: Subject, matrix: Matrix = "hessian", *, steps: int = 10, tolerance: float = 1e-2
) -> dict[str, Eigenvalues]:
    """The largest eigenvalue of each layer's own block of the matrix.

    Args:
        subject: An entered `Subject`.
        matrix: See `Curvature`.
        steps: Most products for each layer.
        tolerance: Relative residual to stop at.

    Returns:
        By name of the module that holds the parameters, in the model's order.
    """
    layers: dict[str, list[str]] = {}
    for name in subject.parameters:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        layer: Curvature(subject, matrix, names).eigenvalues(steps=steps, tolerance=tolerance)
        for layer, names in layers.items()
    }
