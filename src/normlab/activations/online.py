"""Online normalization (Chiley et al. 2019, arXiv 1905.05894)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from normlab.core import statistics as st
from normlab.core.card import Card
from normlab.core.layer import Normalize
from normlab.core.operation import Operation, Standardize
from normlab.core.partition import Layout
from normlab.core.recovery import Affine
from normlab.kernels.closed_form import sum_to
from normlab.kernels.hold import hold
from normlab.kernels.reference import Moments, accumulated, masked

Guard = Literal["layer_scaling", "clamp"]
CLAMP = 5.0


@dataclass(frozen=True)
class Stream(st.Running):
    """Running statistics of samples, of the forward and of the backward pass."""

    def names(self, operation: Operation) -> tuple[str, ...]:
        """Names of the stored statistics."""
        return ("running_mean", "running_var", "control_product", "control_mean")


class OnlineNorm(Normalize):
    """y = s(γ·z + β), z_t = (x_t − μ_{t−1})/√(σ²_{t−1} + ε), sample after sample.

    Statistics stream through the samples t of a batch in their order and on into the next batch.
    With the mean m_t and variance v_t of a channel of sample t and α = 1 − momentum,

        σ²_t = α·σ²_{t−1} + (1 − α)·v_t + α·(1 − α)·(m_t − μ_{t−1})²,
        μ_t = α·μ_{t−1} + (1 − α)·m_t.

    They have no gradient. Two control processes keep the gradient orthogonal to z and to 1 in the
    long run: with h = ∂L/∂z, means over positions and a = backward_momentum,

        h'_t = h_t − a·p_{t−1}·z_t,            p_t = p_{t−1} + mean(h'_t·z_t),
        ∂L/∂x_t = h'_t/σ_{t−1} − a·q_{t−1},    q_t = q_{t−1} + mean(∂L/∂x_t).

    s guards against statistics that lag behind: layer scaling divides each sample by its root mean
    square over channels and positions; ``"clamp"`` cuts at ±5. Evaluation takes the stored μ and
    σ², and s. Source: Chiley et al. 2019, arXiv 1905.05894.

    The backward pass starts from p and q as they were at the forward pass. With the policy
    ``update="accumulate"``, μ and σ² stream on but are stored at `commit`; p and q stay.

    Args:
        num_channels: C.
        eps: ε, also that of layer scaling.
        momentum: Weight of the newest sample, 1 − α.
        affine: Whether there are γ and β.
        backward_momentum: a.
        guard: s: ``"layer_scaling"`` (the paper's), ``"clamp"`` or None.
        channel_dim: 1, or −1 for (…, C).

    Shape:
        (N, C, *) → (N, C, *).

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> OnlineNorm(8)
        OnlineNorm(8, n c * -> c (n *), eps=1e-05, momentum=0.001, guard=layer_scaling)
    """

    shown: ClassVar = ("guard",)

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        momentum: float = 0.001,
        affine: bool = True,
        *,
        backward_momentum: float = 0.01,
        guard: Guard | None = "layer_scaling",
        channel_dim: int = 1,
    ) -> None:
        if not 0 <= backward_momentum <= 1:
            raise ValueError(f"backward_momentum is in [0, 1]; received {backward_momentum}")
        if guard not in (*get_args(Guard), None):
            raise ValueError(f"guard is 'layer_scaling', 'clamp' or None; received {guard!r}")
        self.momentum, self.backward_momentum, self.guard = momentum, backward_momentum, guard
        super().__init__(
            num_channels,
            "n c * -> c (n *)",
            operation=Standardize(eps=eps),
            statistics=Stream(momentum),
            recovery=Affine(affine, affine),
            channel_dim=channel_dim,
        )

    def reset_running_stats(self) -> None:
        """Set μ to 0, σ² to 1, and p and q to 0."""
        super().reset_running_stats()
        for name in self.stored_names[2:]:
            cast(Tensor, getattr(self, name)).zero_()

    def _normalize(
        self, x: Tensor, mask: Tensor | None, measured: list[tuple[Layout, Moments]]
    ) -> Tensor:
        """Stream through the batch; the base's own update has nothing to do."""
        first = x.movedim(self.channel_dim, 1)
        flat = first.reshape(*first.shape[:2], -1)
        valid = None if mask is None else mask.reshape(len(mask), 1, -1)
        # Held as one: what the forward pass does not use, the compiler would read in the backward
        # pass, after an update.
        start = list(hold(torch.stack([cast(Tensor, getattr(self, n)) for n in self.stored_names])))
        if self._update == "accumulate" and self._pooled is not None and not self._uses_stored:
            start[:2] = self._pooled
        mean, variance = start[0][:, None], start[1][:, None]
        if self._measures:
            with torch.no_grad():
                before, after = _scan(flat.detach(), valid, start[0], start[1], self.momentum)
                self._keep(*after)
            if not self._uses_stored:
                mean, variance = before
        eps = cast(float, self.eps)
        observe = self._observe if self._updates and self._update != "accumulate" else None
        control = Control(eps, 0.0 if self._uses_stored else self.backward_momentum, self.guard,
                          None if self._uses_stored else observe)  # fmt: skip
        weight, bias = (None if p is None else p[:, None] for p in (self.weight, self.bias))
        scale = (variance + eps).sqrt()
        function = _Traced if torch.compiler.is_compiling() else _Online
        y: Tensor = function.apply(  # type: ignore[no-untyped-call]
            flat, weight, bias, mean, scale, start[2], start[3], valid, control
        )
        return y.reshape(first.shape).movedim(1, self.channel_dim)

    def _keep(self, mean: Tensor, variance: Tensor) -> None:
        """Apply the update policy to the state after a batch."""
        buffers = [cast(Tensor, getattr(self, name)) for name in self.stored_names[:2]]
        if not self._updates or not st.writable([mean, variance], buffers):
            return
        if self._update == "accumulate":
            self._pooled = (mean, variance)
            return
        for buffer, value in zip(buffers, (mean, variance), strict=True):
            buffer.copy_(value)
        self.num_batches_tracked.add_(1)

    @torch.no_grad()
    def commit(self) -> bool:
        """Store what streamed by under ``update="accumulate"``.

        Returns:
            Whether there was anything.
        """
        pooled, self._pooled = self._pooled, None
        if pooled is None:
            return False
        for name, value in zip(self.stored_names, pooled, strict=False):
            cast(Tensor, getattr(self, name)).copy_(value)
        self.num_batches_tracked.add_(1)
        return True

    @torch.no_grad()
    def _observe(self, *changes: Tensor) -> None:
        """Move p and q by what a backward pass added to them."""
        buffers = [cast(Tensor, getattr(self, name)) for name in self.stored_names[2:]]
        if st.writable(changes, buffers):
            for buffer, change in zip(buffers, changes, strict=True):
                buffer.add_(torch.where(change.isfinite(), change, 0).to(buffer.dtype))


class Control(NamedTuple):
    """What the backward pass needs beside tensors: ε, a, s, and where p and q are kept."""

    eps: float
    rate: float
    guard: str | None
    observe: Callable[..., None] | None


def _mean(x: Tensor, valid: Tensor | None, count: Tensor | int) -> Tensor:
    """Mean over the valid positions of each channel of each sample, (N, C, P) → (N, C)."""
    return masked(x, valid).sum(2) / count


def _count(x: Tensor, valid: Tensor | None) -> Tensor | int:
    return x.shape[2] if valid is None else valid.sum(2).clamp(min=1)


def _present(x: Tensor, valid: Tensor | None) -> Tensor:
    """Whether a sample has a valid position, (N, 1)."""
    if valid is None:
        return torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
    return valid.any(2)


def _scan(
    x: Tensor, valid: Tensor | None, mean: Tensor, variance: Tensor, momentum: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """μ and σ² before each sample, (N, C, 1), and after the last, (C,).

    A channel of a sample that is not finite, or has no valid position, leaves them as they were.
    """
    x, count = masked(accumulated(x), valid), _count(x, valid)
    means = _mean(x, valid, count)
    variances = _mean((x - means[:, :, None]) ** 2, valid, count)
    usable = (means + variances).isfinite() & _present(x, valid)
    before = []
    for m, v, ok in zip(means.unbind(), variances.unbind(), usable.unbind(), strict=True):
        before.append((mean, variance))
        d = m.to(mean.dtype) - mean
        new = variance + momentum * (v.to(mean.dtype) - variance + (1 - momentum) * d**2)
        mean, variance = torch.where(ok, mean + momentum * d, mean), torch.where(ok, new, variance)
    stacked = [torch.stack(s)[:, :, None] for s in zip(*before, strict=True)]
    return (stacked[0], stacked[1]), (mean, variance)


class _Traced(torch.autograd.Function):
    """y = s(γ·(x − center)/scale + β) on (N, C, P), with the controlled gradient."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, center: Tensor, scale: Tensor,
        p: Tensor, q: Tensor, valid: Tensor | None, control: Control,
    ) -> Tensor:  # fmt: skip
        z = masked((accumulated(x) - center) / scale, valid)
        return _tail(z, weight, bias, valid, control)[0].to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:8])
        ctx.save_for_forward(*inputs[:8])
        ctx.control = inputs[8]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        x, weight, bias, center, scale, p, q, valid = ctx.saved_tensors
        control: Control = ctx.control
        z = masked((accumulated(x) - center) / scale, valid)
        g = masked(accumulated(grads[0]), valid)
        y, w, size = _tail(z, weight, bias, valid, control)
        if control.guard == "layer_scaling":
            g = (g - y * _whole(g * y, valid)) / size
        elif control.guard == "clamp":
            g = g * (w.abs() < CLAMP)
        gw = None if weight is None else sum_to(g * z, weight[None])[0]
        gb = None if bias is None else sum_to(g, bias[None])[0]
        h = g if weight is None else g * weight
        return _controlled(h, z, scale, p, q, valid, control).to(x.dtype), gw, gb, *[None] * 6


class _Online(_Traced):
    """The same, also for forward mode and vmap, which the compiler refuses."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, weight, bias, center, scale, _, _, valid = ctx.saved_tensors
        control: Control = ctx.control
        z = masked((accumulated(x) - center) / scale, valid)
        y, w, size = _tail(z, weight, bias, valid, control)
        dx, dweight, dbias = tangents[:3]
        d = torch.zeros_like(z) if dx is None else accumulated(dx) / scale
        d = d if weight is None else d * weight
        d = d if dweight is None else d + z * dweight
        d = masked(d if dbias is None else d + dbias, valid)
        if control.guard == "layer_scaling":
            d = (d - y * _whole(d * y, valid)) / size
        elif control.guard == "clamp":
            d = d * (w.abs() < CLAMP)
        return d.to(x.dtype)


def _whole(x: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over all channels and valid positions of a sample, (N, 1, 1)."""
    count = _count(x, valid)
    if valid is not None:
        assert isinstance(count, Tensor)
        count = count[:, :, None]
    return masked(x, valid).sum((1, 2), keepdim=True) / (count * x.shape[1])


def _tail(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None, control: Control
) -> tuple[Tensor, Tensor, Tensor]:
    """s(w), w = γ·z + β, and the root mean square that layer scaling divides by."""
    w = z if weight is None else z * weight
    w = masked(w if bias is None else w + bias, valid)
    size = (_whole(w * w, valid) + control.eps).sqrt()
    if control.guard == "layer_scaling":
        return w / size, w, size
    return w.clamp(-CLAMP, CLAMP) if control.guard == "clamp" else w, w, size


def _controlled(
    h: Tensor, z: Tensor, scale: Tensor, p: Tensor, q: Tensor, valid: Tensor | None,
    control: Control,
) -> Tensor:  # fmt: skip
    """∂L/∂x; p and q stream through the samples."""
    if not control.rate and control.observe is None:
        return h / scale
    count, a, first = _count(z, valid), control.rate, (p, q)
    present = _present(z, valid).to(z.dtype)
    ps, qs = [], []
    for hz, zz in zip(
        _mean(h * z, valid, count).unbind(), _mean(z * z, valid, count).unbind(), strict=True
    ):
        ps.append(p)
        p = p + hz - a * p * zz
    below = masked((h - a * torch.stack(ps)[:, :, None] * z) / scale, valid)
    for mean, there in zip(_mean(below, valid, count).unbind(), present.unbind(), strict=True):
        qs.append(q)
        q = q + mean - a * q * there
    if control.observe is not None:
        control.observe((p - first[0]).detach(), (q - first[1]).detach())
    return masked(below - a * torch.stack(qs)[:, :, None], valid)


def reference(
    x: Tensor, parameters: Mapping[str, Tensor], *, eps: float = 1e-5, momentum: float = 0.001,
    rate: float = 0.01,
) -> Tensor:  # fmt: skip
    """The first batch, sample by sample; hooks on the graph stand for the control processes."""
    mean, variance = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    p, q = [x.new_zeros(x.shape[1], 1)], [x.new_zeros(x.shape[1], 1)]
    roots: list[Tensor] = []
    shift: list[Tensor] = []
    for sample in x.detach().flatten(2) if x.ndim > 2 else x.detach()[:, :, None]:
        shift, roots = [*shift, mean], [*roots, (variance + eps) ** 0.5]
        m = sample.mean(1)
        v = ((sample - m[:, None]) ** 2).mean(1)
        variance = (1 - momentum) * (variance + momentum * (m - mean) ** 2) + momentum * v
        mean = (1 - momentum) * mean + momentum * m
    through = (x * 1).reshape(*x.shape[:2], -1)
    z = (through - torch.stack(shift)[:, :, None]) / torch.stack(roots)[:, :, None]
    kept = z.detach()

    def orthogonal(g: Tensor) -> Tensor:
        state, out = p[0], []
        for one, at in zip(g, kept, strict=True):
            out.append(one - rate * state * at)
            state = state + (out[-1] * at).mean(1, keepdim=True)
        return torch.stack(out)

    def centered(g: Tensor) -> Tensor:
        state, out = q[0], []
        for one in g:
            out.append(one - rate * state)
            state = state + out[-1].mean(1, keepdim=True)
        return torch.stack(out)

    if z.requires_grad and x.requires_grad:
        z.register_hook(orthogonal)  # type: ignore[no-untyped-call]
        through.register_hook(centered)  # type: ignore[no-untyped-call]
    w = z * parameters["weight"][:, None] + parameters["bias"][:, None]
    return (w / ((w**2).mean((1, 2), keepdim=True) + eps) ** 0.5).reshape(x.shape)


_NOT_A_GRADIENT = "the control processes stand in for the gradient of the running statistics"

CARD = Card(
    name="online",
    title="Online normalization",
    authors="Chiley, Sharapov, Kosson, Koster, Reece, Samaniego de la Fuente, Subbiah & James",
    year=2019,
    arxiv="1905.05894",
    site="activation",
    formula="y = s(γ·(x_t − μ_{t−1})/√(σ²_{t−1} + ε) + β), sample by sample; "
    "h' = h − a·p·z, ∂L/∂x = h'/σ − a·q",
    pattern="n c * -> c (n *)",
    operation="standardize",
    statistics="running ones from before each sample, in training and evaluation",
    recovery="affine per channel, then each sample divided by its root mean square",
    layer=OnlineNorm,
    reference=reference,
    limits=(
        "the gradient is not that of the forward pass, by design",
        "the backward pass updates stored statistics: training needs both passes",
        "samples are taken one after the other: results depend on their order, and time grows "
        "with their number where positions are few; so does the graph that torch.compile traces",
        "compiled by inductor with guard='clamp', a backward pass that is repeated "
        "(retain_graph=True) is wrong",
        "micro-batches under update='accumulate' do not move the backward statistics",
    ),
    use_when="Batches of one sample, or memory for one.",
    avoid_when="Exact gradients are needed, or batches are large.",
    source="code",
    advice="Statistics remember 1/momentum = 1,000 samples; the authors scale the learning rate "
    "and the momentum of the optimizer down to batches of one.",
    exempt={
        "gradcheck": _NOT_A_GRADIENT,
        "gradgradcheck": _NOT_A_GRADIENT,
        "hessian_vector_product": _NOT_A_GRADIENT,
        "per_sample_gradient": "each sample changes the statistics that the next one uses",
    },
)
