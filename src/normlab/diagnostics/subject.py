"""A model on its data as a function of its parameters: what every probe starts from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from normlab.core.randomness import reseed, same_random_state
from normlab.core.structure import inner, tensors
from normlab.diagnostics.held import Mode, held

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Pass:
    """Result of a forward pass.

    Attributes:
        output: What the model returned.
        loss: The loss, a scalar.
    """

    output: Any
    loss: Tensor


class Subject:
    """A model, a loss and batches, evaluated without leaving a trace.

    Each evaluation starts from the same stored statistics and the same random numbers, so that the
    loss is a function of the parameters alone, which may be differentiated twice.

    Args:
        model: Any module.
        loss: ``loss(output, target) → scalar``, a mean over the batch; for batches that are
            mappings, ``loss(output, batch)``. None takes ``output.loss``.
        batches: Pairs (input, target), where an input may be a tensor, a tuple of positional or a
            mapping of keyword arguments; or mappings, passed to the model as keywords.
        mode: How it is measured, see `normlab.diagnostics.held.held`.
        limit: Most batches to take.
        seed: Of dropout and other noise.

    Raises:
        ValueError: If there is no batch, or no parameter that requires a gradient.
        TypeError: If a part of the model is TorchScript, which is no function of its parameters.

    Example:
        >>> batch = torch.ones(4, 2), torch.zeros(4, 1)
        >>> with Subject(nn.Linear(2, 1), nn.functional.mse_loss, [batch]) as subject:
        ...     gradient = subject.gradient()
        >>> {name: tuple(g.shape) for name, g in gradient.items()}
        {'weight': (1, 2), 'bias': (1,)}
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None,
        batches: Iterable[Any],
        *,
        mode: Mode = "train",
        limit: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model = inner(model)
        self.criterion, self.mode, self.seed = loss, mode, seed
        # A loader draws its order, or a seed for its workers.
        with same_random_state(self.model, *_samplers(batches)):
            self.batches = _taken(batches, limit)
        if any(isinstance(module, torch.jit.ScriptModule) for module in self.model.modules()):
            raise TypeError(
                "TorchScript cannot be evaluated as a function of its parameters; give the model "
                "that it was made from"
            )
        parameters = dict(self.model.named_parameters())
        real = {k: p for k, p in parameters.items() if p.requires_grad and not p.is_complex()}
        self.parameters = {k: p.detach() for k, p in real.items()}
        self.constants = {k: p.detach() for k, p in parameters.items() if k not in real}
        if not self.batches:
            raise ValueError("a probe needs at least one batch; received none")
        if not self.parameters:
            raise ValueError(
                "no parameter of the model requires a gradient, so there is nothing to probe; "
                "unfreeze some"
            )
        self._stack: contextlib.ExitStack | None = None

    def __enter__(self) -> Subject:
        with contextlib.ExitStack() as stack:
            # The caller may stand in a block without gradients.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(same_random_state(self.model))
            stack.enter_context(held(self.model, self.mode))
            self._stack = stack.pop_all()  # until here an error leaves nothing behind
        return self

    def __exit__(self, *error: object) -> None:
        assert self._stack is not None
        self._stack.close()
        self._stack = None

    def evaluate(self, batch: Any, parameters: Mapping[str, Tensor] | None = None) -> Pass:
        """Run the model on a batch.

        Args:
            batch: One of `batches`.
            parameters: Values to use instead of the model's own, by name; others keep theirs.

        Returns:
            Output and loss, differentiable in `parameters` as often as torch's operations are.

        Raises:
            RuntimeError: Outside a ``with`` block.
            ValueError: If the loss is not one number.
        """
        if self._stack is None:
            raise RuntimeError("use a Subject in a with block, which puts the model back")
        state = dict(parameters or {})
        for name, p in (*self.constants.items(), *self.parameters.items()):
            if name not in state:  # a copy, since some models write to their weights
                state[name] = p.clone()
        buffers = {k: b.clone() for k, b in self.model.named_buffers()}
        args, kwargs, target = arguments(batch)
        reseed(self.model, self.seed)
        # The fused forms of attention have no second derivative.
        with sdpa_kernel(SDPBackend.MATH):
            output = torch.func.functional_call(self.model, (state, buffers), args, kwargs)
            loss = output.loss if self.criterion is None else self.criterion(output, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                f"the loss is one number, a mean over the batch; received "
                f"{tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}"
            )
        return Pass(output, loss.reshape(()))

    def leaves(self) -> dict[str, Tensor]:
        """The parameters, as new leaves that require a gradient."""
        return _leaves(self.parameters)

    def loss(self, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The mean loss over the batches."""
        losses = [self.evaluate(batch, parameters).loss for batch in self.batches]
        return torch.stack(losses).mean()

    def gradient(self, parameters: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The gradient of the mean loss, batch by batch, at these parameters."""
        sums: dict[str, Tensor] = {}
        for batch in self.batches:
            at = self.leaves() if parameters is None else _leaves(parameters)
            found = torch.autograd.grad(
                self.evaluate(batch, at).loss, list(at.values()), materialize_grads=True
            )
            for name, g in zip(at, found, strict=True):
                g = g.to_dense() if g.is_sparse else g
                sums[name] = sums[name] + g if name in sums else g
        return {name: g / len(self.batches) for name, g in sums.items()}


def _leaves(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: p.detach().clone().requires_grad_() for k, p in parameters.items()}


def _samplers(batches: object) -> list[object]:
    """A loader and the parts of it that may draw."""
    inside = getattr(batches, "batch_sampler", None)
    parts = [getattr(batches, "sampler", None), inside, getattr(inside, "sampler", None)]
    parts += [batches, getattr(batches, "dataset", None)]
    return [part for part in parts if hasattr(part, "__dict__")]


def _taken(batches: Iterable[Any], limit: int | None) -> list[Any]:
    if isinstance(batches, Tensor | Mapping) or (
        isinstance(batches, tuple) and all(isinstance(part, Tensor) for part in batches)
    ):
        raise ValueError("batches is a list (or any iterable) of batches; received a single one")
    return list(islice(batches, limit))


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional and keyword arguments of the model, and what the loss compares with."""
    if isinstance(batch, Mapping):
        return (), dict(batch), batch
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise ValueError(
            f"a batch is a pair (input, target) or a mapping of the model's keywords; received "
            f"{type(batch).__name__}"
        )
    given, target = batch
    if isinstance(given, Mapping):
        return (), dict(given), target
    return (tuple(given), {}, target) if isinstance(given, tuple) else ((given,), {}, target)


def outputs(result: Any) -> Iterator[Tensor]:
    """Walk over the floating-point tensors that a model returned."""
    return (t for t in tensors(result) if t.is_floating_point())
