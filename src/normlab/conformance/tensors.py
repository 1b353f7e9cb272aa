"""Laws about the tensors a layer takes: dtypes, ranks, memory layouts, sizes and masks."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from normlab.conformance.measure import gap
from normlab.conformance.report import Finding, NotApplicable, Worst, violations
from normlab.conformance.subject import Subject

_SAME_SUMS = "float64, the same sums in another order"


def dtypes(s: Subject) -> Finding:
    """The output has the shape, dtype and device of the input, in training and evaluation."""
    found = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer = s.layer(dtype)
        for training in (True, False):
            x = s.x(dtype=dtype)
            y = s.run(layer.train(training), x)
            for what in ("shape", "dtype", "device"):
                if getattr(y, what) != getattr(x, what):
                    mode = "training" if training else "evaluation"
                    found.append(
                        f"{what} {getattr(y, what)} for {getattr(x, what)} in {mode} ({dtype})"
                    )
    return violations(found, "float32, float64 and bfloat16 come out as they went in")


def statistics_precision(s: Subject) -> Finding:
    """Stored floating-point statistics have at least 32 bits in a bfloat16 or float16 model."""
    found, seen = [], 0
    for dtype in (torch.bfloat16, torch.float16):
        layer = s.layer(dtype)
        s.run(layer, s.x(dtype=dtype))
        for name, buffer in layer.named_buffers():
            if buffer.is_floating_point():
                seen += 1
                if torch.finfo(buffer.dtype).bits < 32:
                    found.append(f"{name} has {torch.finfo(buffer.dtype).bits} bits ({dtype})")
    if not seen:
        raise NotApplicable("no floating-point statistics are stored")
    return violations(found, f"{seen} buffers keep 32 bits or more")


def ranks(s: Subject) -> Finding:
    """Positions may lie along any number of axes: values are those of the flattened input."""
    worst = Worst()
    for rank in s.ranks:
        x = s.x(rank)
        y = s.run(s.layer(), x)
        if y.shape != x.shape:
            worst.see(f"shape {tuple(y.shape)} for {tuple(x.shape)}", math.inf)
        elif rank != s.rank and s.rank == 1:
            first = s.channels_first(x)
            flat = s.lay(first.reshape(*first.shape[:2], -1))
            expected = s.channels_first(s.run(s.layer(), flat)).reshape(first.shape)
            worst.see(f"rank {rank} beside rank 1", gap(s.channels_first(y), expected))
        else:
            worst.see(f"rank {rank} finite", 0.0 if y.isfinite().all() else math.inf)
    return worst.finding(1e-10, _SAME_SUMS)


def layouts(s: Subject) -> Finding:
    """Values and gradients do not depend on strides.

    Torch draws random numbers in the order of memory, so that layers with dropout are compared in
    evaluation.
    """
    worst, random = Worst(), s.draws_random_numbers()
    for rank in s.ranks:
        x = s.x(rank)
        expected = s.gradients(s.layer().train(not random), x)
        for name, variant in _strided(x):
            actual = s.gradients(s.layer().train(not random), variant)
            for what, value in expected.items():
                worst.see(f"{what}, {name}, rank {rank}", gap(actual[what], value))
    return worst.finding(1e-10, _SAME_SUMS, "in evaluation" if random else "")


def _strided(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values in other memory layouts."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.ndim in formats:
        yield "channels last", x.contiguous(memory_format=formats[x.ndim])
    yield "transposed", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "every second element", torch.stack([x, -x], -1)[..., 0]


def empty_batch(s: Subject) -> Finding:
    """A batch of no samples gives no samples, and leaves the statistics finite."""
    found = []
    for training in (True, False):
        layer = s.layer().train(training)
        x = s.x(samples=0)
        y = s.run(layer, x)
        if y.shape != x.shape:
            found.append(f"shape {tuple(y.shape)} for {tuple(x.shape)}")
        found += [f"{n} is not finite" for n, b in layer.named_buffers() if not b.isfinite().all()]
    return violations(found, "an empty output of the same shape")


def single_element(s: Subject) -> Finding:
    """One sample of one position has a finite result and gradient, or a clear ValueError."""
    positions = (1,) * (0 if 0 in s.ranks else s.rank)
    x = s.make_input((1, s.channels, *positions), torch.float64)
    outcome, found = "defined", []
    try:
        results = s.gradients(s.layer(), x)
        found += [f"{k} is not finite" for k, v in results.items() if not v.isfinite().all()]
    except ValueError as error:
        outcome = "error"
        if len(str(error)) < 20:
            found.append(f"ValueError says only {str(error)!r}")
    if s.exact_card and s.card is not None and outcome != s.card.batch_of_one:
        found.append(f"the card says {s.card.batch_of_one!r}; it was {outcome!r}")
    layer = s.layer().eval()
    stores = any(b.is_floating_point() for b in layer.buffers())
    # Without stored statistics, evaluation is training again, and may refuse what that refused.
    if (stores or outcome == "defined") and not s.run(layer, x).isfinite().all():
        found.append("not finite in evaluation")
    return violations(found, f"shape {tuple(x.shape)} in training: {outcome}")


def mask(s: Subject) -> Finding:
    """What stands at masked positions changes nothing at valid ones, nor in the statistics."""
    if "mask" not in inspect.signature(s.example.forward).parameters:
        raise NotApplicable("forward takes no mask")
    worst = Worst()
    for rank in s.ranks:
        x = s.x(rank)
        first = s.channels_first(x)
        valid = torch.ones(first.shape[0], *first.shape[2:], dtype=torch.bool, device=x.device)
        everywhere = s.run(s.layer(), x, mask=valid)
        worst.see(f"a mask of True, rank {rank}", gap(everywhere, s.run(s.layer(), x)))
        valid.view(-1)[-(valid.numel() // 3) :] = False
        results = []
        for garbage in (0.0, 1e3, math.nan):
            layer = s.layer()
            spoilt = s.lay(first.masked_fill(~valid.unsqueeze(1), garbage))
            result = s.gradients(layer, spoilt, mask=valid)
            for name in ("y", "∂/∂x"):
                result[name] = s.channels_first(result[name]).movedim(1, -1)[valid]
            results.append({**result, **dict(layer.named_buffers())})
        for result, label in zip(results[1:], ("1000", "NaN"), strict=True):
            for name, value in results[0].items():
                worst.see(f"{name} with {label} behind the mask, rank {rank}",
                          gap(result[name], value))  # fmt: skip
    return worst.finding(1e-12, "float64, sums in which masked elements are exact zeros")
