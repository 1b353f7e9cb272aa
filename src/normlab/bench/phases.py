"""Stages of training as values, their learning rates, and the loss with a teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

SCHEDULES = ("step", "epoch", "released")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stage of training.

    Attributes:
        name: For records.
        epochs: How long.
        lr: Learning rate at the start.
        weight_decay: Of convolutions' and linear layers' weights; Adam's, added to the gradient.
        binary_weights: Whether binary convolutions use one-bit weights.
        batch_size: Samples in a batch.
        hard: Share h of the hard labels in the loss, see `distillation_loss`.
        clip: λ of adaptive gradient clipping of all but the classifier; 0 for none.
        schedule: ``"step"``: lr·(1 − t/T) at step t of T. ``"epoch"``: lr·(1 − e/E) in epoch e of
            E, from 0. ``"released"``: lr·(1 − (e + 1)/E), the quirk of released code, whose last
            epoch learns nothing.

    Raises:
        ValueError: An option is outside its range.
    """

    name: str
    epochs: float
    lr: float
    weight_decay: float = 0.0
    binary_weights: bool = True
    batch_size: int = 64
    hard: float = 0.0
    clip: float = 0.0
    schedule: str = "step"

    def __post_init__(self) -> None:
        for option, low, high in (
            ("epochs", 0, math.inf),
            ("lr", 0, math.inf),
            ("weight_decay", 0, math.inf),
            ("hard", 0, 1),
            ("clip", 0, math.inf),
        ):
            value = getattr(self, option)
            if not low <= value <= high or value == math.inf:
                raise ValueError(f"{option} must be from {low} to {high}; received {value}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {SCHEDULES}; received {self.schedule!r}")


def two_stages(
    *, epochs: tuple[float, float] = (1.0, 1.0), lr: float = 5e-4, **options: Any
) -> tuple[Phase, Phase]:
    """The two stages of the papers.

    Args:
        epochs: Of each stage; 256 in the papers.
        lr: Learning rate of both, 5e-4 in the papers, at batches of 256.
        **options: Further options of both, see `Phase`.

    Returns:
        Stage 1 (real weights, weight decay 1e-5) and stage 2 (one-bit weights, none).

    Example:
        >>> [(p.binary_weights, p.weight_decay) for p in two_stages(clip=0.02)]
        [(False, 1e-05), (True, 0.0)]
    """
    first, second = (Phase(name="", epochs=length, lr=lr, **options) for length in epochs)
    return (
        replace(first, name="real weights", weight_decay=1e-5, binary_weights=False),
        replace(second, name="binary weights"),
    )


def distillation_loss(
    logits: Tensor,
    soft: Tensor | None,
    labels: Tensor | None = None,
    *,
    hard: float = 0.0,
    kind: str = "cross_entropy",
) -> Tensor:
    """L = (1 − h)·mean_n D(p_n, q_n) + h·mean_n (−log q_n[label_n]), q = softmax(logits).

    With the teacher's p = softmax(soft), D is the cross entropy −Σ_k p_k log q_k, as in released
    code, or the divergence Σ_k p_k (log p_k − log q_k): other values, the same gradients.

    Args:
        logits: The student's, (N, K).
        soft: The teacher's, (N, K), constant; None for hard labels alone.
        labels: (N,); not needed where h = 0.
        hard: h.
        kind: ``"cross_entropy"`` or ``"kl"``.

    Returns:
        L.

    Raises:
        ValueError: Labels are needed and absent, or ``kind`` is unknown.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0]])
        >>> float(distillation_loss(z, z, kind="kl"))
        0.0
    """
    if kind not in ("cross_entropy", "kl"):
        raise ValueError(f"kind must be 'cross_entropy' or 'kl'; received {kind!r}")
    share = 1.0 if soft is None else hard
    if share and labels is None:
        raise ValueError(f"hard={hard} without a teacher's logits or above 0 needs labels")
    loss = logits.new_zeros(())
    if soft is not None and share < 1:
        expected, found = soft.detach().log_softmax(1), logits.log_softmax(1)
        gap = expected - found if kind == "kl" else -found
        loss = loss + (1 - share) * (expected.exp() * gap).sum(1).mean()
    if share:
        assert labels is not None
        loss = loss + share * F.cross_entropy(logits, labels)
    return loss


def learning_rate(phase: Phase, step: int, steps: int, per_epoch: int) -> float:
    """The learning rate of a step, see `Phase.schedule`.

    Args:
        phase: The stage.
        step: From 0.
        steps: Of the stage.
        per_epoch: Steps of an epoch.

    Example:
        >>> phase = Phase(name="", epochs=2, lr=1.0, schedule="epoch")
        >>> [learning_rate(phase, step, 4, 2) for step in range(4)]
        [1.0, 1.0, 0.5, 0.5]
    """
    if phase.schedule == "step":
        return phase.lr * (1 - step / steps)
    epochs, epoch = math.ceil(steps / per_epoch), step // per_epoch
    return phase.lr * (1 - (epoch + (phase.schedule == "released")) / epochs)
