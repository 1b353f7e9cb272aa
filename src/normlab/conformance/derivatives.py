"""Laws about derivatives, by autograd and by `torch.func`, and the memory they take."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

from normlab.conformance.measure import changes, direction, gap, seeded, state
from normlab.conformance.report import Finding, NotApplicable, Worst, violations
from normlab.conformance.subject import Subject

_SAME_DERIVATIVE = "float64, the same derivative by another route"


def first_derivative(s: Subject) -> Finding:
    """Gradients are those of central differences, in training."""
    return _numerical(s, gradcheck, fast=False)


def second_derivative(s: Subject) -> Finding:
    """Gradients of gradients are those of central differences, in training."""
    return _numerical(s, gradgradcheck, fast=True)


def _numerical(s: Subject, check: Callable[..., bool], *, fast: bool) -> Finding:
    function, parameters = s.pure(s.layer())
    inputs = [t.clone().requires_grad_() for t in (s.x(few=True), *parameters)]
    try:
        check(function, inputs, fast_mode=fast)
        error = ""
    except GradcheckError as found:
        error = re.sub(r"\s+", " ", str(found))
    detail = error or f"{len(inputs)} inputs of {sum(t.numel() for t in inputs)} elements"
    reason = "the check's own: rtol 1e-3, atol 1e-5 at steps of 1e-6 in float64"
    return Finding(float(bool(error)), 0.0, reason, detail)


def jacobian(s: Subject) -> Finding:
    """torch.func.jacrev gives the Jacobians of plain autograd."""
    function, parameters = s.pure(s.layer())
    inputs = (s.x(few=True, samples=3), *parameters)
    which = tuple(range(len(inputs)))
    actual = torch.func.jacrev(function, argnums=which)(*inputs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    rows = [
        torch.autograd.grad(y_i, leaves, retain_graph=True, materialize_grads=True)
        for y_i in y.reshape(-1)
    ]
    worst = Worst()
    for i, column in enumerate(zip(*rows, strict=True)):
        expected = torch.stack(column).view(*y.shape, *inputs[i].shape)
        worst.see("∂y/∂x" if i == 0 else f"parameter {i}", gap(actual[i], expected))
    return worst.finding(1e-9, _SAME_DERIVATIVE)


def hessian_vector_product(s: Subject) -> Finding:
    """torch.func.jvp of torch.func.grad gives the product of differentiating twice in reverse."""
    function, parameters = s.pure(s.layer())
    x = s.x(few=True)
    inputs = (x, *parameters)
    vectors = tuple(direction(t, seed=20 + i) for i, t in enumerate(inputs))

    def loss(*tensors: Tensor) -> Tensor:
        y = function(*tensors)
        return (direction(x) * y + y**2 / 2).sum()

    gradient = torch.func.grad(loss, argnums=tuple(range(len(inputs))))
    actual = torch.func.jvp(gradient, inputs, vectors)[1]
    leaves = [t.clone().requires_grad_() for t in inputs]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True, materialize_grads=True)
    along = sum(((g * v).sum() for g, v in zip(first, vectors, strict=True)), x.new_zeros(()))
    expected = torch.autograd.grad(along, leaves, materialize_grads=True)
    worst = Worst()
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        worst.see("H·v at x" if i == 0 else f"H·v at parameter {i}", gap(a, e))
    return worst.finding(1e-9, _SAME_DERIVATIVE)


def per_sample_gradient(s: Subject) -> Finding:
    """torch.func.vmap of torch.func.grad gives the gradients of samples taken one by one.

    Where samples share statistics in training, a sample has a gradient of its own in evaluation.
    """
    mixed = s.mixes_samples()
    layer = s.layer()
    layer = s.warm(layer).eval() if mixed else layer
    # Buffers stand outside the transform, as in user code: a batch of updates fits no buffer.
    function, parameters = s.pure(layer, captured=True)
    x = s.x(samples=3)

    def loss(sample: Tensor, *values: Tensor) -> Tensor:
        y = function(sample.unsqueeze(0), *values)
        return (direction(x[:1]) * y).sum()

    gradient = torch.func.grad(loss, argnums=tuple(range(len(parameters) + 1)))
    dims = (0, *[None] * len(parameters))
    with seeded():
        actual = torch.func.vmap(gradient, in_dims=dims, randomness="same")(x, *parameters)
    worst = Worst()
    for i in range(len(x)):
        leaves = [t.detach().clone().requires_grad_() for t in (x[i], *parameters)]
        expected = torch.autograd.grad(loss(*leaves), leaves, materialize_grads=True)
        for j, e in enumerate(expected):
            worst.see("∂/∂x" if j == 0 else f"parameter {j}", gap(actual[j][i], e))
    return worst.finding(1e-9, _SAME_DERIVATIVE, "in evaluation" if mixed else "in training")


def stacked_models(s: Subject) -> Finding:
    """torch.func.vmap over stacked models gives each model's outputs and buffers."""
    models = [s.layer(seed=i) for i in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    xs = torch.stack([s.x(seed=i) for i in range(3)])

    def call(p: dict[str, Tensor], b: dict[str, Tensor], x: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(models[0], (p, b), (x,))
        return y

    with seeded():
        ys = torch.func.vmap(call, randomness="same")(parameters, buffers, xs)
    worst = Worst()
    for i, model in enumerate(models):
        worst.see(f"y of model {i}", gap(ys[i], s.run(model, xs[i])))
        for name, buffer in model.named_buffers():
            worst.see(f"{name} of model {i}", gap(buffers[name][i], buffer))
    return worst.finding(1e-9, "float64, the same sums in another order")


def captured_buffers(s: Subject) -> Finding:
    """A transform of a model in training (a probe) leaves the model's buffers as they were."""
    layer = s.warm(s.layer())
    if not list(layer.buffers()):
        raise NotApplicable("there are no buffers")
    before = state(layer)
    x = s.x(few=True)
    with seeded():
        torch.func.grad(lambda t: (layer(t) * direction(x)).sum())(x)
        torch.func.jvp(layer, (x,), (direction(x),))
    found = changes(before, state(layer))
    return violations(found, f"{len(list(layer.buffers()))} buffers unchanged by grad and jvp")


def saved_memory(s: Subject) -> Finding:
    """What is kept for the backward pass is the input once, and little else."""
    own = any(c.__module__.startswith("normlab.") for c in type(s.example).__mro__)
    if not own and "saved_memory" not in s.asked:
        raise NotApplicable("checked for normlab's layers, or where laws= names it")
    # Many channels and positions, beside which statistics of either are small.
    channels = s.channels * -(-60 // s.channels)
    positions = {0: (), 1: (256,)}.get(s.rank, (16, *[1] * (s.rank - 2), 16))
    layer = s.layer(torch.float32, channels=channels)
    x = s.make_input((4 if positions else 256, channels, *positions), torch.float32)
    x.requires_grad_()
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        s.run(layer, x)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    ratio = total / x.untyped_storage().nbytes()
    detail = f"{total} bytes kept for an input of {x.untyped_storage().nbytes()}"
    reason = "the input once; a tenth of it for statistics, parameters and masks of one bit"
    return Finding(ratio, 1.1, reason, detail)
