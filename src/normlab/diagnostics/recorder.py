"""A light watch over training: what normalizers and weights do, now and then."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normlab.core.stored import StoringLayer, keeps_statistics
from normlab.core.structure import inner, plain
from normlab.diagnostics.watch import channel_dim, watched
from normlab.weights import units


@dataclass(frozen=True)
class Moment:
    """What was seen at one step; dictionaries are by name of the module.

    Attributes:
        step: Number of the step, from 0.
        loss: As it was given.
        variance: Mean over channels of the variance of each normalizer's input in this batch.
        gap: Largest ratio between stored and batch variance (or its inverse) of normalizers that
            store one.
        weight: ‖w‖ of weight layers.
        gradient: ‖∂L/∂w‖ of them, as it stood when the step was recorded.
        rate: η/‖w‖², if the learning rate was given: the effective rate of weights without scale.
    """

    step: int
    loss: float
    variance: dict[str, float]
    gap: dict[str, float]
    weight: dict[str, float]
    gradient: dict[str, float]
    rate: dict[str, float]


class Recorder:
    """Records a training run at a stated cost.

    In a plain loop::

        recorder = nl.Recorder(model)
        for x, y in batches:
            with recorder.step() as step:
                loss = criterion(model(x), y)
                loss.backward()
                step.loss = loss
            optimizer.step()

    With Lightning, ``Trainer(callbacks=[recorder.callback()])``.

    Only chosen steps are looked at; all others cost a comparison. A step is chosen when `every`
    steps have passed and what recording has cost so far, with the cost of one more moment, is
    within `share` of the time since the first step began, so that an expensive model is looked at
    less often. The first moment is recorded whatever it costs.

    What `torch.compile` made runs as it is written on the steps that are looked at, since hooks
    would have it compiled anew each time; all of such a step counts as recording.

    Args:
        model: Any module; it is not changed.
        every: Least distance between recorded steps.
        share: Most of the time that recording may take; 0.05 by default, 1 for no limit.
        keep: Most moments to keep; when they are full, every second one goes and `every` doubles.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        >>> recorder = Recorder(model, every=1, share=1.0)
        >>> with recorder.step(lr=0.1) as step:
        ...     loss = model(torch.randn(8, 2)).square().mean()
        ...     loss.backward()
        ...     step.loss = loss
        >>> [sorted(m.gradient) for m in recorder.moments]
        [['0', '2']]
    """

    def __init__(
        self, model: nn.Module, *, every: int = 20, share: float = 0.05, keep: int = 1000
    ) -> None:
        if every < 1 or not 0 < share <= 1 or keep < 2:
            raise ValueError(
                f"every is at least 1, share in (0, 1], keep at least 2; received {every}, {share} "
                f"and {keep}"
            )
        self.model, self.every, self.share, self.keep = inner(model), every, share, keep
        self._compiled = _is_compiled(model)
        self.moments: list[Moment] = []
        self.steps = 0
        self.spent = 0.0
        self._begun = math.nan
        self._dearest = 0.0
        self._last = -every
        self._open: _Step | None = None

    @property
    def overhead(self) -> float:
        """Share of the time since the first step began that recording took; 0 before it."""
        return self.spent / self._elapsed() if self.steps else 0.0

    def _elapsed(self) -> float:
        return max(time.perf_counter() - self._begun, 1e-9)

    def _affordable(self) -> bool:
        if not self.moments or self.share == 1:
            return True
        return self.spent + self._dearest <= self.share * self._elapsed()

    def step(self, lr: float | None = None) -> _Step:
        """Watch one training step: enter before the forward pass, leave after the backward pass."""
        if not self.steps:
            self._begun = time.perf_counter()
        chosen = self.steps - self._last >= self.every and self._affordable()
        step = _Step(self, self.steps, lr, chosen)
        if chosen:
            self._last = self.steps
        self.steps += 1
        return step

    def to_json(self) -> list[dict[str, Any]]:
        """The moments as JSON values; what is not finite becomes a word."""
        found: list[dict[str, Any]] = plain(self.moments)
        return found

    def _add(self, moment: Moment) -> None:
        self.moments.append(moment)
        if len(self.moments) >= self.keep:
            self.moments = self.moments[::2]
            self.every *= 2

    def callback(self) -> Any:
        """Return a callback for Lightning's ``Trainer(callbacks=[…])`` that records here.

        Raises:
            ImportError: Without Lightning.
        """
        try:
            from lightning.pytorch import Callback
        except ImportError as error:
            raise ImportError(
                "a callback of Lightning needs it; install it with: pip install lightning"
            ) from error
        recorder = self

        class _Callback(Callback):  # type: ignore[misc, unused-ignore]
            def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
                rate = trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None
                recorder._open = recorder.step(rate)
                recorder._open.__enter__()

            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
                # The optimizer has acted by then; its gradients are still there.
                step, recorder._open = recorder._open, None
                if step is None:
                    return
                loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
                if isinstance(loss, Tensor):
                    step.loss = loss
                step.__exit__(None, None, None)

            def on_exception(self, *_: Any) -> None:
                step, recorder._open = recorder._open, None
                if step is not None:
                    step.__exit__(RuntimeError, None, None)

        return _Callback()


class _Step:
    """One step; hooks are there only if it was chosen."""

    def __init__(self, recorder: Recorder, number: int, lr: float | None, chosen: bool) -> None:
        self.recorder, self.number, self.lr, self.chosen = recorder, number, lr, chosen
        self.loss: Tensor | float = math.nan
        if chosen:
            self._cost = self._begun = 0.0
            self._around = contextlib.ExitStack()
            self._variance: dict[str, Tensor] = {}
            self._gap: dict[str, Tensor] = {}

    def __enter__(self) -> _Step:
        if self.chosen:
            self._begun = time.perf_counter()
            with contextlib.ExitStack() as stack:
                if "torch._dynamo" in sys.modules:  # it would compile anew for the hooks, each time
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(watched(self.recorder.model, self._see, only=_normalizes))
                self._around = stack.pop_all()
            self._cost += time.perf_counter() - self._begun
        return self

    def __exit__(self, *error: object) -> None:
        if not self.chosen:
            return
        start = time.perf_counter()
        self._around.close()
        if error[0] is None:
            self.recorder._add(self._moment())
        end = time.perf_counter()
        # What a compiled model loses by running as it is written is not known: all of the step.
        self._cost = end - self._begun if self.recorder._compiled else self._cost + end - start
        self.recorder.spent += self._cost
        self.recorder._dearest = max(self.recorder._dearest, self._cost)

    def _see(self, name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        start = time.perf_counter()
        if x.ndim > 1:
            with torch.no_grad():
                self._variance[name] = variance = _variances(x.detach(), channel_dim(module, x))
                kept = module._buffers.get("running_var")
                if kept is not None and kept.numel() == variance.numel():
                    ratio = (kept.to(variance).reshape(-1) / variance).log().abs()
                    self._gap[name] = ratio.max().exp()
        self._cost += time.perf_counter() - start

    @torch.no_grad()
    def _moment(self) -> Moment:
        weight, gradient, rate = {}, {}, {}
        for name, module in self.recorder.model.named_modules():
            w = getattr(module, "weight", None)
            if not isinstance(module, units.WEIGHT_LAYERS) or not isinstance(w, Tensor):
                continue
            weight[name] = float(w.detach().norm())
            if w.grad is not None:
                gradient[name] = float(w.grad.norm())
            if self.lr is not None and weight[name]:
                rate[name] = self.lr / weight[name] ** 2
        loss = float(self.loss.detach() if isinstance(self.loss, Tensor) else self.loss)
        # Read out only now, so that a device does not wait within the forward pass.
        variance = {name: float(v.mean()) for name, v in self._variance.items()}
        gap = {name: float(g) for name, g in self._gap.items()}
        return Moment(self.number, loss, variance, gap, weight, gradient, rate)


def _variances(x: Tensor, dim: int) -> Tensor:
    """Variance of each channel, in float32 at least; `torch.var` takes several times as long."""
    x = x if x.dtype == torch.float64 else x.float()
    members = [axis for axis in range(x.ndim) if axis != dim % x.ndim]
    centred = x - x.mean(members, keepdim=True)
    return centred.square_().mean(members)


def _is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile has been asked for a model or a part of it."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in model.modules())


def _normalizes(name: str, module: nn.Module) -> bool:
    return isinstance(module, _NORMALIZERS) or keeps_statistics(module)


_NORMALIZERS = (
    StoringLayer, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase,
)  # fmt: skip
