"""The layer under test: how to build it, feed it and look at it, the same way in every law."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from normlab.conformance.measure import Factory, build, direction, gap, seeded
from normlab.conformance.report import NotApplicable
from normlab.core.card import Card, Invariance
from normlab.core.partition import Layout, Partition
from normlab.core.statistics import Renormalized

Twin = Callable[[int, int], nn.Module]
Reference = Callable[[Tensor, Mapping[str, Tensor]], Tensor]

# Lengths differ from one another and from the number of samples, so that mixed-up axes show.
_POSITIONS: dict[int, tuple[int, ...]] = {0: (), 1: (7,), 2: (5, 3), 3: (2, 5, 3)}
_FEW: dict[int, tuple[int, ...]] = {0: (), 1: (3,), 2: (2, 2), 3: (1, 2, 2)}


@dataclass(frozen=True)
class Subject:
    """A layer under test, with what is declared of it.

    Attributes:
        factory: (channels) → layer.
        channels: C.
        ranks: Numbers of position axes that the layer takes.
        channel_dim: 1 or −1.
        card: The card, or None.
        declared: Invariances.
        moments: Whether areas come out standardized; or the pattern of the areas.
        twin: (channels, rank) → a layer to agree with, or None.
        reference: (x, parameters) → y, or None.
        batch_dependent: Whether evaluation may depend on batch-mates.
        exact_card: Whether the layer has the options that the card's declarations are tested with.
        asked: Laws asked for by name.
    """

    factory: Factory
    channels: int
    ranks: tuple[int, ...]
    channel_dim: int = 1
    card: Card | None = None
    declared: tuple[Invariance, ...] = ()
    moments: bool | str = False
    twin: Twin | None = None
    reference: Reference | None = None
    batch_dependent: bool = False
    exact_card: bool = False
    asked: frozenset[str] = frozenset()

    @cached_property
    def example(self) -> nn.Module:
        """A layer to look at, not to run."""
        return build(self.factory, self.channels)

    @property
    def rank(self) -> int:
        """The rank that laws use which need only one."""
        return next((r for r in (1, 2, 3) if r in self.ranks), self.ranks[0])

    @property
    def groups(self) -> int | None:
        """Number of groups of channels, as normlab or torch names it."""
        e = self.example
        found: int | None = getattr(e, "groups", None) or getattr(e, "num_groups", None)
        return found

    @property
    def renormalizes(self) -> bool:
        """Whether statistics are corrected by constants to the gradient."""
        return isinstance(getattr(self.example, "statistics", None), Renormalized)

    def layer(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        plain: bool = False,
        seed: int = 0,
        channels: int | None = None,
    ) -> nn.Module:
        """Build a layer in training mode, always the same one.

        Args:
            dtype: Dtype of the model.
            plain: Leave the parameters as they were made; otherwise they are moved, because γ = 1
                and β = 0 would hide mistakes.
            seed: Another seed gives other parameters.
            channels: C, where it is not the subject's.

        Returns:
            The layer.
        """
        with seeded(seed):
            layer = build(self.factory, channels or self.channels)
        generator = torch.Generator().manual_seed(seed + 100)
        with torch.no_grad():
            for p in () if plain else layer.parameters():
                # Relative, so that positive parameters stay positive.
                u = torch.rand(p.shape, generator=generator).to(p) * 0.6 - 0.3
                p.copy_(torch.where(p == 0, u, p * (1 + u)))
        return layer.to(dtype).train()

    def x(
        self,
        rank: int | None = None,
        dtype: torch.dtype = torch.float64,
        *,
        samples: int = 4,
        seed: int = 1,
        few: bool = False,
    ) -> Tensor:
        """Return an input, always the same one: of mean ½ and deviation 1 in each channel.

        Args:
            rank: Number of position axes.
            dtype: Its dtype.
            samples: N.
            seed: Another seed gives another input.
            few: Few positions, for laws that need whole Jacobians.

        Returns:
            A contiguous tensor of shape (N, C, *positions), or (N, *positions, C).
        """
        rank = self.rank if rank is None else rank
        positions = (_FEW if few else _POSITIONS).get(rank, (2,) * rank)
        return self.make_input((samples, self.channels, *positions), dtype, seed)

    def make_input(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1) -> Tensor:
        """As `x`, for a shape (N, C, *positions)."""
        generator = torch.Generator().manual_seed(seed)
        z = torch.randn(shape, generator=generator, dtype=torch.float64)
        dims = [d for d in range(z.ndim) if d != 1]
        if z.numel() > 2 * shape[1]:
            z = (z - z.mean(dims, keepdim=True)) / z.std(dims, correction=0, keepdim=True)
        # Far from the stored statistics, bounds of a renormalization hold and its correction is
        # constant, as its gradient takes it to be; in between, no numerical derivative is its
        # gradient.
        x = 100 + 10 * z if self.renormalizes else 0.5 + z
        return self.lay(x.to(self.device, dtype))

    def lay(self, x: Tensor) -> Tensor:
        """Bring (N, C, *positions) into the layer's order of axes."""
        return x.movedim(1, -1).contiguous() if self.channel_dim == -1 else x

    def channels_first(self, y: Tensor) -> Tensor:
        """Undo `lay`."""
        return y.movedim(-1, 1) if self.channel_dim == -1 else y

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        tensors = [*self.example.parameters(), *self.example.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")

    def run(self, layer: nn.Module, x: Tensor, *, seed: int = 0, **inputs: Any) -> Tensor:
        """Call a layer; the seed is set, so that layers with dropout are functions too.

        Raises:
            TypeError: If the layer returns something else than a tensor.
        """
        with seeded(seed):
            y = layer(x, **inputs)
        if not isinstance(y, Tensor):
            raise TypeError(f"a normalizer returns one tensor; received {type(y).__name__}")
        return y

    def warm(self, layer: nn.Module) -> nn.Module:
        """Train a layer's statistics on two batches."""
        layer.train()
        dtype = next((p.dtype for p in layer.parameters()), torch.float64)
        for seed in (11, 12):
            self.run(layer, self.x(dtype=dtype, seed=seed))
        return layer

    def gradients(self, layer: nn.Module, x: Tensor, **inputs: Any) -> dict[str, Tensor]:
        """Return y and the gradients at x and all parameters of ⟨w, y⟩, w fixed and random."""
        x = x.detach().requires_grad_()
        y = self.run(layer, x, **inputs)
        named = {n: p for n, p in layer.named_parameters() if p.requires_grad}
        tensors = [x, *named.values()]
        found = torch.autograd.grad((y * direction(y)).sum(), tensors, allow_unused=True)
        labels = ["∂/∂x", *(f"∂/∂{name}" for name in named)]
        full = {
            label: torch.zeros_like(t) if g is None else g
            for label, t, g in zip(labels, tensors, found, strict=True)
        }
        return {"y": y.detach(), **full}

    def pure(
        self, layer: nn.Module, *, captured: bool = False
    ) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        """Make a function (x, *parameters) → y without side effects, and its parameters.

        Every call starts from the same buffers, and the layer keeps its own; unless `captured`,
        where the function uses (and may update) those of the layer.
        """
        named = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
        buffers = {n: b.detach().clone() for n, b in layer.named_buffers()}

        def function(x: Tensor, *parameters: Tensor) -> Tensor:
            given = dict(zip(named, parameters, strict=True))
            copies = {} if captured else {n: b.clone() for n, b in buffers.items()}
            with seeded():
                y = torch.func.functional_call(layer, {**copies, **given}, (x,))
            return cast(Tensor, y)

        return function, tuple(named.values())

    def layout(self, shape: tuple[int, ...], partition: Partition | None = None) -> Layout:
        """Bind the layer's partition to a shape (in the layer's order of axes).

        Raises:
            NotApplicable: If the layer has no partition.
        """
        p: Partition | None = partition or getattr(self.example, "partition", None)
        if p is None or not hasattr(p, "bind"):
            raise NotApplicable("the layer has no partition")
        sizes = {}
        groups = self.groups
        batch_size = getattr(self.example, "batch_size", None)
        if len(p.axes[1]) > 1 and groups:
            sizes[p.axes[1][0]] = groups
        if len(p.axes[0]) > 1 and batch_size:
            sizes[p.axes[0][-1]] = shape[0] // -(-shape[0] // batch_size)
        return p.bind(shape, channel_dim=self.channel_dim, sizes=sizes)

    def draws_random_numbers(self) -> bool:
        """Whether training output depends on the seed: measured."""
        first, second = (self.run(self.layer(), self.x(), seed=i) for i in (1, 2))
        return gap(first, second) > 0

    def mixes_samples(self) -> bool:
        """Whether a sample's training output depends on the others: measured, not declared."""
        layer, x, other = self.layer(), self.x(), self.x(seed=2)
        y = self.run(layer, x)[:1]
        with_others = self.run(self.layer(), torch.cat([x[:1], other[1:]]))[:1]
        return gap(with_others, y) > 1e-9
